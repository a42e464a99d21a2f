"""Sampling on other people's servers: vLLM, in tokens; any OpenAI-compatible one, in text.

Written against vLLM 0.32. What training needs of it is not in OpenAI's interface: token ids in the answer
(`return_token_ids`), and new weights (`/collective_rpc`, or `/v1/load_lora_adapter`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, TypeVar, cast

from torch import Tensor

from accord.errors import ConfigError, DataError, SamplerError, StaleWeightsError
from accord.models.network import Policy
from accord.sampling.connection import Connection, HTTPConfig
from accord.sampling.remote import Exchange, RemoteSampler
from accord.sampling.request import Request, SamplingConfig, completion_seed
from accord.sampling.sampler import Follow, OnFinish, Sampler, hash_weights
from accord.sampling.stops import text_of
from accord.types import Completion, Prompt, StopReason

__all__ = ["OpenAISampler", "VLLMSampler", "connect"]

_DEV_MODE = "Start vLLM with VLLM_SERVER_DEV_MODE=1 in its environment: new weights need its developer's end points."
_LORA_MODE = "Start vLLM with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment and --enable-lora."
_PROCESSED = "Start vLLM with --logprobs-mode processed_logprobs."
_SEEDS = 1 << 63

_T = TypeVar("_T")


def connect(config: HTTPConfig) -> Sampler:
    """The sampler for the server at this address, whichever of the two that can train it is.

    Raises:
        SamplerError: there is none, or it answers text only.
    """
    server = Connection(config)
    if server.has("/status"):
        return RemoteSampler(config)
    if server.has("/version"):
        return VLLMSampler(config)
    raise SamplerError(
        "This server answers text, not the tokens that it sampled. Text that is encoded again need not give the same "
        "tokens, so their log-probabilities would be wrong: no training on it.",
        where=config.url,
        fix="Train with vLLM or `accord sample-server`; OpenAISampler generates text here, to evaluate or to collect.",
    )


class VLLMSampler:
    """Samples on a server of vLLM.

    Its numbers are those of vLLM's own kernels, and which random numbers a seed gives is its own affair: completions
    differ from those of the local engine, and may differ with the company in a batch.

    Attributes:
        policy_version: what `load` said last; 0 before that, when it serves what it was started with.
        weights_hash: that of the weights that were sent; empty before `load`.
    """

    def __init__(self, config: HTTPConfig) -> None:
        """
        Raises:
            SamplerError: there is no such server.
        """
        self._server, self._exchange, self._workers = Connection(config), Exchange(config.exchange), config.concurrency
        self._base = str(_part(self._server, "/v1/models", None, "data", 0, "id"))
        self._model, self._stamp = self._base, ""
        self._stop_ids: tuple[int, ...] = ()
        self._tokenizer: Any = None
        self._processed: bool | None = None
        self.policy_version, self.weights_hash = 0, ""

    def load(self, version: int, policy: Policy, state: Mapping[str, Tensor] | None = None) -> None:
        """Sample from these weights from now on, under this version; see `Sampler.load`.

        vLLM keeps weights in a form of its own, so the hash is that of what it was told to read. It is kept with the
        weights as their name: a server that was started anew, or that another trainer uses, no longer has it.
        """
        expected = hash_weights(policy, state)
        path = self._exchange.write(version, policy, state)
        if policy.adapter is None:
            read = {"method": "reload_weights", "kwargs": {"weights_path": str(path)}}
            self._server.post("/collective_rpc", read, fix=_DEV_MODE)
            emptied = self._server.post("/reset_prefix_cache", None, fix=_DEV_MODE)
            if emptied is not None and emptied.get("success") is False:
                what = "vLLM keeps what it computed with the old weights: requests are running."
                fix = "Let them end before new weights are loaded; is somebody else using this server?"
                raise SamplerError(what, where=self._server.url, fix=fix)
            self._stamp = f"{version}:{expected}"
            self._server.post("/update_weight_version", {"new_version": self._stamp}, fix=_DEV_MODE)
        else:
            # A name of its own for every version: vLLM's prefix cache is kept by name.
            name, old = f"accord-{version}-{expected[:8]}", self._model
            self._server.tell("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path)}, fix=_LORA_MODE)
            if old not in (self._base, name):
                self._server.tell("/v1/unload_lora_adapter", {"lora_name": old}, fix=_LORA_MODE)
            self._model = name
        self._stop_ids, self._tokenizer = policy.stop_ids, policy.tokenizer
        self.policy_version, self.weights_hash = version, expected
        self._verify()
        self._exchange.loaded(path)

    def sample(
        self,
        requests: Sequence[Request],
        config: SamplingConfig,
        *,
        on_finish: OnFinish | None = None,
        follow: Follow | None = None,
    ) -> list[Completion]:
        """One completion per request, in the order of the requests; see `Sampler.sample`.

        That what requests have in common is computed once is up to vLLM's prefix cache.
        """
        settings = [request.settings(config) for request in requests]
        for request in requests:
            if not request.prompt_ids:
                fix = "Start with the model's first token."
                raise DataError("This prompt has no tokens.", where=request.where, fix=fix)
        self._verify()
        if self._processed is None and any(each.shaped for each in settings):
            self._processed = self._answers_processed()

        def complete(index: int) -> Completion:
            completion = self._complete(requests[index], settings[index])
            while follow is not None and (request := follow(index, completion).result()) is not None:
                completion = self._complete(request, request.settings(config))
            return completion

        completions = _concurrently(complete, range(len(requests)), self._workers, on_finish)
        self._verify()
        return completions

    def _verify(self) -> None:
        """Raise if the server no longer has the weights that it was given."""
        if self._model != self._base:
            found = self._model if self._model in self._models() else "no such adapter"
            wanted = self._model
        elif self._stamp:
            wanted = self._stamp
            found = _part(self._server, "/weight_info", None, "weight_version", fix=_DEV_MODE)
        else:
            return
        if found != wanted:
            fix = "Give it the weights again with `load`: it was started anew, or another trainer uses it, too."
            raise StaleWeightsError(f"vLLM serves {found!r}, not {wanted!r}.", where=self._server.url, fix=fix)

    def _complete(self, request: Request, settings: SamplingConfig) -> Completion:
        body = {
            **_standard(settings, request.seed),
            "model": self._model,
            "prompt": list(request.prompt_ids),
            "top_k": settings.top_k,
            "min_p": settings.min_p,
            "repetition_penalty": 1.0,  # else vLLM takes what the model's generation settings say
            "stop_token_ids": list(self._stop_ids),
            "add_special_tokens": False,
            "return_token_ids": True,
            "logprobs": 0,
        }
        choice = self._choice(body)
        try:
            token_ids = tuple(map(int, choice["token_ids"]))
            told = tuple(map(float, choice["logprobs"]["token_logprobs"]))
        except (KeyError, TypeError, ValueError):
            fix = "Use vLLM 0.32 or later; for text alone, use OpenAISampler."
            what = "The server answers neither token ids nor their log-probabilities."
            raise SamplerError(what, where=self._server.url, fix=fix) from None
        logprobs, raw_logprobs = self._both(request, settings, token_ids, told)
        return Completion(
            prompt_id=request.prompt_id,
            text=self._text(token_ids, settings, str(choice.get("text", ""))),
            token_ids=token_ids,
            logprobs=logprobs,
            raw_logprobs=raw_logprobs,
            stop_reason=_stop_reason(choice, self._server.url),
            temperature=settings.temperature,
            seed=request.seed,
            policy_version=self.policy_version,
        )

    def _text(self, token_ids: tuple[int, ...], settings: SamplingConfig, told: str) -> str:
        """What the tokens say, as every sampler has it. vLLM begins a text with the end of a prompt that is no whole
        character, and leaves one out that is incomplete at the end."""
        if self._tokenizer is None:  # nothing was loaded yet
            return told
        return text_of(self._tokenizer, token_ids, self._stop_ids, settings.stop)

    def _both(
        self, request: Request, settings: SamplingConfig, token_ids: tuple[int, ...], told: tuple[float, ...]
    ) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Log-probabilities of the sampling distribution, and the model's. vLLM tells one kind; the other may cost a
        second look at the completion."""
        if not settings.shaped:
            return told, told
        greedy = settings.temperature == 0
        if not self._processed:
            if not greedy:
                what = "This vLLM tells the model's log-probabilities, not those of the sampling distribution."
                raise SamplerError(what, where=self._server.url, fix=f"{_PROCESSED} Or sample at temperature 1 alone.")
            return (0.0,) * len(told), told
        prompt = [*request.prompt_ids, *token_ids]
        body = {"model": self._model, "prompt": prompt, "max_tokens": 1, "prompt_logprobs": 0, "temperature": 0.0}
        said = self._choice(body, "prompt_logprobs")[len(request.prompt_ids) :]
        raw = tuple(float(each[str(token)]["logprob"]) for each, token in zip(said, token_ids, strict=True))
        return ((0.0,) * len(told) if greedy else told), raw

    def _answers_processed(self) -> bool:
        """Whether log-probabilities are those of the sampling distribution: with top_k = 1 they are 0 then."""
        body = {"model": self._model, "prompt": [1], "max_tokens": 1, "logprobs": 0, "temperature": 1.0, "top_k": 1}
        return float(self._choice(body, "logprobs", "token_logprobs", 0)) == 0.0

    def _choice(self, body: dict[str, Any], *keys: str | int) -> Any:
        fix = "Shorten the prompt, or lower max_new_tokens, if it speaks of length."
        return _part(self._server, "/v1/completions", body, "choices", 0, *keys, fix=fix)

    def _models(self) -> list[str]:
        return [str(each["id"]) for each in _part(self._server, "/v1/models", None, "data")]


