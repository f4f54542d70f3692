"""Insertion of quantizers into a model, in place, and the ways to look at what was inserted."""

from __future__ import annotations

import warnings
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy
from torchmetrics import Metric

from lightning_qat_osc.config import Bits, LayerRule, QuantConfig, config_differences
from lightning_qat_osc.oscillation import OscillationState
from lightning_qat_osc.quantizers import (
    InputQuantizer,
    QuantizedLayer,
    Quantizer,
    WeightQuantizer,
    output_channel_dim,
    quantized_class,
)

__all__ = [
    "QuantizedWeight",
    "oscillation_states",
    "quantize_model",
    "quantizable_layers",
    "quantized_layers",
    "quantized_weights",
    "quantizers",
    "scale_parameters",
    "unquantized_layers",
]

QUANTIZABLE = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
    nn.Embedding,
)


_NEVER_CALLED = (NonDynamicallyQuantizableLinear,)  # MultiheadAttention reads the weight of its output projection


def quantizable_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Every layer of a type that can be quantized, by name. Networks inside metrics are not the model's."""
    layers: dict[str, nn.Module] = {}
    of_metrics: set[nn.Module] = set()
    for name, child in module.named_modules():
        if isinstance(child, Metric):
            of_metrics.update(child.modules())
        elif isinstance(child, QUANTIZABLE) and child not in of_metrics and not isinstance(child, _NEVER_CALLED):
            layers[name] = child
    return layers


def _describe(rule: LayerRule) -> str:
    parts = [f"{key}={value!r}" for key, value in (("pattern", rule.pattern), ("layer_type", rule.layer_type)) if value]
    return f"LayerRule({', '.join(parts)})"


def _check_rules_match(rules: tuple[LayerRule, ...], layers: dict[str, nn.Module]) -> None:
    """A rule that matches no layer is a typing error: say so and list what was near.

    Raises:
        ValueError: If there is one.
    """
    for rule in rules:
        if any(rule.matches(name, type(layer)) for name, layer in layers.items()):
            continue
        by_name = [name for name in layers if fnmatchcase(name, rule.pattern or "*")]
        if rule.layer_type is not None and by_name:
            types = sorted({type(layers[n]).__name__ for n in by_name})
            raise ValueError(f"{_describe(rule)} matches no layer; the types there are {', '.join(types)}")
        near = get_close_matches(rule.pattern or "", layers, n=5, cutoff=0.3) or list(layers)[:5]
        raise ValueError(f"{_describe(rule)} matches no layer; near names are {', '.join(near)}")


def _resolve(rules: tuple[LayerRule, ...], name: str, layer: nn.Module, field: str) -> Bits:
    """What the rules say of one layer's bits: "default" where they say nothing.

    Raises:
        ValueError: If two rules contradict each other.
    """
    found: Bits = "default"
    by: LayerRule | None = None
    for rule in rules:
        value: Bits = getattr(rule, field)
        if value == "default" or not rule.matches(name, type(layer)):
            continue
        if by is not None and value != found:
            raise ValueError(
                f"rules contradict each other for layer '{name}': {_describe(by)} sets {field}={found}, "
                f"{_describe(rule)} sets {field}={value}"
            )
        found, by = value, rule
    return found


class _LayerBits(NamedTuple):
    """Bits of one layer, and whether a rule set them."""

    weight: int | None
    input: int | None
    weight_pinned: bool
    input_pinned: bool

    @property
    def any(self) -> bool:
        return self.weight is not None or self.input is not None


def _layer_bits(config: QuantConfig, name: str, layer: nn.Module) -> _LayerBits:
    weight = _resolve(config.rules, name, layer, "weight_bits")
    activation = _resolve(config.rules, name, layer, "activation_bits")
    input_bits = config.activation_bits if activation == "default" else activation
    return _LayerBits(
        weight=config.weight_bits if weight == "default" else weight,
        input=None if isinstance(layer, nn.Embedding) else input_bits,  # its input is indices
        weight_pinned=weight != "default",
        input_pinned=activation != "default",
    )


