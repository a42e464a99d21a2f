"""The simulated panel prefers met requirements, has its tastes, and repeats itself whatever the order."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accord.errors import ConfigError, EmptyDataError
from accord.feedback import Annotator, Panel, utility
from accord.types import Completion, Message, Prompt, Requirement

REQUIREMENTS = (Requirement("max_words", {"count": 5}), Requirement("contains", {"keyword": "tea"}))


def prompt(name="p", requirements=REQUIREMENTS):
    return Prompt(name, (Message("user", "Mention tea in at most five words."),), requirements)


def completion(text, prompt_id="p", stop_reason="stop"):
    return Completion(prompt_id, text, (1,), (0.0,), (0.0,), stop_reason, temperature=1.0, seed=0)


def test_utility_is_the_share_of_requirements_less_a_penalty_for_being_cut_off():
    assert utility(prompt(), completion("I like tea.")) == 1
    assert utility(prompt(), completion("I like milk.")) == 0.5
    assert utility(prompt(), completion("")) == 0
    assert utility(prompt(), completion("tea " * 9, stop_reason="length")) == pytest.approx(0.4)


@settings(max_examples=30)
@given(st.permutations(range(4)))
def test_judgements_do_not_depend_on_order_or_company(order):
    texts = ["I like tea.", "I like milk.", "no no no no no no", "tea tea tea tea tea tea tea"]
    straight = Panel(3).judge(prompt(), [completion(text) for text in texts])
    shuffled = Panel(3).judge(prompt(), [completion(texts[index]) for index in order])
    for one, other in zip(straight, shuffled, strict=True):
        assert other.ranks == tuple(one.ranks[index] for index in order)
        assert (one.kind, one.prompt_id, one.annotator) == ("simulated", "p", other.annotator)


def test_the_same_seed_repeats_and_another_differs():
    prompts = [prompt(f"p{number}") for number in range(20)]
    answers = [[completion(text, p.id) for text in ("I like tea.", "milk", "tea for me")] for p in prompts]

    def everything(seed):
        return [Panel(seed).judge(p, cs) for p, cs in zip(prompts, answers, strict=True)]

    assert everything(1) == everything(1) != everything(2)


def test_better_answers_win_most_of_the_time():
    """Careful annotators: a difference of 1 is seven standard deviations; the careless one errs by √2·0.35."""
    first_places = dict.fromkeys(("sim-brief", "sim-thorough", "sim-careless"), 0)
    for number in range(200):
        name = f"p{number}"
        good, bad = completion("I like tea.", name), completion("I do not like it much at all", name)
        for judgement in Panel(0).judge(prompt(name), [bad, good]):
            first_places[judgement.annotator] += judgement.ranks == (1, 0)
    assert first_places["sim-brief"] >= 198
    assert first_places["sim-thorough"] >= 198
    assert 170 <= first_places["sim-careless"] <= 199


def test_tastes_show_when_answers_are_equally_good():
    long_wins = dict.fromkeys(("sim-brief", "sim-thorough"), 0)
    short_wins = dict(long_wins)
    for number in range(300):
        name = f"p{number}"
        requirement = (Requirement("contains", {"keyword": "tea"}),)
        answers = [completion("Tea.", name), completion("I would very much like a large pot of tea, please.", name)]
        for judgement in Panel(0).judge(prompt(name, requirement), answers)[:2]:
            short_wins[judgement.annotator] += judgement.ranks == (0, 1)
            long_wins[judgement.annotator] += judgement.ranks == (1, 0)
    assert short_wins["sim-brief"] > 2 * long_wins["sim-brief"]
    assert long_wins["sim-thorough"] > 2 * short_wins["sim-thorough"]


def test_equal_texts_tie():
    for judgement in Panel(0).judge(prompt(), [completion("I like tea."), completion("I like tea.")]):
        assert judgement.ranks == (0, 0)


def test_a_panel_of_ones_own():
    (judgement,) = Panel(0, [Annotator("exact", noise=0.0)]).judge(prompt(), [completion("milk"), completion("tea")])
    assert (judgement.annotator, judgement.ranks) == ("exact", (1, 0))


def test_what_cannot_be_judged_is_refused():
    with pytest.raises(ConfigError, match="no requirement"):
        Panel().judge(prompt(requirements=()), [completion("tea")])
    with pytest.raises(ConfigError, match="'q'"):
        Panel().judge(prompt(), [completion("tea", "q")])
    with pytest.raises(EmptyDataError):
        Panel().judge(prompt(), [])