class OpenAISampler:
    """Generates text on any server with OpenAI's interface, to evaluate or to collect; nothing for training.

    Completions have no tokens and no log-probabilities.
    """

    def __init__(self, config: HTTPConfig, model: str) -> None:
        self._server, self._model, self._workers = Connection(config), model, config.concurrency

    def complete(
        self,
        prompts: Sequence[Prompt],
        temperatures: Sequence[float],
        config: SamplingConfig,
        seed: int,
        *,
        on_finish: OnFinish | None = None,
    ) -> list[Completion]:
        """One completion per prompt and temperature, prompt by prompt.

        Raises:
            ConfigError: `config` asks for what OpenAI's interface does not have.
            SamplerError: the server cannot be reached, or refuses.
        """
        foreign = [name for name in ("top_k", "min_p") if getattr(config, name)]
        if foreign:
            fix = "Leave it out, or sample with vLLM or in process."
            raise ConfigError("OpenAI's interface has no such setting.", where=foreign[0], fix=fix)
        wanted = [
            (prompt, temperature, completion_seed(seed, prompt.id, index))
            for prompt in prompts
            for index, temperature in enumerate(temperatures)
        ]
        return _concurrently(lambda each: self._complete(*each, config), wanted, self._workers, on_finish)

    def _complete(self, prompt: Prompt, temperature: float, seed: int, config: SamplingConfig) -> Completion:
        settings = config.model_copy(update={"temperature": temperature})
        body = {"model": self._model, **_standard(settings, seed)}
        if isinstance(prompt.content, str):
            choice = _part(self._server, "/v1/completions", {**body, "prompt": prompt.content}, "choices", 0)
            text = choice.get("text")
        else:
            messages = [{"role": message.role, "content": message.content} for message in prompt.content]
            choice = _part(self._server, "/v1/chat/completions", {**body, "messages": messages}, "choices", 0)
            text = choice.get("message", {}).get("content")
        reason = _stop_reason(choice, self._server.url)
        return Completion(prompt.id, str(text or ""), (), (), (), reason, temperature, seed)