def quantize_model(module: nn.Module, config: QuantConfig) -> nn.Module:
    """Give a model's layers their quantizers, in place.

    Every Conv, ConvTranspose, Linear and Embedding layer becomes an instance of a subclass of its own class, with a
    ``weight_quantizer`` and (but for Embedding) an ``input_quantizer`` as children. Its parameters keep their names.
    The quantizers hand their input on until they are calibrated. Layers that have their quantizers already are left
    alone, so a second call changes nothing.

    Call it yourself at the end of ``LightningModule.configure_model`` (before ``fully_shard``) for layers that are made
    there; :class:`~lightning_qat_osc.QuantizationAwareTraining` calls it for all others.

    Args:
        module: The model. Networks inside torchmetrics Metrics are left out.
        config: What to quantize.

    Returns:
        The same module.

    Raises:
        ValueError: If a rule matches no layer, rules contradict each other, no layer can be quantized, a layer is of a
            kind that is not supported, or the module is quantized already with another configuration.
    """
    layers = quantizable_layers(module)
    if not layers:
        kinds = ", ".join(kind.__name__ for kind in QUANTIZABLE)
        raise ValueError(f"{type(module).__name__} has no layer to quantize: none of {kinds}")
    _check_rules_match(config.rules, layers)
    planned = {name: _layer_bits(config, name, layer) for name, layer in layers.items()}
    for name, layer in layers.items():
        if not isinstance(layer, QuantizedLayer) and planned[name].any:
            _check_supported(name, layer)
        elif isinstance(layer, QuantizedLayer) and layer.quant_config != config:
            differences = config_differences(layer.quant_config.to_dict(), config.to_dict())
            raise ValueError(f"the module is quantized already, and otherwise: {differences}. Begin with a new one")
    shared: dict[nn.Parameter, WeightQuantizer] = {}
    new = [name for name, layer in layers.items() if not isinstance(layer, QuantizedLayer) and planned[name].any]
    _check_shared_weights({name: (layers[name], planned[name].weight) for name in new})
    for name in new:
        _insert(layers[name], config, planned[name], shared)
    if new:
        for name, child in module.named_modules():
            _tell_of_attention(name, child)
    return module


def _check_supported(name: str, layer: nn.Module) -> None:
    """Refuse a layer whose weight is not a parameter that is there.

    Raises:
        ValueError: If it is not; the message says how to leave the layer out.
    """
    leave_out = f"Leave it out with LayerRule(pattern='{name}', weight_bits=None, activation_bits=None)"
    weight = layer._parameters.get("weight")
    if weight is None:
        raise ValueError(
            f"layer '{name}' computes its weight from other parameters (a parametrization, weight or spectral norm),"
            f" which is not supported. {leave_out}, or remove the parametrization first."
        )
    if is_lazy(weight):
        raise ValueError(
            f"layer '{name}' is lazy and has no weight yet: run a batch through the model first. {leave_out}."
        )
    if isinstance(layer, nn.Embedding) and layer.sparse:
        raise ValueError(
            f"layer '{name}' has sparse gradients, quantization has none. {leave_out}, or set sparse=False."
        )


def _check_shared_weights(new: dict[str, tuple[nn.Module, int | None]]) -> None:
    """Layers that share a weight share its quantizer, and so its bits.

    Raises:
        ValueError: If rules set different ones.
    """
    first: dict[object, tuple[str, int | None]] = {}
    for name, (layer, bits) in new.items():
        other, others_bits = first.setdefault(layer.weight, (name, bits))
        if bits != others_bits:
            raise ValueError(
                f"layer '{name}' shares its weight with '{other}', so both have the same bits: rules set {bits} and "
                f"{others_bits}"
            )


