"""Continuous batching in process, on the same weights and with the same numbers as training.

A prompt is computed once and forked into its completions; finished completions leave at once and waiting prompts enter.
Which token comes next depends on the sequence and on its own random numbers, never on what else is in the batch.
A completion that another request may follow keeps its keys and values: only what is new in that request is computed.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from accord.engine.precision import Precision, autocast, resolve_precision
from accord.errors import ConfigError, DataError
from accord.models.decoder_stack import decoder_stack
from accord.models.network import Policy
from accord.sampling.choose import Shaping, choose
from accord.sampling.decode import CachedDecoder, Decoder, Prefix, RecomputingDecoder, Stem
from accord.sampling.request import Request, SamplingConfig, uniforms
from accord.sampling.sampler import Follow, OnFinish, hash_weights
from accord.sampling.stops import StopStrings, text_of
from accord.sampling.weights import cast_linears
from accord.types import Completion, StopReason

__all__ = ["LocalSampler", "OnToken"]

_PREFILL_TOKENS = 1024
"""Prompts are computed together up to this many tokens: enough to fill the processor, few enough for its memory."""

_ANSWER_STEPS = 4
"""Steps that others go on while a request to follow is made; then it is waited for. It enters after so many steps and
not when it is there: the last bits of log-probabilities depend on the company, and are to be the same every time."""

OnToken = Callable[[int, int, float], None]
"""Called with the index of a request, a token of its completion and the token's log-probability, as it is sampled."""


