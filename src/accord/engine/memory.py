"""What training a network takes of memory, predicted before the first step. One model of memory, for plan and engine.

Most of it follows from the parameters: weights, gradients, AdamW's two moments, and autocast's low-precision copy of
the weights. The rest depends on the micro-batch. What the modules keep for backward is not guessed from the
architecture but counted, with saved-tensor hooks, in forward passes over a few tokens; in T tokens and S attention
cells it is exactly ``fixed + a·T + b·S``, and the fixed part is the low-precision copy.

T = unique tokens of a micro-batch, N = tokens that carry loss, V = vocabulary, D = hidden size, L = layers.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from accord.engine.distributed import active
from accord.engine.precision import autocast
from accord.errors import ResourceError
from accord.models.allocator import touch_memory
from accord.models.attention import kept_cells
from accord.models.logprobs import kept_logits
from accord.models.network import Network, Policy
from accord.models.packing import MicroBatch, Part, pack_one
from accord.models.trees import Branch, Tree

__all__ = [
    "SMALLEST",
    "TOKENS",
    "Fit",
    "Load",
    "Memory",
    "MemoryModel",
    "explain_shortage",
    "fit",
    "gigabytes",
    "touch_ahead",
    "usable_memory",
]

TOKENS = 1024
"""Unique tokens of a micro-batch where memory allows."""
SMALLEST = 128
"""Unique tokens of a micro-batch that are tried last."""
_PROBES = (32, 64, 96)
"""Tokens of the passes in which saved tensors are counted: three points fix a polynomial of degree two. Where the
context is shorter they are several sequences."""
_SHARE = 0.9
"""Of the memory that there is, so much may be planned for."""
_HEAP = {torch.bfloat16: (250e6, 0.1), torch.float32: (60e6, 0.2)}
"""On a CPU, beside the tensors: bytes for kernels that oneDNN keeps, and what is free between blocks of the heap as a
share of all that comes and goes in a step. Fitted to Llama, Qwen2 and GPT-2 shapes of 30 to 100 million weights."""
_REMEDY = f"""`accord plan` with the same arguments says what fits. What needs less, each alone or together:
  → --set engine.micro_batch_tokens={SMALLEST}
  → --set engine.activation_checkpointing=on
  → --lora
  → --processes N, on several GPUs
  → Other settings are another run, with another --out. With the same ones --resume goes on from the last checkpoint.
