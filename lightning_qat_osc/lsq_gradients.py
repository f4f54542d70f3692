r"""Fast LSQ gradients: what the backward pass of :func:`~lightning_qat_osc.fake_quantize` computes.

.. math::
    v = x / s, \qquad
    \frac{\partial x_q}{\partial x} = 1[n \le v \le p], \qquad
    \frac{\partial x_q}{\partial s} = \mathrm{round}(v) - v \text{ inside},\; n \text{ or } p \text{ outside}

Source: LSQ, arXiv 1902.08153, Eqs. 2 and 3. :func:`gradients` follows them line by line. The functions
below it choose operations that are fast on CPUs and in compilers, for reasons that docs/performance.md explains.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from lightning_qat_osc.kernels import BLOCK, Limit, as_rows, blocks, in_channels_last, in_one_order, in_rows
from lightning_qat_osc.sharding import is_sharded

__all__ = ["gradients", "gradients_to_differentiate", "suits_kernels"]


def gradients(
    needed: Sequence[bool], grad: Tensor, x: Tensor, scale: Tensor, n: Limit, p: Limit
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of a loss with respect to x and the scale.

    Args:
        needed: Whether the gradient with respect to x is needed, and whether that with respect to the scale is.
        grad: The gradient with respect to x_q.
        x: The tensor that was quantized.
        scale: Its scale, broadcastable to the shape of ``x``.
        n: Smallest integer minus the zero point.
        p: Largest integer minus the zero point.

    Returns:
        The gradients, of the shape and dtype of x and of the scale; None for a gradient that is not needed.
    """
    of_x, of_scale = needed
    if of_x and of_scale and _suits_blocks(grad, x, scale):
        return _gradients_in_blocks(grad, x, scale, n, p)
    v = x / scale
    wide = grad.to(v.dtype)
    grad_x = _materialized(_where_inside(wide, v, n, p).to(grad.dtype), x) if of_x else None
    grad_scale = None
    if of_scale:
        v_inside = _where_inside(v, v, n, p)
        grad_scale = _sum_to_scale(_dxq_ds(v, v_inside, n, p).mul_(wide), scale)
    return grad_x, grad_scale


def gradients_to_differentiate(
    grad: Tensor, x: Tensor, scale: Tensor, n: Limit, p: Limit
) -> tuple[Tensor | None, Tensor | None]:
    """Return both gradients of :func:`gradients` as differentiable functions of ``grad``, for gradient penalties.

    ``x`` and ``scale`` are constants here: with straight-through differentiation, all second derivatives of x_q are 0.
    """
    with torch.no_grad():
        v = x / scale
        inside = _where_inside(torch.ones_like(v), v, n, p)
        dxq_ds = _dxq_ds(v, _where_inside(v, v, n, p), n, p)
    wide = grad.to(v.dtype)
    return (wide * inside).to(grad.dtype), _sum_to_scale(wide * dxq_ds, scale)


def _dxq_ds(v: Tensor, v_inside: Tensor, n: Limit, p: Limit) -> Tensor:
    """Return round(clip(v)) minus ``v_inside`` (v inside the limits, else 0), in the memory of ``v``."""
    return v.clamp_(n, p).round_().sub_(v_inside)


