"""Fake quantization with LSQ gradients, and the corresponding integers.

All functions here take tensors and broadcast: a scale of shape ``[1]`` quantizes per tensor, one of shape
``[C, 1, 1, 1]`` per channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from lightning_qat_osc.kernels import SMALL, Limit, as_rows, cached_scalar, compiled
from lightning_qat_osc.lsq_gradients import gradients, gradients_to_differentiate, suits_kernels

__all__ = ["fake_quantize", "fake_quantize_pair", "integer_grid", "quantize_to_int"]


def integer_grid(bits: int, *, signed: bool) -> tuple[int, int]:
    """Return the limits of the integer grid of a bit width.

    Args:
        bits: Width of the integers, at least 1.
        signed: Whether the integers are in two's complement; otherwise they start at 0.

    Returns:
        ``(quant_min, quant_max)``: ``(-2^(bits-1), 2^(bits-1) - 1)`` if signed, else ``(0, 2^bits - 1)``.
    """
    if signed:
        return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return 0, 2**bits - 1


def _quantize_dequantize(x: Tensor, scale: Tensor, n: Limit, p: Limit) -> Tensor:
    """Round to nearest (ties to even, as torch, ONNX and the hardware do), clip, and scale back."""
    return (x / scale).round_().clamp_(n, p).mul_(scale).to(x.dtype)


def _is_differentiated() -> bool:
    """Whether autograd records this backward pass for ``create_graph=True``. It cannot record compiled ones."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


class _LearnedStepSize(torch.autograd.Function):
    """``x_q = s clip(round(x/s), n, p)`` with the gradients of LSQ. Saves only its two inputs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, n: int, p: int) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.limits = n, p
        return _quantize_dequantize(x, scale, n, p)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, scale = ctx.saved_tensors
        if _is_differentiated():
            return *gradients_to_differentiate(grad_outputs[0], x, scale, *ctx.limits), None, None
        return *gradients(ctx.needs_input_grad[:2], grad_outputs[0], x, scale, *ctx.limits), None, None


class _FusedLearnedStepSizes(torch.autograd.Function):
    """:class:`_LearnedStepSize` for one or two tensors, with one compiled kernel forward and one backward.

    Its arguments are the limits of each tensor's grid, then each tensor followed by its scale.
    """

    @staticmethod
    def forward(ctx: Any, limits: Sequence[tuple[int, int]], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*tensors)
        ctx.limits = limits
        xs, scales = tensors[::2], tensors[1::2]
        operands = [_operands([x], scale, *grid) for x, scale, grid in zip(xs, scales, limits)]
        views = compiled(_forward_of_each, _sizes(xs))(*chain(*operands))
        # detached, because autograd forbids in-place changes to a view that a custom function returns
        return tuple(view.as_strided(x.shape, x.stride()).detach() for x, view in zip(xs, views))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensors, limits = ctx.saved_tensors, ctx.limits
        xs, scales = tensors[::2], tensors[1::2]
        if _is_differentiated():
            each = (gradients_to_differentiate(g, x, s, n, p) for g, x, s, (n, p) in zip(grads, xs, scales, limits))
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
    """Return the gradient of each tensor, followed by that of its scale."""
    each = [gradients(needed[2 * i : 2 * i + 2], *operands[5 * i : 5 * i + 5]) for i in range(len(operands) // 5)]
    return tuple(chain(*each))


def _operands(tensors: Sequence[Tensor], scale: Tensor, n: int, p: int) -> list[Tensor]:
    """Return tensors, their scale and the limits of their grid in the form that compiled kernels take."""
    views = as_rows([scale], tensors)
    assert views is not None
    return [*views[1:], views[0], cached_scalar(n, scale.device), cached_scalar(p, scale.device)]


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
    the equation and ONNX's QuantizeLinear do. The gradient passes where v itself lies within the limits, and not
    wherever round(v) does: that zone would be half a step wider at each end.

    Args:
        x: Values of any shape and floating dtype.
        scale: Step between two grid points, positive, broadcastable to the shape of ``x``. If ``x`` has
            lower precision than the scale, the arithmetic is in the scale's dtype and the result in that of ``x``.
        quant_min: Smallest integer.
        quant_max: Largest integer.
        zero_point: The integer that stands for 0.0.
        fused: Compute with kernels that ``torch.compile`` generates from the same equations. Requires a compiler.

    Returns:
        The quantized values, in the shape and dtype of ``x``.

    Raises:
        TypeError: If ``scale`` is not a tensor.
        ValueError: If ``quant_min`` is above ``quant_max``.
    """
    if not isinstance(scale, Tensor):
        raise TypeError(f"scale must be a tensor, got {scale!r}: pass torch.tensor([{scale!r}]) for a single scale")
    if quant_min > quant_max:
        raise ValueError(f"quant_min must be at most quant_max, {quant_max}, got {quant_min}")
    if scale.dim() == 0:
        scale = scale.view(1)  # type promotion would ignore the dtype of a scale without dimensions
    if x.dim() == 0 and scale.shape == (1,):
        return fake_quantize(x.view(1), scale, quant_min, quant_max, zero_point=zero_point, fused=fused).view(())
    limits = quant_min - zero_point, quant_max - zero_point
    # inside a user's compiled graph, the equations fuse with the operations around them
    if fused and not torch.compiler.is_compiling() and x.numel() > SMALL and suits_kernels(x, scale):
        return _FusedLearnedStepSizes.apply((limits,), x, scale)[0]  # type: ignore[no-untyped-call, no-any-return]
    return _LearnedStepSize.apply(x, scale, *limits)  # type: ignore[no-untyped-call, no-any-return]


