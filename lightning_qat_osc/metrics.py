"""Oscillation statistics and SQNR as torchmetrics Metrics, with distributed reduction.

They sum in float64. For a device without it, call ``metric.set_dtype(torch.float32)`` before ``metric.to(...)``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from zlib import crc32

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_qat_osc.checks import check_number
from lightning_qat_osc.oscillation import OscillationState
from lightning_qat_osc.sharding import local_part

__all__ = ["SQNR", "FrozenShare", "OscillatingShare", "OscillationFrequency"]


class _MeanOverWeights(Metric):
    """Mean of a quantity over the weights, for each layer and in total.

    Args:
        layers: Names of the layers, the keys of the mapping that :meth:`update` takes; at least one.
        what: Other arguments that tell metrics of one class apart.

    Raises:
        TypeError: If ``layers`` is a single name, not a sequence of names.
        ValueError: If ``layers`` is empty.
    """

    full_state_update = False

    def __init__(self, layers: Sequence[str], *what: float) -> None:
        super().__init__()
        if isinstance(layers, str):
            raise TypeError(f"layers must be a sequence of names, got {layers!r}")
        self.layers = list(layers)
        if not self.layers:
            raise ValueError("layers must name at least one tracked layer, got none")
        # unique state names: a MetricCollection merges metrics whose states have equal names and values
        own = f"{type(self).__name__}_{crc32(repr((self.layers, what)).encode()):08x}"
        self._sums, self._counts = f"{own}_sums", f"{own}_counts"
        for name in (self._sums, self._counts):
            self.add_state(name, torch.zeros(len(self.layers), dtype=torch.float64), dist_reduce_fx="sum")

    @property
    def sums(self) -> Tensor:
        """Sum of the quantity over the counted weights of each layer."""
        sums: Tensor = getattr(self, self._sums)
        return sums

    @property
    def counts(self) -> Tensor:
        """Number of counted weights of each layer."""
        counts: Tensor = getattr(self, self._counts)
        return counts

    def _sum(self, state: OscillationState) -> Tensor:
        raise NotImplementedError

    def update(self, states: Mapping[str, OscillationState]) -> None:
        """Add the states from :func:`~lightning_qat_osc.oscillation_states`. Under FSDP, each rank adds its shard.

        Raises:
            ValueError: If a layer has no state.
        """
        untracked = [name for name in self.layers if name not in states]
        if untracked:
            raise ValueError(f"states must contain one for each layer, got none for {', '.join(map(repr, untracked))}")
        sums = torch.stack([self._sum(states[name]).to(self.sums.dtype) for name in self.layers])
        counts = torch.tensor([local_part(states[name].frequency).numel() for name in self.layers])
        self.sums.add_(sums.to(self.sums.device))
        self.counts.add_(counts.to(self.counts.device))

    def compute(self) -> dict[str, Tensor]:
        """Return layer name -> mean over its weights, and ``""`` -> mean over all weights."""
        means = (self.sums / self.counts).float()
        total = (self.sums.sum() / self.counts.sum()).float()
        return {"": total, **dict(zip(self.layers, means.unbind()))}


class OscillationFrequency(_MeanOverWeights):
    """Mean oscillation frequency f, in oscillations per optimizer step (arXiv 2203.11086, Sec. 4.1)."""

    def _sum(self, state: OscillationState) -> Tensor:
        return local_part(state.frequency).sum(dtype=self.sums.dtype)


class OscillatingShare(_MeanOverWeights):
    """Share of the weights that oscillate: "Osc. %" of arXiv 2203.11086, divided by 100.

    Args:
        layers: Names of the layers.
        threshold: Frequency above which a weight counts as oscillating, in [0, 1]. The default is the paper's 0.005.

    Raises:
        TypeError: If the threshold is not a number.
        ValueError: If ``layers`` is empty, or the threshold is out of range.
    """

    def __init__(self, layers: Sequence[str], threshold: float = 0.005) -> None:
        check_number("threshold", threshold, low=0.0, high=1.0)
        super().__init__(layers, threshold)
        self.threshold = threshold

    def _sum(self, state: OscillationState) -> Tensor:
        return (local_part(state.frequency) > self.threshold).sum()


class FrozenShare(_MeanOverWeights):
    """Share of the weights that iterative freezing has frozen (arXiv 2203.11086, Sec. 4.3)."""

    def _sum(self, state: OscillationState) -> Tensor:
        return local_part(state.frozen).sum()


class SQNR(Metric):
    r"""Signal-to-quantization-noise ratio in dB, :math:`10 \log_{10} (\sum x^2 / \sum (x - x_q)^2)`."""

    full_state_update = False
    higher_is_better = True
    signal: Tensor
    noise: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("signal", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("noise", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, x: Tensor, x_q: Tensor) -> None:
        """Add values and their quantized form, which must have the same shape.

        Raises:
            ValueError: If the shapes differ.
        """
        if x.shape != x_q.shape:
            raise ValueError(f"x_q must have the shape of x, {tuple(x.shape)}, got {tuple(x_q.shape)}")
        x, x_q = x.to(self.signal.dtype), x_q.to(self.signal.dtype)  # squares can exceed the range of half precision
        self.signal += x.square().sum()
        self.noise += (x - x_q).square().sum()

    def compute(self) -> Tensor:
        """Return the ratio in dB. It is infinite if there is no quantization error."""
        ratio = torch.where(self.noise == 0.0, torch.inf, self.signal / self.noise)
        return (10.0 * torch.log10(ratio)).float()
