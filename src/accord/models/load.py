"""Load a policy, a reward model or a critic from a hub id, a directory, or `starter`."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from accord.errors import ModelError
from accord.models import ensemble
from accord.models.allocator import keep_memory
from accord.models.attention import ATTENTION, branch_attention, no_mask
from accord.models.attributes import Attribute
from accord.models.fuse import fuse
from accord.models.network import HEADS, KEY, Critic, Network, Policy, Pooling, RewardModel, RewardModelConfig
from accord.models.packing import MicroBatch, pack
from accord.models.starter import STARTER, starter_directory
from accord.models.trees import Branch, Tree

__all__ = ["default_device", "load_critic", "load_judge", "load_policy", "load_reward_model", "load_tokenizer"]


transformers.AttentionInterface.register(ATTENTION, branch_attention)
transformers.AttentionMaskInterface.register(ATTENTION, no_mask)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def default_device() -> torch.device:
    """The first CUDA device if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_policy(name: str, *, chat_template: str | None = None, device: torch.device | None = None) -> Policy:
    """Load a causal language model in float32 with its tokenizer.

    Args:
        name: a hub id, a directory (a whole model or a LoRA adapter), or `starter`.
        chat_template: a Jinja template that replaces the model's own.

    Raises:
        ModelError: it cannot be found or is no causal language model.
    """
    path = _resolve(name)
    model = _load(transformers.AutoModelForCausalLM, name, path)
    if _is_classifier(model):
        fix = "Give a language model; `accord evaluate reward` measures a reward model."
        raise ModelError("This is a reward model: it has no head for tokens.", where=f"--model {name}", fix=fix)
    return _finish(Policy, model, _tokenizer(name, path, chat_template), device)


def load_reward_model(
    name: str,
    settings: RewardModelConfig | None = None,
    *,
    attributes: Sequence[Attribute] = (),
    chat_template: str | None = None,
    device: torch.device | None = None,
) -> RewardModel:
    """Load a sequence classifier; a language model gets a new, zero-initialised score head.

    Args:
        settings: how the score is read, and what is trained (default: as stored with the model; everything).
        attributes: what a new head predicts, one output each (default: one output, the score).

    Raises:
        ModelError: it cannot be found, is of a kind that has no score head, or was trained with another pooling or for
            other attributes.
    """
    if (Path(name) / ensemble.FILE).is_file():
        if settings is not None:
            fix = f"Give one of its members, e.g. {Path(name) / '1'}."
            raise ModelError(
                "This is an ensemble: it scores, but is not trained further.", where=f"--model {name}", fix=fix
            )
        return _load_ensemble(Path(name), chat_template, device)
    settings = settings or RewardModelConfig()
    path, pooling = _resolve(name), settings.pooling
    kept = _stored(path)
    stored, known = kept.get("pooling", "last"), kept.get("attributes", {})
    auto = _MeanPooled if (pooling or stored) == "mean" else transformers.AutoModelForSequenceClassification
    model = _load(auto, name, path, num_labels=len(known or attributes) or 1)
    tokenizer = _tokenizer(name, path, chat_template)
    if _head(model) is None:
        raise ModelError(
            f"{type(model).__name__} has no `score` head.", where=f"--model {name}", fix="Use a causal LM."
        )
    if _is_classifier(model) and pooling not in (None, stored):
        what = f"This reward model reads its scores from {_POOLINGS[stored]}, not from {_POOLINGS[pooling]}."
        raise ModelError(what, where=f"--model {name}", fix="Leave pooling out, or start from a language model.")
    if _is_classifier(model) and attributes and [attribute.name for attribute in attributes] != list(known):
        what = f"This reward model predicts {', '.join(known) or 'one score'}, not the ratings of this data."
        fix = "Name its attributes with reward_model.attributes, or start from a language model."
        raise ModelError(what, where=f"--model {name}", fix=fix)
    _describe(model, "mean" if auto is _MeanPooled else "last", known or _numbers(attributes))
    model.config.pad_token_id = tokenizer.pad_token_id
    network: RewardModel = _finish(RewardModel, model, tokenizer, device)
    network.freeze(settings.frozen_layers)
    network.dropout = settings.dropout
    return network


def load_judge(name: str, *, chat_template: str | None = None) -> RewardModel:
    """Load a reward model to score with.

    Raises:
        ModelError: as `load_reward_model`; or its head is new, so that every score would be 0.
    """
    network = load_reward_model(name, chat_template=chat_template)
    if not any(bool(weights.any()) for weights in network.head.parameters()):
        fix = "Give a model that `accord train reward` has written, or another sequence classifier with one output."
        raise ModelError("This model has no trained score head.", where=f"reward model {name}", fix=fix)
    return network


