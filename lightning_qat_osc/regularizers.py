"""Oscillation dampening: the loss as printed in the paper, and its gradient in closed form."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from lightning_qat_osc.functional import fake_quantize
from lightning_qat_osc.kernels import Limit

__all__ = ["Aggregation", "add_dampening_gradient", "dampening_factor", "dampening_gradient", "dampening_loss"]

Aggregation = Literal["sum", "mean", "kernel_mean"]
"""``sum``: the squared Frobenius norm of the paper. ``mean``: its mean over the weights. ``kernel_mean``: a sum over
output channels (dimension 0) and a mean over the rest, ``.sum(0).mean()`` in the authors' code."""


def _divisor(shape: torch.Size, aggregation: Aggregation) -> int:
    if aggregation == "sum":
        return 1
    if aggregation == "mean":
        return max(1, math.prod(shape))
    if aggregation == "kernel_mean":
        return max(1, math.prod(shape[1:]))
    raise ValueError(f"aggregation must be 'sum', 'mean' or 'kernel_mean', got {aggregation=}")


def dampening_loss(
    weight: Tensor, scale: Tensor, quant_min: int, quant_max: int, aggregation: Aggregation = "sum"
) -> Tensor:
    r"""Return the squared distance of the latent weights from the centers of their bins.

    .. math:: L_{damp} = \| w_q - \mathrm{clip}(w, s n, s p) \|_F^2

    with no gradient through :math:`w_q`. Source: Nagel et al., arXiv 2203.11086, Sec. 4.2 (Eq. 6). The authors'
    lambda of 0.1 applies to ``kernel_mean``, the 1e-4 to 1e-2 of their Table 4 to ``sum``.

    Args:
        weight: Latent weights; dimension 0 holds the output channels.
        scale: Step between two grid points, broadcastable against ``weight``.
        quant_min: Smallest integer, n.
        quant_max: Largest integer, p.
        aggregation: How the squared distances are reduced.

    Returns:
        A scalar.

    Raises:
        ValueError: If the aggregation is unknown.
    """
    weight_q = fake_quantize(weight, scale, quant_min, quant_max).detach()
    clipped = torch.clamp(weight, min=scale * quant_min, max=scale * quant_max)
    return (weight_q - clipped).square().sum() / _divisor(weight.shape, aggregation)


def dampening_factor(shape: torch.Size, aggregation: Aggregation) -> float:
    """Return the factor in the gradient of the squared distance: 2, divided by the divisor of the aggregation."""
    return 2.0 / _divisor(shape, aggregation)


def add_dampening_gradient(
    scale: Tensor, pull: Tensor, grad: Tensor, weight: Tensor, quant_min: Limit, quant_max: Limit
) -> None:
    r"""Add a multiple of :func:`dampening_loss`'s gradient, :math:`2 (w - w_q) \, 1[s n \le w \le s p]`, in place.

    With v = clip(w/s, n, p) the indicator needs no mask: :math:`v - \mathrm{round}(v)` is 0 at the grid's ends.
    The scale gets no gradient.

    Args:
        scale: Step between two grid points, broadcastable against ``weight``.
        pull: ``scale`` times lambda times :func:`dampening_factor`.
        grad: Gradient of the latent weights, changed in place.
        weight: Latent weights.
        quant_min: Smallest integer, n.
        quant_max: Largest integer, p.
    """
    v = (weight / scale).clamp_(quant_min, quant_max)
    grad.add_(v.sub_(v.round()).mul_(pull))


@torch.no_grad()
def dampening_gradient(
    weight: Tensor, scale: Tensor, quant_min: int, quant_max: int, aggregation: Aggregation = "sum"
) -> Tensor:
    """Return the gradient of :func:`dampening_loss`, as :func:`add_dampening_gradient` adds it.

    Args:
        weight: Latent weights; dimension 0 holds the output channels.
        scale: Step between two grid points, broadcastable against ``weight``.
        quant_min: Smallest integer, n.
        quant_max: Largest integer, p.
        aggregation: How the squared distances are reduced.

    Returns:
        A tensor of the weight's shape.

    Raises:
        ValueError: If the aggregation is unknown.
    """
    gradient = torch.zeros_like(weight)
    pull = scale * dampening_factor(weight.shape, aggregation)
    add_dampening_gradient(scale, pull, gradient, weight, quant_min, quant_max)
    return gradient
