"""Insertion of quantizers into a model, in place."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from inspect import getattr_static

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_qat_osc.checks import check_module
from lightning_qat_osc.config import QuantConfig, config_differences
from lightning_qat_osc.copies import untrained_copies
from lightning_qat_osc.layers import (
    calling_forward,
    disable_fused_path,
    input_names,
    kind_names,
    kind_of,
    layer_kind,
    weight_names,
)
from lightning_qat_osc.lookup import (
    model_modules,
    own_parameters,
    qualified_name,
    quantized_layers,
    weight_name,
    weights_with_quantizers,
)
from lightning_qat_osc.quantized_layer import QuantizedLayer, latent_weight, quantized_class
from lightning_qat_osc.quantizers import InputQuantizer, WeightQuantizer
from lightning_qat_osc.rules import LayerBits, check_rules_match, planned_bits

__all__ = [
    "hidden_weights",
    "no_layer_to_quantize",
    "quantizable_layers",
    "quantize_model",
    "unquantized_layers",
    "weights_of_other_sizes",
    "weights_tied_late",
]


def quantizable_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Return every layer that can be quantized, by name. Networks inside metrics are not part of the model."""
    layers = {name: child for name, child in model_modules(module) if layer_kind(type(child)) is not None}
    past = {layer.out_proj for layer in layers.values() if _reads_past_its_projection(layer)}
    return {name: layer for name, layer in layers.items() if layer not in past}


def no_layer_to_quantize(module: nn.Module) -> str:
    """Return the error message for a module without quantizable layers."""
    return f"{type(module).__name__} has no layer to quantize: it contains none of {', '.join(kind_names())}"


def _reads_past_its_projection(layer: nn.Module) -> bool:
    """Whether an attention uses its output projection's weight without calling the projection, even once quantized."""
    if not isinstance(layer, nn.MultiheadAttention) or isinstance(layer, QuantizedLayer):
        return False
    return calling_forward(type(layer)) is None


def quantize_model(module: nn.Module, config: QuantConfig) -> nn.Module:
    """Insert quantizers into a model's layers, in place.

    Every Conv, ConvTranspose, Linear, Bilinear, Embedding, EmbeddingBag, MultiheadAttention, recurrent layer and
    ``transformers`` Conv1D becomes an instance of a subclass of its own class. The layer gets one child module for each
    weight and (except in embeddings) each input: its quantizer. The layer's parameters keep their names. Quantizers
    return their input unchanged until they are calibrated. Layers that already have quantizers are left alone, so a
    second call changes nothing.

    Call this function at the end of ``LightningModule.configure_model`` (before ``fully_shard``) for layers that are
    created there; :class:`~lightning_qat_osc.QuantizationAwareTraining` calls it for all others.

    Args:
        module: The model. Networks inside torchmetrics Metrics are not quantized.
        config: What to quantize.

    Returns:
        The same module.

    Raises:
        TypeError: If ``module`` is not a module, or ``config`` is not a QuantConfig.
        ValueError: If a rule matches no layer, rules contradict each other, there is no layer to quantize, a layer is
            not supported, or the module is already quantized with another configuration.

    Warns:
        UserWarning: About what stays in full precision (parameters outside the layers, intermediate values of a
            layer), and about weights that are quantized without tracking of their oscillations.
    """
    check_module("module", module)
    if not isinstance(config, QuantConfig):
        raise TypeError(f"config must be a QuantConfig, got {config!r}")
    layers = quantizable_layers(module)
    if not layers:
        raise ValueError(no_layer_to_quantize(module))
    check_rules_match(config.rules, layers)
    planned = planned_bits(config, layers)
    for name in planned:
        layer = layers[name]
        if not isinstance(layer, QuantizedLayer):
            _check_supported(name, layer)
        elif layer.quant_config != config:
            differences = config_differences(layer.quant_config.to_dict(), config.to_dict())
            raise ValueError(
                f"the module is already quantized with a different configuration: {differences}. To change the bits, "
                "load only the weights of its checkpoint into a new module, with load_from_checkpoint(path, "
                "strict=False); if the network is an argument, pass one in full precision"
            )
    new = {name: layers[name] for name in planned if not isinstance(layers[name], QuantizedLayer)}
    _check_shared_weights(new, planned)
    shared: dict[Tensor, WeightQuantizer] = {w.weight: w.quantizer for w in weights_with_quantizers(module)}
    for name, layer in new.items():
        _insert(layer, config, planned[name], shared)
    if new:
        for _, child in model_modules(module):
            disable_fused_path(child)
        _fix_scales_of_copies(layers, new)
        for warning in _full_precision(module, layers, new, planned):
            warnings.warn(warning, stacklevel=2)
    return module


