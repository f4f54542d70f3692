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
from lightning_qat_osc.sharding import copy_whole_, whole

__all__ = ["InputQuantizer", "Quantizer", "WeightQuantizer"]


class Quantizer(nn.Module):
    """A learned scale and the integer grid that it stretches.

    Until it is calibrated, and with ``bits`` None, it returns what it is given. The scale keeps its precision when the
    model is cast to a lower one.

    Attributes:
        scale: Learned step between two grid points, with at least one dimension: FSDP2 refuses scalars.
        bits: Width of the integers, or None for full precision.
        pinned: Whether a rule has set the bits, so that being the first or last layer does not.
        quant_min: Smallest integer.
        quant_max: Largest integer.
        zero_point: The integer that stands for 0.0.
        calibrated: Whether the scale and the grid have been set from data.
        stale: Whether its layer's weights have since come from a state in full precision, or been drawn anew.
        held: None, or, while its scale wants no gradient because nobody trains it, what its layer was before.
        scale_grad: Gradient of the scale between the moment it is taken out of the optimizer's sight and the step.
        fused: Whether to compute with compiled kernels.
        recompute: Whether its layer quantizes again in the backward pass instead of keeping the result for it.
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
        # bits and range once more, for the checkpoint. As a buffer of floats it survives averaged copies of the model.
        self.register_buffer("grid", torch.empty(5))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Be without a range again, as where a module that was made on the meta device gets its memory."""
        self.scale.fill_(1.0)
        self.quant_min, self.quant_max, self.zero_point = 0, 0, 0
        self.calibrated = False
        self._write_grid()

    @property
    def active(self) -> bool:
        """Whether the forward pass quantizes."""
        return self.calibrated and self.bits is not None

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize ``x``, of any shape that the scale broadcasts against."""
        return self._quantize(x, self.scale) if self.active else x

    @property
    def hooked(self) -> bool:
        """Whether somebody watches its calls, which then have to be made."""
        hooks = self._forward_hooks, self._forward_pre_hooks, self._backward_hooks, self._backward_pre_hooks
        return any(hooks)

    @property
    def limits(self) -> tuple[int, int]:
        """The smallest and the largest integer counted from the zero point, n and p."""
        return self.quant_min - self.zero_point, self.quant_max - self.zero_point

    def _quantize(self, x: Tensor, scale: Tensor) -> Tensor:
        return fake_quantize(x, scale, self.quant_min, self.quant_max, zero_point=self.zero_point, fused=self.fused)

    def recipe(self, x: Tensor) -> Recipe:
        """How ``x`` is quantized."""
        return Recipe(self._quantize, (x.detach(), self.scale.detach()))

    @torch.no_grad()
    def set_range(self, scale: Tensor, quant_min: int, quant_max: int, zero_point: int = 0) -> None:
        """Set the scale and the grid, and quantize from now on."""
        copy_whole_(self.scale, scale.view(self.scale.shape))
        self.quant_min, self.quant_max, self.zero_point = quant_min, quant_max, zero_point
        self.calibrated = True
        self._write_grid()

    def begin_anew(self) -> None:
        """Be as it was made: to be calibrated."""
        self.bits, self.stale = self._bits_asked, False
        self.reset_parameters()

    def take_over(self, other: Quantizer) -> None:
        """Have the bits and the range of another quantizer."""
        self.set_bits(other.bits)
        if other.calibrated:
            self.set_range(whole(other.scale.detach()), other.quant_min, other.quant_max, other.zero_point)

    def set_bits(self, bits: int | None) -> None:
        """Change the width, before calibration."""
        self.bits = bits
        self._write_grid()

    @torch.no_grad()
    def _write_grid(self) -> None:
        values = [self.bits or 0, self.quant_min, self.quant_max, self.zero_point, self.calibrated]
        self.grid.copy_(torch.tensor(values, dtype=self.grid.dtype))

    def _read_grid(self) -> None:
        # rounded: an average of equal numbers is off by an ulp
        bits, quant_min, quant_max, zero_point, calibrated = (round(value) for value in self.grid.tolist())
        self.bits, self.calibrated = bits or None, bool(calibrated)
        self.quant_min, self.quant_max, self.zero_point = quant_min, quant_max, zero_point

    def extra_repr(self) -> str:
        """Bits, grid and number of scales."""
        limits = f"[{self.quant_min}, {self.quant_max}], zero_point={self.zero_point}"
        return f"bits={self.bits}, {limits if self.calibrated else 'no range yet'}, scales={self.scale.numel()}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow the model to another device or a wider dtype, never to one that would round the scale."""

        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype.itemsize >= tensor.dtype.itemsize else tensor.to(moved.device)

        return super()._apply(keep_precision, recurse)  # type: ignore[no-any-return, no-untyped-call]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load the quantizer, if the checkpoint has it."""
        if any(key.startswith(prefix) for key in state_dict):
            if f"{prefix}grid" not in state_dict:
                warnings.warn(
                    f"The state has a part of {prefix.rstrip('.')}, but not its grid, which is a buffer: without it a "
                    "scale is worth nothing, and the next fit sets a new one.",
                    stacklevel=2,
                )
            super()._load_from_state_dict(state_dict, prefix, *args)
            self._read_grid()
            self.stale = False


