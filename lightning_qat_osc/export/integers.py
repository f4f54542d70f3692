"""The integers of a trained model: its weights as stored integers, and the grids of its inputs as plain numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_qat_osc.checks import check_module
from lightning_qat_osc.functional import quantize_to_int
from lightning_qat_osc.lookup import qualified_name, quantized_layers
from lightning_qat_osc.quantized_layer import QuantizedLayer, latent_weight
from lightning_qat_osc.quantizers import InputQuantizer, WeightQuantizer
from lightning_qat_osc.sharding import full_tensor

__all__ = [
    "InputGrid",
    "IntegerWeight",
    "argument_grids",
    "input_grids",
    "integer_weights",
    "layers_by_every_name",
]


@dataclass(frozen=True, eq=False)
class IntegerWeight:
    """A weight as integers and their step: ``scale * values``, where the integer 0 stands for 0.0.

    Attributes:
        values: The integers, int8, in the shape of the weight.
        scale: Positive steps, broadcastable against ``values``: a single one, or one per index of ``channel_axis``.
        bits: Width of the integers, 2 to 8.
        quant_min: Smallest integer of the grid.
        quant_max: Largest integer of the grid.
        channel_axis: The dimension along which scales differ, or None if there is a single scale.
        dtype: Dtype of the floating-point weight.
    """

    values: Tensor
    scale: Tensor
    bits: int
    quant_min: int
    quant_max: int
    channel_axis: int | None
    dtype: torch.dtype = torch.float32

    def dequantize(self) -> Tensor:
        """Return the weight that the quantized layer computed with, bit for bit, except that every zero is +0.0."""
        wide = torch.promote_types(self.scale.dtype, self.dtype)  # as fake_quantize multiplies and rounds
        return (self.values.to(wide) * self.scale).to(self.dtype)


@dataclass(frozen=True)
class InputGrid:
    """The grid of a layer's input: ``scale * (integer - zero_point)``.

    Attributes:
        scale: Step between two grid points.
        zero_point: The integer that stands for 0.0.
        quant_min: Smallest integer.
        quant_max: Largest integer.
        bits: Width of the integers, 2 to 8.
        dtype: Dtype of the scale, and the narrowest one that the arithmetic uses.
    """

    scale: float
    zero_point: int
    quant_min: int
    quant_max: int
    bits: int
    dtype: torch.dtype = torch.float32


def layers_by_every_name(module: nn.Module) -> dict[str, QuantizedLayer]:
    """Return the quantized layers of a model by name; a layer with several names is listed under each of them."""
    found = set(quantized_layers(module).values())
    every = module.named_modules(remove_duplicate=False)
    return {name: layer for name, layer in every if isinstance(layer, QuantizedLayer) and layer in found}


@torch.no_grad()
def integer_weights(module: nn.Module) -> dict[str, IntegerWeight]:
    """Return the integers of every weight that a model currently quantizes.

    A frozen weight has the integer at which it was frozen, since freezing holds its latent value there.

    Args:
        module: A model with quantizers.

    Returns:
        Key of the parameter in the float model's state_dict, such as ``conv1.weight`` -> its integers. A weight that
        layers share is one object under each of its names. A weight that a layer computes from other parameters (a
        parametrization, pruning) is included under the name by which the layer reads it.

    Raises:
        ValueError: If a weight contains NaN, or its scale is not positive and finite.
    """
    check_module("module", module)
    found: dict[tuple[WeightQuantizer, Tensor | QuantizedLayer], IntegerWeight] = {}
    weights = {}
    for name, layer in layers_by_every_name(module).items():
        for parameter, quantizer in layer.weight_quantizers().items():
            if not quantizer.active:
                continue
            shared = layer._parameters.get(parameter)
            key = (quantizer, layer if shared is None else shared)
            if key not in found:
                weight = full_tensor(latent_weight(layer, parameter)).detach()
                found[key] = _integers(qualified_name(name, parameter), weight, quantizer)
            weights[qualified_name(name, parameter)] = found[key]
    return weights


def _integers(name: str, weight: Tensor, quantizer: WeightQuantizer) -> IntegerWeight:
    assert quantizer.bits is not None
    scale = full_tensor(quantizer.scale).detach().clone()
    if bool(weight.isnan().any()):
        raise ValueError(f"weight '{name}' must not contain NaN to be converted to integers")
    if not bool((scale.isfinite() & (scale > 0)).all()):
        raise ValueError(f"the scale of weight '{name}' must be positive and finite, got {scale.flatten().tolist()}")
    per_channel = scale.dim() > 1 or scale.numel() > 1
    return IntegerWeight(
        values=quantize_to_int(weight, scale, quantizer.quant_min, quantizer.quant_max),
        scale=scale,
        bits=quantizer.bits,
        quant_min=quantizer.quant_min,
        quant_max=quantizer.quant_max,
        channel_axis=quantizer.channel_dim if per_channel else None,
        dtype=weight.dtype,
    )


def input_grids(module: nn.Module) -> dict[str, dict[str, InputGrid]]:
    """Return the grids of all inputs that a model currently quantizes.

    Args:
        module: A model with quantizers.

    Returns:
        Layer name -> name of an argument of its forward -> grid, in the order of the arguments. Layers without
        quantized inputs are left out.
    """
    check_module("module", module)
    found = {
        name: {argument: grid for argument, grid in argument_grids(layer) if grid is not None}
        for name, layer in layers_by_every_name(module).items()
    }
    return {name: grids for name, grids in found.items() if grids}


def argument_grids(layer: QuantizedLayer) -> Iterator[tuple[str, InputGrid | None]]:
    """Yield the name and grid of a layer's quantizable arguments, in order; the grid is None for full precision."""
    for argument, quantizer in layer.input_quantizers().items():
        yield argument, _grid(quantizer) if quantizer.active else None


def _grid(quantizer: InputQuantizer) -> InputGrid:
    assert quantizer.bits is not None
    scale = full_tensor(quantizer.scale).detach()
    return InputGrid(
        scale=scale.item(),
        zero_point=quantizer.zero_point,
        quant_min=quantizer.quant_min,
        quant_max=quantizer.quant_max,
        bits=quantizer.bits,
        dtype=scale.dtype,
    )
