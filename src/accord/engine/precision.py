"""Which precision the matrix products run in: bfloat16 where the hardware has it, float32 elsewhere.

Weights, optimiser state, log-probabilities and losses are float32 always; only products and what feeds them change.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal

import torch

__all__ = ["Precision", "autocast", "resolve_precision"]

Precision = Literal["auto", "bfloat16", "float32"]


def resolve_precision(wanted: Precision, device: torch.device) -> torch.dtype:
    """The data type of the matrix products."""
    if wanted == "auto":
        fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else _cpu_has_bfloat16()
        return torch.bfloat16 if fast else torch.float32
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[wanted]


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """The context in which a network runs forward."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


@cache
def _cpu_has_bfloat16() -> bool:
    """Emulated bfloat16 is slower than float32, so the processor's own flags decide."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    flags = set(next((line for line in text.splitlines() if line.startswith("flags")), "").split())
    return bool(flags & {"avx512_bf16", "amx_bf16"})
