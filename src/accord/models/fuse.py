"""Embedding, linear layer, RMS norm and gated MLP that keep less for backward: same numbers, less memory, less time.

Under autocast a norm gives float32, and each of the linear layers behind it makes and keeps a bfloat16 copy of its own.
Here the norm gives the copy that all of them share. A linear layer keeps a copy of its weights, too, until its backward
pass; here it casts them once more instead. A module is replaced only if its own output agrees with the
replacement's on random input, so no model is known by name. Parameters keep their objects and their names.

T = rows, D = hidden size, I = inner size of the MLP.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from accord.models.gradients import gradient_sum

__all__ = ["Embedding", "GatedMLP", "Linear", "RMSNorm", "fuse"]


class RMSNorm(nn.Module):
    """x / rms(x) · (offset + weight), rounded to the precision of autocast (Zhang and Sennrich 2019)."""

    def __init__(self, weight: nn.Parameter, epsilon: float, offset: float) -> None:
        super().__init__()
        self.weight, self.epsilon, self.offset = weight, epsilon, offset

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        device = hidden.device.type
        precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        with torch.autocast(device, enabled=False):
            if not torch.is_grad_enabled() and hidden.dtype == self.weight.dtype:  # fewer calls: decoding is all calls
                scale = self.weight + self.offset if self.offset else self.weight
                return F.rms_norm(hidden, scale.shape, scale, self.epsilon).to(precision)
            normed: Tensor = _RMSNorm.apply(hidden, self.weight, self.epsilon, self.offset, precision)
        return normed


class GatedMLP(nn.Module):
    """down(silu(gate(x)) · up(x)) (Shazeer 2020); silu is computed again in the backward pass instead of kept."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        if not torch.is_grad_enabled():
            inner: Tensor = F.silu(self.gate_proj(hidden), inplace=True).mul_(self.up_proj(hidden))
            return self.down_proj(inner)
        result: Tensor = self.down_proj(_SwiGLU.apply(self.gate_proj(hidden), self.up_proj(hidden)))
        return result


class Linear(nn.Linear):
    """x · Wᵀ + b in the precision of autocast; nothing of the cast weights is kept."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., D] to [..., O]."""
        device = hidden.device.type
        precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.weight.dtype
        if precision == self.weight.dtype:
            return F.linear(hidden.to(precision), self.weight, self.bias)
        with torch.autocast(device, enabled=False):
            product: Tensor = _Linear.apply(hidden, self.weight, self.bias, precision)
        return product


class Embedding(nn.Module):
    """Token vectors whose gradient is added row by row to the parameter's own."""

    def __init__(self, weight: Tensor, padding_idx: int | None) -> None:
        super().__init__()
        self.weight, self.padding_idx = weight, padding_idx

    def forward(self, ids: Tensor) -> Tensor:
        """[...] to [..., D]."""
        vectors: Tensor = _Embedding.apply(self.weight, ids, self.padding_idx)
        return vectors


_Tried = dict[tuple[object, ...], bool]


def fuse(model: nn.Module) -> None:
    """Replace all embeddings, linear layers, norms and MLPs of `model` that compute what these compute, in place."""
    tried: _Tried = {}
    _replace(model, _linear_like)  # first: an MLP holds them
    _replace(model, lambda child: _embedding_like(child) or _norm_like(child, tried) or _mlp_like(child, tried))


def _replace(model: nn.Module, like: Callable[[nn.Module], nn.Module | None]) -> None:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            replacement = like(child)
            if replacement is not None:
                setattr(parent, name, replacement)


def _linear_like(module: nn.Module) -> Linear | None:
    """Only the plain kind: a subclass (quantised) has its own way."""
    return Linear(module) if type(module) is nn.Linear else None


def _embedding_like(module: nn.Module) -> Embedding | None:
    """Only the plain kind: some models scale their embedding, in a class of their own."""
    if type(module) is not nn.Embedding or module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
        return None
    return Embedding(module.weight, module.padding_idx)


