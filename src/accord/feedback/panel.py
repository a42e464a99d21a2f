"""A simulated panel: three annotators who want the requirements met, each with a taste and with noise of their own.

Their judgements are marked "simulated" wherever they go.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from accord.data.requirements import met
from accord.errors import ConfigError, EmptyDataError
from accord.feedback.ranking import rank
from accord.types import Completion, Judgement, Prompt

__all__ = ["ANNOTATORS", "Annotator", "Panel", "utility"]

CUT_OFF_PENALTY = 0.1
"""What an answer that ran into the token limit loses."""

DEAD_ZONE = 0.15
"""Answers that seem closer than this are called a tie."""


@dataclass(frozen=True, slots=True)
class Annotator:
    """A simulated annotator, in units of utility (1: all requirements met).

    `noise` is the standard deviation of the error on each completion (far above 1: answers at random), `length_bias`
    what a doubling of the number of words adds.

    Example: ``Annotator("sim-brief", noise=0.1, length_bias=-0.05)``
    """

    name: str
    noise: float
    length_bias: float = 0.0


ANNOTATORS = (
    Annotator("sim-brief", noise=0.1, length_bias=-0.05),
    Annotator("sim-thorough", noise=0.1, length_bias=0.05),
    Annotator("sim-careless", noise=0.35),
)
"""One prefers short answers, one long ones, one is careless."""


def utility(prompt: Prompt, completion: Completion) -> float:
    """The share of the prompt's requirements that the completion meets, less a penalty for being cut off.

    Raises:
        ConfigError: the prompt has no requirement, so there is nothing to judge by.
    """
    if not prompt.requirements:
        what = f"Prompt {prompt.id!r} has no requirement, so a simulated panel cannot judge its completions."
        raise ConfigError(what, where=str(prompt.source or prompt.id), fix="Add requirements, or judge by people.")
    answers = met(prompt.requirements, completion.text)
    return sum(answers) / len(answers) - CUT_OFF_PENALTY * (completion.stop_reason == "length")


class Panel:
    """Simulated annotators. An annotator's error depends on the seed, the annotator, the prompt and the text alone:
    neither on the order of the completions nor on what else is judged.
    """

    def __init__(self, seed: int = 0, annotators: Sequence[Annotator] = ANNOTATORS) -> None:
        self.seed, self.annotators = seed, tuple(annotators)

    def judge(self, prompt: Prompt, completions: Sequence[Completion]) -> tuple[Judgement, ...]:
        """One judgement per annotator; `ranks[k]` is the place of `completions[k]`.

        Raises:
            EmptyDataError: no completion.
            ConfigError: a completion of another prompt, or a prompt without requirements.
        """
        if not completions:
            raise EmptyDataError(f"No completion of prompt {prompt.id!r} to judge.", fix="Sample some first.")
        strangers = {completion.prompt_id for completion in completions} - {prompt.id}
        if strangers:
            what = f"Completions of prompt {sorted(strangers)[0]!r} cannot answer prompt {prompt.id!r}."
            raise ConfigError(what, fix="Group completions by prompt_id.")
        true = [utility(prompt, completion) for completion in completions]
        return tuple(
            Judgement(
                prompt.id,
                annotator.name,
                "simulated",
                rank(
                    [
                        self._seems(annotator, prompt, completion, value)
                        for completion, value in zip(completions, true, strict=True)
                    ],
                    DEAD_ZONE,
                ),
            )
            for annotator in self.annotators
        )

    def _seems(self, annotator: Annotator, prompt: Prompt, completion: Completion, true: float) -> float:
        taste = annotator.length_bias * math.log2(1 + len(completion.text.split()))
        error = annotator.noise * self._normal(annotator.name, prompt.id, completion.text)
        return true + taste + error

    def _normal(self, *key: str) -> float:
        """A standard normal number that is a function of the seed and the key."""
        digest = hashlib.sha256(json.dumps([self.seed, *key]).encode()).digest()
        return NormalDist().inv_cdf((int.from_bytes(digest[:6], "big") + 0.5) / 2**48)