def _tell_of_attention(name: str, module: nn.Module) -> None:
    """Name what stays in full precision, and keep evaluation on the path that calls the quantized layers."""
    if isinstance(module, nn.MultiheadAttention):
        warnings.warn(
            f"The projections of MultiheadAttention '{name}' stay in full precision: it does not call them as layers.",
            stacklevel=3,
        )
    if isinstance(module, nn.TransformerEncoderLayer):
        # with a hook, evaluation does not take the fused path, which reads weights past their layers
        module.linear1.register_forward_pre_hook(_off_the_fused_path)


def _off_the_fused_path(module: nn.Module, args: tuple[object, ...]) -> None:
    """A hook that does nothing."""


def _insert(
    layer: nn.Module, config: QuantConfig, bits: _LayerBits, shared: dict[nn.Parameter, WeightQuantizer]
) -> None:
    layer.__class__ = quantized_class(type(layer))
    assert isinstance(layer, QuantizedLayer)
    layer.quant_config = config
    layer.weight_quantizer = layer.input_quantizer = None
    if bits.weight is not None:
        if layer.weight not in shared:
            shared[layer.weight] = WeightQuantizer(
                bits.weight,
                layer.weight,
                granularity=config.weight_granularity,
                channel_dim=output_channel_dim(layer),
                method=config.weight_range,
                pinned=bits.weight_pinned,
            )
        layer.weight_quantizer = shared[layer.weight]
    if bits.input is not None:
        layer.input_quantizer = InputQuantizer(
            bits.input, method=config.activation_range, device=layer.weight.device, pinned=bits.input_pinned
        )
    layer.train(layer.training)


def quantized_layers(module: nn.Module) -> dict[str, QuantizedLayer]:
    """The layers of a model that have quantizers, by name."""
    return {name: layer for name, layer in quantizable_layers(module).items() if isinstance(layer, QuantizedLayer)}


def unquantized_layers(module: nn.Module, config: QuantConfig) -> list[str]:
    """Names of the layers that :func:`quantize_model` would give quantizers and that have none."""
    return [
        name
        for name, layer in quantizable_layers(module).items()
        if not isinstance(layer, QuantizedLayer) and _layer_bits(config, name, layer).any
    ]


class QuantizedWeight(NamedTuple):
    """A weight that is quantized now: the name of its layer, its latent values and its quantizer."""

    name: str
    weight: nn.Parameter
    quantizer: WeightQuantizer


def quantized_weights(module: nn.Module, max_bits: int = 8) -> list[QuantizedWeight]:
    """The weights of a model that are quantized to at most ``max_bits`` bits."""
    found: dict[WeightQuantizer, QuantizedWeight] = {}
    for name, layer in quantized_layers(module).items():
        q = layer.weight_quantizer
        if q is not None and q.active and q.bits is not None and q.bits <= max_bits:
            found.setdefault(q, QuantizedWeight(name, layer.weight, q))
    return list(found.values())


def oscillation_states(module: nn.Module) -> dict[str, OscillationState]:
    """The oscillation history of every weight that is tracked.

    Args:
        module: A model that :class:`~lightning_qat_osc.OscillationTracking` or
            :class:`~lightning_qat_osc.IterativeFreezing` has trained, or one loaded from its checkpoint.

    Returns:
        Layer name -> state, with ``weight_int``, ``frequency``, ``ema_int`` and ``frozen``, each of the weight's shape.
        Where several layers share a weight, the name is that of the first.
    """
    states: dict[OscillationState, str] = {}
    for name, layer in quantized_layers(module).items():
        if layer.weight_quantizer is not None and layer.weight_quantizer.oscillation is not None:
            states.setdefault(layer.weight_quantizer.oscillation, name)
    return {name: state for state, name in states.items()}


def quantizers(module: nn.Module) -> list[Quantizer]:
    """The quantizers of a model, each once, in the order of its layers."""
    both = [q for layer in quantized_layers(module).values() for q in (layer.weight_quantizer, layer.input_quantizer)]
    return list(dict.fromkeys(q for q in both if q is not None))


def scale_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The learned scales of a model, in the order of its layers."""
    return [quantizer.scale for quantizer in quantizers(module)]
