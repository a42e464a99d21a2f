"""The networks that Accord trains: a policy (log-probabilities of tokens), a reward model (a score), a critic (values).

All wrap a transformers model whose attention branches (`accord.models.attention`), and all answer one question:
what does the network say of this packed micro-batch? Nothing else of the network is visible to a loss.

T = packed tokens, N = tokens that carry loss, C = completions, D = hidden size.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import safetensors.torch
import torch
from pydantic import Field
from torch import Tensor, nn

from accord.config import Config
from accord.errors import ConfigError, ModelError
from accord.files import atomic_directory, atomic_file, write_text
from accord.models.attributes import Attribute
from accord.models.logprobs import CONSTANT_STATISTICS, Head, token_logprobs
from accord.models.noise import embedding_noise
from accord.models.packing import MicroBatch

__all__ = [
    "HEADS",
    "KEY",
    "Critic",
    "Network",
    "Outputs",
    "Policy",
    "Pooling",
    "RewardModel",
    "RewardModelConfig",
    "whole",
]

Pooling = Literal["last", "mean"]
"""What a score is read from: the last token of the completion, or the mean over the tokens of the completion."""

KEY = "accord"
"""Where config.json and adapter_config.json keep what a reward model needs beyond what transformers knows."""

HEADS: dict[Pooling, str] = {"last": "score", "mean": "mean_score"}
"""The head's name, in the model and in its file. transformers has sequence classifiers read `score` at the last token:
a library that loads a mean-pooled model finds no such head and says so, instead of giving other scores in silence."""

_VALUE_HEAD = "value_head"
"""The name of a policy's value head in the model. It is no part of the model's files: these load anywhere."""


@dataclass(frozen=True, slots=True)
class Outputs:
    """What a network says of a micro-batch: log-probabilities in nats, or scores; float32."""

    logprobs_N: Tensor | None = None
    scores_C: Tensor | None = None
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    """What else a loss asked for, per loss token [N], by name (`accord.models.logprobs.token_logprobs`)."""

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Outputs:
        """The inverse of `tensors`."""
        statistics = {name: values for name, values in tensors.items() if name not in ("logprobs", "scores")}
        return cls(tensors.get("logprobs"), tensors.get("scores"), statistics)

    def tensors(self) -> dict[str, Tensor]:
        """All of them by name."""
        named = {"logprobs": self.logprobs_N, "scores": self.scores_C, **self.statistics}
        return {name: values for name, values in named.items() if values is not None}

    def leaves(self) -> Outputs:
        """The same numbers as leaves of a new graph, to find a loss's gradient in what has one."""
        new = {
            name: values.detach().requires_grad_(name not in CONSTANT_STATISTICS)
            for name, values in self.tensors().items()
        }
        return Outputs.of(new)


def whole(tensor: Tensor) -> Tensor:
    """The tensor, gathered if it is sharded; then all ranks must call this."""
    gathered: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return gathered