def load_critic(name: str, tokenizer: Any, *, device: torch.device | None = None) -> Critic:
    """Load a separate critic from a reward model, whose head becomes the value head, or from a language model.

    Args:
        tokenizer: the policy's. A critic reads the policy's tokens, so its own must be the same.

    Raises:
        ModelError: it cannot be found, has no score head, is an ensemble, or has other tokens.
    """
    try:
        network = load_reward_model(name, RewardModelConfig(), device=device)
    except ModelError as error:
        raise ModelError(error.what, where=f"critic.model {name}", fix=error.fix) from None
    if network.tokenizer.get_vocab() != tokenizer.get_vocab():
        fix = "Start the critic from the policy, or from a reward model of the same family."
        raise ModelError("Its tokens are not those of the policy.", where=f"critic.model {name}", fix=fix)
    return Critic(network.model, network.tokenizer, branching=network.branching)


def load_tokenizer(name: str, *, chat_template: str | None = None) -> Any:
    """The tokenizer alone, with a padding token that is not a stop token."""
    return _tokenizer(name, _resolve(name), chat_template)


def _load_ensemble(path: Path, chat_template: str | None, device: torch.device | None) -> RewardModel:
    try:
        stored = json.loads((path / ensemble.FILE).read_text(encoding="utf-8"))
        members, penalty = [str(name) for name in stored["members"]], float(stored["penalty"])
    except (OSError, ValueError, KeyError, TypeError):
        fix = "Train it again with reward_model.members."
        raise ModelError(f"{ensemble.FILE} cannot be read.", where=str(path), fix=fix) from None
    loaded = [load_reward_model(str(path / name), chat_template=chat_template, device=device) for name in members]
    return ensemble.RewardEnsemble(loaded, penalty)


_POOLINGS = {"last": "the last token", "mean": "the mean over tokens"}


class _MeanPooled:
    """Stands in for transformers' auto classes: a sequence classifier whose head is read at the mean over tokens."""

    @staticmethod
    def from_pretrained(path: str, **options: Any) -> Any:
        config = transformers.AutoConfig.from_pretrained(path)
        base: Any = transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None)
        if base is None:
            raise ValueError(f"{type(config).__name__} has no sequence classifier.")

        def initialise(model: Any, config: Any, *arguments: Any, **named: Any) -> None:
            base.__init__(model, config, *arguments, **named)
            if hasattr(model, HEADS["last"]):
                setattr(model, HEADS["mean"], getattr(model, HEADS["last"]))
                delattr(model, HEADS["last"])

        kind: Any = type(f"MeanPooled{base.__name__}", (base,), {"__init__": initialise, "__module__": __name__})
        return kind.from_pretrained(path, **options)


def _describe(model: Any, pooling: Pooling, attributes: Mapping[str, Mapping[str, float]]) -> None:
    """Keep in the model's configuration what a plain sequence classifier with one output does not have."""
    kept: dict[str, Any] = {"pooling": pooling} if pooling != "last" else {}
    if attributes:
        kept["attributes"] = {name: dict(numbers) for name, numbers in attributes.items()}
        model.config.id2label = dict(enumerate(attributes))
        model.config.label2id = {name: index for index, name in enumerate(attributes)}
    if kept:
        setattr(model.config, KEY, kept)


def _numbers(attributes: Sequence[Attribute]) -> dict[str, dict[str, float]]:
    return {each.name: {"mean": each.mean, "std": each.std, "weight": each.weight} for each in attributes}


def _head(model: Any) -> nn.Module | None:
    return next((getattr(model, name) for name in HEADS.values() if hasattr(model, name)), None)


def _stored(path: str) -> dict[str, Any]:
    """What our reward models keep beside what transformers and peft know."""
    if _is_adapter(path):
        settings = json.loads((Path(path) / "adapter_config.json").read_text(encoding="utf-8"))
    else:
        try:
            settings, _ = transformers.PreTrainedConfig.get_config_dict(path)
        except (OSError, ValueError):
            settings = {}  # loading it says what is wrong
    return dict(settings.get(KEY, {}))


def _resolve(name: str) -> str:
    if name == STARTER:
        return str(starter_directory())
    if Path(name).is_dir() and not (Path(name) / "config.json").exists() and not _is_adapter(name):
        fix = "Give a directory that holds config.json, e.g. runs/<name>/model."
        raise ModelError("This directory holds no model.", where=f"--model {name}", fix=fix)
    return name


def _is_adapter(path: str) -> bool:
    return (Path(path) / "adapter_config.json").exists()


