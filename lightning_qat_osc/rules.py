"""Bits of each layer: those of the model, or those of the rules that match the layer."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn

from lightning_qat_osc.config import Bits, LayerRule, QuantConfig
from lightning_qat_osc.layers import kind_of
from lightning_qat_osc.lookup import quantized_layers

__all__ = ["LayerBits", "bits_differences", "check_rules_match", "planned_bits"]


class LayerBits(NamedTuple):
    """Bits of one layer, and whether a rule set them."""

    weight: int | None
    input: int | None
    weight_pinned: bool
    input_pinned: bool

    @property
    def any(self) -> bool:
        """Whether the weight or the input has bits."""
        return self.weight is not None or self.input is not None


def planned_bits(config: QuantConfig, layers: dict[str, nn.Module]) -> dict[str, LayerBits]:
    """Return the bits of every layer that is to be quantized."""
    planned = {name: _layer_bits(config, name, layer) for name, layer in layers.items()}
    left_out = {name for name, bits in planned.items() if not bits.any}
    # attention that is left out runs torch's fused function, which does not call its output projection as a layer
    left_out |= {f"{name}.out_proj" for name in left_out if isinstance(layers[name], nn.MultiheadAttention)}
    return {name: bits for name, bits in planned.items() if name not in left_out}


def _layer_bits(config: QuantConfig, name: str, layer: nn.Module) -> LayerBits:
    weight = _resolve(config.rules, name, layer, "weight_bits")
    activation = _resolve(config.rules, name, layer, "activation_bits")
    input_bits = config.activation_bits if activation == "default" else activation
    return LayerBits(
        weight=config.weight_bits if weight == "default" else weight,
        input=input_bits if kind_of(layer).inputs else None,  # an embedding's input is indices
        weight_pinned=weight != "default",
        input_pinned=activation != "default",
    )


def _resolve(rules: Sequence[LayerRule], name: str, layer: nn.Module, field: str) -> Bits:
    """Return the bits that the rules set for one layer, or "default" if no rule sets them.

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


def check_rules_match(rules: Sequence[LayerRule], layers: dict[str, nn.Module]) -> None:
    """Raise for rules that match no layer, as after a typing error, and for rules that can have no effect.

    Raises:
        ValueError: If there is such a rule; the message lists similar names or says why it has no effect.
    """
    for rule in rules:
        matching = [layer for name, layer in layers.items() if rule.matches(name, type(layer))]
        if matching and isinstance(rule.activation_bits, int) and not any(kind_of(layer).inputs for layer in matching):
            kinds = ", ".join(sorted({type(layer).__name__ for layer in matching}))
            raise ValueError(
                f"{_describe(rule)} sets activation_bits, but matches only {kinds}, whose inputs are indices and "
                "cannot be quantized"
            )
        if matching:
            continue
        by_name = [name for name in layers if fnmatchcase(name, rule.pattern or "*")]
        if rule.layer_type is not None and by_name:
            types = sorted({type(layers[n]).__name__ for n in by_name})
            raise ValueError(
                f"{_describe(rule)} matches no layer; without layer_type, it matches layers of type {', '.join(types)}"
            )
        near = get_close_matches(rule.pattern or "", layers, n=5, cutoff=0.3) or list(layers)[:5]
        inside = any(name.startswith(f"{rule.pattern}.") for name in layers)
        hint = f"; a pattern must match the whole name: '{rule.pattern}.*' matches the layers inside" if inside else ""
        raise ValueError(f"{_describe(rule)} matches no layer{hint}; layer names include {', '.join(near)}")


def _describe(rule: LayerRule) -> str:
    parts = [f"{key}={value!r}" for key, value in (("pattern", rule.pattern), ("layer_type", rule.layer_type)) if value]
    return f"LayerRule({', '.join(parts)})"


def bits_differences(module: nn.Module, config: QuantConfig) -> list[str]:
    """List bits of a calibrated model that a configuration cannot give, as when its checkpoint is from another one.

    Args:
        module: A model with quantizers.
        config: The configuration that was passed to :func:`quantize_model`.

    Returns:
        A phrase for each weight and input with such bits.
    """
    differences = []
    for name, layer in quantized_layers(module).items():
        bits = _layer_bits(config, name, layer)
        special = {config.first_last_bits} - {None}  # the first or last layer may have these
        weight = {bits.weight} if bits.weight_pinned else {bits.weight} | special
        inputs = {bits.input, None} if bits.input_pinned else {bits.input, None} | special
        for quantizers, allowed in ((layer.weight_quantizers(), weight), (layer.input_quantizers(), inputs)):
            for key, q in quantizers.items():
                if q.calibrated and q.bits not in allowed:
                    wanted = " or ".join(str(b) for b in sorted(allowed - {None}, key=str)) or "full precision"
                    differences.append(f"{key} of layer '{name}' has {q.bits} bits instead of {wanted}")
    return differences
