"""Fake quantization with LSQ gradients, and the integers behind it.

Everything here is a function of tensors and broadcasts: a scale of shape ``[1]`` quantizes per tensor, one of shape
``[C, 1, 1, 1]`` per channel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_qat_osc.kernels import SMALL, compiled, in_one_order, memory, number

__all__ = ["Limit", "fake_quantize", "integer_grid", "quantize_to_int", "rows"]

Limit = TypeVar("Limit", int, Tensor)
"""A limit of an integer grid: a number, or a tensor without dimensions."""


def integer_grid(bits: int, *, signed: bool) -> tuple[int, int]:
    """Limits of the integer grid of a bit width.

    Args:
        bits: Width of the integers, at least 1.
        signed: Two's complement integers; otherwise they start at 0.

    Returns:
        ``(quant_min, quant_max)``: ``(-2^(bits-1), 2^(bits-1) - 1)`` if signed, else ``(0, 2^bits - 1)``.
    """
    if signed:
        return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return 0, 2**bits - 1


def _where_inside(values: Tensor, v: Tensor, n: Limit, p: Limit) -> Tensor:
    """``values`` where n <= v <= p, else 0: eagerly in one pass, several times as fast as with a mask.

    The backward of hardtanh does it for open intervals, so this asks for the one between the floats next to the limits.
    """
    if torch.compiler.is_compiling():
        return torch.where(v == v.clamp(n, p), values, 0.0)
    inside: Tensor = torch.ops.aten.hardtanh_backward.default(values, v, *_just_outside(int(n), int(p), v.dtype))
    return inside


@cache
def _just_outside(n: int, p: int, dtype: torch.dtype) -> tuple[float, float]:
    """The floating-point numbers next to the limits of a grid."""
    return _next_away_from_zero(n, -1.0, dtype), _next_away_from_zero(p, 1.0, dtype)


def _next_away_from_zero(limit: int, sign: float, dtype: torch.dtype) -> float:
    """The floating-point number next to a limit in the direction of a sign, which is its own or that of 0."""
    info = torch.finfo(dtype)
    if limit == 0:
        return sign * info.smallest_normal * info.eps
    _, exponent = math.frexp(limit)
    return limit + sign * math.ldexp(info.eps, exponent - 1)


def _quantize_dequantize(x: Tensor, scale: Tensor, n: Limit, p: Limit) -> Tensor:
    """Round to nearest (ties to even, as torch, ONNX and the hardware do), clip, and scale back."""
    return (x / scale).round_().clamp_(n, p).mul_(scale).to(x.dtype)


def _gradients(
    grad: Tensor, x: Tensor, scale: Tensor, n: Limit, p: Limit, of_x: bool, of_scale: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Straight through for x inside the grid; for the scale round(v) - v inside, n or p outside."""
    v = x / scale
    wide = grad.to(v.dtype)
    grad_x = _where_inside(wide, v, n, p).to(grad.dtype) if of_x else None
    grad_scale = None
    if of_scale:
        v_inside = _where_inside(v, v, n, p)
        dxq_ds = v.clamp_(n, p).round_().sub_(v_inside)
        grad_scale = _sum_to_scale(dxq_ds.mul_(wide), scale)
    return grad_x, grad_scale


def _gradients_to_differentiate(
    grad: Tensor, x: Tensor, scale: Tensor, n: Limit, p: Limit
) -> tuple[Tensor | None, Tensor | None]:
    """The same as differentiable functions of ``grad``, for gradient penalties.

    ``x`` and ``scale`` are constants here: to straight-through differentiation x_q has no second derivatives but 0.
    """
    with torch.no_grad():
        v = x / scale
        inside = _where_inside(torch.ones_like(v), v, n, p)
        dxq_ds = v.clamp(n, p).round_().sub_(_where_inside(v, v, n, p))
    wide = grad.to(v.dtype)
    return (wide * inside).to(grad.dtype), _sum_to_scale(wide * dxq_ds, scale)


def _is_differentiated() -> bool:
    """Whether a backward pass is itself recorded, for ``create_graph=True``. Compiled ones cannot be."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _sum_to_scale(terms: Tensor, scale: Tensor) -> Tensor:
    """The gradient of a scale from its terms, one for each value."""
    if terms.dim() > 3 and scale.numel() == 1:
        # channel by channel, as batch normalization sums: a compiler then reads what both need once
        terms = terms.sum((0, *range(2, terms.dim())), keepdim=True)
    return terms.sum_to_size(scale.shape)


class _LearnedStepSize(torch.autograd.Function):
    """``x_q = s clip(round(x/s), n, p)`` with the gradients of LSQ. Saves its two inputs and nothing else."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, n: int, p: int) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.limits = n, p
        return _quantize_dequantize(x, scale, n, p)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, scale = ctx.saved_tensors
        if _is_differentiated():
            return *_gradients_to_differentiate(grad_outputs[0], x, scale, *ctx.limits), None, None
        return *_gradients(grad_outputs[0], x, scale, *ctx.limits, *ctx.needs_input_grad[:2]), None, None