class LocalSampler:
    """Samples from a policy as it stands: after an optimiser step, the next call samples from the new weights.

    Attributes:
        policy_version: what `load` said last; completions carry it.
    """

    def __init__(self, policy: Policy, precision: Precision = "auto") -> None:
        """`precision` is that of the engine, so that log-probabilities are those of training."""
        self.policy, self.policy_version = policy, 0
        self.dtype = resolve_precision(precision, policy.device)
        if not policy.branching:
            name = type(policy.model).__name__
            print(f"{name} cannot share prompts: sampling computes each sequence anew per token.", file=sys.stderr)

    @property
    def weights_hash(self) -> str:
        """The hash of the weights as they are now, computed anew; a sharded policy needs a call on all ranks."""
        return hash_weights(self.policy)

    def load(self, version: int, policy: Policy, state: Mapping[str, Tensor] | None = None) -> None:  # noqa: ARG002
        """Sample from this policy as it stands, under this version: its weights are used in place, not copied."""
        self.policy, self.policy_version = policy, version

    def sample(
        self,
        requests: Sequence[Request],
        config: SamplingConfig,
        *,
        on_finish: OnFinish | None = None,
        follow: Follow | None = None,
        on_token: OnToken | None = None,
    ) -> list[Completion]:
        """Sample one completion per request, in the order of the requests; see `Sampler.sample`.

        Args:
            on_token: called for every token of every completion, as it is sampled.

        Raises:
            ConfigError: a request asks for a seed, a setting or a token that does not exist.
            DataError: a prompt is empty, or with `max_new_tokens` longer than the model's context.
        """

        def make(index: int, request: Request) -> _Sequence:
            return self._sequence(index, request, config)

        sequences = [make(index, request) for index, request in enumerate(requests)]
        with self._ready() as decoder:
            run = _Run(self.policy, decoder, sequences, config.max_batch, make)
            run.version, run.on_finish, run.on_token, run.follow = self.policy_version, on_finish, on_token, follow
            return run.completions()

    def kept_per_token(self) -> int:
        """Bytes of keys and values that a token keeps while sequences grow; none where each is computed anew."""
        with self._ready() as decoder:
            kept = decoder(1).start([(0,)])[0].stem.kept
        if kept is None:
            return 0
        return sum(states.nbytes // states.shape[1] for pair in kept.prefill.states.values() for states in pair)

    def _sequence(self, index: int, request: Request, config: SamplingConfig) -> _Sequence:
        """The completion to make of a request, once that is checked."""
        settings = request.settings(config)
        self._check(request, settings, self.policy.head.weight_VD.shape[0])
        stops = StopStrings(self.policy.tokenizer, settings.stop) if settings.stop else None
        return _Sequence(index, request, settings, uniforms(request.seed, settings.max_new_tokens), stops)

    def _check(self, request: Request, settings: SamplingConfig, vocabulary: int) -> None:
        if not request.prompt_ids:
            fix = "Start with the model's first token."
            raise DataError("This prompt has no tokens.", where=request.where, fix=fix)
        longest = len(request.prompt_ids) + settings.max_new_tokens
        if longest > self.policy.context:
            what = (
                f"{len(request.prompt_ids)} prompt tokens and {settings.max_new_tokens} new ones are more than the "
                f"{self.policy.context} that the model was built for."
            )
            raise DataError(what, where=request.where, fix="Shorten the prompt, or lower max_new_tokens.")
        unknown = [token for token in (*request.prompt_ids, *settings.logit_bias) if not 0 <= token < vocabulary]
        if unknown:
            what = f"Token {unknown[0]} does not exist: the model knows 0 to {vocabulary - 1}."
            raise ConfigError(what, where=request.where, fix="Encode with the model's own tokenizer.")

    @contextmanager
    def _ready(self) -> Iterator[Callable[[int], Decoder]]:
        """One autocast context and one cast of the weights for all steps; the network is left as it was found.

        Yields what makes a decoder of so many slots.
        """
        policy, model = self.policy, self.policy.model
        training = model.training
        model.eval()
        try:
            stack = decoder_stack(model) if policy.branching else None
            with torch.no_grad(), autocast(policy.device, self.dtype), cast_linears(model, self.dtype):
                if policy.branching:
                    yield lambda slots: CachedDecoder(policy, slots, self.dtype, stack)
                else:
                    yield lambda slots: RecomputingDecoder(policy, slots)
        finally:
            model.train(training)


@dataclass(slots=True, eq=False)
class _Sequence:
    """A completion in the making. `index` is that of its request."""

    index: int
    request: Request
    settings: SamplingConfig
    uniforms: npt.NDArray[np.float64]
    stops: StopStrings | None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    raw_logprobs: list[float] = field(default_factory=list)

    @property
    def cached(self) -> int:
        """Tokens whose keys and values are known, which is also the position of the last token."""
        return len(self.request.prompt_ids) + len(self.token_ids) - 1


@dataclass(frozen=True, slots=True, eq=False)
class _Resting:
    """A finished turn whose successor is being made; it is waited for at step `due`."""

    row: _Sequence
    completion: Completion
    stem: Stem
    successor: Future[Request | None]
    due: int


class _Run:
    """One call of `sample`: sequence `live[m]` stands in slot m of the decoder."""

    def __init__(
        self,
        policy: Policy,
        decoder: Callable[[int], Decoder],
        sequences: Sequence[_Sequence],
        max_batch: int,
        make: Callable[[int, Request], _Sequence],
    ) -> None:
        self.policy, self.version, self.make = policy, 0, make
        self.on_finish: OnFinish | None = None
        self.on_token: OnToken | None = None
        self.follow: Follow | None = None
        self.head, self.output = policy.head, policy.model.get_output_embeddings()
        self.stop_ids = frozenset(policy.stop_ids)
        self.slots = min(max_batch, max(len(sequences), 1))
        self.decoder = decoder(self.slots)
        self.finished: list[Completion | None] = [None] * len(sequences)
        self.steps = 0
        self.live: list[_Sequence] = []
        self.resting: deque[_Resting] = deque()
        self.entering: deque[tuple[Prefix, deque[_Sequence]]] = deque()
        groups: dict[tuple[int, ...], deque[_Sequence]] = {}
        for sequence in sequences:
            groups.setdefault(sequence.request.prompt_ids, deque()).append(sequence)
        self.waiting = deque(groups.items())

    def completions(self) -> list[Completion]:
        """Run until every request is finished."""
        while self.live or self.entering or self.waiting or self.resting:
            self._resume()
            self._admit()
            if self.live:
                self.steps += 1
                tokens = [sequence.token_ids[-1] for sequence in self.live]
                positions = [sequence.cached for sequence in self.live]
                self._extend(0, self.decoder.step(tokens, positions))
        return [completion for completion in self.finished if completion is not None]

    def _resume(self) -> None:
        """Let successors that are due enter before new prompts; each brings its slot's keys and values along."""
        idle = not (self.live or self.entering or self.waiting)
        found: list[tuple[_Sequence, Stem]] = []
        while self.resting and (idle or self.resting[0].due <= self.steps):
            resting = self.resting.popleft()
            request = resting.successor.result()
            if request is None:
                self._finish(resting.row, resting.completion)
                continue
            said = (*resting.row.request.prompt_ids, *resting.row.token_ids)
            if request.prompt_ids[: len(said)] != said:
                raise ValueError("A request that follows another begins with that one's prompt and completion.")
            found.append((self.make(resting.row.index, request), resting.stem))
        stems = [(stem, row.request.prompt_ids[len(stem.token_ids) :]) for row, stem in found]
        prefixes = [prefix for part in _parts(stems) for prefix in self.decoder.extend(part)]
        entering = [(prefix, deque([row])) for prefix, (row, _) in zip(prefixes, found, strict=True)]
        self.entering.extendleft(reversed(entering))

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
        uniform_M = torch.tensor([row.uniforms[len(row.token_ids)] for row in rows], device=hidden_MD.device)
        shaping = _shaping([row.settings for row in rows], hidden_MD.device)
        choice = choose(self.head.shape(self.output(hidden_MD)), uniform_M, shaping)
        tokens, logprobs = choice.tokens_M.tolist(), choice.logprobs_M.tolist()
        for row, token, logprob, raw in zip(rows, tokens, logprobs, choice.raw_logprobs_M.tolist(), strict=True):
            row.token_ids.append(token)
            row.logprobs.append(logprob)
            row.raw_logprobs.append(raw)
            if self.on_token is not None:
                self.on_token(row.index, token, logprob)
        # From the last slot down, so that the sequence that fills a gap is one that stays.
        for slot in range(len(self.live) - 1, first - 1, -1):
            row = self.live[slot]
            reason = self._ended(row)
            if reason is not None:
                completion = self._completion(row, reason)
                if self.follow is None:
                    self._finish(row, completion)
                else:
                    self._rest(row, completion, slot)
                last = self.live.pop()
                if last is not row:
                    self.decoder.move(len(self.live), slot, last.cached)
                    self.live[slot] = last

    def _ended(self, row: _Sequence) -> StopReason | None:
        if row.token_ids[-1] in self.stop_ids or (row.stops is not None and row.stops.met(row.token_ids)):
            return "stop"
        return "length" if len(row.token_ids) == row.settings.max_new_tokens else None

    def _rest(self, row: _Sequence, completion: Completion, slot: int) -> None:
        assert self.follow is not None
        stem = self.decoder.keep(slot, (*row.request.prompt_ids, *row.token_ids[:-1]))
        successor = self.follow(row.index, completion)
        self.resting.append(_Resting(row, completion, stem, successor, self.steps + _ANSWER_STEPS))

    def _completion(self, row: _Sequence, reason: StopReason) -> Completion:
        return Completion(
            prompt_id=row.request.prompt_id,
            text=text_of(self.policy.tokenizer, row.token_ids, self.stop_ids, row.settings.stop),
            token_ids=tuple(row.token_ids),
            logprobs=tuple(row.logprobs),
            raw_logprobs=tuple(row.raw_logprobs),
            stop_reason=reason,
            temperature=row.settings.temperature,
            seed=row.request.seed,
            policy_version=self.version,
        )

    def _finish(self, row: _Sequence, completion: Completion) -> None:
        self.finished[row.index] = completion
        if self.on_finish is not None:
            self.on_finish(row.index, completion)


def _parts(stems: Sequence[tuple[Stem, tuple[int, ...]]]) -> Iterator[list[tuple[Stem, tuple[int, ...]]]]:
    """What is computed together: as many new tokens as one packed row takes."""
    part: list[tuple[Stem, tuple[int, ...]]] = []
    for stem, new in stems:
        if part and sum(len(each) for _, each in part) + len(new) > _PREFILL_TOKENS:
            yield part
            part = []
        part.append((stem, new))
    if part:
        yield part


def _shaping(rows: Sequence[SamplingConfig], device: torch.device) -> Shaping:
    """How the logits of these rows become probabilities."""
    biases = [(row, token, number) for row, own in enumerate(rows) for token, number in own.logit_bias.items()]
    bias = None
    if biases:
        places, tokens, numbers = zip(*biases, strict=True)
        bias = (
            torch.tensor(places, device=device),
            torch.tensor(tokens, device=device),
            torch.tensor(numbers, dtype=torch.float32, device=device),
        )
    return Shaping(
        temperature_M=torch.tensor([own.temperature for own in rows], dtype=torch.float32, device=device),
        top_p_M=torch.tensor([own.top_p for own in rows], dtype=torch.float32, device=device),
        top_k_M=torch.tensor([own.top_k for own in rows], device=device),
        min_p_M=torch.tensor([own.min_p for own in rows], dtype=torch.float32, device=device),
        bias=bias,
    )
