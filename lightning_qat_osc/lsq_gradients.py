r"""LSQ's gradients, made fast: what the backward pass of :func:`~lightning_qat_osc.fake_quantize` computes.

.. math::
    v = x / s, \qquad
    \frac{\partial x_q}{\partial x} = 1[n \le v \le p], \qquad
    \frac{\partial x_q}{\partial s} = \mathrm{round}(v) - v \text{ inside},\; n \text{ or } p \text{ outside}

Source: LSQ, arXiv 1902.08153, Eqs. 2 and 3. :func:`gradients` has them line by line. What is below it chooses
operations that CPUs and compilers are fast with; docs/performance.md has what each is worth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from lightning_qat_osc.kernels import BLOCK, Limit, blocks, in_channels_last, in_one_order, in_rows, rows
from lightning_qat_osc.sharding import is_sharded

__all__ = ["gradients", "gradients_to_differentiate", "suits_kernels"]


def gradients(
    needed: Sequence[bool], grad: Tensor, x: Tensor, scale: Tensor, n: Limit, p: Limit
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of a loss by x and by the scale.

    Args:
        needed: Whether that of x is needed, and that of the scale.
        grad: The gradient by x_q.
        x: What was quantized.
        scale: Its scale, of a shape that broadcasts.
        n: Smallest integer less the zero point.
        p: Largest integer less the zero point.

    Returns:
        Each, of the shape and dtype of what it is by, or None where it is not needed.
    """
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


def gradients_to_differentiate(
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


def _dxq_ds(v: Tensor, v_inside: Tensor, n: Limit, p: Limit) -> Tensor:
    """round(clip(v)) - v inside, in the memory of ``v``."""
    return v.clamp_(n, p).round_().sub_(v_inside)


def _where_inside(values: Tensor, v: Tensor, n: Limit, p: Limit, *, out: Tensor | None = None) -> Tensor:
    """``values`` where n <= v <= p, else 0.

    Eagerly in one pass: a mask would be several, and CPUs are slow with booleans. The backward of hardtanh selects so,
    but for open intervals; hence the floats next to the limits. ``out`` is for eager calls.
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


def suits_kernels(x: Tensor, scale: Tensor) -> bool:
    """Whether a tensor and its scale are as compiled kernels and blocks take them."""
    return in_rows(scale, x) and not is_sharded(x)


def _suits_blocks(grad: Tensor, x: Tensor, scale: Tensor) -> bool:
    """Whether :func:`_gradients_in_blocks` can be used, and is faster."""
    if torch.compiler.is_compiling() or not x.is_cpu or x.numel() <= 4 * BLOCK:
        return False
    if x.dtype.itemsize < 4 or not x.dtype == grad.dtype == scale.dtype:  # dot products of 16 bits are slow
        return False
    return in_one_order([x, grad]) and suits_kernels(x, scale)


def _gradients_in_blocks(grad: Tensor, x: Tensor, scale: Tensor, n: Limit, p: Limit) -> tuple[Tensor, Tensor]:
    """:func:`gradients` in blocks that stay in a CPU's cache, in two buffers for all of them."""
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


def _written(grad_x: Tensor, x: Tensor) -> Tensor:
    """The gradient by x, which a compiler for CPUs is made to write to memory.

    It would otherwise join this arithmetic to each loop that reads the result: the backward pass of a norm has two, and
    both would divide by the scale. A compiler writes what it takes a view of, so a view is taken, in the layout of
    ``x`` (torch 2.6 lets no compiled backward pass ask a gradient for its own). Contiguous images are left as they are,
    since convolutions for CPUs lay them out anew and would have to turn the view back. Other devices compute faster
    than they write.
    """
    if not (torch.compiler.is_compiling() and x.is_cpu) or is_sharded(x):
        return grad_x
    if in_channels_last(x) or (x.dim() == 3 and x.is_contiguous()):
        return grad_x.as_strided(x.shape, x.stride())
    return grad_x


def _sum_to_scale(terms: Tensor, scale: Tensor) -> Tensor:
    """The gradient by a scale from its terms, one for each value."""
    if scale.numel() == 1 and torch.compiler.is_compiling():
        terms = _partly_summed(terms, on_cpu=scale.is_cpu)
    return terms.sum_to_size(scale.shape)


def _partly_summed(terms: Tensor, *, on_cpu: bool) -> Tensor:
    """Terms of a scale's gradient, summed over the dimension along which a compiler has a loop anyway.

    Summed over everything at once they would be a loop of their own, over two tensors that others have just read.

    Args:
        terms: Of an image, [N, C, ...], or of tokens, [N, L, C].
        on_cpu: Whether they are on a CPU. (torch 2.6 lets no compiled backward pass ask a gradient for its device.)
    """
    if terms.dim() < 3 or terms.shape[1:].numel() <= 2**10:
        return terms  # few
    if terms.dim() == 3:
        # on CPUs the loop that writes the gradient adds them up; elsewhere over features, as layer normalization sums
        return terms if on_cpu else terms.sum(-1, keepdim=True)
    if on_cpu:
        return terms.sum(1, keepdim=True)  # over channels, which compilers for CPUs lay side by side for convolutions
    return terms.sum((0, *range(2, terms.dim())), keepdim=True)  # channel by channel, as batch normalization sums
