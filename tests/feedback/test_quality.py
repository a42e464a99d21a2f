"""Panel agreement: hand-counted, and an annotator who guesses shows."""

import random

import pytest

from accord.errors import ConfigError, EmptyDataError
from accord.feedback import ANNOTATORS, Annotator, Panel, agreement
from accord.types import Completion, Judgement, Message, Prompt, Requirement


def test_by_hand():
    """One prompt of three completions, pairs 01, 02, 12. a: 0≻1, 0≻2, 1≻2; b: 0≻1, 0≻2, tie; c: 1≻0, 0≻2, 1≻2.

    Both strict: ab on 01 and 02 (equal, equal), ac on all three (one differs), bc on 01 and 02 (one differs): 5 of 7.
    Against the majority of the others: a's others (b, c) tie on 01, say 0≻2 and 1≻2: 2 of 2. b's others (a, c) tie on
    01 and say 0≻2: 1 of 1 (b has no preference on 12). c's others (a, b) say 0≻1, 0≻2, 1≻2: 2 of 3. Together 5 of 6.
    """
    rankings = {"a": (0, 1, 2), "b": (0, 1, 1), "c": (1, 0, 2)}
    result = agreement([Judgement("p", name, "human", ranks) for name, ranks in rankings.items()])
    assert (result.prompts, result.pairs) == (1, 3)
    assert (result.pairwise.value, result.pairwise.pairs) == (pytest.approx(5 / 7), 7)
    found = {name: (quality.value, quality.pairs) for name, quality in result.annotators.items()}
    assert found == {"a": (1.0, 2), "b": (1.0, 1), "c": (pytest.approx(2 / 3), 3)}
    assert (result.ceiling.value, result.ceiling.pairs) == (pytest.approx(5 / 6), 6)
    assert result.pairwise.interval is None


def test_annotators_may_judge_different_prompts():
    result = agreement(
        [
            Judgement("p", "a", "human", (0, 1)),
            Judgement("p", "b", "human", (0, 1)),
            Judgement("q", "a", "human", (0, 1)),
            Judgement("q", "c", "human", (1, 0)),
        ]
    )
    assert result.pairwise.value == 0.5
    assert {name: quality.value for name, quality in result.annotators.items()} == {"a": 0.5, "b": 1.0, "c": 0.0}


def test_a_single_annotator_has_no_agreement_but_a_reason():
    result = agreement([Judgement("p", "a", "human", (0, 1))])
    assert result.pairwise.value is result.alpha.value is result.ceiling.value is None
    assert "two annotators" in result.pairwise.reason


def test_a_constant_order_of_preference_is_not_mistaken_for_chance():
    """All prefer completion 0 on every prompt, but for a tenth: with the order flipped at random α stays near
    2·agreement - 1, where a fixed order would give labels of one kind and an α near 0.
    """
    generator = random.Random(0)
    judgements = [
        Judgement(f"p{prompt}", name, "human", (1, 0) if generator.random() < 0.1 else (0, 1))
        for prompt in range(400)
        for name in "ab"
    ]
    result = agreement(judgements)
    assert result.alpha.value == pytest.approx(2 * result.pairwise.value - 1, abs=0.03)
    assert result.alpha.value > 0.5


def simulate(annotators, prompts=150):
    """Four completions per prompt, each meeting none, one or both of two requirements."""
    generator = random.Random(1)
    requirements = (Requirement("contains", {"keyword": "tea"}), Requirement("contains", {"keyword": "cake"}))
    panel = Panel(0, annotators)
    judgements = []
    for number in range(prompts):
        prompt = Prompt(f"p{number}", (Message("user", "Tea and cake?"),), requirements)
        texts = [f"{generator.choice(['tea', 'no'])} {generator.choice(['cake', 'no'])} {place}" for place in range(4)]
        completions = [Completion(prompt.id, text, (1,), (0.0,), (0.0,), "stop", 1.0, 0) for text in texts]
        judgements += panel.judge(prompt, completions)
    return agreement(judgements, resamples=300)


def test_the_panel_agrees_and_the_careless_one_is_the_worst():
    result = simulate(ANNOTATORS)
    accuracy = {name: quality.value for name, quality in result.annotators.items()}
    assert min(accuracy, key=accuracy.get) == "sim-careless"
    assert result.annotators["sim-careless"].interval.low > 0.5
    assert 0.75 < result.pairwise.value < 0.98
    assert result.ceiling.interval.low < result.ceiling.value < result.ceiling.interval.high


def test_an_annotator_who_answers_at_random_shows():
    result = simulate([*ANNOTATORS[:2], Annotator("guesser", noise=1e6)])
    low, high = result.annotators["guesser"].interval
    assert low < 0.5 < high
    assert all(result.annotators[name].interval.low > high for name in ("sim-brief", "sim-thorough"))


def test_wrong_judgements_are_refused():
    one = Judgement("p", "a", "human", (0, 1))
    with pytest.raises(EmptyDataError):
        agreement([])
    with pytest.raises(ConfigError, match="twice"):
        agreement([one, one])
    with pytest.raises(ConfigError, match="different numbers"):
        agreement([one, Judgement("p", "b", "human", (0, 1, 2))])
