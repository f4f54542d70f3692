"""Oscillations of quantized weights: the state that is kept for each weight, and how a step updates it.

Source of every equation: Nagel et al., *Overcoming Oscillations in Quantization-Aware Training*, ICML 2022,
arXiv 2203.11086, Secs. 4.1 and 4.3 and Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lightning_qat_osc.kernels import Limit
from lightning_qat_osc.sharding import sharded_like

__all__ = ["OscillationState", "advance", "pass_on_gradient"]

_TENSORS = ("weight_int", "direction", "frequency", "ema_int", "frozen")


class OscillationState(nn.Module):
    """Oscillation history of one weight tensor, updated once per optimizer step. It takes 11 bytes per weight.

    Its tensors are moved, loaded and saved with the module that holds them, but are not buffers: every DDP rank
    computes identical values, so they need no broadcast, and an exponential moving average of the model must not
    average them. Floating-point tensors stay in float32, whatever precision the model trains in.

    Args:
        weight_int: Integers of the weights before the first step, int8, in the shape of the weight.

    Attributes:
        weight_int: Integers after the last step, int8.
        direction: Sign of the last change of each integer, int8; 0 before any change.
        frequency: Exponential moving average of the oscillations, f, in oscillations per step.
        ema_int: Exponential moving average of the integers.
        frozen: Whether the integer stays fixed for the rest of training, bool.
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

        with :math:`\tau` the step of the last change. The first change has no earlier direction, so it is not an
        oscillation, as in the paper's text and the authors' code. The integer of a frozen weight does not change.

        Args:
            weight_int: Integers after the step, with the dtype and shape of the stored ones.
            momentum: Weight of the new value, m.
        """
        z, frozen = weight_int.float(), self.frozen.float()
        _track(z, self.weight_int, self.direction, self.frequency, self.ema_int, frozen, momentum)

    @torch.no_grad()
    def freeze(self, threshold: float) -> None:
        """Freeze weights that oscillate more often than a threshold, at round(ema_int) (Algorithm 1).

        Args:
            threshold: Frequency above which a weight is frozen, f_th.
        """
        z, frozen = self.weight_int.float(), self.frozen.float()
        _freeze(z, self.weight_int, self.frequency, self.ema_int, frozen, threshold)
        self.frozen.copy_(frozen)

    @torch.no_grad()
    def hold_frozen(self, weight: Tensor, scale: Tensor) -> None:
        """Reset frozen latent weights to ``s z`` in place, so that they round to their integer z.

        Args:
            weight: Latent weights.
            scale: Their scale, which is still trained, broadcastable against ``weight``.
        """
        held = (scale * self.weight_int).to(weight.dtype)
        weight.copy_(torch.where(self.frozen, held, weight))

    @torch.no_grad()
    def restart_where_moved(self, weight_int: Tensor) -> None:
        """Reset the history of weights whose integers have changed without an update, as in a fit without tracking.

        Args:
            weight_int: Current integers, with the dtype and shape of the stored ones.
        """
        moved = weight_int != self.weight_int
        self.ema_int.copy_(torch.where(moved, weight_int.float(), self.ema_int))
        self.weight_int.copy_(weight_int)
        for of_the_past in (self.direction, self.frequency, self.frozen):
            of_the_past.mul_(~moved)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the tensors to another device with the module, but keep their dtypes."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name in _TENSORS:
            tensor: Tensor = getattr(self, name)
            moved = fn(tensor)
            setattr(self, name, moved if moved.dtype == tensor.dtype else tensor.to(moved.device))
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Copy tensors out of shared memory in a spawned process. Lightning does so for parameters and buffers only."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for name in _TENSORS:
            tensor: Tensor = getattr(self, name)
            if tensor.is_cpu and tensor.is_shared():  # type: ignore[no-untyped-call]
                setattr(self, name, tensor.clone())

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in _TENSORS:
            tensor: Tensor = getattr(self, name)
            # several states may share one storage: save only the part of this one
            shares = tensor.untyped_storage().nbytes() > tensor.nbytes
            destination[prefix + name] = tensor.clone() if shares else tensor

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
        if prefix and not any(key.startswith(prefix) for key in state_dict):
            return  # the state of a full-precision model, or one saved before tracking began
        for name in _TENSORS:
            tensor: Tensor = getattr(self, name)
            saved = state_dict.get(prefix + name)
            if saved is None:
                missing_keys.append(prefix + name)
            elif saved.shape != tensor.shape:
                error_msgs.append(f"size mismatch for {prefix}{name}: {tuple(saved.shape)} != {tuple(tensor.shape)}")
            else:
                setattr(self, name, saved.to(device=tensor.device, dtype=tensor.dtype, copy=True))


def _whole() -> torch.dtype:
    """Return the dtype for whole numbers: in compiled CPU code, minima and conversions of integers cost less."""
    return torch.int32 if torch.compiler.is_compiling() else torch.float32


def _move(old: Tensor, share: Tensor | float, new: Tensor) -> None:
    """Move ``old`` a share of the way to ``new``, in place. Whole numbers move by a share of 0 or 1, exactly."""
    if not torch.compiler.is_compiling():
        old.lerp_(new, share)  # in one pass
    elif old.is_floating_point():
        old.add_(share * (new - old))
    else:
        old.bitwise_xor_((old ^ new) & -share)  # -1 has all bits set and 0 none; integer products are slow


def _hold(weight: Tensor, frozen: Tensor, at: Tensor) -> None:
    """Set the weights to ``at`` where ``frozen`` is 1, in place."""
    if torch.compiler.is_compiling():
        weight.copy_(torch.where(frozen > 0, at, weight))
    else:
        weight.lerp_(at, frozen.to(weight.dtype))  # no mask, which is slow on CPUs; exact at 0 and 1


def _track(
    z: Tensor,
    weight_int: Tensor,
    direction: Tensor,
    frequency: Tensor,
    ema_int: Tensor,
    frozen: Tensor,
    momentum: Tensor | float,
) -> None:
    """Apply Sec. 4.1 in place. ``z``: the integers after the step; ``frozen``: 0 or 1; both of the same dtype."""
    before = weight_int.to(z.dtype)
    _move(z, frozen, before)
    delta = z.sub(before).clamp_(-1, 1)  # the sign, since it is a difference of integers
    last = direction.to(z.dtype)
    oscillated = (delta * last).clamp_(max=0).neg_()  # 1 for opposite signs, neither of which is 0
    _move(frequency, momentum, oscillated.to(frequency.dtype))
    _move(ema_int, momentum, z.to(ema_int.dtype))
    _move(last, delta.abs(), delta)
    weight_int.copy_(z)
    direction.copy_(last)


def _freeze(
    z: Tensor, weight_int: Tensor, frequency: Tensor, ema_int: Tensor, frozen: Tensor, threshold: Tensor | float
) -> None:
    """Apply the freezing of Algorithm 1 in place. ``z`` and ``frozen`` are as in :func:`_track`."""
    above = frequency.clone().gt_(threshold)  # in place, to get numbers instead of a mask
    newly_frozen = above.to(z.dtype).sub_(frozen).clamp_(min=0)
    _move(z, newly_frozen, ema_int.round().to(z.dtype))
    frozen.add_(newly_frozen)
    weight_int.copy_(z)


def advance(
    scale: Tensor,
    weight: Tensor,
    weight_int: Tensor,
    direction: Tensor,
    frequency: Tensor,
    ema_int: Tensor,
    frozen: Tensor,
    momentum: Tensor | float,
    threshold: Tensor | float | None,
    quant_min: Limit,
    quant_max: Limit,
) -> None:
    """Advance an :class:`OscillationState` by one step in place: ``update``, then ``freeze`` and ``hold_frozen``.

    Args:
        scale: Scale of the weights after the step, broadcastable against them.
        weight: Latent weights after the step.
        weight_int: ``weight_int`` of the state.
        direction: ``direction`` of the state.
        frequency: ``frequency`` of the state.
        ema_int: ``ema_int`` of the state.
        frozen: ``frozen`` of the state, or the same as numbers 0 and 1.
        momentum: Weight of the new value, m; a tensor without dimensions for compiled kernels.
        threshold: Frequency above which a weight is frozen; a tensor for compiled kernels, like ``momentum``. None
            neither freezes weights nor holds frozen ones.
        quant_min: Smallest integer.
        quant_max: Largest integer.
    """
    z = (weight / scale).round_().clamp_(quant_min, quant_max).to(_whole())
    held = frozen.to(z.dtype)
    _track(z, weight_int, direction, frequency, ema_int, held, momentum)
    if threshold is not None:
        _freeze(z, weight_int, frequency, ema_int, held, threshold)
        frozen.copy_(held)
        _hold(weight, held, (scale * z.to(frequency.dtype)).to(weight.dtype))


def pass_on_gradient(scale_grad: Tensor, weight_grad: Tensor, weight_int: Tensor, frozen: Tensor) -> None:
    r"""Pass the gradient of frozen weights on to their scale, and set theirs to 0, both in place.

    A frozen weight is :math:`w_q = s z` with z constant, so :math:`\partial w_q / \partial s = z` (Sec. 4.3). The
    forward pass does not account for this: the latent weight lies at s z, where LSQ's term round(v) - v is 0 and the
    straight-through gradient g arrives in ``weight_grad``. So ``scale_grad`` lacks the sum of g z, which is added here.
    Where rounding errors put s z just outside the grid, g is 0 and LSQ's term already is z. The correction is linear in
    the gradients, so it remains valid after accumulation, averaging over ranks and unscaling.

    Args:
        scale_grad: Gradient of the scale, in the shape of the scale or of the weights.
        weight_grad: Gradient of the latent weights; afterwards 0 for frozen weights.
        weight_int: ``weight_int`` of the state.
        frozen: ``frozen`` of the state, or the same as numbers 0 and 1.
    """
    of_frozen = weight_grad * frozen.to(scale_grad.dtype)
    weight_grad.sub_(of_frozen)
    owed = of_frozen.mul_(weight_int.to(of_frozen.dtype)).sum_to_size(scale_grad.shape)
    scale_grad.add_(sharded_like(owed, scale_grad))
