"""What to sample: settings, and one request per completion."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import Field

from accord.config import Config
from accord.errors import ConfigError
from accord.models.render import Renderer
from accord.types import Prompt

__all__ = ["Request", "SamplingConfig", "completion_seed", "requests_for", "uniforms"]


class SamplingConfig(Config):
    """How completions are sampled. A request may replace every setting but max_batch for itself.

    A token is sampled among those that top_k, top_p and min_p all keep.
    """

    temperature: float = Field(1.0, ge=0.0, allow_inf_nan=False)
    """Logits are divided by this; 0 takes the most likely token (greedy)."""
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    """Sample among the most likely tokens that together hold this probability."""
    top_k: int = Field(0, ge=0)
    """Sample among this many most likely tokens; 0 means all."""
    min_p: float = Field(0.0, ge=0.0, le=1.0)
    """Sample among the tokens at least this times as likely as the most likely one (Nguyen et al. 2024)."""
    logit_bias: dict[Annotated[int, Field(ge=0)], Annotated[float, Field(ge=-100, le=100)]] = Field(
        default_factory=dict
    )
    """Added to the logits of these token ids, before the temperature; -100 as good as forbids one, 100 demands it."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """A completion ends, for the reason `stop`, once its text holds one of these strings; its text ends before it."""
    max_new_tokens: int = Field(256, gt=0)
    """A completion that reaches this length ends with the stop reason `length`."""
    max_batch: int = Field(64, gt=0)
    """Completions that are extended together. More need more memory."""

    @property
    def shaped(self) -> bool:
        """Whether tokens are drawn from another distribution than the model's own."""
        plain = self.temperature == 1 and self.top_p == 1 and not self.top_k and not self.min_p
        return not plain or bool(self.logit_bias)


@dataclass(frozen=True, slots=True)
class Request:
    """One completion to sample. Requests with equal prompts share its computation.

    `seed` (0 ≤ seed < 2¹²⁸) alone decides the random numbers; what is None is taken from `SamplingConfig`.

    Example: ``Request("p-001", (1, 4093, 198), seed=7, temperature=0.8, stop=("\\n",))``
    """

    prompt_id: str
    prompt_ids: tuple[int, ...]
    seed: int
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    logit_bias: Mapping[int, float] | None = None
    stop: tuple[str, ...] | None = None
    max_new_tokens: int | None = None

    @property
    def where(self) -> str:
        """The place that an error about this request names."""
        return f"prompt {self.prompt_id}"

    def settings(self, config: SamplingConfig) -> SamplingConfig:
        """What holds for this request: its own settings where it has any.

        Raises:
            ConfigError: one of them, or the seed, is out of range.
        """
        if not 0 <= self.seed < 1 << 128:
            raise ConfigError(f"seed = {self.seed} is out of range.", where=self.where, fix="Use 0 to 2**128 - 1.")
        own = {name: value for name in _OWN if (value := getattr(self, name)) is not None}
        if not own:
            return config
        checked = SamplingConfig.build(own, where=self.where)
        return config.model_copy(update={name: getattr(checked, name) for name in own})


_OWN = tuple(name for name in SamplingConfig.model_fields if name in Request.__dataclass_fields__)


def requests_for(
    prompts: Sequence[Prompt], renderer: Renderer, temperatures: Sequence[float], seed: int
) -> list[Request]:
    """One request per prompt and temperature, prompt by prompt; each has a seed of its own.

    Raises:
        RowError: a prompt is longer than the renderer allows.
    """
    requests = []
    for prompt in prompts:
        ids = tuple(renderer.prompt(prompt.content, prompt.source).tolist())
        for index, temperature in enumerate(temperatures):
            requests.append(Request(prompt.id, ids, completion_seed(seed, prompt.id, index), temperature))
    return requests


def completion_seed(seed: int, prompt_id: str, index: int) -> int:
    """The seed of completion `index` of a prompt: the same whatever other prompts there are, and in any order."""
    digest = hashlib.blake2b(f"{seed}/{index}/{prompt_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def uniforms(seed: int, count: int) -> npt.NDArray[np.float64]:
    """Random number n in [0, 1) of this seed decides token n. The numbers do not depend on `count` (Philox)."""
    return np.random.Generator(np.random.Philox(key=seed)).random(count)
