from __future__ import annotations

import dataclasses
import inspect
import pickle
import re

import pytest

from accord import types
from accord.types import Source

RECORDS = [cls for cls in vars(types).values() if inspect.isclass(cls) and dataclasses.is_dataclass(cls)]


def example(cls: type) -> object:
    """The record that the class's docstring shows."""
    text = re.search(r"Example: ``(.+?)``", inspect.getdoc(cls), flags=re.DOTALL)
    assert text, f"{cls.__name__} shows no example"
    return eval(text[1], vars(types))


@pytest.mark.parametrize("cls", RECORDS)
def test_the_example_in_the_docstring_is_a_record(cls):
    record = example(cls)
    assert isinstance(record, cls)
    assert dataclasses.replace(record) == record


@pytest.mark.parametrize("cls", RECORDS)
def test_records_are_frozen_small_and_travel_between_processes(cls):
    record = example(cls)
    field = dataclasses.fields(cls)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(record, field, None)
    assert not hasattr(record, "__dict__")
    assert pickle.loads(pickle.dumps(record)) == record


def test_every_exported_record_is_tested_here():
    assert {cls.__name__ for cls in RECORDS} <= set(types.__all__)
    assert len(RECORDS) >= 10


def test_a_source_reads_as_editors_understand_it():
    assert str(Source("data/pairs.jsonl", 17)) == "data/pairs.jsonl:17"