class Network(ABC):
    """A transformers model with its tokenizer.

    Attributes:
        model: the transformers model (with LoRA layers inside it if there are any).
        tokenizer: its tokenizer.
        branching: whether its attention can branch; if not, every completion is computed with its own prompt.
        adapter: the peft model that holds the LoRA layers of `model`, or None.
        noise: α of the noise that is added to the embeddings in training; 0 for none.
    """

    def __init__(self, model: Any, tokenizer: Any, *, branching: bool = True) -> None:
        self.model, self.tokenizer, self.branching = model, tokenizer, branching
        self.adapter: Any = None
        self.noise = 0.0

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def context(self) -> int:
        """The longest sequence that the model was built for."""
        return int(getattr(self.model.config, "max_position_embeddings", 1 << 30))

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a turn: the tokenizer's, and those of the generation settings."""
        extra = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        extra = [extra] if isinstance(extra, int) else extra or []
        return tuple(dict.fromkeys([int(self.tokenizer.eos_token_id), *extra]))

    def trainable(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def layers(self) -> list[nn.Module]:
        """The stack of layers that every token passes: what activation checkpointing and sharding work on."""
        from transformers.modeling_layers import GradientCheckpointingLayer

        return [module for module in self.model.modules() if isinstance(module, GradientCheckpointingLayer)]

    def hidden(self, batch: MicroBatch) -> Tensor:
        """Last hidden states [T, D] of a packed micro-batch."""
        inputs: dict[str, Any] = {"input_ids": batch.input_ids_T[None], "use_cache": False}
        if self.branching:
            inputs |= {"position_ids": batch.positions_T[None], "batch": batch}
        noisy = self.noise and self.model.training
        with embedding_noise(self.model, batch, self.noise) if noisy else nullcontext():
            result: Tensor = self.model.base_model(**inputs).last_hidden_state[0]
        return result

    @abstractmethod
    def __call__(self, batch: MicroBatch, statistics: frozenset[str] = frozenset()) -> Outputs:
        """What the network says of a micro-batch, with the statistics that are asked for."""

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """The base model for a while: with LoRA, that is the reference."""
        with self.adapter.disable_adapter() if self.adapter else nullcontext():
            yield

    def fingerprint(self) -> str:
        """A hash of the configuration and of every base weight (LoRA layers and a value head left out)."""
        state = hashlib.blake2b(digest_size=16)
        state.update(json.dumps(self.model.config.to_diff_dict(), sort_keys=True, default=str).encode())
        weights = {name.replace(".base_layer", ""): tensor for name, tensor in self.model.state_dict().items()}
        names = sorted(name for name in weights if "lora_" not in name and not _of_value_head(name))
        is_sharded = any(hasattr(weights[name], "full_tensor") for name in names)
        with ThreadPoolExecutor() as pool:
            each = map if is_sharded else pool.map  # a gathered weight is let go of before the next one comes
            for name, digest in zip(names, each(_digest, (weights[name] for name in names)), strict=True):
                state.update(name.encode() + digest)
        return state.hexdigest()

    def state(self) -> dict[str, Tensor]:
        """What is saved, by name: whole tensors in the host's memory. Sharded weights need a call on all ranks."""
        module = self.adapter or self.model
        names = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
        kept: dict[int, Tensor] = {}
        state: dict[str, Tensor] = {}
        for name, tensor in module.state_dict(keep_vars=True).items():
            if self.adapter is None or name in names:
                if id(tensor) not in kept:  # tied weights stay one
                    kept[id(tensor)] = whole(tensor.detach()).cpu()
                state[name] = kept[id(tensor)]
        return state

    def save(self, directory: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Write the model (or its adapter) and the tokenizer in Hugging Face format, atomically; no value head.

        Args:
            state: the weights, where the model itself does not hold them whole.
        """
        if hasattr(self.model, _VALUE_HEAD):
            state = {name: tensor for name, tensor in (state or self.state()).items() if not _of_value_head(name)}
        with atomic_directory(directory) as temporary:
            (self.adapter or self.model).save_pretrained(temporary, state_dict=state)
            self.tokenizer.save_pretrained(temporary)
            stored = getattr(self.model.config, KEY, None)
            if self.adapter is not None and stored is not None:
                path = temporary / "adapter_config.json"
                settings = json.loads(path.read_text(encoding="utf-8"))
                write_text(path, json.dumps({**settings, KEY: stored}, indent=2) + "\n")


class RewardModelConfig(Config):
    """How a reward model reads a score, and what of it is trained."""

    pooling: Pooling | None = None
    """What the score is read from: the completion's last token (`last`), or the mean over its tokens (`mean`). It is
    stored with the model (default: as stored with a reward model; the last token for a new head)."""
    frozen_layers: Annotated[int, Field(ge=0)] | Literal["all"] = 0
    """So many of the lower layers are not trained, nor the embeddings below them; `all`: the head alone is trained."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """The share of the pooled state that is zeroed at random in training."""
    members: int = Field(1, ge=1)
    """Train so many models on disjoint parts of the prompts; together they score as one."""
    penalty: float = Field(0.0, ge=0)
    """Standard deviations between the members that are taken from their mean score."""
    attributes: dict[str, float] = Field(default_factory=dict)
    """Ratings to learn, and the weight of each in the score (default: all that the data has, with equal weights)."""


class Policy(Network):
    """The model that is being aligned: a causal language model.

    Attributes:
        temperature: what logits are divided by before log-probabilities are taken of them: that at which completions
            are sampled, so that what is trained is what was sampled. A sampler divides by its own.
    """

    def __init__(self, model: Any, tokenizer: Any, *, branching: bool = True) -> None:
        super().__init__(model, tokenizer, branching=branching)
        self.temperature = 1.0

    def add_value_head(self) -> None:
        """Give it a second, linear head on the same trunk, for the value of the state before a token: zero at first.

        Call it after `accord.models.lora.add_lora`, which freezes what is there, and before an engine is built.
        """
        head = nn.Linear(self.model.config.get_text_config().hidden_size, 1, dtype=torch.float32, device=self.device)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        setattr(self.model, _VALUE_HEAD, head)

    def save_value_head(self, path: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Write the value head as a safetensors file, atomically.

        Args:
            path: `critic.safetensors`, beside the model's directory.
            state: what `state` returned, where the model itself does not hold its weights whole.
        """
        head = {name.rpartition(".")[2]: t for name, t in (state or self.state()).items() if _of_value_head(name)}
        with atomic_file(path) as temporary:
            safetensors.torch.save_file(head, temporary)

    def load_value_head(self, path: Path) -> None:
        """Add the value head that `save_value_head` wrote.

        Raises:
            ModelError: the file cannot be read, or belongs to a model of another size.
        """
        self.add_value_head()
        try:
            getattr(self.model, _VALUE_HEAD).load_state_dict(safetensors.torch.load_file(path))
        except (OSError, RuntimeError, safetensors.SafetensorError) as error:
            message = str(error).strip().splitlines()[0]
            fix = "Give the critic.safetensors that was written with this model."
            raise ModelError(f"This value head cannot be loaded: {message}", where=str(path), fix=fix) from None

    @property
    def head(self) -> Head:
        output = self.model.get_output_embeddings()
        config = self.model.config
        scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1.0)
        softcap = getattr(config, "final_logit_softcapping", None)
        return Head(output.weight, getattr(output, "bias", None), scale=scale, softcap=softcap)

    def __call__(self, batch: MicroBatch, statistics: frozenset[str] = frozenset()) -> Outputs:
        """Log-probability of every loss token given what stands before it on its branch.

        Where `statistics` asks for "values", also the value of the state before it: [N].
        """
        rows_ND = self.hidden(batch)[batch.predictor_N]
        head = self.head.at(self.temperature)
        logprobs_N, others = token_logprobs(head, rows_ND, batch.target_N, statistics - {"values"})
        if "values" in statistics:
            with torch.autocast(rows_ND.device.type, enabled=False):
                others["values"] = getattr(self.model, _VALUE_HEAD)(rows_ND.float())[:, 0]
        return Outputs(logprobs_N=logprobs_N, statistics=others)


class RewardModel(Network):
    """A sequence classifier that scores completions: with one output, or with one for each attribute of ratings.

    Attributes:
        attributes: what the outputs predict, in standard deviations; the score is their weighted sum. Stored with the
            model; empty for a model with one output, which is the score.
        dropout: the share of the pooled state that is zeroed at random in training.
    """

    def __init__(self, model: Any, tokenizer: Any, *, branching: bool = True) -> None:
        super().__init__(model, tokenizer, branching=branching)
        self.dropout = 0.0
        stored: dict[str, dict[str, float]] = getattr(model.config, KEY, {}).get("attributes", {})
        self.attributes = tuple(Attribute(name, **numbers) for name, numbers in stored.items())

    @property
    def pooling(self) -> Pooling:
        """What a score is read from. It is stored with the model: the same wherever the model is loaded."""
        return "mean" if hasattr(self.model, HEADS["mean"]) else "last"

    @property
    def head(self) -> nn.Module:
        """From a pooled hidden state to scores."""
        head: nn.Module = getattr(self.model, HEADS[self.pooling])
        return head

    def freeze(self, layers: int | Literal["all"]) -> None:
        """Train neither the embeddings nor the lowest `layers` layers: nothing is kept or computed for their gradients.

        Raises:
            ConfigError: the model has not so many layers.
        """
        body = self.model.base_model
        if layers == "all":
            body.requires_grad_(False)
        elif layers > 0:
            depth = self.model.config.get_text_config().num_hidden_layers
            if layers > depth:
                fix = f'Set it to at most {depth}, or to "all".'
                raise ConfigError(f"The model has {depth} layers.", where=f"frozen_layers = {layers}", fix=fix)
            stack = next(m for m in body.modules() if isinstance(m, nn.ModuleList) and len(m) == depth)
            positions = [module for module in body.modules() if isinstance(module, nn.Embedding)]
            for module in [self.model.get_input_embeddings(), *positions, *stack[:layers]]:
                module.requires_grad_(False)

    def __call__(self, batch: MicroBatch, statistics: frozenset[str] = frozenset()) -> Outputs:
        """Score of every completion, and where `statistics` asks for "ratings", every attribute's: [C, A]."""
        hidden_TD = self.hidden(batch)
        pooled_CD = hidden_TD[batch.last_C].float() if self.pooling == "last" else _means(hidden_TD, batch)
        if self.dropout and self.model.training:
            pooled_CD = pooled_CD * _dropout(batch, self.dropout, pooled_CD)
        scores_C, scores_CA = self._score(pooled_CD)
        return Outputs(scores_C=scores_C, statistics={"ratings": scores_CA} if "ratings" in statistics else {})

    def _score(self, states_RD: Tensor) -> tuple[Tensor, Tensor]:
        """Scores [R] and attributes [R, A] of float32 states."""
        with torch.autocast(states_RD.device.type, enabled=False):
            scores_RA = self.head(states_RD)
            weights_A = scores_RA.new_tensor([attribute.weight for attribute in self.attributes] or [1.0])
            return scores_RA @ weights_A, scores_RA


class Critic(RewardModel):
    """A reward model that is read before every token: the value of that state, in units of reward.

    `accord.models.load.load_critic` makes one of a reward model (its head included) or of a language model (a head of
    zeros); its files are a reward model's.
    """

    def __call__(self, batch: MicroBatch, statistics: frozenset[str] = frozenset()) -> Outputs:  # noqa: ARG002
        """The statistic "values" alone: the value of the state before every loss token, [N]."""
        values_N, _ = self._score(self.hidden(batch)[batch.predictor_N].float())
        return Outputs(statistics={"values": values_N})


def _of_value_head(name: str) -> bool:
    """Whether a weight of this name belongs to a value head."""
    return name.startswith(f"{_VALUE_HEAD}.") or f".{_VALUE_HEAD}." in name


def _digest(weight: Tensor) -> bytes:
    return hashlib.sha256(whole(weight.detach()).cpu().contiguous().view(torch.uint8).numpy().data).digest()


def _means(hidden_TD: Tensor, batch: MicroBatch) -> Tensor:
    """Mean hidden state of every completion's tokens, float32: [C, D]."""
    spans = [span for tree in batch.layout for span in tree.branches]
    return torch.stack([hidden_TD[span.start : span.start + span.length].float().mean(0) for span in spans])


def _dropout(batch: MicroBatch, share: float, like: Tensor) -> Tensor:
    """0, or 1 / (1 − share), drawn for every completion from the step's seed and its place in the step.

    So the numbers depend neither on packing nor on whether the loss takes one pass or two.
    """
    generator, rows = torch.Generator(), []
    for part in batch.parts:
        for branch in part.branches:
            generator.manual_seed(hash((torch.initial_seed(), part.tree, branch)) & ((1 << 63) - 1))
            rows.append(torch.rand(like.shape[1], generator=generator) >= share)
    return torch.stack(rows).to(like) / (1 - share)
