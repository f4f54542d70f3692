"""Fake quantization with LSQ gradients, and the integers behind it.

Everything here is a function of tensors and broadcasts: a scale of shape ``[1]`` quantizes per tensor, one of shape
``[C, 1, 1, 1]`` per channel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_qat_osc.kernels import (
    BLOCK,
    SMALL,
    blocks,
    compiled,
    in_channels_last,
    in_one_order,
    in_rows,
    number,
    rows,
)
from lightning_qat_osc.sharding import is_sharded

__all__ = ["Limit", "fake_quantize", "fake_quantize_pair", "integer_grid", "quantize_to_int"]

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


def _where_inside(values: Tensor, v: Tensor, n: Limit, p: Limit, *, out: Tensor | None = None) -> Tensor:
    """``values`` where n <= v <= p, else 0: eagerly in one pass, several times as fast as with a mask.

    The backward of hardtanh does it for open intervals, so this asks for the one between the floats next to the limits.
    Eagerly it can be written to ``out``.
    """
    if torch.compiler.is_compiling():
        return torch.where(v == v.clamp(n, p), values, 0.0)
    limits = _just_outside(int(n), int(p), v.dtype)
    if out is None:
        inside: Tensor = torch.ops.aten.hardtanh_backward.default(values, v, *limits)
        return inside
    return torch.ops.aten.hardtanh_backward.grad_input(values, v, *limits, grad_input=out)  # type: ignore[no-any-return]


@cache
def _just_outside(n: int, p: int, dtype: torch.dtype) -> tuple[float, float]:
    """The floating-point numbers next to the limits of a grid."""
    return _neighbour(n, -1.0, dtype), _neighbour(p, 1.0, dtype)


def _neighbour(limit: int, sign: float, dtype: torch.dtype) -> float:
    """The normal floating-point number next to a limit in the direction of a sign: CPUs may take others for 0.

    In Python, where no default device, fake tensor or transform is in the way of a number.
    """
    info = torch.finfo(dtype)
    if limit == 0:
        return sign * info.smallest_normal
    mantissa, exponent = math.frexp(limit)
    closer = mantissa == -0.5 * sign  # below a power of two they are half as far apart
    return limit + sign * math.ldexp(info.eps, exponent - 1 - closer)


def _quantize_dequantize(x: Tensor, scale: Tensor, n: Limit, p: Limit) -> Tensor:
    """Round to nearest (ties to even, as torch, ONNX and the hardware do), clip, and scale back."""
    return (x / scale).round_().clamp_(n, p).mul_(scale).to(x.dtype)


def _gradients(
    needed: Sequence[bool], grad: Tensor, x: Tensor, scale: Tensor, n: Limit, p: Limit
) -> tuple[Tensor | None, Tensor | None]:
    """Straight through for x inside the grid; for the scale round(v) - v inside, n or p outside."""
    of_x, of_scale = needed
    if of_x and of_scale and _suits_blocks(grad, x, scale):
        return _gradients_in_blocks(grad, x, scale, n, p)
    v = x / scale
    wide = grad.to(v.dtype)
    grad_x = _written(_where_inside(wide, v, n, p).to(grad.dtype), x) if of_x else None
    grad_scale = None
    if of_scale:
        v_inside = _where_inside(v, v, n, p)
        grad_scale = _sum_to_scale(_dxq_ds(v, v_inside, n, p).mul_(wide), scale)
    return grad_x, grad_scale


def _dxq_ds(v: Tensor, v_inside: Tensor, n: Limit, p: Limit) -> Tensor:
    """The scale's derivative, in the memory of ``v``."""
    return v.clamp_(n, p).round_().sub_(v_inside)


def _suits_blocks(grad: Tensor, x: Tensor, scale: Tensor) -> bool:
    """Whether :func:`_gradients_in_blocks` can be used, and is faster."""
    if torch.compiler.is_compiling() or not x.is_cpu or x.numel() <= 4 * BLOCK:
        return False
    if x.dtype.itemsize < 4 or not x.dtype == grad.dtype == scale.dtype:  # dot products of 16 bits are slow
        return False
    return in_one_order([x, grad]) and _suits_kernels(x, scale)


def _gradients_in_blocks(grad: Tensor, x: Tensor, scale: Tensor, n: Limit, p: Limit) -> tuple[Tensor, Tensor]:
    """:func:`_gradients` in blocks that stay in a CPU's cache, in two buffers for all of them."""
    grad_x = torch.empty_like(x)
    views = rows([scale], [grad, x, grad_x])
    assert views is not None
    buffers: list[Tensor] = []
    sums = []
    for scale_block, grad_block, x_block, grad_x_block in blocks(views):
        buffers = buffers or [torch.empty_like(x_block) for _ in range(2)]
        v, v_inside = (buffer[: len(x_block)] for buffer in buffers)
        torch.div(x_block, scale_block, out=v)
        _where_inside(grad_block, v, n, p, out=grad_x_block)
        _where_inside(v, v, n, p, out=v_inside)
        sums.append(torch.linalg.vecdot(_dxq_ds(v, v_inside, n, p), grad_block).view_as(scale_block))
    return grad_x, torch.cat(sums).sum_to_size(views[0].shape).view(scale.shape)


