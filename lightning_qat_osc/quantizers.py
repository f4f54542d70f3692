"""Weight and input quantizers, and the quantized form of a layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lightning_qat_osc.config import Granularity, QuantConfig
from lightning_qat_osc.functional import fake_quantize, integer_grid, quantize_to_int
from lightning_qat_osc.oscillation import OscillationState
from lightning_qat_osc.ranges import RangeMethod, activation_grid, estimate_scale

__all__ = ["InputQuantizer", "QuantizedLayer", "Quantizer", "WeightQuantizer", "quantized_class"]

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


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
        scale_grad: Gradient of the scale between the moment it is taken out of the optimizer's sight and the step.
    """

    grid: Tensor

    def __init__(self, bits: int | None, scale_shape: Sequence[int], *, pinned: bool = False) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(tuple(scale_shape)))
        self.bits = bits
        self.pinned = pinned
        self.quant_min, self.quant_max, self.zero_point = 0, 0, 0
        self.calibrated = False
        self.scale_grad: Tensor | None = None
        # the five above once more, for the checkpoint. As a buffer of floats it survives averaged copies of the model.
        self.register_buffer("grid", torch.zeros(5))
        self._write_grid()

    @property
    def active(self) -> bool:
        """Whether the forward pass quantizes."""
        return self.calibrated and self.bits is not None

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize ``x``, of any shape that the scale broadcasts against."""
        if not self.active:
            return x
        return fake_quantize(x, self.scale, self.quant_min, self.quant_max, self.zero_point)

    @torch.no_grad()
    def set_range(self, scale: Tensor, quant_min: int, quant_max: int, zero_point: int = 0) -> None:
        """Set the scale and the grid, and quantize from now on."""
        self.scale.copy_(scale.view_as(self.scale))
        self.quant_min, self.quant_max, self.zero_point = quant_min, quant_max, zero_point
        self.calibrated = True
        self._write_grid()

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
        """Load the quantizer if the checkpoint has it; a full-precision one leaves it to be calibrated."""
        if any(key.startswith(prefix) for key in state_dict):
            super()._load_from_state_dict(state_dict, prefix, *args)
            self._read_grid()


class WeightQuantizer(Quantizer):
    """Symmetric signed quantizer of a weight, with the oscillation history of its integers once it is tracked.

    Args:
        bits: Width of the integers, 2 to 8.
        weight: The weight, for its shape and device.
        granularity: One scale, or one for each output channel.
        channel_dim: The weight's dimension of output channels.
        method: How the range is initialised.
        pinned: Whether a rule has set the bits.
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
        self.oscillation: OscillationState | None = None
        self.to(weight.device)

    @torch.no_grad()
    def calibrate(self, weight: Tensor) -> str | None:
        """Set the range from the weight.

        Args:
            weight: The latent weight.

        Returns:
            None, or what was wrong with the weight and what was done about it.
        """
        assert self.bits is not None
        quant_min, quant_max = integer_grid(self.bits, signed=True)
        groups = self.scale.numel()
        rows = weight.detach().movedim(self.channel_dim, 0).reshape(groups, -1) if groups > 1 else weight.reshape(1, -1)
        word = None
        if not bool(rows.isfinite().all()):
            word = "its weight holds NaN or inf; its range comes from the finite values"
            rows = rows.nan_to_num(0.0, 0.0, 0.0)
        scale = estimate_scale(rows, quant_min, quant_max, self.method)
        empty = rows.abs().amax(dim=1) == 0
        if bool(empty.any()):
            # as if drawn by torch's default initialisation, uniform within 1/sqrt(fan_in), so that training can leave 0
            fan_in = max(1, weight.numel() // weight.shape[self.channel_dim])
            scale = torch.where(empty, 1.0 / (math.sqrt(fan_in) * quant_max), scale)
            which = "its weight is" if groups == 1 else f"{int(empty.sum())} of its {groups} weight channels are"
            word = word or f"{which} all zero; the range is that of torch's default initialisation, 1/sqrt(fan_in)"
        self.set_range(scale, quant_min, quant_max)
        return word

    def to_int(self, weight: Tensor) -> Tensor:
        """The integers of a weight, int8."""
        return quantize_to_int(weight, self.scale, self.quant_min, self.quant_max)

    def start_tracking(self, weight: Tensor) -> OscillationState:
        """Begin the oscillation history from the weight's integers, or go on with the one that a checkpoint brought."""
        if self.oscillation is None:
            self.oscillation = OscillationState(self.to_int(weight.detach()))
        return self.oscillation

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load the history with the quantizer, or begin without one if the checkpoint was made before tracking."""
        saved = state_dict.get(f"{prefix}oscillation.weight_int")
        if saved is None:
            self.oscillation = None
        elif self.oscillation is None:
            self.oscillation = OscillationState(saved.to(self.scale.device))
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
        self.set_range(estimate_scale(sample.reshape(1, -1), n, p, self.method), quant_min, quant_max, zero_point)


class QuantizedLayer(nn.Module):
    """What :func:`quantized_class` adds to a layer's class: two child modules, and a forward that calls them.

    The layer keeps its own parameters and their names, so that checkpoints of the float model load, and its own
    forward, which sees the quantized weight where it reads ``self.weight``. Everyone else sees the latent weight.

    Attributes:
        weight: The latent weight.
        quant_config: What was asked for when the quantizers were inserted.
        weight_quantizer: Quantizer of the weight, or None. Layers that share a weight share it.
        input_quantizer: Quantizer of the first argument of ``forward``, or None.
    """

    weight: nn.Parameter
    quant_config: QuantConfig
    weight_quantizer: WeightQuantizer | None
    input_quantizer: InputQuantizer | None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Quantize the input and the weight, then run the layer's own forward on them."""
        if self.input_quantizer is not None:
            if args:
                args = (self.input_quantizer(args[0]), *args[1:])
            else:
                name = next(iter(kwargs))
                kwargs[name] = self.input_quantizer(kwargs[name])
        weight = self.weight
        if self.weight_quantizer is not None:
            weight = cast(nn.Parameter, self.weight_quantizer(weight))
        for quantizer in (self.weight_quantizer, self.input_quantizer):
            if quantizer is not None and not quantizer.active:
                # DDP waits for a gradient of every parameter, also of a scale that is not in use: it gets 0
                weight = cast(nn.Parameter, weight + 0.0 * quantizer.scale.sum())
        # an instance attribute comes before nn.Module's look-up of the parameter of that name
        self.__dict__["weight"] = weight
        try:
            return super().forward(*args, **kwargs)
        finally:
            del self.__dict__["weight"]

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by the layer's own class: the quantized one is made at run time."""
        return _new_quantized, (float_class(self),), self.__dict__


def quantized_class(layer_class: type[nn.Module]) -> type[nn.Module]:
    """The quantized form of a layer's class: a subclass of it whose forward is :meth:`QuantizedLayer.forward`.

    Args:
        layer_class: Class of a layer with a ``weight``.

    Returns:
        The same class for the same argument.
    """
    return _make_class(cast(Any, layer_class))


@cache
def _make_class(layer_class: Any) -> type[nn.Module]:
    attributes = {"__module__": layer_class.__module__, "__doc__": layer_class.__doc__}
    return type(f"Quantized{layer_class.__name__}", (QuantizedLayer, layer_class), attributes)


def float_class(layer: nn.Module) -> type[nn.Module]:
    """The class that a quantized layer had before."""
    original: type[nn.Module] = type(layer).__mro__[2]  # after the quantized class and QuantizedLayer
    return original


def _new_quantized(layer_class: type[nn.Module]) -> nn.Module:
    quantized = quantized_class(layer_class)
    return quantized.__new__(quantized)


def output_channel_dim(layer: nn.Module) -> int:
    """Dimension of a layer's weight that holds the output channels (for transposed convolutions those of a group)."""
    return 1 if isinstance(layer, _TRANSPOSED) else 0
