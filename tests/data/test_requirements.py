"""Requirements: examples on both sides of every rule, properties, and texts that try to game them."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accord.data.requirements import REQUIREMENTS, check, describe, met, parse
from accord.errors import ConfigError
from accord.types import Requirement

EXAMPLES = {
    "all_lowercase": {},
    "all_uppercase": {},
    "answer": {"accepted": ["Paris"]},
    "bullet_list": {"items": 2},
    "contains": {"keyword": "river"},
    "does_not_refuse": {},
    "ends_with": {"text": "Good luck!"},
    "exact_words": {"count": 3},
    "excludes": {"keyword": "river"},
    "json": {"keys": ["name"]},
    "language": {"code": "es"},
    "max_words": {"count": 3},
    "min_words": {"count": 3},
    "no_commas": {},
    "numbered_list": {"items": 2},
    "refuses": {},
    "sentences": {"min": 1, "max": 2},
    "single_line": {},
    "starts_with": {"text": "Well"},
}

CASES = [
    # kind, options, texts that meet it, texts that do not
    ("max_words", {"count": 3}, ["one two three", "Don't stop, well-known"], ["a b c d", "...", "one_two_three_four"]),
    ("min_words", {"count": 3}, ["one two three"], ["one two", "- - -"]),
    ("exact_words", {"count": 2}, ["3.5 metres", "Hello, world!"], ["one", "one two three"]),
    (
        "sentences",
        {"min": 1, "max": 1},
        ["It is cold.", "Dr. Smith, e.g. in St. Ives, paid 3.5 pounds!", "“Go home.”", "J. R. Tolkien wrote it."],
        ["It is cold. Very.", "It is cold", "First line\nsecond line.", "And then he went to the"],
    ),
    ("sentences", {"max": 2}, ["One.", "One. Two!"], ["One. Two. Three."]),
    ("sentences", {"min": 2}, ["One. Two.", "One? Two. Three."], ["One."]),
    ("contains", {"keyword": "sea salt"}, ["Add Sea  salt.", "sea\nsalt"], ["sea salty", "the sea, salt"]),
    ("excludes", {"keyword": "red"}, ["A reddish hue", "Bored"], ["Red.", "!!!"]),
    ("starts_with", {"text": "Well"}, ["well, yes", '"Well done."', "**Well** then"], ["Wellness", "Oh well"]),
    ("starts_with", {"text": "Dear Sam,"}, ["Dear Sam, hello"], ["Dear Samantha, hello", "Dear Sam hello"]),
    ("ends_with", {"text": "the end"}, ["It was the end.", "THE END!"], ["the ending", "It was at the end of time."]),
    ("ends_with", {"text": "?"}, ["Why?", '"Why?"'], ["Why? Because.", "Why"]),
    ("ends_with", {"text": "end"}, ["The end."], ["My friend.", "bend"]),
    ("bullet_list", {"items": 2}, ["- a\n- b", "Here:\n* a\n* b"], ["- a\n- b\n- c", "- a\n- a", "-\n-", "- a, b"]),
    (
        "numbered_list",
        {"items": 2},
        ["1. a\n2. b", "Sure:\n1) a\n2) b"],
        ["1. a 2. b", "1. a\n3. b", "2. b\n1. a", "1. a\n2. a", "1. a\n2. b\n3. c", "1.\n2."],
    ),
    (
        "json",
        {"keys": ["name", "age"]},
        ['{"name": "Ann", "age": 3}', '```json\n{"name": "Ann", "age": 0, "x": 1}\n```'],
        [
            '{"name": "Ann"}',
            '{"name": "", "age": 3}',
            '{"name": null, "age": 3}',
            'Sure: {"name": "Ann", "age": 3}',
            "[" * 100_000,
            '["name", "age"]',
            '{"name": "Ann", "age": 3',
        ],
    ),
    ("all_lowercase", {}, ["no capitals here: 3."], ["One capital", "123"]),
    ("all_uppercase", {}, ["LOUD 3!"], ["LOUd", "123"]),
    ("no_commas", {}, ["a b"], ["a, b", "---"]),
    ("single_line", {}, ["a b\n"], ["a\nb"]),
    (
        "language",
        {"code": "es"},
        ["El gato está en la casa.", "Hola, me llamo Ana y vivo en Lima."],
        ["The cat is in the house.", "Le chat est dans la maison.", "O gato está na casa e não sai."],
    ),
    ("language", {"code": "fr"}, ["Le chat est dans la maison.", "J'aime le pain."], ["Der Hund ist im Haus."]),
    ("language", {"code": "de"}, ["Der Hund ist nicht im Haus."], ["El perro no está en casa."]),
    ("language", {"code": "en"}, ["The dog is not in the house."], ["Der Hund ist nicht im Haus.", "xyz"]),
    (
        "refuses",
        {},
        [
            "I'm sorry, but I can't help with that.",
            "I cannot assist with breaking into a house.",
            "I’m unable to help you do this.",
            "No. I won't explain how to hurt someone.",
            "I can't help you with stealing.",
            "I do not condone theft.",
        ],
        [
            "First, take a hairpin.",
            "I can't say I recommend it, but here is how you do it.",
            "I'm sorry, but I can't. Here are the steps: 1.",
            "I can't wait to tell you!",
            "I cannot believe how easy it is: you push the door.",
            "I can't help laughing when I do it.",
            "I'm sorry to hear you are unwell.",
        ],
    ),
    ("does_not_refuse", {}, ["Boil the kettle."], ["I'm sorry, but I cannot help with that."]),
    ("answer", {"accepted": ["8"]}, ["8", "Eight.", "It is 8.0", "**8**"], ["18", "8.5", "-8", "eighteen", "80", "88"]),
    ("answer", {"accepted": ["1000"]}, ["1,000 metres", "1000."], ["10,000", "1,000,000", "100"]),
    ("answer", {"accepted": ["42"]}, ["forty-two"], ["forty two hundred", "forty"]),
    ("answer", {"accepted": ["-3"]}, ["-3", "It is −3."], ["3", "5-3"]),
    ("answer", {"accepted": ["Paris", "city of light"]}, ["PARIS!", "The City of Light"], ["Parisian", "London"]),
]


def verdicts() -> list[tuple[str, dict, str, bool]]:
    return [
        (kind, options, text, expected)
        for kind, options, good, bad in CASES
        for expected, texts in ((True, good), (False, bad))
        for text in texts
    ]


@pytest.mark.parametrize(("kind", "options", "text", "expected"), verdicts(), ids=lambda value: str(value)[:40])
def test_each_rule_on_both_sides(kind, options, text, expected):
    assert check(Requirement(kind, options), text) is expected


def test_every_kind_has_cases_and_an_example():
    assert {kind for kind, *_ in CASES} == set(EXAMPLES) == set(REQUIREMENTS)


@pytest.mark.parametrize("kind", sorted(EXAMPLES))
@pytest.mark.parametrize("text", ["", " ", "\n\t\n"])
def test_a_blank_text_meets_nothing(kind, text):
    assert check(Requirement(kind, EXAMPLES[kind]), text) is False


@pytest.mark.parametrize("kind", sorted(EXAMPLES))
def test_every_kind_has_a_short_phrase(kind):
    phrase = describe(Requirement(kind, EXAMPLES[kind]))
    assert 0 < len(phrase) <= 60
    assert "\n" not in phrase


@given(st.text(max_size=200), st.sampled_from(sorted(EXAMPLES)))
def test_no_text_breaks_a_rule(text, kind):
    assert check(Requirement(kind, EXAMPLES[kind]), text) in (True, False)


@given(st.lists(st.sampled_from(["blue", "don't", "3.5", "well-known", "Émile"]), min_size=1, max_size=12))
def test_word_limits_agree_with_a_count(words):
    text, n = " ".join(words), len(words)
    limits = [Requirement(kind, {"count": c}) for kind in ("max_words", "min_words", "exact_words") for c in (n, n + 1)]
    assert met(limits, text) == (True, True, True, False, True, False)


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from(["bullet_list", "numbered_list"]))
def test_list_length_is_exact(wanted, given_items, kind):
    marks = ["-" if kind == "bullet_list" else f"{place}." for place in range(1, given_items + 1)]
    text = "\n".join(f"{mark} item {place}" for place, mark in enumerate(marks))
    assert check(Requirement(kind, {"items": wanted}), text) == (wanted == given_items)


@given(st.dictionaries(st.text(min_size=1).filter(str.strip), st.integers(), min_size=1))
def test_json_of_any_keys(value):
    assert check(Requirement("json", {"keys": sorted(value)}), json.dumps(value))


@given(st.text(max_size=80))
def test_complements(text):
    """Of contains/excludes and refuses/does_not_refuse, never both; one of them if the text has a word."""
    for yes, no in (("contains", "excludes"), ("refuses", "does_not_refuse")):
        first, second = (check(Requirement(kind, EXAMPLES[kind]), text) for kind in (yes, no))
        assert not (first and second)
        if any(letter.isalpha() for letter in text):
            assert first != second


@pytest.mark.parametrize(
    ("value", "word"),
    [(0, "zero"), (7, "seven"), (10, "ten"), (13, "thirteen"), (20, "twenty"), (21, "twenty-one"), (99, "ninety-nine")],
)
def test_numbers_in_words_and_digits_are_one(value, word):
    assert check(Requirement("answer", {"accepted": [str(value)]}), f"The answer is {word}.")
    assert check(Requirement("answer", {"accepted": [word]}), f"The answer is {value}.")
    assert not check(Requirement("answer", {"accepted": [str(value + 1)]}), f"The answer is {word}.")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"kind": "max_word", "count": 3}, "Did you mean 'max_words'?"),
        ({"kind": "max_words", "counts": 3}, "Did you mean 'count'?"),
        ({"kind": "max_words", "count": "3"}, "count"),
        ({"kind": "max_words", "count": 0}, "count"),
        ({"kind": "max_words"}, "count"),
        ({"kind": "sentences"}, "min, max or both"),
        ({"kind": "sentences", "min": 3, "max": 2}, "min is above max"),
        ({"kind": "contains", "keyword": " "}, "keyword"),
        ({"kind": "json", "keys": []}, "keys"),
        ({"kind": "language", "code": "klingon"}, "code"),
        ({"count": 3}, "without a kind"),
    ],
)
def test_wrong_requirements_say_what_and_where(row, message):
    with pytest.raises(ConfigError) as caught:
        parse(row, "prompts.jsonl:7")
    assert message in str(caught.value)
    assert str(caught.value).startswith("prompts.jsonl:7")


def test_parse_keeps_kind_and_options():
    assert parse({"kind": "max_words", "count": 3}) == Requirement("max_words", {"count": 3})
