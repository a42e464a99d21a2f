"""The part of a decoding step that is no matrix product, compiled for the processor at hand (`native.cpp`).

A step of many small calls costs more in calls and passes over memory than in arithmetic. Compiling takes two seconds,
once; the result is kept in Accord's cache. Without a C++ compiler everything works, at the speed of torch's own calls.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from accord.models.starter import cache_directory

__all__ = ["Native", "native"]

_SOURCE = Path(__file__).with_suffix(".cpp")
_OPTIONS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-fno-math-errno", "-fopenmp")
_WIDTH = 16
"""Numbers of a vector in native.cpp: rows are whole vectors."""
_KINDS = {torch.float32: "float", torch.bfloat16: "bfloat"}
_LARGEST_HEAD = 1024
"""As native.cpp has room for."""


class _Attention(ctypes.Structure):
    """`Attention` of native.cpp, field by field."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("M", "H", "K", "D", "P", "S", "column", "window")),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "cos", "sin")),
        *((name, ctypes.c_void_p) for name in ("prompt_keys", "prompt_values", "keys", "values")),
        *((name, ctypes.c_void_p) for name in ("order", "prompt", "length", "start", "position", "out")),
    ]


class Native:
    """The compiled functions. All tensors are contiguous, on the CPU, and of one precision unless said otherwise."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._functions = {
            (name, dtype): getattr(library, f"{name}_{kind}")
            for name in ("attend", "choose", "norm", "swiglu")
            for dtype, kind in _KINDS.items()
        }
        pointer, size, threads = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        arguments = {
            "attend": [ctypes.POINTER(_Attention), threads],
            "choose": [*[pointer] * 6, size, size, threads],
            "norm": [pointer, pointer, pointer, pointer, size, size, ctypes.c_float, threads],
            "swiglu": [pointer, pointer, size, threads],
        }
        for (name, _), function in self._functions.items():
            function.argtypes, function.restype = arguments[name], None

    @staticmethod
    def takes(dtype: torch.dtype, *sizes: int) -> bool:
        """Whether rows of these sizes and this precision are computed."""
        return dtype in _KINDS and all(size % _WIDTH == 0 for size in sizes)

    @classmethod
    def attends(cls, dtype: torch.dtype, size: int) -> bool:
        """Whether heads of this size and this precision are computed."""
        return 0 < size <= _LARGEST_HEAD and cls.takes(dtype, size)

    def norm(
        self, hidden_MD: Tensor, delta_MD: Tensor | None, weight_D: Tensor, epsilon: float, out_MD: Tensor
    ) -> None:
        """Add `delta_MD` to the float32 `hidden_MD`, in place; `out_MD` becomes its RMS norm times `weight_D`."""
        delta = None if delta_MD is None else delta_MD.data_ptr()
        self._functions["norm", out_MD.dtype](
            hidden_MD.data_ptr(),
            delta,
            weight_D.data_ptr(),
            out_MD.data_ptr(),
            *hidden_MD.shape,
            epsilon,
            torch.get_num_threads(),
        )

    def swiglu(self, gate: Tensor, up: Tensor) -> None:
        """gate becomes silu(gate) · up."""
        self._functions["swiglu", gate.dtype](gate.data_ptr(), up.data_ptr(), gate.numel(), torch.get_num_threads())

    def attend(
        self,
        states: tuple[Tensor, Tensor, Tensor],
        rotation: tuple[Tensor, Tensor] | None,
        cache: tuple[Tensor, Tensor, Tensor, Tensor],
        seats: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
        column: int,
        scale: float,
        window: int | None,
    ) -> Tensor:
        """Store one key and value per sequence at `column` of the cache, and attend with one query per sequence.

        Args:
            states: query [M, H, D], key and value [M, K, D].
            rotation: float32 cos and sin [M, D] of rotary positions that are still to be applied, or None.
            cache: of prompts keys [G, K, D, P] and values [G, K, P, D]; of slots keys [·, K, D, S], values [·, K, S, D]
            seats: int64; slots in the order of their prompts, each slot's prompt, first own column and position [M],
                and each prompt's length [G]: order, prompt, length, start, position.
            window: a token sees itself and this many minus one before it.

        Returns:
            [M, H, D].
        """
        query, key, value = states
        M, H, D = query.shape
        out = torch.empty_like(query)
        cos, sin = rotation or (None, None)
        call = _Attention(
            *(M, H, key.shape[1], D, cache[0].shape[3], cache[2].shape[3], column, window or 0, scale),
            *(query.data_ptr(), key.data_ptr(), value.data_ptr()),
            *(None if cos is None else cos.data_ptr(), None if sin is None else sin.data_ptr()),
            *(tensor.data_ptr() for tensor in (*cache, *seats, out)),
        )
        self._functions["attend", query.dtype](ctypes.byref(call), torch.get_num_threads())
        return out

    def choose(self, logits_MV: Tensor, uniform_M: Tensor, temperature_M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sample a token per row: tokens, their log-probabilities, and these at temperature 1 (NaN: not finite logits).

        Args:
            uniform_M: float64 in [0, 1).
            temperature_M: float32, above 0.
        """
        M, V = logits_MV.shape
        tokens_M, logprobs_M, raw_M = (
            torch.empty(M, dtype=dtype) for dtype in (torch.int64, torch.float32, torch.float32)
        )
        tensors = logits_MV, uniform_M, temperature_M, tokens_M, logprobs_M, raw_M
        pointers = [tensor.data_ptr() for tensor in tensors]
        self._functions["choose", logits_MV.dtype](*pointers, M, V, torch.get_num_threads())
        return tokens_M, logprobs_M, raw_M


@functools.cache
def native() -> Native | None:
    """The compiled functions, or None (said once on stderr) where they cannot be compiled."""
    try:
        return Native(ctypes.CDLL(str(_library())))
    except (OSError, subprocess.SubprocessError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        reason = next((line for line in lines if "error" in line), lines[0] if lines else type(error).__name__)
        notice = f"Sampling on this CPU is slower than it could be: no C++ compiler that works ({reason})."
        print(notice, file=sys.stderr)
        return None


def _library() -> Path:
    """Compile, unless it was done for this source, compiler and processor."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise FileNotFoundError("c++ not found")
    # torch's own OpenMP library: two of them would keep two sets of threads, in each other's way.
    own = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*"))
    file = Path(compiler).resolve()
    version = f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}"
    told = [_SOURCE.read_text(encoding="utf-8"), version, *_OPTIONS, *map(str, own), platform.machine(), _processor()]
    path = cache_directory() / "native" / f"{hashlib.sha256(chr(0).join(told).encode()).hexdigest()[:16]}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as directory:
            compiled, linked = Path(directory) / "native.o", Path(directory) / "native.so"
            libraries = [str(own[0])] if own else ["-fopenmp"]
            for command in (
                [compiler, *_OPTIONS, "-c", str(_SOURCE), "-o", str(compiled)],
                [compiler, "-shared", str(compiled), *libraries, "-o", str(linked)],
            ):
                subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
            os.replace(linked, path)
    return path


def _processor() -> str:
    """What this processor can do: compiled code is for it alone."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