def _fix_scales_of_copies(layers: dict[str, nn.Module], new: dict[str, nn.Module]) -> None:
    """Set ``requires_grad=False`` on the scales of an average or another untrained copy of the network.

    The code that updates the copy's weights updates its scales too, so DDP must not wait for their gradients.
    """
    trained = [name for name, layer in layers.items() if any(p.requires_grad for p in own_parameters(layer))]
    # also whole networks by structure: a resumed run needs the same trainable scales, however far weights have moved
    copies = untrained_copies(layers, trained) | untrained_copies(layers, trained, near=False)
    for name in copies.keys() & new.keys():
        layer = new[name]
        assert isinstance(layer, QuantizedLayer)
        for quantizer in layer.quantizers():
            quantizer.scale.requires_grad_(False)


def _computed(layer: nn.Module, parameter: str) -> bool:
    """Whether a weight is not a parameter, but computed from others: by a parametrization, a norm, pruning."""
    return layer._parameters.get(parameter) is None


def _check_supported(name: str, layer: nn.Module) -> None:
    """Raise if a layer cannot be quantized, for example because it is lazy or has sparse gradients.

    Raises:
        ValueError: If the layer is not supported; the message says how to leave it out, if that helps.
    """
    leave_out = f"Leave it out with LayerRule(pattern='{name}', weight_bits=None, activation_bits=None)"
    if any(getattr(hook, "quantizes_inputs", False) for hook in layer._forward_pre_hooks.values()):
        raise ValueError(
            f"layer '{name}' was created by convert and already quantizes its inputs: start from the weights of the "
            "checkpoint instead, with load_from_checkpoint(path, strict=False)."
        )
    for parameter in weight_names(layer):
        try:
            weight = latent_weight(layer, parameter)
        except AttributeError as error:
            raise ValueError(
                f"layer '{name}' has no {parameter} of its own (maybe another network generates it): {error}. "
                f"{leave_out}."
            ) from error
        if is_lazy(weight):
            raise ValueError(
                f"layer '{name}' is lazy and has no {parameter} yet: run a batch through the model first. {leave_out}."
            )
        if not weight.is_floating_point() or weight.dtype.itemsize < 2:
            raise ValueError(
                f"layer '{name}' has a {parameter} of {weight.dtype}; only 16- to 64-bit floating-point weights can be "
                f"quantized. {leave_out}."
            )
    children = {f"{parameter}_quantizer" for parameter in (*weight_names(layer), *input_names(type(layer)))}
    names = {"input_quantizer", *children, *vars(QuantizedLayer), *QuantizedLayer.__annotations__} - set(dir(nn.Module))
    there = {*layer._modules, *layer._parameters, *layer._buffers}
    taken = sorted(n for n in names if n[0] != "_" and (n in there or getattr_static(layer, n, None) is not None))
    if taken:
        raise ValueError(
            f"layer '{name}' already has an attribute '{taken[0]}', a name that the quantizers need. {leave_out}."
        )
    try:
        quantized_class(type(layer))
    except Exception as error:
        raise ValueError(
            f"layer '{name}' cannot be quantized, because its class {type(layer).__name__} cannot be subclassed: "
            f"{error}. {leave_out}."
        ) from error
    if "forward" in layer.__dict__:
        raise ValueError(
            f"layer '{name}' has a forward that was set on the instance, which a subclass cannot override: set it "
            f"after the quantizers are inserted. {leave_out}."
        )
    if getattr(layer, "max_norm", None) is not None:
        raise ValueError(
            f"layer '{name}' has max_norm={layer.max_norm}, which would renormalize quantized weights off their grid. "
            f"{leave_out}, or set max_norm=None."
        )
    if getattr(layer, "sparse", False):
        raise ValueError(
            f"layer '{name}' uses sparse gradients, which quantization does not support. {leave_out}, or set "
            "sparse=False."
        )


def hidden_weights(module: nn.Module) -> list[str]:
    """Return the names of weights whose quantizers have no effect because of a parametrization registered later."""
    hidden = []
    for name, layer in quantized_layers(module).items():
        for parameter in layer.parameter_quantizers:
            owner = next((c for c in type(layer).__mro__ if parameter in vars(c)), None)
            if owner not in (None, quantized_class(layer.float_class)):
                hidden.append(weight_name(name, parameter))
    return hidden


def weights_of_other_sizes(module: nn.Module) -> list[str]:
    """Return the names of weights whose output channels and scales differ in number: the weights were replaced."""
    return [
        name
        for name, weight, q in weights_with_quantizers(module)
        if q.scale.numel() > 1 and q.scale.numel() != weight.shape[q.channel_dim]
    ]


