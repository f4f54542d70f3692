"""Range initialization: the scale that a grid starts from, estimated from weights or observed activations.

Every estimator takes values of shape ``[G, n]``, one row for each scale (a single row per tensor, or one row per
channel), and works on all rows at once.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_qat_osc.kernels import blocks

__all__ = ["RangeMethod", "activation_grid", "estimate_scale"]

RangeMethod = Literal["mse", "minmax", "percentile", "lsq"]
"""``mse``: least squared error. ``minmax``: nothing is clipped. ``percentile``: from the 0.1th to the 99.9th.
``lsq``: ``2 mean|x| / sqrt(p)``, with p the grid's longer side."""

_TAIL = 0.001  # share of the values that the percentile range leaves out at each end
_HISTOGRAM_BINS = 2048
_COARSE, _SMALL, _FINE = 40, 20, 16  # candidates of the MSE search
_RATIO = 0.8  # of one small candidate to the one before it


class _Weighted(NamedTuple):
    """``values`` and how many elements each stands for (``counts`` None: one each). Both are [G, m]."""

    values: Tensor
    counts: Tensor | None


def _compress(x: Tensor) -> _Weighted:
    """Compress long rows to the bin centers and counts of a histogram; keep the elements of short rows. x: [G, n]."""
    groups, n = x.shape
    if n <= _HISTOGRAM_BINS:
        return _Weighted(x, None)
    low, high = x.amin(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)
    width = (high - low).clamp_min(torch.finfo(x.dtype).tiny) / _HISTOGRAM_BINS
    index = ((x - low) / width).to(torch.int64).clamp_(0, _HISTOGRAM_BINS - 1)
    index += _HISTOGRAM_BINS * torch.arange(groups, device=x.device).unsqueeze(1)
    counts = torch.bincount(index.flatten(), minlength=groups * _HISTOGRAM_BINS).view(groups, -1)
    centers = low + width * (torch.arange(_HISTOGRAM_BINS, device=x.device, dtype=x.dtype) + 0.5)
    return _Weighted(centers, counts.to(x.dtype))


def _percentiles(x: Tensor, tail: float) -> tuple[Tensor, Tensor]:
    """Return the values below and above which a share ``tail`` of the elements lies, each [G]. x: [G, n]."""
    n = x.shape[1]
    low, high = max(1, math.ceil(tail * n)), max(1, math.ceil((1.0 - tail) * n))
    # topk, because kthvalue raises on GPUs with deterministic algorithms
    return x.topk(low, largest=False).values[:, -1], x.topk(n - high + 1).values[:, -1]


