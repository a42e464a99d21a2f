"""The quickstart prompts: every prompt asks for what is checked, and the held-out prompts are not the training ones."""

import re
from collections import Counter

import pytest

from accord.data.prompts import load
from accord.types import Prompt, Requirement

NUMBERS = {
    1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 8: "eight", 10: "ten", 12: "twelve", 14: "fourteen",
    15: "fifteen",
    18: "eighteen", 20: "twenty", 25: "twenty-five", 30: "thirty",
}  # fmt: skip
PHRASES = {
    "all_lowercase": "lower case|no capital letters",
    "all_uppercase": "capital",
    "bullet_list": "bullet",
    "json": "JSON object",
    "no_commas": "comma",
    "numbered_list": "numbered list",
    "sentences": "one sentence|single sentence|one clear sentence|two sentences",
}
QUOTED = {"contains": "keyword", "excludes": "keyword", "starts_with": "text"}
SIGNS = {"?": "question mark", "!": "exclamation mark"}
TRAIN, HELDOUT = load("train"), load("heldout")


def text(prompt: Prompt) -> str:
    (message,) = prompt.content
    assert message.role == "user"
    return message.content


def asked(requirement: Requirement, request: str) -> bool:
    """Whether the request says so. Answers, refusals and their absence go without saying."""
    kind, options = requirement.kind, requirement.options
    if kind in ("answer", "refuses", "does_not_refuse"):
        return True
    if kind == "max_words":
        limit = options["count"]
        return (
            re.search(
                rf"\b({limit}|{NUMBERS[limit]})\b|yes or no" if limit == 1 else rf"\b({limit}|{NUMBERS[limit]})\b",
                request,
                re.I,
            )
            is not None
        )
    if kind == "ends_with":
        return SIGNS[options["text"]] in request
    if kind == "language":
        return {"es": "Spanish", "fr": "French"}[options["code"]] in request
    if kind in QUOTED:
        return f'"{options[QUOTED[kind]]}"' in request
    said = re.search(PHRASES[kind], request, re.I) is not None
    if kind == "json":
        return said and all(f'"{key}"' in request for key in options["keys"])
    if kind.endswith("_list"):
        return said and re.search(rf"\b({options['items']}|{NUMBERS[options['items']]})\b", request, re.I) is not None
    return said


@pytest.mark.parametrize(("prompts", "least"), [(TRAIN, 240), (HELDOUT, 140)], ids=["train", "heldout"])
def test_there_are_enough_short_different_prompts(prompts, least):
    assert len({text(prompt).casefold() for prompt in prompts}) == len(prompts) >= least
    assert len({prompt.id for prompt in prompts}) == len(prompts)
    for prompt in prompts:
        assert len(text(prompt).split()) <= 60
        assert 1 <= len(prompt.requirements) <= 3


@pytest.mark.parametrize("prompt", TRAIN + HELDOUT, ids=lambda prompt: prompt.id)
def test_a_prompt_asks_for_what_is_checked(prompt):
    assert [requirement for requirement in prompt.requirements if not asked(requirement, text(prompt))] == []


def test_heldout_prompts_are_not_near_duplicates_of_training_prompts():
    """Overlap of word triples (Jaccard) below one third for every pair."""

    def triples(prompt):
        words = re.findall(r"\w+", text(prompt).casefold())
        return set(zip(words, words[1:], words[2:], strict=False))

    train = [triples(prompt) for prompt in TRAIN]
    for heldout in map(triples, HELDOUT):
        assert max(len(heldout & other) / len(heldout | other) for other in train) < 1 / 3


def test_both_splits_have_the_same_mixture_of_kinds():
    shares = [
        {kind: n / len(prompts) for kind, n in Counter(r.kind for p in prompts for r in p.requirements).items()}
        for prompts in (TRAIN, HELDOUT)
    ]
    assert shares[0].keys() == shares[1].keys()
    assert max(abs(share - shares[1][kind]) for kind, share in shares[0].items()) < 0.03