class _FusedLearnedStepSize(_LearnedStepSize):
    """The same in one compiled kernel forward and one backward, where the memory of all tensors runs in one order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, n: int, p: int) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.limits = n, p
        views = rows([scale], [x])
        if views is None:
            return _quantize_dequantize(x, scale, n, p)
        limits = number(n, x.device), number(p, x.device)
        out: Tensor = compiled(_quantize_dequantize)(views[1], views[0], *limits)
        return out.as_strided(x.shape, x.stride())

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        if _is_differentiated():
            return _LearnedStepSize.backward(ctx, *grad_outputs)
        x, scale = ctx.saved_tensors
        (grad,) = grad_outputs
        if grad.stride() != x.stride():
            grad = torch.empty_like(x).copy_(grad)
        views = rows([scale], [x, grad])
        if views is None:
            return _LearnedStepSize.backward(ctx, *grad_outputs)
        s, x_view, grad_view = views
        limits = (number(limit, x.device) for limit in ctx.limits)
        grad_x, grad_scale = compiled(_gradients)(grad_view, x_view, s, *limits, *ctx.needs_input_grad[:2])
        return (
            None if grad_x is None else grad_x.as_strided(x.shape, x.stride()),
            None if grad_scale is None else grad_scale.view(scale.shape),
            None,
            None,
        )


def rows(scales: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor] | None:
    """Scales and tensors that they apply to, in few dimensions and the same memory: [1] and [n], or [G, 1] and [G, n].

    None where the tensors' memory runs in different orders, or output channels are not the first dimension.
    """
    groups, n = scales[0].numel(), tensors[0].numel()
    if groups == 1 and in_one_order(tensors):
        return [*(memory(s, 1) for s in scales), *(memory(t, n) for t in tensors)]
    if groups > 1 and scales[0].shape[0] == groups and all(t.is_contiguous() for t in tensors):
        return [*(memory(s, groups, 1) for s in scales), *(memory(t, groups, n // groups) for t in tensors)]
    return None


def fake_quantize(
    x: Tensor, scale: Tensor, quant_min: int, quant_max: int, zero_point: int = 0, *, fused: bool = False
) -> Tensor:
    r"""Quantize and dequantize, with the gradients of LSQ.

    .. math::
        v = x / s, \qquad x_q = s \, (\mathrm{clip}(\mathrm{round}(v) + z, q_{min}, q_{max}) - z)

        \frac{\partial x_q}{\partial x} = 1[n \le v \le p], \qquad
        \frac{\partial x_q}{\partial s} = \mathrm{round}(v) - v \text{ inside},\; n \text{ or } p \text{ outside}

    with :math:`n = q_{min} - z` and :math:`p = q_{max} - z`. Source: LSQ, arXiv 1902.08153, Eqs. 1-3;
    Nagel et al., arXiv 2203.11086, Eqs. 1-2.

    Unlike ``torch.fake_quantize_per_tensor_affine``, which multiplies by the reciprocal of the scale, this divides, as
    the equation and ONNX's QuantizeLinear do. The gradient passes where v itself lies within the limits, not where its
    rounded value does: that zone would be half a step wider at each end.

    Args:
        x: Values of any shape and floating dtype.
        scale: Step between two grid points, positive, broadcastable against ``x``. For an ``x`` of lower precision than
            the scale, the arithmetic is in the scale's dtype and the result in that of ``x``.
        quant_min: Smallest integer.
        quant_max: Largest integer.
        zero_point: The integer that stands for 0.0.
        fused: Compute with kernels that ``torch.compile`` makes of the same equations. It needs a compiler.

    Returns:
        The quantized values, in the shape and dtype of ``x``.
    """
    # inside somebody's compiled graph the equations fuse with what is around them
    fused = fused and x.numel() > SMALL and not torch.compiler.is_compiling()
    function = _FusedLearnedStepSize if fused else _LearnedStepSize
    out: Tensor = function.apply(x, scale, quant_min - zero_point, quant_max - zero_point)  # type: ignore[no-untyped-call]
    return out


@torch.no_grad()
def quantize_to_int(x: Tensor, scale: Tensor, quant_min: int, quant_max: int, zero_point: int = 0) -> Tensor:
    """The integers behind :func:`fake_quantize`: ``clip(round(x/s) + z, quant_min, quant_max)``.

    Args:
        x: Values of any shape and floating dtype.
        scale: Step between two grid points, positive, broadcastable against ``x``.
        quant_min: Smallest integer, at least -128.
        quant_max: Largest integer, at most 255.
        zero_point: The integer that stands for 0.0.

    Returns:
        int8 integers of the shape of ``x`` (uint8 where ``quant_max`` is above 127).
    """
    n, p = quant_min - zero_point, quant_max - zero_point
    dtype = torch.int8 if quant_max <= 127 else torch.uint8
    return (x / scale).round_().clamp_(n, p).add_(zero_point).to(dtype)