def _load(auto: Any, name: str, path: str, **options: Any) -> Any:
    try:
        if _is_adapter(path):
            return _load_adapter(auto, path, **options)
        try:
            model = auto.from_pretrained(path, dtype=torch.float32, attn_implementation=ATTENTION, **options)
        except KeyError:  # its attention classes are listed by name, and ours is not among them
            model = auto.from_pretrained(path, dtype=torch.float32, **options)
        head: Any = _head(model)
        if head is not None and not _is_classifier(model):
            # Zero scores at first: the first loss is log 2 whatever the seed, and nothing random enters the weights.
            nn.init.zeros_(head.weight)
        return model
    except (OSError, ValueError) as error:
        message = str(error).strip().splitlines()[0]
        offline = os.environ.get("HF_HUB_OFFLINE") == "1"
        fix = (
            "Hub access is switched off (HF_HUB_OFFLINE=1): give a local directory, or `starter`."
            if offline
            else "Give a hub id, a directory with config.json and weights, or `starter`; `accord doctor` tests the hub."
        )
        raise ModelError(f"Cannot load this model: {message}", where=f"--model {name}", fix=fix) from None


def _is_classifier(model: Any) -> bool:
    """Whether its files were written by a sequence classifier, whatever it was loaded as."""
    return any("ForSequenceClassification" in kind for kind in model.config.architectures or ())


def _load_adapter(auto: Any, path: str, **options: Any) -> Any:
    import peft

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", f"Unexpected keyword arguments .'{KEY}'.")  # our own, which peft cannot know
        settings = peft.PeftConfig.from_pretrained(path)
    base = _load(auto, settings.base_model_name_or_path, _resolve(settings.base_model_name_or_path), **options)
    return peft.PeftModel.from_pretrained(base, path, config=settings).merge_and_unload()


def _tokenizer(name: str, path: str, chat_template: str | None) -> Any:
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        message = str(error).strip().splitlines()[0]
        fix = "A model directory also needs tokenizer.json."
        raise ModelError(f"Cannot load its tokenizer: {message}", where=f"--model {name}", fix=fix) from None
    if tokenizer.eos_token_id is None:
        raise ModelError("The tokenizer has no stop (eos) token.", where=f"--model {name}", fix="Set eos_token in it.")
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


def _finish(kind: type[Any], model: Any, tokenizer: Any, device: torch.device | None) -> Any:
    keep_memory()
    for module in model.modules():
        # Preference data is small and each row counts: like TRL, no dropout. Masks of a run stay reproducible, too.
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for option in ("attention_dropout", "attn_pdrop"):
            if isinstance(getattr(module, option, None), float):
                setattr(module, option, 0.0)
    model.to(device or default_device())
    fuse(model)
    network: Network = kind(model, tokenizer)
    network.branching = _can_branch(network)
    if not network.branching:
        notice = f"{type(model).__name__} cannot share a prompt: every completion is computed with a prompt of its own."
        print(notice, file=sys.stderr)
        # Branch attention asks for no mask; a model that does not use it would see the future.
        implementation = "sdpa" if getattr(model, "_supports_sdpa", False) else "eager"
        model.set_attn_implementation(implementation)
        # Models without transformers' attention interface ignore the call, yet ask the configuration for their mask.
        model.config._attn_implementation = implementation
    return network


def _can_branch(network: Network) -> bool:
    """Try it: branches must say what the same tokens say alone, one branch must not see the other."""
    generator = np.random.default_rng(0)
    size = min(network.model.config.get_text_config().vocab_size, 1000)
    prompt, first, second = (generator.integers(0, size, length) for length in (5, 4, 3))
    branches = tuple(Branch(tokens, np.ones(len(tokens), bool)) for tokens in (first, second))
    forked, alone = (
        pack(trees, 1 << 20)[0].to(network.device)
        for trees in ([Tree(prompt, branches, ranks=(0, 1))], [Tree(prompt, (branch,)) for branch in branches])
    )
    try:
        with torch.no_grad():
            pairs = zip(_spoken(network, forked), _spoken(network, alone), strict=True)
            return all(torch.allclose(one, other, atol=1e-3, rtol=1e-3) for one, other in pairs)
    except Exception:  # attention of a kind that does not know the layout may fail in any way
        return False


def _spoken(network: Network, batch: MicroBatch) -> list[Tensor]:
    """Hidden states of every branch, the shortest first: packing may change their order."""
    hidden = network.hidden(batch)
    spans = [span for tree in batch.layout for span in tree.branches]
    return [hidden[span.start : span.start + span.length] for span in sorted(spans, key=lambda span: span.length)]
