"""The quantization plan: what is quantized, and how, as a text table and as data for YAML."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest

from torch import nn

from lightning_qat_osc.checks import check_module
from lightning_qat_osc.layers import weight_names
from lightning_qat_osc.lookup import quantized_layers
from lightning_qat_osc.quantized_layer import QuantizedLayer, latent_weight
from lightning_qat_osc.quantizers import InputQuantizer, WeightQuantizer
from lightning_qat_osc.sharding import full_tensor
from lightning_qat_osc.tables import table

__all__ = ["LayerPlan", "format_plan", "quantization_plan"]


@dataclass(frozen=True)
class LayerPlan:
    """One line of the quantization plan.

    Attributes:
        layer: Name of the layer.
        type: Its class.
        shape: Shape of its weight; empty if the line is only for a further input.
        weight_bits: Bits of the weight, None for full precision.
        weight_scale: Scale of the weight; with one scale per channel, their mean.
        activation_bits: Bits of the input, None for full precision.
        activation_scale: Scale of the input.
        activation_range: The smallest and the largest input value that the grid represents.
    """

    layer: str
    type: str
    shape: list[int]
    weight_bits: int | None
    weight_scale: float | None
    activation_bits: int | None
    activation_scale: float | None
    activation_range: list[float] | None


def quantization_plan(module: nn.Module) -> list[LayerPlan]:
    """Return what is quantized, and how, in the order of the model's layers.

    A layer with several weights or inputs has a line for each. Lines after the first are named ``layer.parameter``, or
    ``layer.argument`` if only an input is left. If weights are sharded, every rank must call this function.

    Args:
        module: A quantized model. Before its ranges are set, scales and activation ranges are None.

    Returns:
        A line for each layer, whose fields :class:`LayerPlan` describes.

    Raises:
        TypeError: If ``module`` is not a module.
    """
    check_module("module", module)
    lines = []
    for name, layer in quantized_layers(module).items():
        weights = {key: q if q.active else None for key, q in layer.weight_quantizers().items()}
        inputs = {key: q for key, q in layer.input_quantizers().items() if q.active}
        parameters = list(weights) or [weight_names(layer)[0]]
        for i, (parameter, argument) in enumerate(zip_longest(parameters, inputs)):
            line = name if i == 0 else f"{name}.{parameter or argument}"
            lines.append(_line(line, layer, parameter, weights.get(parameter), inputs.get(argument)))
    return lines


def _line(
    name: str, layer: QuantizedLayer, parameter: str | None, w: WeightQuantizer | None, x: InputQuantizer | None
) -> LayerPlan:
    scale = reach = None
    if x is not None:
        scale = full_tensor(x.scale).item()
        reach = [(x.quant_min - x.zero_point) * scale, (x.quant_max - x.zero_point) * scale]
    return LayerPlan(
        layer=name,
        type=layer.float_class.__name__,
        shape=[] if parameter is None else list(latent_weight(layer, parameter).shape),
        weight_bits=None if w is None else w.bits,
        weight_scale=None if w is None else full_tensor(w.scale).detach().mean().item(),
        activation_bits=None if x is None else x.bits,
        activation_scale=scale,
        activation_range=reach,
    )


def format_plan(plan: list[LayerPlan]) -> str:
    """Format a quantization plan as a text table."""

    def text(value: float | int | None, form: str = "") -> str:
        return "full" if value is None else format(value, form)

    rows = [("layer", "type", "weight", "W bits", "W scale", "A bits", "A range")]
    for p in plan:
        reach = "" if p.activation_range is None else f"[{p.activation_range[0]:.3g}, {p.activation_range[1]:.3g}]"
        scale = "" if p.weight_scale is None else f"{p.weight_scale:.3g}"
        shape = "x".join(map(str, p.shape))
        rows.append((p.layer, p.type, shape, text(p.weight_bits), scale, text(p.activation_bits), reach))
    return table(rows)
