"""Access to the layers, weights, quantizers, scales and oscillation histories of a quantized model, by name."""

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
    "qualified_name",
    "quantized_layers",
    "quantized_weights",
    "quantizers",
    "scale_parameters",
    "weight_name",
    "weights_with_quantizers",
]


class QuantizedWeight(NamedTuple):
    """A parameter that has a quantizer: its name, its latent values and the quantizer."""

    name: str
    weight: nn.Parameter
    quantizer: WeightQuantizer


def model_modules(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every submodule with its name, except those in torchmetrics Metrics, which are not part of the model."""
    of_metrics: set[nn.Module] = set()
    for name, child in module.named_modules():
        if isinstance(child, Metric):
            of_metrics.update(child.modules())
        if child not in of_metrics:
            yield name, child


def quantized_layers(module: nn.Module) -> dict[str, QuantizedLayer]:
    """Return the layers of a model that have quantizers, by name."""
    return {name: layer for name, layer in model_modules(module) if isinstance(layer, QuantizedLayer)}


def own_parameters(layer: nn.Module) -> Iterator[nn.Parameter]:
    """Return the parameters of a layer and its submodules, except scales."""
    scales = {id(q.scale) for q in layer.modules() if isinstance(q, Quantizer)}
    return (p for p in layer.parameters() if id(p) not in scales)


def qualified_name(name: str, inside: str) -> str:
    """Return the full name of something in a submodule, such as the key of a parameter in a state_dict."""
    return f"{name}.{inside}" if name else inside


def weight_name(layer: str, parameter: str) -> str:
    """Return the name of a weight: that of its layer, followed by the parameter's unless that is ``weight``."""
    return layer if parameter == "weight" else f"{layer}.{parameter}"


def quantized_weights(module: nn.Module, max_bits: int = 8) -> list[QuantizedWeight]:
    """Return the weights of a model that are quantized to at most ``max_bits`` bits.

    A weight that its layer computes from others (a parametrization, pruning) is not a parameter, and not included.
    """
    return [w for w in weights_with_quantizers(module) if is_quantized(w.quantizer, max_bits)]


def is_quantized(quantizer: Quantizer, max_bits: int = 8) -> bool:
    """Whether a quantizer is active and has at most ``max_bits`` bits."""
    return quantizer.active and quantizer.bits is not None and quantizer.bits <= max_bits


def weights_with_quantizers(module: nn.Module) -> list[QuantizedWeight]:
    """Return the parameters of a model that have a quantizer, active or not, one for each quantizer."""
    found: dict[WeightQuantizer, QuantizedWeight] = {}
    for layer_name, layer in quantized_layers(module).items():
        for parameter, q in layer.weight_quantizers().items():
            weight = layer._parameters.get(parameter)
            if weight is not None:
                found.setdefault(q, QuantizedWeight(weight_name(layer_name, parameter), weight, q))
    return list(found.values())


def computed_weights(module: nn.Module) -> dict[str, WeightQuantizer]:
    """Return the quantizers of weights that are not parameters, but computed from others, by the weights' names."""
    return {
        weight_name(layer_name, parameter): q
        for layer_name, layer in quantized_layers(module).items()
        for parameter, q in layer.weight_quantizers().items()
        if layer._parameters.get(parameter) is None
    }


def oscillation_states(module: nn.Module) -> dict[str, OscillationState]:
    """Return the oscillation history of every weight that is tracked.

    Args:
        module: A model that :class:`~lightning_qat_osc.OscillationTracking` or
            :class:`~lightning_qat_osc.IterativeFreezing` has trained, or one loaded from its checkpoint.

    Returns:
        Layer name -> state, with ``weight_int`` and ``direction`` in int8, ``frequency`` and ``ema_int`` in float32 and
        ``frozen`` in bool, each of the weight's shape. For a parameter that is not called ``weight``, the name is
        ``layer.parameter``; for a weight that several layers share, it is the name of the first.

    Raises:
        TypeError: If ``module`` is not a module.
    """
    check_module("module", module)
    states: dict[OscillationState, str] = {}
    for layer_name, layer in quantized_layers(module).items():
        for parameter, q in layer.weight_quantizers().items():
            if q.oscillation is not None:
                states.setdefault(q.oscillation, weight_name(layer_name, parameter))
    return {name: state for state, name in states.items()}


def quantizers(module: nn.Module) -> list[Quantizer]:
    """Return the quantizers of a model, each once, in the order of its layers."""
    return list(dict.fromkeys(q for layer in quantized_layers(module).values() for q in layer.quantizers()))


def scale_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Return the learned scales of a model, in the order of its layers."""
    return [quantizer.scale for quantizer in quantizers(module)]