def _part(server: Connection, path: str, body: Any, *keys: str | int, fix: str | None = None) -> Any:
    """What stands in the JSON that a POST of `body` (a GET, if None) answers, under these keys."""
    answer = server.get(path, fix=fix) if body is None else server.post(path, body, fix=fix)
    try:
        for key in keys:
            answer = answer[key]
    except (KeyError, IndexError, TypeError):
        what = f"The answer has no {'.'.join(map(str, keys))}."
        fix = "Is this the url of a server with OpenAI's interface? Give it without /v1."
        raise SamplerError(what, where=f"{server.url}{path}", fix=fix) from None
    return answer


def _standard(settings: SamplingConfig, seed: int) -> dict[str, Any]:
    """What OpenAI's interface has."""
    body: dict[str, Any] = {
        "max_tokens": settings.max_new_tokens,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "seed": seed % _SEEDS,
    }
    if settings.stop:
        body["stop"] = list(settings.stop)
    if settings.logit_bias:
        body["logit_bias"] = {str(token): number for token, number in settings.logit_bias.items()}
    return body


def _stop_reason(choice: Mapping[str, Any], url: str) -> StopReason:
    reason = choice.get("finish_reason")
    if reason not in ("stop", "length"):
        what = f"A completion ended for the reason {reason!r}."
        raise SamplerError(what, where=url, fix="The server's log says more; the same request can be sent again.")
    return cast(StopReason, reason)


def _concurrently(
    complete: Callable[[_T], Completion], wanted: Sequence[_T], workers: int, on_finish: OnFinish | None
) -> list[Completion]:
    """`complete` of each, so many at a time; the first error stops what has not begun."""
    finished: dict[int, Completion] = {}
    with ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(complete, each): index for index, each in enumerate(wanted)}
        try:
            for future in as_completed(futures):
                finished[futures[future]] = future.result()
                if on_finish is not None:
                    on_finish(futures[future], finished[futures[future]])
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return [finished[index] for index in range(len(wanted))]
