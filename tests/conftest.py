"""What every test shares: no network, reproducible property tests, and the optional data beside the checkout."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# Set before anything imports huggingface_hub or datasets, which read them once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
# Tests run side by side; torch's threads of one would wait for those of another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

REPOSITORY = Path(__file__).resolve().parents[1]

# No deadline: a slow machine is not a fault. Derandomised: the same commit gives the same result.
settings.register_profile("accord", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("accord")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The directory of real preference data beside the checkout; the test is skipped where there is none."""
    directory = REPOSITORY.parent / "shared" / "data"
    if not directory.is_dir():
        pytest.skip("needs the data sets of ../shared/data, which are not in the repository")
    return directory