"""


@contextmanager
def explain_shortage() -> Iterator[None]:
    """Where memory runs out, say what to do about it.

    Raises:
        ResourceError: in place of the error of torch (of a GPU, or of the CPU's allocator) or of Python.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        first = str(error).partition("\n")[0]
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "can't allocate memory" not in first:
            raise
        asked = re.search(r"[Tt]ried to allocate ([\d.]+) (\w+)", first)
        what = f"Memory ran out: {asked[1]} {asked[2]} more were asked for." if asked else "Memory ran out."
        raise ResourceError(what, fix=_REMEDY.rstrip()) from error


@dataclass(frozen=True, slots=True)
class Load:
    """What a micro-batch asks of memory.

    Attributes:
        tokens: unique tokens T, idle ones included.
        loss_tokens: N.
        cells: attention weights kept for backward, per query head.
    """

    tokens: int
    loss_tokens: int
    cells: int

    @classmethod
    def of(cls, batch: MicroBatch, network: Network) -> Load:
        """The load of a packed micro-batch."""
        tokens = len(batch.input_ids_T)
        return cls(tokens, len(batch.target_N), kept_cells(batch) if network.branching else tokens * tokens)

    @classmethod
    def full(cls, tokens: int) -> Load:
        """The load of `tokens` in sequences of 256, where all carry loss: hardly any data asks more."""
        return cls(tokens, tokens, tokens * min(tokens, 256))


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes by part, at the moment of a step at which their sum is largest.

    Attributes:
        program: interpreter and libraries (CPU only: CUDA counts none of them), and other networks that are loaded.
        weights: as they are loaded.
        low_precision: autocast's copy of the weights.
        gradients, moments: of what is trained; AdamW has two moments.
        activations: kept from the forward for the backward pass.
        logits: kept likewise.
        workspace: what the backward pass holds for a moment.
        heap: free memory between blocks of other sizes, and prepared kernels (CPU only).
    """

    program: int
    weights: int
    low_precision: int
    gradients: int
    moments: int
    activations: int
    logits: int
    workspace: int
    heap: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True, slots=True)
class _Kept:
    """Bytes kept for backward as a polynomial: fixed, per token, per attention cell."""

    fixed: float
    per_token: float
    per_cell: float

    def __call__(self, load: Load) -> int:
        """Without the fixed part."""
        return int(self.per_token * load.tokens + self.per_cell * load.cells)


@dataclass(frozen=True, slots=True)
class MemoryModel:
    """The memory of one network in one precision; made by `MemoryModel.of`."""

    program: int
    on_cpu: bool
    precision: torch.dtype
    weights: int
    gradients: int
    trainable: int
    largest: int
    """Elements of the largest trained matrix of the body."""
    head: int
    """Elements of the language-model head, V · D (none in a reward model)."""
    vocabulary: int
    head_gradient: int
    """Bytes of the gradient of that head: the backward pass begins with it."""
    layers: int
    whole: _Kept
    inside: _Kept
    """Of that, what is kept inside the L layers: activation checkpointing lets go of it."""
    inputs: float
    """Bytes per token of one layer's input: what activation checkpointing keeps instead."""

    @classmethod
    def of(cls, network: Network, precision: torch.dtype, device: torch.device | None = None) -> MemoryModel:
        """Count what `network` keeps in `precision`, by three forward passes over a few tokens.

        Args:
            device: where it will compute, if it is to be moved there.
        """
        on_cpu = (device or network.device).type == "cpu"
        parameters = list(network.model.parameters())
        weights = sum(tensor.nbytes for tensor in (*parameters, *network.model.buffers()))
        used = psutil.Process().memory_info().rss if on_cpu else torch.cuda.memory_allocated(device or network.device)
        trained = network.trainable()
        head = network.model.get_output_embeddings().weight if isinstance(network, Policy) else None
        tables = {id(head), id(network.model.get_input_embeddings().weight)}
        matrices = [p.numel() for p in trained if p.ndim == 2 and id(p) not in tables]
        with autocast(network.device, precision):  # around all of them: weights are cast once
            counts = [_count(network, precision, tokens) for tokens in _PROBES]
        return cls(
            program=max(0, used - weights),
            on_cpu=on_cpu,
            precision=precision,
            weights=weights,
            gradients=sum(p.nbytes for p in trained),
            trainable=sum(p.numel() for p in trained),
            largest=max(matrices, default=0),
            head=head.numel() if head is not None else 0,
            vocabulary=len(head) if head is not None else 0,
            head_gradient=head.nbytes if head is not None and head.requires_grad else 0,
            layers=max(1, counts[0].layers),
            whole=_polynomial(counts, [count.whole for count in counts]),
            inside=_polynomial(counts, [count.inside for count in counts]),
            inputs=counts[0].inputs / counts[0].tokens,
        )

    def training(self, load: Load, *, checkpointing: bool, accumulates: bool, processes: int = 1) -> Memory:
        """Memory of an optimiser step whose largest micro-batch is `load`, once the moments are there.

        Args:
            accumulates: a step has several micro-batches, so the gradient of one stands beside activations of the next.
            processes: weights, gradients and moments are sharded over so many; the memory is that of one of them.
        """
        moments = Memory(
            program=self.program,
            weights=self.weights // processes + (2 * self.weights // self.layers if processes > 1 else 0),
            low_precision=0,
            gradients=self.gradients // processes,
            moments=8 * self.trainable // processes,
            activations=0,
            logits=0,
            workspace=0,
        )
        before = replace(moments, gradients=moments.gradients if accumulates else 0)
        moment = [self._backward_begins(before, load, checkpointing=checkpointing), moments]
        if checkpointing:
            moment.append(self._forward_ends(before, load))
        return max((self._with_heap(memory) for memory in moment), key=lambda memory: memory.total)

    def forward(self, load: Load) -> Memory:
        """Memory of a pass without gradients (the reference), when the moments are there."""
        layer = (self.inside(load) + int(self.inputs * load.tokens)) // self.layers
        moments = 8 * self.trainable
        copy, workspace = self._copy(), 2 * layer
        return self._with_heap(Memory(self.program, self.weights, copy, 0, moments, 0, 0, workspace))

    def sampling(self, workspace: int) -> Memory:
        """Memory while it samples with so many bytes of keys, values and logits, when the moments are there."""
        moments = 8 * self.trainable
        return self._with_heap(
            Memory(self.program, self.weights, self._copy(), self.gradients, moments, 0, 0, workspace)
        )

    def _copy(self) -> int:
        return int(self.whole.fixed) + self._head_copy()

    def _head_copy(self) -> int:
        return self.precision.itemsize * self.head if self.precision.itemsize < 4 else 0

    def _kept(self, load: Load, *, checkpointing: bool) -> int:
        if not checkpointing:
            return self.whole(load)
        return self.whole(load) - self.inside(load) + int(self.layers * self.inputs * load.tokens)

    def _backward_begins(self, before: Memory, load: Load, *, checkpointing: bool) -> Memory:
        low = self.precision.itemsize
        logits = kept_logits(load.loss_tokens, self.vocabulary, self.precision)
        layer = self.inside(load) // self.layers
        # A gradient is made in the products' precision, then cast, then added.
        workspace = layer + (low + 4) * self.largest
        copy = self._copy()
        if checkpointing:
            workspace += layer
            copy = self._head_copy() + int(self.inside.fixed) // self.layers
        gradients = max(before.gradients, self.head_gradient)
        kept = self._kept(load, checkpointing=checkpointing)
        # The logits are gone when the layers begin.
        return replace(
            before,
            low_precision=copy,
            gradients=gradients,
            activations=kept,
            logits=logits,
            workspace=max(0, workspace - logits),
        )

    def _forward_ends(self, before: Memory, load: Load) -> Memory:
        """With activation checkpointing, autocast's copies of trained weights live until the forward pass ends."""
        trained = self.gradients > self.weights // 2
        copy = self._copy() if trained else int(self._copy() / self.layers)
        logits = kept_logits(load.loss_tokens, self.vocabulary, self.precision)
        return replace(
            before, low_precision=copy, activations=self._kept(load, checkpointing=True), logits=logits, workspace=0
        )

    def _with_heap(self, memory: Memory) -> Memory:
        if not self.on_cpu:
            return memory
        kernels, share = _HEAP[self.precision]
        moving = memory.low_precision + memory.gradients + memory.activations + memory.logits + memory.workspace
        return replace(memory, heap=int(kernels + share * moving))


@dataclass(frozen=True, slots=True)
class Fit:
    """What a run can afford: unique tokens per micro-batch, and whether activations are computed again.

    Attributes:
        needed: bytes with these settings.
        capacity: bytes that may be used.
        wanted: bytes with the settings that would be fastest.
    """

    tokens: int
    checkpointing: bool
    needed: int
    capacity: int
    wanted: int

    @property
    def fits(self) -> bool:
        return self.needed <= self.capacity

    def notice(self) -> str | None:
        """One line that says what memory has decided, if it has."""
        if self.wanted <= self.capacity:
            return None
        again = ", activations computed again" if self.checkpointing else ""
        need = f"the fastest way needs about {gigabytes(self.wanted)}, and {gigabytes(self.capacity)} may be used"
        more = "" if self.fits else f" This needs about {gigabytes(self.needed)}: see `accord plan`."
        return f"Memory: {self.tokens:,} tokens per micro-batch{again}, because {need}.{more}"


def touch_ahead(directory: Path) -> None:
    """Have memory ready, while libraries are imported, that training all weights of a model will take.

    Weights, gradients and two moments in float32, their copy in bfloat16, and what a micro-batch of `TOKENS` keeps: 34
    bytes per layer and hidden unit (Korthikanti et al. 2022, eq. 2, without attention weights). The headers of the
    model's files say how many weights there are. On a CPU only.
    """
    if torch.cuda.is_available() or active():
        return
    weights = 0
    for file in directory.glob("*.safetensors"):
        with suppress(SafetensorError, OSError), safe_open(file, "pt") as tensors:
            weights += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    settings: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        settings = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    kept = 34 * TOKENS * settings.get("num_hidden_layers", 0) * settings.get("hidden_size", 0)
    touch_memory(min(18 * weights + kept, psutil.virtual_memory().available // 2))


def fit(
    model: MemoryModel,
    device: torch.device,
    tokens: int | None,
    checkpointing: bool | None,
    processes: int = 1,
    beside: int = 0,
) -> Fit:
    """The fastest settings that fit, among those that are left open (None); the smallest where nothing fits.

    Activations are computed again (8 to 18 % more time) before micro-batches are made smaller.

    Args:
        beside: bytes that others will take.
    """
    capacity = usable_memory(device) - beside
    modes = [False, True] if checkpointing is None else [checkpointing]
    sizes = [tokens] if tokens is not None else [TOKENS >> k for k in range(10) if TOKENS >> k >= SMALLEST]
    tried: list[Fit] = []
    for size in sizes:
        for mode in modes:
            load = Load.full(size)
            needed = model.training(load, checkpointing=mode, accumulates=True, processes=processes).total
            wanted = tried[0].wanted if tried else needed
            tried.append(Fit(size, mode, needed, capacity, wanted))
            if tried[-1].fits:
                return tried[-1]
    return tried[-1]


def usable_memory(device: torch.device) -> int:
    """Bytes that this process may plan for: most of the device's memory, or its part of the machine's or container's.

    Of the whole, not of what is free now: a run that goes on later must come to the same settings.
    """
    if device.type == "cuda":
        whole = torch.cuda.get_device_properties(device).total_memory
    else:
        whole = min([psutil.virtual_memory().total, *_container_limits()]) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return int(_SHARE * whole)


def gigabytes(size: float) -> str:
    """``3.42 GB``; small sizes in MB."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _container_limits() -> list[int]:
    """Limits of a control group, if there is one (version 2, then 1)."""
    limits = []
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):
            limits.append(int(Path(path).read_text(encoding="ascii")))
    return limits


@dataclass(slots=True)
class _Count:
    """Bytes kept for backward by a pass over a few tokens: in all, inside the layers, and one layer's input."""

    tokens: int
    cells: int
    layers: int = 0
    whole: int = 0
    inside: int = 0
    inputs: int = 0


def _count(network: Network, precision: torch.dtype, tokens: int) -> _Count:
    lengths = [min(network.context, tokens - start) for start in range(0, tokens, network.context)]
    branches = [Branch(np.zeros(length, np.int64), np.ones(length, bool)) for length in lengths]
    trees = [Tree(np.zeros(0, np.int64), (branch,)) for branch in branches]
    batch = pack_one([Part(index, (0,)) for index in range(len(trees))], trees).to(network.device)
    load = Load.of(batch, network)
    count = _Count(load.tokens, load.cells)
    seen = {_storage(tensor) for tensor in (*network.model.parameters(), *network.model.buffers())}
    with _layers(network, count) as inside:

        def keep(tensor: Tensor) -> Tensor:
            place = _storage(tensor)
            if place not in seen:
                seen.add(place)
                size = tensor.untyped_storage().nbytes()
                count.whole += size
                count.inside += size if inside else 0
            return tensor.detach()  # itself, it would keep the graph alive

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with torch.enable_grad(), autocast(network.device, precision), hooks:
            network.hidden(batch)
    return count


@contextmanager
def _layers(network: Network, count: _Count) -> Iterator[list[nn.Module]]:
    """The stack of layers that the forward pass is in: at most one."""
    inside: list[nn.Module] = []

    def enter(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        inside.append(module)
        count.inputs = next(v for v in (*args, *named.values()) if isinstance(v, Tensor)).nbytes

    def leave(*_: Any) -> None:
        inside.pop()

    layers = network.layers()
    count.layers = len(layers)
    handles = [layer.register_forward_pre_hook(enter, with_kwargs=True) for layer in layers]
    handles += [layer.register_forward_hook(leave) for layer in layers]
    try:
        yield inside
    finally:
        for handle in handles:
            handle.remove()


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _polynomial(counts: list[_Count], sizes: list[int]) -> _Kept:
    """The coefficients of fixed + a·T + b·S through three counts; b = 0 where S grows with T, as in short sequences."""
    rows = np.array([[1.0, count.tokens, count.cells] for count in counts])
    if np.linalg.matrix_rank(rows) < rows.shape[1]:
        rows[:, 2] = 0.0
    fixed, per_token, per_cell = np.linalg.lstsq(rows, np.array(sizes, dtype=float))[0]
    return _Kept(max(0.0, fixed), float(per_token), max(0.0, per_cell))
