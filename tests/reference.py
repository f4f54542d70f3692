"""Slow, independent oracles, written from the papers: Python numbers and loops, or autograd of the printed equation."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


def fake_quantize_equation(x: Tensor, s: Tensor, n: int, p: int) -> Tensor:
    """Compute ``s clip(round(x/s), n, p)`` with a straight-through round, so that autograd gives LSQ's gradients."""
    v = x / s
    # at n and p, the gradient of torch.clamp is 1 or 0, depending on the torch version
    clipped = torch.where((n <= v) & (v <= p), v, v.detach().clamp(n, p))
    return s * (clipped + (torch.round(clipped) - clipped).detach())


def masked_fake_quantize(x: Tensor, s: Tensor, n: int, p: int, frozen: Tensor, z: Tensor) -> Tensor:
    """Compute the paper's forward with freezing: a frozen weight is its constant integer z times the learned scale."""
    return torch.where(frozen, s * z, fake_quantize_equation(x, s, n, p))


def round_half_even(value: float) -> int:
    """Round to nearest, ties to even, in Python."""
    return round(value)


@dataclass
class WeightLoop:
    """Algorithm 1 of arXiv 2203.11086 for one weight, with Python floats; one call of ``step`` per step."""

    integer: int
    momentum: float
    threshold: float = math.inf
    frequency: float = 0.0
    ema: float = field(init=False)
    last_direction: int = 0
    frozen: bool = False

    def __post_init__(self) -> None:
        self.ema = float(self.integer)

    def step(self, integer: int) -> None:
        if self.frozen:
            integer = self.integer
        oscillated = 0.0
        if integer != self.integer:
            direction = 1 if integer > self.integer else -1
            if self.last_direction != 0 and direction != self.last_direction:
                oscillated = 1.0
            self.last_direction = direction
        self.integer = integer
        self.frequency = self.momentum * oscillated + (1 - self.momentum) * self.frequency
        self.ema = self.momentum * integer + (1 - self.momentum) * self.ema
        if not self.frozen and self.frequency > self.threshold:
            self.frozen = True
            self.integer = round_half_even(self.ema)
