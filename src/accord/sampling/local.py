"""Continuous batching in process, on the same weights and with the same numbers as training.

A prompt is computed once and forked into its completions; finished completions leave at once and waiting prompts enter.
Which token comes next depends on the sequence and on its own random numbers, never on what else is in the batch.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from accord.engine.precision import Precision, autocast, resolve_precision
from accord.errors import ConfigError, DataError
from accord.models.network import Policy
from accord.sampling.choose import Shaping, choose
from accord.sampling.decode import CachedDecoder, Decoder, Prefix, RecomputingDecoder
from accord.sampling.request import Request, SamplingConfig, uniforms
from accord.sampling.weights import cast_linears
from accord.types import Completion, StopReason

__all__ = ["LocalSampler"]

_PREFILL_TOKENS = 1024
"""Prompts are computed together up to this many tokens: enough to fill the processor, few enough for its memory."""

OnFinish = Callable[[int, Completion], None]


class LocalSampler:
    """Samples from a policy as it stands: after an optimiser step, the next call samples from the new weights."""

    def __init__(self, policy: Policy, precision: Precision = "auto") -> None:
        """`precision` is that of the engine, so that log-probabilities are those of training."""
        self.policy = policy
        self.dtype = resolve_precision(precision, policy.device)
        if not policy.branching:
            name = type(policy.model).__name__
            print(f"{name} cannot share prompts: sampling computes each sequence anew per token.", file=sys.stderr)

    def sample(
        self, requests: Sequence[Request], config: SamplingConfig, *, on_finish: OnFinish | None = None
    ) -> list[Completion]:
        """Sample one completion per request, in the order of the requests.

        Args:
            on_finish: called with the index of a request and its completion as soon as that is finished.

        Raises:
            ConfigError: a request asks for a seed, temperature, top_p or top_k that does not exist.
            DataError: a prompt is empty, or with `max_new_tokens` longer than the model's context.
        """
        for request in requests:
            self._check(request, config)
        with self._ready():
            return _Run(self.policy, requests, config, on_finish).completions()

    def _check(self, request: Request, config: SamplingConfig) -> None:
        where = f"prompt {request.prompt_id}"
        if not request.prompt_ids:
            raise DataError("This prompt has no tokens.", where=where, fix="Start with the model's first token.")
        longest = len(request.prompt_ids) + config.max_new_tokens
        if longest > self.policy.context:
            what = (
                f"{len(request.prompt_ids)} prompt tokens and {config.max_new_tokens} new ones are more than the "
                f"{self.policy.context} that the model was built for."
            )
            raise DataError(what, where=where, fix="Shorten the prompt, or lower max_new_tokens.")
        if not 0 <= request.seed < 1 << 128:
            raise ConfigError(f"seed = {request.seed} is out of range.", where=where, fix="Use 0 to 2**128 - 1.")
        overrides = {"temperature": request.temperature, "top_p": request.top_p, "top_k": request.top_k}
        SamplingConfig.build({key: value for key, value in overrides.items() if value is not None}, where=where)

    @contextmanager
    def _ready(self) -> Iterator[None]:
        """One autocast context and one cast of the weights for all steps; the network is left as it was found."""
        model = self.policy.model
        training = model.training
        model.eval()
        try:
            with torch.no_grad(), autocast(self.policy.device, self.dtype), cast_linears(model, self.dtype):
                yield
        finally:
            model.train(training)


@dataclass(slots=True, eq=False)
class _Sequence:
    """A completion in the making. `index` is that of its request."""

    index: int
    request: Request
    shape: tuple[float, float, int]
    """Temperature, top_p, top_k."""
    uniforms: npt.NDArray[np.float64]
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    raw_logprobs: list[float] = field(default_factory=list)

    @property
    def cached(self) -> int:
        """Tokens whose keys and values are known, which is also the position of the last token."""
        return len(self.request.prompt_ids) + len(self.token_ids) - 1


class _Run:
    """One call of `sample`: sequence `live[m]` stands in slot m of the decoder."""

    def __init__(
        self, policy: Policy, requests: Sequence[Request], config: SamplingConfig, on_finish: OnFinish | None
    ) -> None:
        self.policy, self.config, self.on_finish = policy, config, on_finish
        self.head, self.output = policy.head, policy.model.get_output_embeddings()
        self.stop_ids = frozenset(policy.stop_ids)
        self.slots = min(config.max_batch, max(len(requests), 1))
        decoder = CachedDecoder if policy.branching else RecomputingDecoder
        self.decoder: Decoder = decoder(policy, self.slots)
        self.finished: list[Completion | None] = [None] * len(requests)
        self.live: list[_Sequence] = []
        self.entering: deque[tuple[Prefix, deque[_Sequence]]] = deque()
        groups: dict[tuple[int, ...], deque[_Sequence]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(request.prompt_ids, deque()).append(self._sequence(index, request))
        self.waiting = deque(groups.items())

    def completions(self) -> list[Completion]:
        """Run until every request is finished."""
        while self.live or self.entering or self.waiting:
            self._admit()
            if self.live:
                tokens = [sequence.token_ids[-1] for sequence in self.live]
                positions = [sequence.cached for sequence in self.live]
                self._extend(0, self.decoder.step(tokens, positions))
        return [completion for completion in self.finished if completion is not None]

    def _sequence(self, index: int, request: Request) -> _Sequence:
        config = self.config
        shape = (
            config.temperature if request.temperature is None else request.temperature,
            config.top_p if request.top_p is None else request.top_p,
            config.top_k if request.top_k is None else request.top_k,
        )
        return _Sequence(index, request, shape, uniforms(request.seed, config.max_new_tokens))

    def _admit(self) -> None:
        """Fill free slots, prompt by prompt, and sample the first token of what enters."""
        first = len(self.live)
        hidden: list[Tensor] = []
        while len(self.live) < self.slots and (self.entering or self.waiting):
            if not self.entering:
                self._prefill()
            prefix, sequences = self.entering[0]
            start = len(self.live)
            while sequences and len(self.live) < self.slots:
                self.live.append(sequences.popleft())
                hidden.append(prefix.hidden_D)
            self.decoder.fork(prefix, slice(start, len(self.live)))
            if not sequences:
                self.entering.popleft()
        if hidden:
            self._extend(first, torch.stack(hidden))

    def _prefill(self) -> None:
        """Compute waiting prompts, as many as free slots need and one packed row takes."""
        free = self.slots - len(self.live)
        chosen = [self.waiting.popleft()]
        tokens, sequences = len(chosen[0][0]), len(chosen[0][1])
        while self.waiting and sequences < free and tokens + len(self.waiting[0][0]) <= _PREFILL_TOKENS:
            chosen.append(self.waiting.popleft())
            tokens += len(chosen[-1][0])
            sequences += len(chosen[-1][1])
        prefixes = self.decoder.start([prompt_ids for prompt_ids, _ in chosen])
        self.entering.extend((prefix, group) for prefix, (_, group) in zip(prefixes, chosen, strict=True))

    def _extend(self, first: int, hidden_MD: Tensor) -> None:
        """Sample a token for each of slots first, first + 1, …, and let the finished leave."""
        rows = self.live[first:]
        device = hidden_MD.device
        uniform_M = torch.tensor([row.uniforms[len(row.token_ids)] for row in rows], device=device)
        temperatures, top_ps, top_ks = zip(*(row.shape for row in rows), strict=True)
        shaping = Shaping(
            temperature_M=torch.tensor(temperatures, dtype=torch.float32, device=device),
            top_p_M=torch.tensor(top_ps, dtype=torch.float32, device=device),
            top_k_M=torch.tensor(top_ks, device=device),
        )
        choice = choose(self.head.shape(self.output(hidden_MD)), uniform_M, shaping)
        tokens, logprobs = choice.tokens_M.tolist(), choice.logprobs_M.tolist()
        for row, token, logprob, raw in zip(rows, tokens, logprobs, choice.raw_logprobs_M.tolist(), strict=True):
            row.token_ids.append(token)
            row.logprobs.append(logprob)
            row.raw_logprobs.append(raw)
        # From the last slot down, so that the sequence that fills a gap is one that stays.
        for slot in range(len(self.live) - 1, first - 1, -1):
            row = self.live[slot]
            stopped = row.token_ids[-1] in self.stop_ids
            if stopped or len(row.token_ids) == self.config.max_new_tokens:
                self._finish(row, "stop" if stopped else "length")
                last = self.live.pop()
                if last is not row:
                    self.decoder.move(len(self.live), slot, last.cached)
                    self.live[slot] = last

    def _finish(self, row: _Sequence, reason: StopReason) -> None:
        spoken = row.token_ids[:-1] if reason == "stop" else row.token_ids
        completion = Completion(
            prompt_id=row.request.prompt_id,
            text=self.policy.tokenizer.decode(spoken, skip_special_tokens=True),
            token_ids=tuple(row.token_ids),
            logprobs=tuple(row.logprobs),
            raw_logprobs=tuple(row.raw_logprobs),
            stop_reason=reason,
            temperature=row.shape[0],
            seed=row.request.seed,
        )
        self.finished[row.index] = completion
        if self.on_finish is not None:
            self.on_finish(row.index, completion)
