"""Weight and input quantizers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lightning_qat_osc.config import Granularity
from lightning_qat_osc.functional import fake_quantize, integer_grid, quantize_to_int
from lightning_qat_osc.oscillation import OscillationState
from lightning_qat_osc.ranges import RangeMethod, activation_grid, estimate_scale
from lightning_qat_osc.recomputation import Recipe
from lightning_qat_osc.sharding import copy_full_, full_tensor

__all__ = ["InputQuantizer", "Quantizer", "WeightQuantizer"]


class Quantizer(nn.Module):
    """Quantizer with a learned scale and an integer grid.

    Until it is calibrated, and when ``bits`` is None, it returns its input unchanged. The scale keeps its precision
    when the model is cast to a lower one.

    Attributes:
        scale: Learned step between two grid points, with at least one dimension: FSDP2 refuses scalars.
        bits: Width of the integers, or None for full precision.
        pinned: Whether a rule has set the bits, so that ``first_last_bits`` does not change them.
        quant_min: Smallest integer.
        quant_max: Largest integer.
        zero_point: The integer that stands for 0.0.
        calibrated: Whether the scale and the grid have been set from data.
        stale: Whether the layer's weights have since been loaded from a full-precision state or re-initialized.
        held: While :func:`~lightning_qat_osc.scales.hold_scales` is in effect (outside of fits that train scales, and
            while a sharded checkpoint is restored), whether the layer was "trained" or "frozen" when its scale was set
            to ``requires_grad=False``; None otherwise.
        scale_grad: Gradient of the scale, set aside before gradients are clipped until Adam's step on the scale, so
            that the user's optimizer does not use it.
        fused: Whether to compute with compiled kernels.
        recompute: Whether the layer quantizes again in the backward pass instead of saving the result for it.
    """

    grid: Tensor

    def __init__(self, bits: int | None, scale_shape: Sequence[int], *, pinned: bool = False) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(tuple(scale_shape), dtype=torch.float32))  # whatever the default dtype
        self.bits = self._bits_asked = bits
        self.pinned = pinned
        self.stale = False
        self.held: Literal["trained", "frozen"] | None = None
        self.scale_grad: Tensor | None = None
        self.fused = False
        self.recompute = False
        # a copy of bits and range for checkpoints: a buffer of floats, so that it survives averaging of models
        self.register_buffer("grid", torch.empty(5))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Drop the range. Also called when a module that was created on the meta device is materialized."""
        self.scale.fill_(1.0)
        self.quant_min, self.quant_max, self.zero_point = 0, 0, 0
        self.calibrated = False
        self._write_grid()

    @property
    def active(self) -> bool:
        """Whether the forward pass quantizes."""
        return self.calibrated and self.bits is not None

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize ``x``, of any shape that the scale broadcasts to."""
        return self._quantize(x, self.scale) if self.active else x

    @property
    def hooked(self) -> bool:
        """Whether the quantizer has hooks, so that its call must not be bypassed."""
        hooks = self._forward_hooks, self._forward_pre_hooks, self._backward_hooks, self._backward_pre_hooks
        return any(hooks)

    @property
    def limits(self) -> tuple[int, int]:
        """The smallest and the largest integer minus the zero point, n and p."""
        return self.quant_min - self.zero_point, self.quant_max - self.zero_point

    def _quantize(self, x: Tensor, scale: Tensor) -> Tensor:
        return fake_quantize(x, scale, self.quant_min, self.quant_max, zero_point=self.zero_point, fused=self.fused)

    def recipe(self, x: Tensor) -> Recipe:
        """Return the recipe that quantizes ``x`` again in the backward pass."""
        return Recipe(self._quantize, (x.detach(), self.scale.detach()))

    @torch.no_grad()
    def set_range(self, scale: Tensor, quant_min: int, quant_max: int, zero_point: int = 0) -> None:
        """Set the scale and the grid, and mark the quantizer as calibrated."""
        copy_full_(self.scale, scale.view(self.scale.shape))
        self.quant_min, self.quant_max, self.zero_point = quant_min, quant_max, zero_point
        self.calibrated = True
        self._write_grid()

    def reset(self) -> None:
        """Reset bits and range to the state before calibration."""
        self.bits, self.stale = self._bits_asked, False
        self.reset_parameters()

    def copy_range(self, other: Quantizer) -> None:
        """Copy the bits and the range of another quantizer."""
        self.set_bits(other.bits)
        if other.calibrated:
            self.set_range(full_tensor(other.scale.detach()), other.quant_min, other.quant_max, other.zero_point)

    def set_bits(self, bits: int | None) -> None:
        """Change the bit width, before calibration."""
        self.bits = bits
        self._write_grid()

    @torch.no_grad()
    def _write_grid(self) -> None:
        values = [self.bits or 0, self.quant_min, self.quant_max, self.zero_point, self.calibrated]
        self.grid.copy_(torch.tensor(values, dtype=self.grid.dtype))

    def _read_grid(self) -> None:
        # rounded, because an average of equal numbers can be off by an ulp
        bits, quant_min, quant_max, zero_point, calibrated = (round(value) for value in self.grid.tolist())
        self.bits, self.calibrated = bits or None, bool(calibrated)
        self.quant_min, self.quant_max, self.zero_point = quant_min, quant_max, zero_point

    def extra_repr(self) -> str:
        """Return bits, grid and number of scales."""
        limits = f"[{self.quant_min}, {self.quant_max}], zero_point={self.zero_point}"
        return f"bits={self.bits}, {limits if self.calibrated else 'no range yet'}, scales={self.scale.numel()}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move to another device or a wider dtype with the model, but never to a dtype that would round the scale."""

        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype.itemsize >= tensor.dtype.itemsize else tensor.to(moved.device)

        return super()._apply(keep_precision, recurse)  # type: ignore[no-any-return, no-untyped-call]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load the quantizer if the state_dict contains it."""
        if any(key.startswith(prefix) for key in state_dict):
            if f"{prefix}grid" not in state_dict:
                warnings.warn(
                    f"The state_dict has entries of {prefix.rstrip('.')}, but not its buffer 'grid'. A scale cannot "
                    "be used without it; the next fit sets a new range.",
                    stacklevel=2,
                )
            super()._load_from_state_dict(state_dict, prefix, *args)
            self._read_grid()
            self.stale = False


