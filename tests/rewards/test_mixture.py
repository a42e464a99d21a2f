"""The sum of rewards: weights, clipping, normalising, failures as data, errors that name the culprit."""

from __future__ import annotations

import json
import math
import statistics
import threading
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accord.errors import ConfigError, DataError, RunError
from accord.rewards import Failed, RewardConfig, RewardKind, Rewards, failure_summary, reward_metrics
from accord.rewards.base import REWARDS, concurrently
from accord.rewards.mixture import Outcomes
from accord.rewards.workers import Score, _shared
from accord.types import Completion, Prompt, Requirement, Reward, Source

PROMPT = Prompt("p", "question")
COMPLETION = Completion("p", "", (), (), (), "stop", temperature=1.0, seed=0)


@pytest.fixture
def own(tmp_path, monkeypatch):
    """`own("return [1.0] * len(completions)")`: the name of a reward function with that body, in a file."""
    made = iter(range(100))
    monkeypatch.chdir(tmp_path)

    def write(body: str, function: str = "mine") -> str:
        path = tmp_path / f"rewards_{next(made)}.py"
        path.write_text(f"from accord.rewards import Failed\ndef {function}(prompts, completions):\n    {body}\n")
        return f"./{path.name}:{function}"

    return write


@pytest.fixture
def score(completion):
    """`score(rewards, "a", "b")`: the rewards of these texts."""
    return lambda rewards, *texts: rewards([PROMPT] * len(texts), [completion(text) for text in texts])


def test_the_value_is_the_weighted_sum_of_the_parts(score):
    """length of "a b c" with max 2: 1 − 1/2 = 0.5; 2 · 1 − 0.5 · 0.5 = 1.75."""
    rewards = Rewards([{"name": "regex", "pattern": "c", "weight": 2}, {"name": "length", "max": 2, "weight": -0.5}])
    assert score(rewards, "a b c") == [Reward(1.75, {"regex": 1.0, "length": 0.5})]


def test_clipping_comes_before_the_weight_and_parts_stay_as_they_were(own, score):
    rewards = Rewards([{"name": own("return [-7, 0.5, 9]"), "clip": [-1, 1], "weight": 3}])
    found = score(rewards, "a", "b", "c")
    assert [each.value for each in found] == [-3, 1.5, 3]
    assert [each.parts["mine"] for each in found] == [-7, 0.5, 9]


def test_normalising_by_the_batch(own, score):
    """1, 2, 6 have the mean 3 and the standard deviation √((4 + 1 + 9) / 2) = √7; None counts for neither."""
    rewards = Rewards([{"name": own("return [1, 2, None, 6]"), "normalise": "batch"}])
    found = score(rewards, "a", "b", "c", "d")
    assert found[2].value is None
    expected = [(x - 3) / (math.sqrt(7) + 1e-4) for x in (1, 2, 6)]
    assert [each.value for k, each in enumerate(found) if k != 2] == pytest.approx(expected)


@pytest.mark.parametrize("normalise", ["batch", "running"])
def test_equal_rewards_normalise_to_zero(own, score, normalise):
    rewards = Rewards([{"name": own("return [0.1] * len(completions)"), "normalise": normalise}])
    assert [each.value for each in score(rewards, "a", "b", "c")] == pytest.approx([0, 0, 0], abs=1e-9)
    assert score(rewards, "a")[0].value == pytest.approx(0, abs=1e-9)


@given(st.lists(st.lists(st.floats(-100, 100), min_size=1, max_size=4), min_size=1, max_size=4))
def test_running_means_are_those_of_everything_seen(batches):
    said = iter(batches)
    kind = RewardKind(RewardConfig, lambda _config, _tokenizer: lambda _prompts, _completions: next(said))
    rewards, resumed = (_with(kind, normalise="running") for _ in range(2))
    seen: list[float] = []
    for batch in batches:
        seen += batch
        resumed.restore(json.loads(json.dumps(rewards.state())))
        values = [each.value for each in rewards([PROMPT] * len(batch), [COMPLETION] * len(batch))]
        deviation = statistics.stdev(seen) if len(seen) > 1 else 0
        expected = [(value - statistics.fmean(seen)) / (deviation + 1e-4) for value in batch]
        assert values == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert rewards.state()["test"]["count"] == len(seen)
    assert resumed.state()["test"]["count"] == len(seen) - len(batches[-1])


def _with(kind: RewardKind, **settings) -> Rewards:
    REWARDS._rows["test"] = kind
    try:
        return Rewards([{"name": "test", **settings}])
    finally:
        del REWARDS._rows["test"]


