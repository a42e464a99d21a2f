"""The records that travel between the parts, each with an example. No torch here.

A text is either plain (`str`, used verbatim) or a conversation (`tuple[Message, ...]`, rendered by the model's chat
template). Prompt and completion are always separate: nothing is ever guessed from a common prefix of characters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = [
    "Completion",
    "Content",
    "Demonstration",
    "Episode",
    "Judgement",
    "LabelledCompletion",
    "Message",
    "PreferencePair",
    "Prompt",
    "Ranking",
    "RatedCompletion",
    "Record",
    "Requirement",
    "Reward",
    "Source",
    "StopReason",
]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Example: ``Message("user", "Name a colour.")``
    """

    role: str
    content: str


Content = str | tuple[Message, ...]
"""Plain text, or the messages of a conversation."""

StopReason = Literal["stop", "length"]
"""`stop`: the model ended its turn. `length`: the token limit did."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a record comes from. `str(source)` is ``file:line``, as editors understand it.

    Example: ``Source("data/pairs.jsonl", 17)``
    """

    path: str
    line: int

    def __str__(self) -> str:
        return f"{self.path}:{self.line}"


@dataclass(frozen=True, slots=True)
class Requirement:
    """Something a program can check about a completion; `accord.data.requirements` knows the kinds.

    Example: ``Requirement("max_words", {"count": 20})``
    """

    kind: str
    options: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt that awaits completions.

    `answer` is the ground truth that verifiable rewards compare with, where there is one: a number, a text, unit tests.
    `fields` is the row that it was read from, for environments: any column may say what is special to this prompt.

    Example: ``Prompt("p-001", (Message("user", "Name a colour."),), (Requirement("max_words", {"count": 1}),))``
    """

    id: str
    content: Content
    requirements: tuple[Requirement, ...] = ()
    source: Source | None = None
    answer: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Episode:
    """What became of a conversation with an environment.

    `messages` are the turns of both after the prompt. `sampled` says of every token of the completion whether the
    policy said it; the others are what it was shown. `reward` is the sum of what the environment gave, None if it gave
    none; `failure` says why it failed, where it did. `parts` are named numbers of the environment, summed over turns.

    Example: ``Episode((Message("assistant", "7?"), Message("user", "Lower.")), (True, True, False), 1, 0.0)``
    """

    messages: tuple[Message, ...]
    sampled: tuple[bool, ...]
    turns: int
    reward: float | None = None
    failure: str = ""
    parts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Completion:
    """A sampled completion, with the sampler's own tokens: they are never encoded again.

    `token_ids` includes the stop token if the model produced one. `logprobs` are those of the sampling distribution
    (after temperature and truncation), `raw_logprobs` those of the model at temperature 1; both in nats, one per token.
    `policy_version` says which weights it was sampled from: it counts what a trainer has given its sampler.

    Of a conversation with an environment (`episode`) the tokens are those of all turns and of what the environment
    answered between them, whose log-probabilities are 0; `text` is that of the last turn, and `stop_reason` is `length`
    also where the limit of turns ended it.

    Example: ``Completion("p-001", "Blue", (21187, 2), (-0.4, -0.01), (-0.5, -0.02), "stop", temperature=0.8, seed=7)``
    """

    prompt_id: str
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    raw_logprobs: tuple[float, ...]
    stop_reason: StopReason
    temperature: float
    seed: int
    policy_version: int = 0
    episode: Episode | None = None

    @property
    def sampled(self) -> tuple[bool, ...]:
        """Which tokens the policy said."""
        return self.episode.sampled if self.episode else (True,) * len(self.token_ids)

    @property
    def length(self) -> int:
        """How many tokens the policy said."""
        return sum(self.sampled)


@dataclass(frozen=True, slots=True)
class Demonstration:
    """What to say: supervised fine-tuning. A completion of several messages trains its assistant turns only.

    Example: ``Demonstration("2 + 2 =", " 4")``
    """

    prompt: Content
    completion: Content
    source: Source | None = None


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """One completion preferred to another.

    `margin` is how much better it is, `probability` how probable it is that it is better (a share of votes, say), where
    the data says so.

    Example: ``PreferencePair("2 + 2 =", chosen=" 4", rejected=" 5")``
    """

    prompt: Content
    chosen: Content
    rejected: Content
    margin: float | None = None
    source: Source | None = None
    probability: float | None = None


@dataclass(frozen=True, slots=True)
class Ranking:
    """K completions in order of preference: rank 0 is best, equal ranks are a tie.

    Example: ``Ranking("2 + 2 =", (" 4", " four", " 5"), ranks=(0, 0, 1))``
    """

    prompt: Content
    completions: tuple[Content, ...]
    ranks: tuple[int, ...]
    source: Source | None = None


@dataclass(frozen=True, slots=True)
class LabelledCompletion:
    """One completion with a thumb up (`True`) or down, without a partner.

    Example: ``LabelledCompletion("2 + 2 =", " 5", label=False)``
    """

    prompt: Content
    completion: Content
    label: bool
    source: Source | None = None


@dataclass(frozen=True, slots=True)
class RatedCompletion:
    """One completion with a number for each attribute, on the scale of its data set; higher is more of it.

    Example: ``RatedCompletion("2 + 2 =", " 4", {"correctness": 4.0, "verbosity": 0.0})``
    """

    prompt: Content
    completion: Content
    ratings: Mapping[str, float]
    source: Source | None = None


@dataclass(frozen=True, slots=True)
class Judgement:
    """What one annotator said of the completions of one prompt: `ranks[k]` is the place of completion k, 0 best.

    `kind` never gets lost: a simulated or artificial judgement stays marked as one wherever it goes.

    Example: ``Judgement("p-001", "sim-a", "simulated", ranks=(0, 2, 1, 2))``
    """

    prompt_id: str
    annotator: str
    kind: Literal["human", "ai", "simulated"]
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Reward:
    """What a completion is worth in training.

    `parts` is what each reward function said of it, by name, before clipping and normalising. A function that failed
    said None and has its reason in `failures`. `value` is the weighted sum; None if a function of any weight failed.

    Example: ``Reward(None, {"exact_answer": 1.0, "judge": None}, {"judge": "timeout"})``
    """

    value: float | None
    parts: Mapping[str, float | None]
    failures: Mapping[str, str] = field(default_factory=dict)


Record = Demonstration | PreferencePair | Ranking | LabelledCompletion | RatedCompletion | Prompt
"""What a data file can hold."""