class WeightQuantizer(Quantizer):
    """Symmetric signed quantizer of a weight, with the oscillation history of its integers once it is tracked.

    Args:
        bits: Width of the integers, 2 to 8.
        weight: The weight, for its shape and device.
        granularity: One scale, or one for each output channel.
        channel_dim: The weight's dimension of output channels.
        method: How the range is initialised.
        pinned: Whether a rule has set the bits.

    Attributes:
        read_outside: The function that reads the weight outside of its layer, where calibration has seen one.
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
        """Be without a range and a history again."""
        super().reset_parameters()
        self.oscillation: OscillationState | None = None

    @torch.no_grad()
    def calibrate(self, weight: Tensor) -> str | None:
        """Set the range from the weight.

        Args:
            weight: The latent weight.

        Returns:
            None, or what was wrong with the weight and what was done about it.
        """
        assert self.bits is not None
        weight = whole(weight)
        quant_min, quant_max = integer_grid(self.bits, signed=True)
        groups = self.scale.numel()
        rows = weight.detach().movedim(self.channel_dim, 0).reshape(groups, -1) if groups > 1 else weight.reshape(1, -1)
        problem = None
        if not bool(rows.isfinite().all()):
            problem = "its weight holds NaN or inf; its range comes from the finite values"
            rows = rows.nan_to_num(0.0, 0.0, 0.0)
        scale = estimate_scale(rows, quant_min, quant_max, self.method)
        empty = rows.abs().amax(dim=1) == 0
        if bool(empty.any()):
            # as if drawn by torch's default initialisation, uniform within 1/sqrt(fan_in), so that training can leave 0
            fan_in = max(1, weight.numel() // weight.shape[self.channel_dim])
            scale = torch.where(empty, 1.0 / (math.sqrt(fan_in) * quant_max), scale)
            which = "its weight is" if groups == 1 else f"{int(empty.sum())} of its {groups} weight channels are"
            problem = (
                problem or f"{which} all zero; the range is that of torch's default initialisation, 1/sqrt(fan_in)"
            )
        self.set_range(scale, quant_min, quant_max)
        return problem

    def to_int(self, weight: Tensor) -> Tensor:
        """The integers of a weight, int8."""
        return quantize_to_int(weight, self.scale, self.quant_min, self.quant_max)

    def start_tracking(self, weight: Tensor) -> OscillationState:
        """Begin the oscillation history from the weight's integers, or go on with the one that a checkpoint brought.

        A weight that has grown begins anew.
        """
        if self.oscillation is None or self.oscillation.weight_int.shape != weight.shape:
            self.oscillation = OscillationState(self.to_int(weight.detach()))
        return self.oscillation

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load the history with the quantizer, or begin without one if the checkpoint was made before tracking."""
        saved = state_dict.get(f"{prefix}oscillation.weight_int")
        if saved is None and f"{prefix}scale" in state_dict:
            self.oscillation = None
        elif saved is not None and self.oscillation is None:
            # a scale without memory is about to be the saved one
            self.oscillation = OscillationState(saved if self.scale.is_meta else saved.to(self.scale.device))
        super()._load_from_state_dict(state_dict, prefix, *args)


class InputQuantizer(Quantizer):
    """Quantizer of a layer's input, per tensor: unsigned where the input is non-negative, else with a zero point.

    Args:
        bits: Width of the integers, 2 to 8.
        method: How the range is initialised.
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
            sample = sample.new_tensor([low, high])  # the extremes of all values, not of a sample
        self.set_range(estimate_scale(sample.reshape(1, -1), n, p, self.method), quant_min, quant_max, zero_point)
