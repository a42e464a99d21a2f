from __future__ import annotations

import sys

import pytest

from accord.errors import ConfigError, UnknownNameError
from accord.registry import Registry


@pytest.fixture
def losses() -> Registry[str]:
    registry: Registry[str] = Registry("loss", "accord.test_losses")
    registry.add("kto", "one completion")
    registry.add("dpo", "two completions")
    return registry


def test_rows_are_found_by_name_and_listed_in_order(losses):
    assert losses["dpo"] == "two completions"
    assert list(losses) == ["dpo", "kto"]
    assert "dpo" in losses
    assert "ipo" not in losses


def test_adding_returns_the_row_so_that_it_serves_as_a_definition():
    registry: Registry[list[int]] = Registry("list", "accord.test_lists")
    row = [1]
    assert registry.add("one", row) is row


def test_an_unknown_name_says_the_nearest_and_how_to_add_one(losses):
    with pytest.raises(UnknownNameError) as caught:
        losses["dpoo"]
    assert str(caught.value) == (
        "Unknown loss 'dpoo'. Did you mean 'dpo'? Known: dpo, kto.\n  → To add one: docs/extending.md#loss"
    )


def test_a_name_is_registered_once(losses):
    with pytest.raises(ConfigError, match="'dpo' is registered twice"):
        losses.add("dpo", "again")
    assert losses["dpo"] == "two completions"


def test_a_plugin_is_found_by_its_entry_point_and_imported_only_when_asked_for(tmp_path, monkeypatch, losses):
    """A real installed distribution, as pip leaves it on disk: a module and its metadata."""
    (tmp_path / "outside_loss.py").write_text("row = 'from outside'\n")
    metadata = tmp_path / "outside-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[accord.test_losses]\nmine = outside_loss:row\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    assert list(losses) == ["dpo", "kto", "mine"]
    assert "mine" in losses
    assert "outside_loss" not in sys.modules
    assert losses["mine"] == "from outside"
    assert losses["mine"] == "from outside", "found again once loaded"
