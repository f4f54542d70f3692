"""A plain implementation of the paper's algorithm from its text, as a baseline. The authors' code was not run.

Tracking happens in the forward pass with full-sized temporaries; arXiv 2203.11086, Secs. 4.1 and 4.3 and Algorithm 1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _round_ste(x: Tensor) -> Tensor:
    return (x.round() - x).detach() + x


class PlainTracker:
    """Integers, directions, frequencies, averages, masks and counts: 25 bytes per weight, updated in every step."""

    def __init__(self, momentum: float = 0.01, threshold: float = 0.03) -> None:
        self.momentum, self.threshold = momentum, threshold
        self.before: Tensor | None = None

    @torch.no_grad()
    def __call__(self, z: Tensor) -> Tensor:
        """Return the integers after freezing. ``z`` contains the current integers, as floats."""
        if self.before is None:
            self.before, self.ema = z.clone(), z.clone()
            self.direction, self.frequency = torch.zeros_like(z), torch.zeros_like(z)
            self.frozen, self.frozen_int = torch.zeros_like(z, dtype=torch.bool), torch.zeros_like(z)
            self.count = torch.zeros_like(z)
            return z
        z = torch.where(self.frozen, self.frozen_int, z)
        delta = z - self.before
        sign = delta.sign()
        switched = sign != 0
        oscillated = switched & (sign != self.direction) & (self.direction != 0)
        self.frequency = self.momentum * oscillated.float() + (1 - self.momentum) * self.frequency
        self.ema = self.momentum * z + (1 - self.momentum) * self.ema
        self.direction = torch.where(switched, sign, self.direction)
        self.count = self.count + oscillated
        freeze_now = (self.frequency > self.threshold) & ~self.frozen
        self.frozen_int = torch.where(freeze_now, self.ema.round(), self.frozen_int)
        self.frozen = self.frozen | freeze_now
        self.before = z
        return torch.where(self.frozen, self.frozen_int, z)


class PlainQuantizer(nn.Module):
    """LSQ, computed by autograd with straight-through rounding."""

    def __init__(self, x: Tensor, quant_min: int, quant_max: int, tracker: PlainTracker | None = None) -> None:
        super().__init__()
        self.scale = nn.Parameter(2.0 * x.detach().abs().mean().view(1) / quant_max**0.5)
        self.limits, self.tracker = (quant_min, quant_max), tracker

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize."""
        z = torch.clamp(_round_ste(x / self.scale), *self.limits)
        if self.tracker is not None and self.training:
            z = z + (self.tracker(z.detach()) - z).detach()
        return self.scale * z


class _PlainLayer(nn.Module):
    def __init__(self, layer: nn.Conv2d | nn.Linear, tracked: bool) -> None:
        super().__init__()
        self.layer = layer
        self.weight_quantizer = PlainQuantizer(layer.weight, -8, 7, PlainTracker() if tracked else None)
        self.input_quantizer: PlainQuantizer | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.input_quantizer is None:
            self.input_quantizer = PlainQuantizer(x, 0 if x.min() >= 0 else -8, 15 if x.min() >= 0 else 7)
        x, weight = self.input_quantizer(x), self.weight_quantizer(self.layer.weight)
        if isinstance(self.layer, nn.Linear):
            return F.linear(x, weight, self.layer.bias)
        return self.layer._conv_forward(x, weight, self.layer.bias)


def prepare(network: nn.Module, batch: Tensor, *, tracked: bool) -> nn.Module:
    """Wrap every Conv2d and Linear that is called, and initialize the input quantizers from a batch."""
    for name, child in list(network.named_modules()):
        if isinstance(child, (nn.Conv2d, nn.Linear)) and not name.endswith("out_proj"):  # attention does not call it
            parent = network.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], _PlainLayer(child, tracked))
    with torch.no_grad():
        network.eval()(batch)
    return network.train()