def test_state_of_other_rewards_is_refused():
    rewards = Rewards([{"name": "length", "max": 2, "normalise": "running"}])
    with pytest.raises(RunError, match="judge"):
        rewards.restore({"judge": {"count": 1, "mean": 0.0, "squares": 0.0}})


FAILURES = {
    "raise ValueError('no such thing\\nand more')": "ValueError: no such thing",
    "raise TimeoutError": "timeout",
    "return [None]": "none returned",
    "return [float('nan')]": "not a number",
    "return [float('-inf')]": "infinite",
    "return [Failed('closed: on Sundays')]": "closed: on Sundays",
}


@pytest.mark.parametrize(("body", "reason"), FAILURES.items(), ids=FAILURES.values())
def test_a_failed_reward_is_data_and_never_zero(own, score, body, reason):
    rewards = Rewards([{"name": own(body)}, {"name": "length", "max": 2}])
    (found,) = score(rewards, "a b")
    assert found == Reward(None, {"mine": None, "length": 1.0}, {"mine": reason})


def test_a_failed_reward_without_weight_leaves_the_value(own, score):
    rewards = Rewards([{"name": own("return [None]"), "weight": 0}, {"name": "length", "max": 2}])
    (found,) = score(rewards, "a b")
    assert found.value == 1
    assert found.failures == {"mine": "none returned"}


@pytest.mark.parametrize("body", ["return []", "return [1.0] * (len(completions) + 1)"])
def test_a_wrong_number_of_values_is_an_error_that_names_the_reward(own, score, body):
    rewards = Rewards([{"name": own(body), "label": "odd"}])
    with pytest.raises(ConfigError, match=r"reward odd: It returned \d values for 2 completions"):
        score(rewards, "a", "b")


@pytest.mark.parametrize("body", ["return ['good']", "return [[1.0]]"])
def test_values_that_are_no_numbers_are_an_error_that_names_the_reward(own, score, body):
    with pytest.raises(ConfigError, match="reward mine: It returned what is no number"):
        score(Rewards([{"name": own(body)}]), "a")


@pytest.mark.parametrize("body", ["import numpy; return numpy.array([1, 0])", "return [True, False]", "return (1, 0)"])
def test_numbers_of_any_kind(own, score, body):
    assert [each.value for each in score(Rewards([{"name": own(body)}]), "a", "b")] == [1, 0]


def test_a_function_that_takes_too_long_has_no_reward_and_is_not_called_twice_at_once(own, score, tmp_path):
    body = (
        "import pathlib, time\n"
        f"    calls = pathlib.Path({str(tmp_path / 'calls')!r}); calls.open('a').write('x')\n"
        "    time.sleep(30); return [1.0]"
    )
    rewards = Rewards([{"name": own(body), "timeout": 0.3}])
    assert [score(rewards, "a")[0].failures["mine"] for _ in range(3)] == ["timeout"] * 3
    assert (tmp_path / "calls").read_text() == "x"


def test_a_function_in_time(own, score):
    assert score(Rewards([{"name": own("return [1.0]"), "timeout": 30.0}]), "a")[0].value == 1
    assert (
        score(Rewards([{"name": own("raise KeyError(3)"), "timeout": 30.0}]), "a")[0].failures["mine"] == "KeyError: 3"
    )


def test_a_function_of_a_package(score):
    """`operator.concat` of two equal lists has twice as many items as completions: it was called."""
    with pytest.raises(ConfigError, match="2 values for 1"):
        score(Rewards([{"name": "operator:concat"}]), "a")


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("./nowhere.py:mine", "No such file"),
        ("no_such_package.rewards:mine", "ModuleNotFoundError"),
        ("operator:no_such_name", "has no function 'no_such_name'"),
        ("math:pi", "'pi' is not a function"),
        ("math:", "names no function"),
        ("length_", "Did you mean 'length'"),
    ],
)
def test_a_reward_that_cannot_be_found(name, complaint):
    with pytest.raises(ConfigError, match=complaint):
        Rewards([{"name": name}])


def test_a_file_with_an_error_says_which(own):
    name = own("return [1.0]\nthis is no Python")
    with pytest.raises(ConfigError, match="SyntaxError"):
        Rewards([{"name": name}])


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ([], "no reward to train on"),
        ([{"name": "length", "max": 2, "weight": 0}], "no reward to train on"),
        ([{"weight": 1}], "without a name"),
        ([{"name": "length", "max": 2}, {"name": "length", "min": 2}], "Two rewards have the label 'length'"),
        ([{"name": "length", "maximum": 2}], r"\[\[rewards\]\] 1 \(length\).*Did you mean 'max'"),
    ],
)
def test_wrong_settings(settings, complaint):
    with pytest.raises(ConfigError, match=complaint):
        Rewards(settings)