def _covering_scale(low: Tensor, high: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """Return the smallest scale whose grid reaches from ``low`` to ``high``, each [G]."""
    scale = high / quant_max if quant_max > 0 else torch.zeros_like(high)
    return torch.maximum(scale, low / quant_min) if quant_min < 0 else scale


def _squared_error(weighted: _Weighted, scale: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """Return the sum of squared quantization errors of each row. scale: [G]."""
    s = scale.unsqueeze(1)
    error = (weighted.values / s).round_().clamp_(quant_min, quant_max).mul_(s).sub_(weighted.values)
    error.square_()
    if weighted.counts is not None:
        error.mul_(weighted.counts)
    return error.sum(dim=1)


def _mse_scale(weighted: _Weighted, covering: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """Search for the scale of least squared error among shares of ``covering``, coarsely and then around the best."""
    best_share = torch.ones_like(covering)
    best_error = torch.full_like(covering, torch.inf)

    def consider(share: Tensor) -> None:
        nonlocal best_share, best_error
        error = _squared_error(weighted, covering * share, quant_min, quant_max)
        better = error < best_error
        best_share = torch.where(better, share, best_share)
        best_error = torch.where(better, error, best_error)

    for k in range(1, _COARSE + 1):
        consider(torch.full_like(covering, k / _COARSE))
    for k in range(1, _SMALL + 1):  # for rows with a few outliers far from all other values
        consider(torch.full_like(covering, _RATIO**k / _COARSE))
    coarse_share, small = best_share, best_share < 1.0 / _COARSE
    for k in range(1, _FINE + 1):
        offset = 2.0 * k / (_FINE + 1) - 1.0
        consider(coarse_share + torch.where(small, offset * (1.0 - _RATIO) * coarse_share, offset / _COARSE))
    return covering * best_share


def _power_of_two(largest: Tensor) -> Tensor:
    """Return a power of two near each largest absolute value, [G].

    Dividing by it rounds nothing, and keeps squares of tiny values from becoming 0 and sums of huge ones from becoming
    infinite. It is computed on the CPU, where powers are exact on every machine.
    """
    exponent = torch.frexp(largest.cpu()).exponent.clamp_(-126, 126)
    return torch.ldexp(torch.ones_like(exponent, dtype=largest.dtype), exponent).to(largest.device)


@torch.no_grad()
def estimate_scale(x: Tensor, quant_min: int, quant_max: int, method: RangeMethod = "mse") -> Tensor:
    """Estimate the scale of each row of values for a given grid.

    Args:
        x: Finite values, [G, n].
        quant_min: Smallest integer minus the zero point, at most 0.
        quant_max: Largest integer minus the zero point, at least 0.
        method: ``mse`` searches for the least squared error (the paper's choice, arXiv 2203.11086, Sec. 5.1);
            ``minmax`` covers every value; ``percentile`` covers those from the 0.1th to the 99.9th percentile; ``lsq``
            is 2 mean|x| / sqrt(p) (arXiv 1902.08153, Sec. 2.1), with p the larger of ``quant_max`` and
            ``-quant_min - 1``. The paper has no zero points and uses ``quant_max``, which is small if most of the grid
            lies below the zero point.

    Returns:
        Positive scales, [G], in the range of normal float32 numbers. A row of zeros gets the smallest of these.

    Raises:
        ValueError: If the method is unknown.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    low, high = x.amin(dim=1), x.amax(dim=1)
    unit = _power_of_two(torch.maximum(-low, high))
    x, low, high = x / unit.unsqueeze(1), low / unit, high / unit
    smallest, largest = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    covering = _covering_scale(low, high, quant_min, quant_max).clamp_min(smallest)
    if method == "minmax":
        scale = covering
    elif method == "lsq":
        scale = 2.0 * x.abs().mean(dim=1) / math.sqrt(max(quant_max, -quant_min - 1, 1))
    elif method == "percentile":
        scale = _covering_scale(*_percentiles(x, _TAIL), quant_min, quant_max)
        scale = torch.where(scale > smallest, scale, covering)  # for more than 99.9 % zeros
    elif method == "mse":
        scale = torch.cat([_mse_scale(_compress(b), cover, quant_min, quant_max) for cover, b in blocks([covering, x])])
    else:
        raise ValueError(f"method must be 'mse', 'minmax', 'percentile' or 'lsq', got {method=}")
    return (scale * unit).clamp(smallest, largest)


@torch.no_grad()
def activation_grid(x: Tensor, low: float, high: float, bits: int, method: RangeMethod = "mse") -> tuple[int, int, int]:
    """Choose the unsigned integers for an activation, with a zero point above 0 if it has negative values.

    Args:
        x: A sample of the finite values of the activation, 1-dimensional.
        low: Smallest value observed.
        high: Largest value observed.
        bits: Width of the integers.
        method: ``minmax`` sets the zero point from ``low`` and ``high``; the others from the 0.1th and 99.9th
            percentile, so that one outlier on one side does not take nearly the whole grid.

    Returns:
        ``(quant_min, quant_max, zero_point)`` with ``quant_min`` 0. The zero point is 0 if no value was negative.
    """
    quant_max = 2**bits - 1
    if low >= 0.0:
        return 0, quant_max, 0
    if method != "minmax":
        low_tail, high_tail = _percentiles(x.float().unsqueeze(0), _TAIL)
        if low_tail < high_tail:
            low, high = low_tail.item(), high_tail.item()
    low, high = min(low, 0.0), max(high, 0.0)
    # at least one integer below the zero point and, if positive values were seen, one above it
    zero_point = min(max(round(-low / (high - low) * quant_max), 1), quant_max - 1 if high > 0.0 else quant_max)
    return 0, quant_max, zero_point