class WeightQuantizer(Quantizer):
    """Symmetric signed quantizer of a weight, with the oscillation history of its integers once tracking starts.

    Args:
        bits: Width of the integers, 2 to 8.
        weight: The weight, which determines the shape and device of the scale.
        granularity: One scale, or one for each output channel.
        channel_dim: The weight's dimension of output channels.
        method: How the range is initialized.
        pinned: Whether a rule has set the bits.

    Attributes:
        read_outside: Name of a function that calibration has seen read the weight outside of its layer, or None.
    """

    def __init__(
        self,
        bits: int,
        weight: Tensor,
        *,
        granularity: Granularity = "per_tensor",
        channel_dim: int = 0,
        method: RangeMethod = "mse",
        pinned: bool = False,
    ) -> None:
        shape = [1]
        if granularity == "per_channel":
            shape = [1] * weight.dim()
            shape[channel_dim] = weight.shape[channel_dim]
        super().__init__(bits, shape, pinned=pinned)
        self.channel_dim = channel_dim
        self.method = method
        self.read_outside: str | None = None
        self.to(weight.device)

    def reset_parameters(self) -> None:
        """Drop the range and the oscillation history."""
        super().reset_parameters()
        self.oscillation: OscillationState | None = None

    @torch.no_grad()
    def calibrate(self, weight: Tensor) -> str | None:
        """Set the range from the weight.

        Args:
            weight: The latent weight.

        Returns:
            None, or a description of what is wrong with the weight and how the range was set nevertheless.
        """
        assert self.bits is not None
        weight = full_tensor(weight)
        quant_min, quant_max = integer_grid(self.bits, signed=True)
        groups = self.scale.numel()
        rows = weight.detach().movedim(self.channel_dim, 0).reshape(groups, -1) if groups > 1 else weight.reshape(1, -1)
        problem = None
        if not bool(rows.isfinite().all()):
            problem = "its weight contains NaN or inf; its range is set from the finite values"
            rows = rows.nan_to_num(0.0, 0.0, 0.0)
        scale = estimate_scale(rows, quant_min, quant_max, self.method)
        empty = rows.abs().amax(dim=1) == 0
        if bool(empty.any()):
            # the range of torch's default initialization, uniform within 1/sqrt(fan_in), so that training can leave 0
            fan_in = max(1, weight.numel() // weight.shape[self.channel_dim])
            scale = torch.where(empty, 1.0 / (math.sqrt(fan_in) * quant_max), scale)
            which = "its weight is" if groups == 1 else f"{int(empty.sum())} of its {groups} weight channels are"
            problem = (
                problem or f"{which} all zero; the range is set as for torch's default initialization, 1/sqrt(fan_in)"
            )
        self.set_range(scale, quant_min, quant_max)
        return problem

    def to_int(self, weight: Tensor) -> Tensor:
        """Return the integers of a weight, int8."""
        return quantize_to_int(weight, self.scale, self.quant_min, self.quant_max)

    def start_tracking(self, weight: Tensor) -> OscillationState:
        """Return the oscillation history. Create it from the weight's integers if there is none yet.

        An existing history, as from a checkpoint, is kept unless the weight's shape has changed.
        """
        if self.oscillation is None or self.oscillation.weight_int.shape != weight.shape:
            self.oscillation = OscillationState(self.to_int(weight.detach()))
        return self.oscillation

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load the quantizer with its history, or drop the history if the checkpoint is from before tracking."""
        saved = state_dict.get(f"{prefix}oscillation.weight_int")
        if saved is None and f"{prefix}scale" in state_dict:
            self.oscillation = None
        elif saved is not None and self.oscillation is None:
            # a scale on the meta device is about to be replaced by the saved one, so its device does not count
            self.oscillation = OscillationState(saved if self.scale.is_meta else saved.to(self.scale.device))
        super()._load_from_state_dict(state_dict, prefix, *args)


class InputQuantizer(Quantizer):
    """Per-tensor quantizer of a layer's input: unsigned, with a zero point above 0 if the input has negative values.

    Args:
        bits: Width of the integers, 2 to 8.
        method: How the range is initialized.
        device: Device of the scale.
        pinned: Whether a rule has set the bits.
    """

    def __init__(
        self,
        bits: int,
        *,
        method: RangeMethod = "mse",
        device: torch.device | None = None,
        pinned: bool = False,
    ) -> None:
        super().__init__(bits, [1], pinned=pinned)
        self.method = method
        self.to(device)

    @torch.no_grad()
    def calibrate(self, sample: Tensor, low: float, high: float) -> None:
        """Set the grid and the range from observed inputs.

        Args:
            sample: Finite values of the input, 1-dimensional, not all 0.
            low: Smallest value observed.
            high: Largest value observed.
        """
        assert self.bits is not None
        quant_min, quant_max, zero_point = activation_grid(sample, low, high, self.bits, self.method)
        n, p = quant_min - zero_point, quant_max - zero_point
        if self.method == "minmax":
            sample = sample.new_tensor([low, high])  # the extremes of all observed values, not only of the sample
        self.set_range(estimate_scale(sample.reshape(1, -1), n, p, self.method), quant_min, quant_max, zero_point)