def test_prompts_are_checked_before_anything_is_sampled():
    rewards = Rewards([{"name": "exact_answer"}, {"name": "requirements"}])
    wanted = (Requirement("max_words", {"count": 2}),)
    good = Prompt("a", "question", wanted, answer="1")
    assert rewards.check([good]) is None
    with pytest.raises(DataError, match=r"a.jsonl:7: 1 of 2 prompts have no answer, which exact_answer needs"):
        rewards.check([good, Prompt("b", "question", wanted, Source("a.jsonl", 7))])
    with pytest.raises(DataError, match="no requirements"):
        rewards.check([Prompt("b", "question", answer="1")])


def test_metrics_and_the_line_of_failures():
    rewards = [
        Reward(1.0, {"a": 1.0, "judge": 4.0}),
        Reward(None, {"a": 3.0, "judge": None}, {"judge": "HTTP 503: busy"}),
        Reward(None, {"a": 5.0, "judge": None}, {"judge": "HTTP 503: gone"}),
        Reward(None, {"a": 7.0, "judge": None}, {"judge": "timeout"}),
    ]
    assert reward_metrics(rewards) == {
        "rewards/a/mean": 4.0,
        "rewards/a/std": pytest.approx(math.sqrt(20 / 3)),
        "rewards/a/failed": 0.0,
        "rewards/judge/mean": 4.0,
        "rewards/judge/failed": 0.75,
        "rewards/judge/failed/HTTP 503": 0.5,
        "rewards/judge/failed/timeout": 0.25,
    }
    line = "judge failed for 3 of 4 completions: HTTP 503 2, timeout 1 (HTTP 503: busy)"
    assert failure_summary(rewards) == line
    assert failure_summary(rewards[:1]) is None
    assert reward_metrics([]) == {}
    assert Rewards([{"name": "length", "max": 2}])([], []) == []


def test_rewards_that_wait_run_beside_the_others():
    """Both meet at a barrier, which neither passes alone."""
    barrier = threading.Barrier(2)

    def meet(_config, _tokenizer):
        return lambda _prompts, _completions: [float(barrier.wait(20) >= 0)]

    REWARDS._rows |= {"one": RewardKind(RewardConfig, meet, waits=True), "two": RewardKind(RewardConfig, meet)}
    try:
        (found,) = Rewards([{"name": "one"}, {"name": "two"}])([PROMPT], [COMPLETION])
    finally:
        del REWARDS._rows["one"], REWARDS._rows["two"]
    assert found.value == 2


def test_concurrent_calls_keep_their_order_and_meet():
    barrier = threading.Barrier(3)

    def square(k: int) -> int:
        barrier.wait(20)
        return k * k

    assert concurrently(square, range(6), 3) == [0, 1, 4, 9, 16, 25]
    assert concurrently(square, [], 3) == []


def test_an_error_in_a_thread_is_raised():
    with pytest.raises(ZeroDivisionError):
        concurrently(lambda k: 1 // k, [1, 0], 2)


def test_failed_is_small():
    assert Failed("timeout").reason == "timeout"
    assert not hasattr(Failed("timeout"), "__dict__")


def test_rewards_of_several_workers_are_those_of_one() -> None:
    """Completions of a prompt go to one worker; normalising is over the whole batch, here."""
    settings = [
        {"name": "length", "unit": "characters", "max": 2, "normalise": "running"},
        {"name": "regex", "pattern": "b", "weight": 0.5, "normalise": "batch"},
    ]
    seen: list[set[str]] = []

    def worker() -> Score:
        own = Rewards(settings)

        def score(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Outcomes:
            seen.append({prompt.id for prompt in prompts})
            return own.outcomes(prompts, completions)

        return score

    prompts = [Prompt(f"p{k // 3}", "Say:") for k in range(12)]
    completions = [
        Completion(prompt.id, "ab" * (k % 5), (1,), (0.0,), (0.0,), "stop", 1.0, k) for k, prompt in enumerate(prompts)
    ]
    alone, shared = Rewards(settings), Rewards(settings, score=_shared([worker(), worker(), worker()]))
    for _ in range(2):
        assert shared(prompts, completions) == alone(prompts, completions)
    assert shared.state() == alone.state()
    assert sorted(map(sorted, seen[:3])) == [["p0", "p3"], ["p1"], ["p2"]]
