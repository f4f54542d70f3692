"""Fake quantization with LSQ gradients, and the integers behind it.

Everything here is a function of tensors and broadcasts: a scale of shape ``[1]`` quantizes per tensor, one of shape
``[C, 1, 1, 1]`` per channel.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["fake_quantize", "integer_grid", "quantize_to_int"]


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


def _where_inside(values: Tensor, v: Tensor, n: int, p: int) -> Tensor:
    """``values`` where n <= v <= p, else 0: in one pass, several times as fast as with a mask.

    The backward of hardtanh does it for open intervals, so this asks for the one between the floats next to the limits.
    """
    below, above = _next_away_from_zero(n, -1.0, v.dtype), _next_away_from_zero(p, 1.0, v.dtype)
    inside: Tensor = torch.ops.aten.hardtanh_backward(values.to(v.dtype), v, below, above)
    return inside.to(values.dtype)


def _next_away_from_zero(limit: int, sign: float, dtype: torch.dtype) -> float:
    """The floating-point number next to a limit in the direction of a sign, which is its own or that of 0."""
    info = torch.finfo(dtype)
    if limit == 0:
        return sign * info.smallest_normal * info.eps
    _, exponent = math.frexp(limit)
    return limit + sign * math.ldexp(info.eps, exponent - 1)


class _LearnedStepSize(torch.autograd.Function):
    """``x_q = s clip(round(x/s), n, p)`` with the gradients of LSQ. Saves its two inputs and nothing else."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, n: int, p: int) -> Tensor:
        """Round to nearest (ties to even, as torch, ONNX and the hardware do), clip, and scale back."""
        ctx.save_for_backward(x, scale)
        ctx.limits = n, p
        return (x / scale).round_().clamp_(n, p).mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Straight through for x inside the grid; for the scale round(v) - v inside, n or p outside."""
        (grad,) = grad_outputs
        x, scale = ctx.saved_tensors
        n, p = ctx.limits
        v = x / scale
        grad_x = _where_inside(grad, v, n, p) if ctx.needs_input_grad[0] else None
        grad_scale = None
        if ctx.needs_input_grad[1]:
            v_inside = _where_inside(v, v, n, p)
            dxq_ds = v.round_().clamp_(n, p).sub_(v_inside)
            grad_scale = dxq_ds.mul_(grad).sum_to_size(scale.shape)
        return grad_x, grad_scale, None, None


def fake_quantize(x: Tensor, scale: Tensor, quant_min: int, quant_max: int, zero_point: int = 0) -> Tensor:
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

    Returns:
        The quantized values, in the shape and dtype of ``x``.
    """
    out: Tensor = _LearnedStepSize.apply(x, scale, quant_min - zero_point, quant_max - zero_point)  # type: ignore[no-untyped-call]
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
