"""Oscillations of quantized weights: what is remembered of each weight, and how a step changes it.

Source of every equation: Nagel et al., *Overcoming Oscillations in Quantization-Aware Training*, ICML 2022,
arXiv 2203.11086, Secs. 4.1 and 4.3 and Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lightning_qat_osc.sharding import sharded_like

__all__ = ["OscillationState", "add_frozen_scale_gradient"]

_TENSORS = ("weight_int", "direction", "frequency", "ema_int", "frozen")


class OscillationState(nn.Module):
    """Oscillation history of one weight tensor, 11 bytes a weight. It changes once per optimizer step.

    Its tensors move, load and save with the module that holds them, but are no buffers: every DDP rank computes the
    same ones, so none is to be broadcast, and an exponential moving average of the model has no meaning for them.
    The floating ones stay in 32 bits whatever precision the model trains in.

    Args:
        weight_int: Integers of the weights before the first step, int8, of the weight's shape.

    Attributes:
        weight_int: Integers after the last step, int8.
        direction: Sign of the last change of each integer, int8; 0 before any change.
        frequency: Exponential moving average of the oscillations, f, in oscillations per step.
        ema_int: Exponential moving average of the integers.
        frozen: Whether the integer is held for the rest of training.
    """

    def __init__(self, weight_int: Tensor) -> None:
        super().__init__()
        self.weight_int = weight_int.clone()
        self.direction = torch.zeros_like(weight_int)
        self.frequency = torch.zeros_like(weight_int, dtype=torch.float32)
        self.ema_int = weight_int.to(torch.float32)
        self.frozen = torch.zeros_like(weight_int, dtype=torch.bool)

    @torch.no_grad()
    def update(self, weight_int: Tensor, momentum: float) -> None:
        r"""Advance by one optimizer step (Sec. 4.1).

        .. math::
            \Delta_t = w^t_{int} - w^{t-1}_{int}, \qquad
            o_t = [\Delta_t \ne 0] \wedge [\mathrm{sign}(\Delta_t) \ne \mathrm{sign}(\Delta_\tau)]

            f_t = m \, o_t + (1 - m) f_{t-1}, \qquad
            \mathrm{ema}_t = m \, w^t_{int} + (1 - m) \, \mathrm{ema}_{t-1}

        with :math:`\tau` the step of the last change. A first change has no earlier direction and is no oscillation, as
        in the paper's text and the authors' code. The integer of a frozen weight does not change.

        Args:
            weight_int: Integers after the step, of the dtype and shape of the stored ones.
            momentum: Weight of the new value, m.
        """
        weight_int = torch.where(self.frozen, self.weight_int, weight_int)
        up = weight_int > self.weight_int
        # delta_t is -1, 0 or 1 here: a difference of two int8 integers may not fit in one
        delta = up.to(torch.int8) - (weight_int < self.weight_int).to(torch.int8)
        # opposite signs, neither of them 0
        oscillated = (delta * self.direction) < 0
        self.frequency.lerp_(oscillated.to(self.frequency.dtype), momentum)
        self.ema_int.lerp_(weight_int.to(self.ema_int.dtype), momentum)
        self.direction = torch.where(delta != 0, delta, self.direction)
        self.weight_int = weight_int

    @torch.no_grad()
    def freeze(self, threshold: float) -> None:
        """Freeze the weights that oscillate more often than a threshold, at round(ema_int) (Algorithm 1).

        Args:
            threshold: Frequency above which a weight is frozen, f_th.
        """
        newly_frozen = (self.frequency > threshold) & ~self.frozen
        target = self.ema_int.round().to(self.weight_int.dtype)
        self.weight_int = torch.where(newly_frozen, target, self.weight_int)
        self.frozen = self.frozen | newly_frozen

    @torch.no_grad()
    def hold_frozen(self, weight: Tensor, scale: Tensor) -> None:
        """Put the latent weights that are frozen back at ``s z``, in place, so that they round to their integer.

        Args:
            weight: Latent weights.
            scale: Their scale, which goes on learning, broadcastable against ``weight``.
        """
        held = (scale * self.weight_int).to(weight.dtype)
        weight.copy_(torch.where(self.frozen, held, weight))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow the module to another device, never to another dtype."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name in _TENSORS:
            tensor: Tensor = getattr(self, name)
            moved = fn(tensor)
            setattr(self, name, moved if moved.dtype == tensor.dtype else tensor.to(moved.device))
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in _TENSORS:
            destination[prefix + name] = getattr(self, name)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for name in _TENSORS:
            tensor: Tensor = getattr(self, name)
            saved = state_dict.get(prefix + name)
            if saved is None:
                missing_keys.append(prefix + name)
            elif saved.shape != tensor.shape:
                error_msgs.append(f"size mismatch for {prefix}{name}: {tuple(saved.shape)} != {tuple(tensor.shape)}")
            else:
                setattr(self, name, saved.to(device=tensor.device, dtype=tensor.dtype, copy=True))


@torch.no_grad()
def add_frozen_scale_gradient(state: OscillationState, weight_grad: Tensor, scale_grad: Tensor) -> None:
    r"""Give the scale the gradient that frozen weights owe it, and take theirs, both in place.

    A frozen weight is :math:`w_q = s z` with z constant, so :math:`\partial w_q / \partial s = z` (Sec. 4.3). The
    forward pass knows nothing of that: its latent weight lies at s z, where LSQ gives round(v) - v = 0 and the
    straight-through gradient g arrives in ``weight_grad``. What is missing in ``scale_grad`` is the sum of g z. Where
    s z rounds to just outside the grid, g is 0 there and LSQ's own term is z already. The correction is linear in
    the gradients, so it holds after accumulation, averaging over ranks and unscaling.

    Args:
        state: The weight's oscillation state.
        weight_grad: Gradient of the latent weights; 0 at the frozen ones afterwards.
        scale_grad: Gradient of the scale.
    """
    owed = torch.where(state.frozen, weight_grad, 0.0).to(scale_grad.dtype) * state.weight_int
    scale_grad.add_(sharded_like(owed.sum_to_size(scale_grad.shape), scale_grad))
    weight_grad.masked_fill_(state.frozen, 0.0)