def _where_inside(values: Tensor, v: Tensor, n: Limit, p: Limit, *, out: Tensor | None = None) -> Tensor:
    """Return ``values`` where n <= v <= p, else 0.

    In eager mode this is one pass. A mask would take several, and CPUs are slow with booleans. The backward of hardtanh
    selects values in an open interval, so its limits are the floats just outside n and p. ``out`` is for eager calls.
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
    """Return the floating-point numbers just outside the limits of a grid."""
    return _neighbor(n, -1.0, dtype), _neighbor(p, 1.0, dtype)


def _neighbor(limit: int, sign: float, dtype: torch.dtype) -> float:
    """Return the normal floating-point number just above (sign 1) or below (sign -1) a limit.

    It is normal because CPUs may flush subnormal numbers to 0. It is computed in Python, where a default device, a fake
    tensor or a transform cannot interfere.
    """
    info = torch.finfo(dtype)
    if limit == 0:
        return sign * info.smallest_normal
    mantissa, exponent = math.frexp(limit)
    closer = mantissa == -0.5 * sign  # numbers just below a power of two are half as far apart
    return limit + sign * math.ldexp(info.eps, exponent - 1 - closer)


def suits_kernels(x: Tensor, scale: Tensor) -> bool:
    """Whether the memory layouts of a tensor and its scale suit compiled kernels and blocks."""
    return in_rows(scale, x) and not is_sharded(x)


def _suits_blocks(grad: Tensor, x: Tensor, scale: Tensor) -> bool:
    """Whether :func:`_gradients_in_blocks` can be used, and is faster."""
    if torch.compiler.is_compiling() or not x.is_cpu or x.numel() <= 4 * BLOCK:
        return False
    if x.dtype.itemsize < 4 or not x.dtype == grad.dtype == scale.dtype:  # 16-bit dot products are slow
        return False
    return in_one_order([x, grad]) and suits_kernels(x, scale)


def _gradients_in_blocks(grad: Tensor, x: Tensor, scale: Tensor, n: Limit, p: Limit) -> tuple[Tensor, Tensor]:
    """Compute :func:`gradients` in blocks that stay in a CPU's cache, with two buffers that all blocks share."""
    grad_x = torch.empty_like(x)
    views = as_rows([scale], [grad, x, grad_x])
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


def _materialized(grad_x: Tensor, x: Tensor) -> Tensor:
    """Return the gradient with respect to x so that, on CPUs, the compiler writes it to memory.

    Otherwise the compiler fuses this arithmetic into each loop that reads the result: the backward pass of a norm has
    two such loops, and both would divide by the scale. The compiler writes a tensor to memory when a view of it is
    taken, so this takes a view, in the layout of ``x`` (in torch 2.6, a compiled backward pass cannot query the layout
    of a gradient). Contiguous images are left as they are, because CPU convolutions change their layout and would have
    to convert the view back. Other devices compute faster than they write.
    """
    if not (torch.compiler.is_compiling() and x.is_cpu) or is_sharded(x):
        return grad_x
    if in_channels_last(x) or (x.dim() == 3 and x.is_contiguous()):
        return grad_x.as_strided(x.shape, x.stride())
    return grad_x


def _sum_to_scale(terms: Tensor, scale: Tensor) -> Tensor:
    """Return the gradient with respect to a scale: the sum of its terms, one for each value of x."""
    if scale.numel() == 1 and torch.compiler.is_compiling():
        terms = _partly_summed(terms, on_cpu=scale.is_cpu)
    return terms.sum_to_size(scale.shape)


def _partly_summed(terms: Tensor, *, on_cpu: bool) -> Tensor:
    """Sum the terms of a scale's gradient over the dimension along which the compiler has a loop anyway.

    A sum over all dimensions at once would be a separate loop, over two tensors that other loops have just read.

    Args:
        terms: The terms for an image, [N, C, ...], or for tokens, [N, L, C].
        on_cpu: Whether they are on a CPU. (In torch 2.6, a compiled backward pass cannot query a gradient's device.)
    """
    if terms.dim() < 3 or terms.shape[1:].numel() <= 2**10:
        return terms  # too few to matter
    if terms.dim() == 3:
        # on CPUs, the loop that writes the gradient sums them; elsewhere sum over features, as layer normalization does
        return terms if on_cpu else terms.sum(-1, keepdim=True)
    if on_cpu:
        return terms.sum(1, keepdim=True)  # channels, which CPU compilers place side by side for convolutions
    return terms.sum((0, *range(2, terms.dim())), keepdim=True)  # for each channel, as batch normalization sums