def _gradients_to_differentiate(
    grad: Tensor, x: Tensor, scale: Tensor, n: Limit, p: Limit
) -> tuple[Tensor | None, Tensor | None]:
    """The same as differentiable functions of ``grad``, for gradient penalties.

    ``x`` and ``scale`` are constants here: to straight-through differentiation x_q has no second derivatives but 0.
    """
    with torch.no_grad():
        v = x / scale
        inside = _where_inside(torch.ones_like(v), v, n, p)
        dxq_ds = _dxq_ds(v, _where_inside(v, v, n, p), n, p)
    wide = grad.to(v.dtype)
    return (wide * inside).to(grad.dtype), _sum_to_scale(wide * dxq_ds, scale)


def _is_differentiated() -> bool:
    """Whether a backward pass is itself recorded, for ``create_graph=True``. Compiled ones cannot be."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _written(grad_x: Tensor, x: Tensor) -> Tensor:
    """A gradient that a compiler for CPUs writes once: of a tensor that it takes a view of, it needs the memory.

    Otherwise each loop of the backward passes ahead, such as the two of a norm, divides by the scale anew, and the
    scale's sum has a loop of its own with the activation in it. Other devices compute faster than they write.
    The layout is that of ``x``: torch 2.6 does not let a compiled backward pass ask for a gradient's.
    """
    if not (torch.compiler.is_compiling() and x.is_cpu) or is_sharded(x):
        return grad_x
    # contiguous images stay as they are: convolutions for CPUs lay them out anew, where a view has its layout
    if in_channels_last(x) or (x.dim() == 3 and x.is_contiguous()):
        return grad_x.as_strided(x.shape, x.stride())
    return grad_x


def _sum_to_scale(terms: Tensor, scale: Tensor) -> Tensor:
    """The gradient of a scale from its terms, one for each value."""
    if scale.numel() == 1 and torch.compiler.is_compiling():
        terms = _partly_summed(terms, on_cpu=scale.is_cpu)
    return terms.sum_to_size(scale.shape)


def _partly_summed(terms: Tensor, *, on_cpu: bool) -> Tensor:
    """Terms summed along the dimension for which a compiler adds them up in a loop that it has anyway.

    ``on_cpu`` is for them to say, if torch 2.6 let a compiled backward pass ask them.
    """
    if terms.dim() < 3 or terms.shape[1:].numel() <= 2**10:
        return terms  # few
    if terms.dim() == 3:
        # CPUs add up what they write a gradient of; elsewhere over features, as layer normalization sums
        return terms if on_cpu else terms.sum(-1, keepdim=True)
    if on_cpu:
        return terms.sum(1, keepdim=True)  # over channels, which compilers for CPUs lay side by side for convolutions
    return terms.sum((0, *range(2, terms.dim())), keepdim=True)  # channel by channel, as batch normalization sums


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
        return *_gradients(ctx.needs_input_grad[:2], grad_outputs[0], x, scale, *ctx.limits), None, None


class _FusedLearnedStepSizes(torch.autograd.Function):
    """The same for one tensor or for two at once, in one compiled kernel forward and one backward.

    Its arguments are the limits of each tensor's grid, then each tensor followed by its scale.
    """

    @staticmethod
    def forward(ctx: Any, limits: Sequence[tuple[int, int]], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*tensors)
        ctx.limits = limits
        xs, scales = tensors[::2], tensors[1::2]
        operands = [_operands([x], scale, *grid) for x, scale, grid in zip(xs, scales, limits)]
        views = compiled(_forward_of_each, _sizes(xs))(*chain(*operands))
        # detached, since a view that a function returns cannot be changed in place
        return tuple(view.as_strided(x.shape, x.stride()).detach() for x, view in zip(xs, views))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensors, limits = ctx.saved_tensors, ctx.limits
        xs, scales = tensors[::2], tensors[1::2]
        if _is_differentiated():
            each = (_gradients_to_differentiate(g, x, s, n, p) for g, x, s, (n, p) in zip(grads, xs, scales, limits))
            return None, *chain(*each)
        grads = tuple(g if g.stride() == x.stride() else torch.empty_like(x).copy_(g) for g, x in zip(grads, xs))
        operands = [_operands([g, x], scale, *grid) for g, x, scale, grid in zip(grads, xs, scales, limits)]
        views = compiled(_backward_of_each, _sizes(xs))(ctx.needs_input_grad[1:], *chain(*operands))
        return None, *(v if v is None else v.as_strided(t.shape, t.stride()) for v, t in zip(views, tensors))


def _sizes(xs: Sequence[Tensor]) -> str:
    return "_".join("large" if x.numel() > SMALL else "small" for x in xs)


def _forward_of_each(*operands: Tensor) -> tuple[Tensor, ...]:
    return tuple(_quantize_dequantize(*operands[i : i + 4]) for i in range(0, len(operands), 4))


def _backward_of_each(needed: Sequence[bool], *operands: Tensor) -> tuple[Tensor | None, ...]:
    """For each tensor its gradient and its scale's."""
    each = [_gradients(needed[2 * i : 2 * i + 2], *operands[5 * i : 5 * i + 5]) for i in range(len(operands) // 5)]
    return tuple(chain(*each))


def _operands(tensors: Sequence[Tensor], scale: Tensor, n: int, p: int) -> list[Tensor]:
    """Tensors, their scale and the limits of their grid, as compiled kernels take them."""
    views = rows([scale], tensors)
    assert views is not None
    return [*views[1:], views[0], number(n, scale.device), number(p, scale.device)]


def fake_quantize(
    x: Tensor, scale: Tensor, quant_min: int, quant_max: int, *, zero_point: int = 0, fused: bool = False
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
        scale: Step between two grid points, positive, broadcastable to the shape of ``x``. For an ``x`` of lower
            precision than the scale, the arithmetic is in the scale's dtype and the result in that of ``x``.
        quant_min: Smallest integer.
        quant_max: Largest integer.
        zero_point: The integer that stands for 0.0.
        fused: Compute with kernels that ``torch.compile`` makes of the same equations. It needs a compiler.

    Returns:
        The quantized values, in the shape and dtype of ``x``.

    Raises:
        TypeError: If ``scale`` is no tensor.
        ValueError: If ``quant_min`` is above ``quant_max``.
    """
    if not isinstance(scale, Tensor):
        raise TypeError(f"scale must be a tensor, got {scale!r}: torch.tensor([{scale!r}]) for one scale")
    if quant_min > quant_max:
        raise ValueError(f"quant_min must be at most quant_max, {quant_max}, got {quant_min}")
    if scale.dim() == 0:
        scale = scale.view(1)  # torch would compute in the dtype of x, whatever that of a number
    if x.dim() == 0 and scale.shape == (1,):
        return fake_quantize(x.view(1), scale, quant_min, quant_max, zero_point=zero_point, fused=fused).view(())
    limits = quant_min - zero_point, quant_max - zero_point
    # inside somebody's compiled graph the equations fuse with what is around them
    if fused and not torch.compiler.is_compiling() and x.numel() > SMALL and _suits_kernels(x, scale):
        return _FusedLearnedStepSizes.apply((limits,), x, scale)[0]  # type: ignore[no-untyped-call, no-any-return]
    return _LearnedStepSize.apply(x, scale, *limits)  # type: ignore[no-untyped-call, no-any-return]


def fake_quantize_pair(
    xs: tuple[Tensor, Tensor], scales: tuple[Tensor, Tensor], limits: tuple[tuple[int, int], tuple[int, int]]
) -> tuple[Tensor, Tensor] | None:
    """:func:`fake_quantize` of two tensors in one compiled kernel.

    Args:
        xs: The tensors.
        scales: Their scales.
        limits: n and p of each.

    Returns:
        Both quantized, or None where both are small, or one is not as kernels take it, or only one has gradients.
    """
    first, second = xs
    if first.numel() < second.numel():
        both = fake_quantize_pair(xs[::-1], scales[::-1], limits[::-1])
        return None if both is None else both[::-1]
    if first.numel() <= SMALL or second.numel() == 0 or first.device != second.device:
        return None
    learned = [x.requires_grad or scale.requires_grad for x, scale in zip(xs, scales)]
    if learned[0] != learned[1] or not all(map(_suits_kernels, xs, scales)):
        return None  # autograd would take both for learned
    return _FusedLearnedStepSizes.apply(limits, first, scales[0], second, scales[1])  # type: ignore[no-untyped-call, no-any-return]


def _suits_kernels(x: Tensor, scale: Tensor) -> bool:
    return in_rows(scale, x) and not is_sharded(x)


@torch.no_grad()
def quantize_to_int(x: Tensor, scale: Tensor, quant_min: int, quant_max: int, *, zero_point: int = 0) -> Tensor:
    """The integers behind :func:`fake_quantize`: ``clip(round(x/s) + z, quant_min, quant_max)``.

    Args:
        x: Values of any shape and floating dtype.
        scale: Step between two grid points, positive, broadcastable to the shape of ``x``.
        quant_min: Smallest integer, at least -128.
        quant_max: Largest integer, at most 255.
        zero_point: The integer that stands for 0.0.

    Returns:
        int8 integers of the shape of ``x`` (uint8 where ``quant_max`` is above 127).
    """
    if x.dim() == 0 and scale.numel() == 1:
        return quantize_to_int(x.view(1), scale, quant_min, quant_max, zero_point=zero_point).view(())
    scale = scale.view(1) if scale.dim() == 0 else scale
    n, p = quant_min - zero_point, quant_max - zero_point
    dtype = torch.int8 if quant_max <= 127 else torch.uint8
    return (x / scale).round_().clamp_(n, p).add_(zero_point).to(dtype)