def fake_quantize_pair(
    xs: tuple[Tensor, Tensor], scales: tuple[Tensor, Tensor], limits: tuple[tuple[int, int], tuple[int, int]]
) -> tuple[Tensor, Tensor] | None:
    """Run :func:`fake_quantize` on two tensors in one compiled kernel.

    Args:
        xs: The tensors.
        scales: Their scales.
        limits: n and p of each tensor.

    Returns:
        Both quantized tensors. None if both are small, the smaller one is empty, their devices differ, a memory layout
        does not suit the kernels, or only one of the tensors (or its scale) requires grad.
    """
    first, second = xs
    if first.numel() < second.numel():
        both = fake_quantize_pair(xs[::-1], scales[::-1], limits[::-1])
        return None if both is None else both[::-1]
    if first.numel() <= SMALL or second.numel() == 0 or first.device != second.device:
        return None
    learned = [x.requires_grad or scale.requires_grad for x, scale in zip(xs, scales)]
    if learned[0] != learned[1] or not all(map(suits_kernels, xs, scales)):
        return None  # autograd would mark both outputs as requiring grad
    return _FusedLearnedStepSizes.apply(limits, first, scales[0], second, scales[1])  # type: ignore[no-untyped-call, no-any-return]


@torch.no_grad()
def quantize_to_int(x: Tensor, scale: Tensor, quant_min: int, quant_max: int, *, zero_point: int = 0) -> Tensor:
    """Return the integers behind :func:`fake_quantize`: ``clip(round(x/s) + z, quant_min, quant_max)``.

    Args:
        x: Values of any shape and floating dtype.
        scale: Step between two grid points, positive, broadcastable to the shape of ``x``.
        quant_min: Smallest integer, at least -128.
        quant_max: Largest integer, at most 255.
        zero_point: The integer that stands for 0.0.

    Returns:
        int8 integers of the shape of ``x`` (uint8 if ``quant_max`` is above 127).
    """
    if x.dim() == 0 and scale.numel() == 1:
        return quantize_to_int(x.view(1), scale, quant_min, quant_max, zero_point=zero_point).view(())
    scale = scale.view(1) if scale.dim() == 0 else scale
    n, p = quant_min - zero_point, quant_max - zero_point
    dtype = torch.int8 if quant_max <= 127 else torch.uint8
    return (x / scale).round_().clamp_(n, p).add_(zero_point).to(dtype)
