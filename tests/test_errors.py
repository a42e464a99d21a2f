from __future__ import annotations

import inspect
import re

import pytest

from accord import errors
from accord.errors import AccordError, DataError, RowError, unknown_name


def test_a_message_says_where_what_and_what_to_do():
    error = RowError("Chosen equals rejected.", where="pairs.jsonl:17", fix="Delete the row.")
    assert str(error) == "pairs.jsonl:17: Chosen equals rejected.\n  → Delete the row."
    assert (error.what, error.where, error.fix) == ("Chosen equals rejected.", "pairs.jsonl:17", "Delete the row.")


def test_place_and_advice_are_optional():
    assert str(AccordError("No rows.")) == "No rows."
    assert str(AccordError("No rows.", where="a.csv")) == "a.csv: No rows."


def test_the_tree_in_the_docstring_is_the_tree_of_classes():
    """Every class stands in the drawing under its own base class: indentation is four columns per level."""
    drawn, parents = {}, []
    for line in errors.__doc__.splitlines():
        found = re.match(r"^([│├└─ ]*)([A-Z]\w+Error)\b", line)
        if found:
            level = len(found[1]) // 4
            parents[level:] = [found[2]]
            drawn[found[2]] = parents[level - 1] if level else "Exception"
    classes = {name: cls for name, cls in vars(errors).items() if inspect.isclass(cls) and issubclass(cls, AccordError)}
    assert drawn == {name: cls.__bases__[0].__name__ for name, cls in classes.items()}


def test_one_clause_catches_them_all():
    with pytest.raises(AccordError):
        raise DataError("No.")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("dpoo", "Unknown loss 'dpoo'. Did you mean 'dpo'? Known: dpo, ipo, kto."),
        ("mauve", "Unknown loss 'mauve'. Known: dpo, ipo, kto."),
    ],
)
def test_an_unknown_name_is_compared_with_the_known_ones(name, sentence):
    assert unknown_name("loss", name, ["dpo", "ipo", "kto"]) == sentence


def test_an_unknown_name_where_nothing_is_known():
    assert unknown_name("loss", "dpo", []) == "Unknown loss 'dpo'. Known: none."