def weights_tied_late(module: nn.Module) -> list[str]:
    """Return the names of two weights that were tied after each got its quantizer; an empty list if there are none."""
    first: dict[nn.Parameter, str] = {}
    for name, weight, _ in weights_with_quantizers(module):  # one weight for each quantizer
        if first.setdefault(weight, name) != name:
            return [first[weight], name]
    return []


def _check_shared_weights(new: dict[str, nn.Module], planned: dict[str, LayerBits]) -> None:
    """Check that layers which share a weight, and so its quantizer, have the same bits.

    Raises:
        ValueError: If rules set different bits.
    """
    first: dict[object, tuple[str, int | None]] = {}
    for name, layer in new.items():
        for parameter in weight_names(layer):
            bits = planned[name].weight
            if _computed(layer, parameter):
                continue
            other, others_bits = first.setdefault(getattr(layer, parameter), (name, bits))
            if bits != others_bits:
                raise ValueError(
                    f"layers '{other}' and '{name}' share a weight and must have the same bits, but the rules give "
                    f"them {others_bits} and {bits}"
                )


def _full_precision(
    module: nn.Module, layers: dict[str, nn.Module], new: dict[str, nn.Module], planned: dict[str, LayerBits]
) -> Iterable[str]:
    """Yield warnings about what stays in full precision, or is not tracked, although the user did not ask for that."""
    remaining: dict[tuple[str, str], list[str]] = {}
    for name, layer in new.items():
        kind = kind_of(layer)
        assert isinstance(layer, QuantizedLayer)
        if isinstance(layer, nn.MultiheadAttention) and not isinstance(layer, kind.forward or ()):
            yield (
                f"The output projection of attention '{name}' stays in full precision: {layer.float_class.__name__} "
                "overrides forward and does not call it as a layer."
            )
        if kind.remains is not None and planned[name].input is not None:
            remaining.setdefault((layer.float_class.__name__, kind.remains), []).append(name)
        computed = [p for p in layer.parameter_quantizers if _computed(layer, p)]
        if computed:
            yield (
                f"Layer '{name}' computes its {', '.join(computed)} from other parameters (a parametrization, a norm, "
                "pruning): it is quantized, but its oscillations are not tracked, dampened or frozen."
            )
    for (type_name, what), names in remaining.items():
        yield f"{type_name} {_join_names(names)}: {what} stay in full precision."
    outside = _parameters_outside(module, layers)
    if outside:
        yield f"Parameters outside the layers that can be quantized stay in full precision: {_join_names(outside)}."


def _join_names(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{', '.join(names[:5])}{more}"


def _parameters_outside(module: nn.Module, layers: dict[str, nn.Module]) -> list[str]:
    """Return the names of matrices outside of quantizable layers, without vectors (norms, biases, class tokens)."""
    inside = {id(p) for layer in layers.values() for p in layer.parameters()}
    return [
        qualified_name(name, key)
        for name, child in model_modules(module)
        for key, p in child.named_parameters(recurse=False)
        if "Norm" not in type(child).__name__
        and id(p) not in inside
        and (is_lazy(p) or sum(size > 1 for size in p.shape) > 1)
    ]


def _insert(layer: nn.Module, config: QuantConfig, bits: LayerBits, shared: dict[Tensor, WeightQuantizer]) -> None:
    kind, inputs = kind_of(layer), input_names(type(layer))
    layer.__class__ = quantized_class(type(layer))
    assert isinstance(layer, QuantizedLayer)
    weights: dict[str, WeightQuantizer] = {}
    for parameter in () if bits.weight is None else kind.weights(layer):
        assert bits.weight is not None
        weight = latent_weight(layer, parameter)
        weights[parameter] = shared.get(weight) or WeightQuantizer(
            bits.weight,
            weight,
            granularity=config.weight_granularity,
            channel_dim=kind.channel_dim,
            method=config.weight_range,
            pinned=bits.weight_pinned,
        )
        weights[parameter].pinned |= bits.weight_pinned  # a rule may name any of the layers that share the weight
        shared[weight] = weights[parameter]
    like = latent_weight(layer, kind.weights(layer)[0])
    quantized_inputs = {
        argument: InputQuantizer(bits.input, method=config.activation_range, pinned=bits.input_pinned)
        for argument in inputs
        if bits.input is not None
    }
    layer.add_quantizers(config, weights, quantized_inputs)
    for quantizer in layer.quantizers():
        quantizer.to(like.device, like.dtype)  # float64 in a double module, but never below float32


def unquantized_layers(module: nn.Module, config: QuantConfig) -> list[str]:
    """Return the names of layers without quantizers that :func:`quantize_model` would quantize."""
    layers = quantizable_layers(module)
    return [name for name in planned_bits(config, layers) if not isinstance(layers[name], QuantizedLayer)]
