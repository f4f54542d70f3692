"""Ways to look at a quantized model: its layers, weights, quantizers, scales and oscillation histories, by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn
from torchmetrics import Metric

from lightning_qat_osc.checks import check_module
from lightning_qat_osc.oscillation import OscillationState
from lightning_qat_osc.quantized_layer import QuantizedLayer
from lightning_qat_osc.quantizers import Quantizer, WeightQuantizer

__all__ = [
    "QuantizedWeight",
    "computed_weights",
    "is_quantized",
    "model_modules",
    "oscillation_states",
    "own_parameters",
    "qualified",
    "quantized_layers",
    "quantized_weights",
    "quantizers",
    "scale_parameters",
    "weight_name",
    "weights_with_quantizers",
]


class QuantizedWeight(NamedTuple):
    """A parameter that is quantized now: its name, its latent values and its quantizer."""

    name: str
    weight: nn.Parameter
    quantizer: WeightQuantizer


def model_modules(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every submodule with its name, without the networks inside torchmetrics Metrics, which are not the model's."""
    of_metrics: set[nn.Module] = set()
    for name, child in module.named_modules():
        if isinstance(child, Metric):
            of_metrics.update(child.modules())
        if child not in of_metrics:
            yield name, child


def quantized_layers(module: nn.Module) -> dict[str, QuantizedLayer]:
    """The layers of a model that have quantizers, by name."""
    return {name: layer for name, layer in model_modules(module) if isinstance(layer, QuantizedLayer)}


def own_parameters(layer: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of a layer and what is in it, but for scales."""
    scales = {id(q.scale) for q in layer.modules() if isinstance(q, Quantizer)}
    return (p for p in layer.parameters() if id(p) not in scales)


def qualified(name: str, inside: str) -> str:
    """The name of something in a submodule, such as the key of its parameter in a state_dict."""
    return f"{name}.{inside}" if name else inside


def weight_name(layer: str, parameter: str) -> str:
    """What a weight is called: by its layer, and where its layer has several by its own name too."""
    return layer if parameter == "weight" else f"{layer}.{parameter}"


def quantized_weights(module: nn.Module, max_bits: int = 8) -> list[QuantizedWeight]:
    """The weights of a model that are quantized to at most ``max_bits`` bits.

    A weight that its layer computes from other parameters (a parametrization, pruning) is no parameter, and not here.
    """
    return [w for w in weights_with_quantizers(module) if is_quantized(w.quantizer, max_bits)]


def is_quantized(quantizer: Quantizer, max_bits: int = 8) -> bool:
    """Whether a quantizer quantizes now, to at most ``max_bits`` bits."""
    return quantizer.active and quantizer.bits is not None and quantizer.bits <= max_bits


def weights_with_quantizers(module: nn.Module) -> list[QuantizedWeight]:
    """The parameters of a model that have a quantizer, in use or not, each quantizer once."""
    found: dict[WeightQuantizer, QuantizedWeight] = {}
    for layer_name, layer in quantized_layers(module).items():
        for parameter, q in layer.weight_quantizers().items():
            weight = layer._parameters.get(parameter)
            if weight is not None:
                found.setdefault(q, QuantizedWeight(weight_name(layer_name, parameter), weight, q))
    return list(found.values())


def computed_weights(module: nn.Module) -> dict[str, WeightQuantizer]:
    """The quantizers of weights that are no parameters, but computed from others, by the weight's name."""
    return {
        weight_name(layer_name, parameter): q
        for layer_name, layer in quantized_layers(module).items()
        for parameter, q in layer.weight_quantizers().items()
        if layer._parameters.get(parameter) is None
    }


def oscillation_states(module: nn.Module) -> dict[str, OscillationState]:
    """The oscillation history of every weight that is tracked.

    Args:
        module: A model that :class:`~lightning_qat_osc.OscillationTracking` or
            :class:`~lightning_qat_osc.IterativeFreezing` has trained, or one loaded from its checkpoint.

    Returns:
        Layer name -> state, with ``weight_int`` and ``direction`` in int8, ``frequency`` and ``ema_int`` in float32 and
        ``frozen`` in bool, each of the weight's shape. Where a layer has several weights, the name is
        ``layer.parameter``; where several layers share a weight, it is that of the first.

    Raises:
        TypeError: If it is no module.
    """
    check_module("module", module)
    states: dict[OscillationState, str] = {}
    for layer_name, layer in quantized_layers(module).items():
        for parameter, q in layer.weight_quantizers().items():
            if q.oscillation is not None:
                states.setdefault(q.oscillation, weight_name(layer_name, parameter))
    return {name: state for state, name in states.items()}


def quantizers(module: nn.Module) -> list[Quantizer]:
    """The quantizers of a model, each once, in the order of its layers."""
    return list(dict.fromkeys(q for layer in quantized_layers(module).values() for q in layer.quantizers()))


def scale_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The learned scales of a model, in the order of its layers."""
    return [quantizer.scale for quantizer in quantizers(module)]
