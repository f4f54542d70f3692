"""Oscillation dampening: the loss as printed and its gradient in closed form."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from lightning_qat_osc.functional import fake_quantize

__all__ = ["Aggregation", "dampening_gradient", "dampening_loss"]

Aggregation = Literal["sum", "mean", "kernel_mean"]
"""``sum``: the squared Frobenius norm of the paper. ``mean``: its mean over the weights. ``kernel_mean``: a sum over
output channels (dimension 0) and a mean over the rest, ``.sum(0).mean()`` in the authors' code."""


def _divisor(shape: torch.Size, aggregation: Aggregation) -> int:
    if aggregation == "sum":
        return 1
    if aggregation == "mean":
        return math.prod(shape)
    if aggregation == "kernel_mean":
        return math.prod(shape[1:])
    raise ValueError(f"aggregation must be 'sum', 'mean' or 'kernel_mean', got {aggregation=}")


def dampening_loss(
    weight: Tensor, scale: Tensor, quant_min: int, quant_max: int, aggregation: Aggregation = "sum"
) -> Tensor:
    r"""Distance of the latent weights from the centres of their bins.

    .. math:: L_{damp} = \| w_q - \mathrm{clip}(w, s n, s p) \|_F^2

    without a gradient through :math:`w_q`. Source: Nagel et al., arXiv 2203.11086, Sec. 4.2 (Eq. 6). The authors'
    lambda of 0.1 belongs to ``kernel_mean``; those of their Table 4 to a different scale.

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


@torch.no_grad()
def dampening_gradient(
    weight: Tensor, scale: Tensor, quant_min: int, quant_max: int, aggregation: Aggregation = "sum"
) -> Tensor:
    r"""Gradient of :func:`dampening_loss`: :math:`2 (w - w_q) \, 1[s n \le w \le s p]`; the scale gets none.

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
    weight_q = fake_quantize(weight, scale, quant_min, quant_max)
    outside = (weight < scale * quant_min) | (weight > scale * quant_max)
    factor = 2.0 / _divisor(weight.shape, aggregation)
    return weight.sub(weight_q).mul_(factor).masked_fill_(outside, 0.0)