def _norm_like(module: nn.Module, tried: _Tried) -> RMSNorm | None:
    weight = getattr(module, "weight", None)
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if "RMSNorm" not in type(module).__name__ or not isinstance(weight, nn.Parameter) or epsilon is None:
        return None
    candidates = (RMSNorm(weight, float(epsilon), offset) for offset in (0.0, 1.0))
    return next((norm for norm in candidates if _agree(module, norm, len(weight), weight, tried)), None)


def _mlp_like(module: nn.Module, tried: _Tried) -> GatedMLP | None:
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if not all(isinstance(part, nn.Linear) for part in parts):
        return None
    mlp, gate = GatedMLP(module), parts[0]
    assert isinstance(gate, nn.Linear)
    return mlp if _agree(module, mlp, gate.in_features, gate.weight, tried) else None


def _agree(module: nn.Module, replacement: nn.Module, size: int, like: Tensor, tried: _Tried) -> bool:
    """Whether both compute the same. Of modules with the same classes and the same settings, one is tried."""
    kind = (_settings(module), _settings(replacement), size)
    if kind not in tried:
        generator = torch.Generator().manual_seed(0)
        probe = torch.randn(1, 3, size, generator=generator).to(like.device, like.dtype)
        with torch.no_grad():
            tried[kind] = torch.allclose(module(probe), replacement(probe), rtol=1e-5, atol=1e-6)
    return tried[kind]


def _settings(module: nn.Module) -> tuple[object, ...]:
    """The classes of a module and of all inside it, their functions and plain attributes: all but the weights."""

    def counts(value: object) -> bool:
        return value is None or isinstance(value, int | float | str) or callable(value)

    return tuple((type(each), *(item for item in vars(each).items() if counts(item[1]))) for each in module.modules())


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_VD: Tensor, ids: Tensor, padding_idx: int | None) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.weight_VD, ctx.padding_idx = weight_VD, padding_idx
        return weight_VD.detach()[ids]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        """As in torch, the padding token's vector has no gradient."""
        (ids,) = ctx.saved_tensors
        grad = grads[0] if ctx.padding_idx is None else grads[0].masked_fill(ids[..., None] == ctx.padding_idx, 0)
        sum_VD, rest = gradient_sum(ctx.weight_VD)
        sum_VD.index_add_(0, ids.flatten(), grad.flatten(0, -2).to(sum_VD.dtype))
        return rest, None, None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight_OD: Tensor, bias_O: Tensor | None, precision: torch.dtype) -> Tensor:
        low = hidden.to(precision)
        ctx.save_for_backward(low, weight_OD)
        ctx.dtype = hidden.dtype
        return F.linear(low, weight_OD.to(precision), None if bias_O is None else bias_O.to(precision))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        low, weight_OD = ctx.saved_tensors
        grad_TO = grads[0].flatten(0, -2)
        grad_hidden = (grads[0] @ weight_OD.to(low.dtype)).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        grad_weight = (grad_TO.T @ low.flatten(0, -2)).to(weight_OD.dtype) if ctx.needs_input_grad[1] else None
        grad_bias = grad_TO.sum(0).to(weight_OD.dtype) if ctx.needs_input_grad[2] else None
        return grad_hidden, grad_weight, grad_bias, None


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight_D: Tensor, epsilon: float, offset: float, precision: torch.dtype
    ) -> Tensor:
        mean_square = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True, dtype=torch.float32).square_()
        inverse = mean_square.div_(hidden.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(hidden, weight_D, inverse)
        ctx.offset = offset
        return (hidden * inverse).mul_(weight_D + offset if offset else weight_D).to(precision)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """y = x̂·w, x̂ = x·s: ∂L/∂x = s·(g·w − x̂·mean(g·w·x̂)), ∂L/∂w = Σ g·x̂."""
        hidden, weight_D, inverse = ctx.saved_tensors
        normed = hidden * inverse
        grad = grads[0].to(normed.dtype)
        grad_weight = (grad * normed).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        grad = grad * (weight_D + ctx.offset if ctx.offset else weight_D)
        inner = (grad * normed).mean(dim=-1, keepdim=True)
        return grad.sub_(normed.mul_(inner)).mul_(inverse).to(hidden.dtype), grad_weight, None, None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_gate: Tensor = torch.ops.aten.silu_backward(grads[0] * up, gate)
        return grad_gate, grads[0] * F.silu(gate)
