"""The two networks that Accord trains: a policy (log-probabilities of tokens) and a reward model (a score).

Both wrap a transformers model whose attention branches (`accord.models.attention`), and both answer one question:
what does the network say of this packed micro-batch? Nothing else of the network is visible to a loss.

T = packed tokens, N = tokens that carry loss, C = completions, D = hidden size.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from accord.files import atomic_directory
from accord.models.logprobs import Head, token_logprobs
from accord.models.packing import MicroBatch

__all__ = ["Network", "Outputs", "Policy", "RewardModel"]


@dataclass(frozen=True, slots=True)
class Outputs:
    """What a network says of a micro-batch: log-probabilities in nats, or scores; float32."""

    logprobs_N: Tensor | None = None
    scores_C: Tensor | None = None


class Network(ABC):
    """A transformers model with its tokenizer.

    Attributes:
        model: the transformers model (with LoRA layers inside it if there are any).
        tokenizer: its tokenizer.
        branching: whether its attention can branch; if not, every completion is computed with its own prompt.
        adapter: the peft model that holds the LoRA layers of `model`, or None.
    """

    def __init__(self, model: Any, tokenizer: Any, *, branching: bool = True) -> None:
        self.model, self.tokenizer, self.branching = model, tokenizer, branching
        self.adapter: Any = None

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

    def hidden(self, batch: MicroBatch) -> Tensor:
        """Last hidden states [T, D] of a packed micro-batch."""
        inputs: dict[str, Any] = {"input_ids": batch.input_ids_T[None], "use_cache": False}
        if self.branching:
            inputs |= {"position_ids": batch.positions_T[None], "batch": batch}
        result: Tensor = self.model.base_model(**inputs).last_hidden_state[0]
        return result

    @abstractmethod
    def __call__(self, batch: MicroBatch) -> Outputs:
        """What the network says of a micro-batch."""

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """The base model for a while: with LoRA, that is the reference."""
        with self.adapter.disable_adapter() if self.adapter else nullcontext():
            yield

    def fingerprint(self) -> str:
        """A hash of the configuration and of every base weight (LoRA layers left out)."""
        state = hashlib.blake2b(digest_size=16)
        state.update(json.dumps(self.model.config.to_diff_dict(), sort_keys=True, default=str).encode())
        weights = {name.replace(".base_layer", ""): tensor for name, tensor in self.model.state_dict().items()}
        for name in sorted(name for name in weights if "lora_" not in name):
            state.update(name.encode())
            state.update(weights[name].detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return state.hexdigest()

    def save(self, directory: Path) -> None:
        """Write the model (or its adapter) and the tokenizer in Hugging Face format, atomically."""
        with atomic_directory(directory) as temporary:
            (self.adapter or self.model).save_pretrained(temporary)
            self.tokenizer.save_pretrained(temporary)


class Policy(Network):
    """The model that is being aligned: a causal language model."""

    @property
    def head(self) -> Head:
        output = self.model.get_output_embeddings()
        config = self.model.config
        scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1.0)
        softcap = getattr(config, "final_logit_softcapping", None)
        return Head(output.weight, getattr(output, "bias", None), scale=scale, softcap=softcap)

    def __call__(self, batch: MicroBatch) -> Outputs:
        """Log-probability of every loss token given what stands before it on its branch."""
        rows_ND = self.hidden(batch)[batch.predictor_N]
        return Outputs(logprobs_N=token_logprobs(self.head, rows_ND, batch.target_N))


class RewardModel(Network):
    """A sequence classifier with one output; the score of a completion is read at its last token."""

    def __call__(self, batch: MicroBatch) -> Outputs:
        """Score of every completion."""
        last_CD = self.hidden(batch)[batch.last_C]
        with torch.autocast(last_CD.device.type, enabled=False):
            scores_C = self.model.score(last_CD.float())[:, 0]
        return Outputs(scores_C=scores_C)
