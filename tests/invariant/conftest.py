"""Lets the tests of this folder import what they share, and gives them the enumerated language."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from enumerated import World

# Threads cost more than they bring where the models are tiny, most of all when tests run on every core.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """The language of 4,096 strings, with the reference that every policy starts from."""
    return World(tmp_path_factory.mktemp("world") / "model")
