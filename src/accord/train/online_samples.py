"""samples.html of an online run: completions of a few prompts with their rewards, of the first step and of the last."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accord.tracking import Sample, write_samples
from accord.train.rollouts import Rollout
from accord.types import Completion, Reward

__all__ = ["RolloutPage"]

_SHOWN = 4


class RolloutPage:
    """The page of one run. What the first step sampled stays on it; a run that is resumed begins with its own first.

    Args:
        tokenizer: the policy's.
        count: prompts to show of a step; 0 for no page.
    """

    def __init__(self, directory: Path, tokenizer: Any, count: int) -> None:
        self._path, self._tokenizer, self._count = directory / "samples.html", tokenizer, count
        self._first: list[Sample] = []

    def show(self, step: int, rollouts: Sequence[Rollout]) -> None:
        """Write the page anew, with these in the place of the step before."""
        if not self._count:
            return
        latest = [self._sample(step, rollout) for rollout in rollouts[: self._count]]
        note = f"Up to {_SHOWN} completions per prompt, with what they are worth: step {step}"
        if self._first:
            note += " first, then the first step of this process"
        write_samples(self._path, [*latest, *self._first], "Samples", f"{note}.")
        self._first = self._first or latest

    def _sample(self, step: int, rollout: Rollout) -> Sample:
        pairs = list(zip(rollout.completions, rollout.rewards, strict=True))[:_SHOWN]
        prompt = self._tokenizer.decode(rollout.prompt.ids_P.tolist())
        return Sample(prompt, tuple((f"Step {step} · {_about(*pair)}", _text(pair[0])) for pair in pairs))


def _text(completion: Completion) -> str:
    """What was said; of a conversation everything, turn by turn."""
    if completion.episode is None:
        return completion.text
    return "\n\n".join(f"[{message.role}] {message.content}" for message in completion.episode.messages)


def _about(completion: Completion, reward: Reward) -> str:
    """What a completion is worth, and why: ``reward 0.90 · exact_answer 1 · length -1 · 34 tokens, cut``."""
    parts = [
        f"{label} {reward.failures.get(label, 'none') if value is None else format(value, '.3g')}"
        for label, value in reward.parts.items()
    ]
    worth = "no reward" if reward.value is None else f"reward {reward.value:.2f}"
    cut = ", cut" if completion.stop_reason == "length" else ""
    return " · ".join([worth, *parts, f"{completion.length} tokens{cut}"])
