"""What to quantize, and to how many bits: plain dataclasses that read the same in Python and in YAML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from lightning_qat_osc.checks import check_bits, check_choice
from lightning_qat_osc.ranges import RangeMethod

__all__ = ["Bits", "Granularity", "LayerRule", "QuantConfig"]

Granularity = Literal["per_tensor", "per_channel"]
"""One scale for the whole tensor, or one for each output channel."""

Bits = int | None | Literal["default"]
"""A width of 2 to 8, None for full precision, or "default" if a rule does not set it."""


@dataclass(frozen=True)
class LayerRule:
    """Bits for the layers that it matches. They override the bits of the model and ``first_last_bits``.

    Args:
        pattern: Layer names with the wildcards ``*``, ``?`` and ``[...]``, such as ``features.*``. None matches all.
        layer_type: Name of the layers' class or of a base class of it, such as ``Conv2d``. None matches all.
        weight_bits: Bits of the weights, 2 to 8. None leaves them in full precision; "default" sets nothing, so that
            other rules or the model's bits, including ``first_last_bits``, apply.
        activation_bits: Bits of the inputs, with the same choices. If both are None, the layer is not quantized.

    Raises:
        TypeError: If a bit width is not an integer, or ``pattern`` or ``layer_type`` is not a string.
        ValueError: If a bit width is out of range, neither a pattern nor a type is given, or the rule sets nothing.
    """

    pattern: str | None = None
    layer_type: str | None = None
    weight_bits: Bits = "default"
    activation_bits: Bits = "default"

    def __post_init__(self) -> None:
        """Validate."""
        if self.pattern is None and self.layer_type is None:
            raise ValueError("a LayerRule needs a pattern or a layer_type, got neither")
        for name in ("pattern", "layer_type"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                hint = f"; use its name, '{value.__name__}'" if isinstance(value, type) else ""
                raise TypeError(f"LayerRule.{name} must be a string, got {value!r}{hint}")
        check_bits("LayerRule.weight_bits", self.weight_bits, none="full precision", default_allowed=True)
        check_bits("LayerRule.activation_bits", self.activation_bits, none="full precision", default_allowed=True)
        if self.weight_bits == "default" and self.activation_bits == "default":
            raise ValueError(f"a LayerRule must set weight_bits or activation_bits, got {self}")

    def matches(self, name: str, layer_class: type) -> bool:
        """Whether the rule applies to a layer of this name and class."""
        if self.pattern is not None and not fnmatchcase(name, self.pattern):
            return False
        return self.layer_type is None or self.layer_type in {c.__name__ for c in layer_class.__mro__}


@dataclass(frozen=True)
class QuantConfig:
    """How a model is quantized.

    Args:
        weight_bits: Bits of the weights, 2 to 8; None leaves them in full precision.
        activation_bits: Bits of the layers' inputs, 2 to 8; None leaves them in full precision.
        first_last_bits: Bits of the first and the last layer that a forward pass executes; the first layer's input
            stays in full precision. None treats both layers, and the first layer's input, like all others.
        weight_granularity: One weight scale per tensor, or one per output channel.
        weight_range: How weight ranges are initialized.
        activation_range: How activation ranges are initialized.
        rules: Exceptions by layer name or type.

    Raises:
        TypeError: If a bit width is not an integer, or ``rules`` is not a sequence of LayerRule objects.
        ValueError: If a bit width is out of range, a choice is unknown, or there is nothing to quantize.
    """

    weight_bits: int | None = 4
    activation_bits: int | None = 4
    first_last_bits: int | None = 8
    weight_granularity: Granularity = "per_tensor"
    weight_range: RangeMethod = "mse"
    activation_range: RangeMethod = "mse"
    rules: Sequence[LayerRule] = ()

    def __post_init__(self) -> None:
        """Validate."""
        if not isinstance(self.rules, Sequence):
            raise TypeError(f"rules must be a list of LayerRule objects, got {self.rules!r}")
        object.__setattr__(self, "rules", tuple(self.rules))  # a list and a tuple of the same rules are equal
        check_bits("weight_bits", self.weight_bits, none="full precision")
        check_bits("activation_bits", self.activation_bits, none="full precision")
        check_bits("first_last_bits", self.first_last_bits, none="the same bits as the other layers")
        check_choice("weight_granularity", self.weight_granularity, Granularity)
        check_choice("weight_range", self.weight_range, RangeMethod)
        check_choice("activation_range", self.activation_range, RangeMethod)
        for rule in self.rules:
            if not isinstance(rule, LayerRule):
                hint = "; convert it with LayerRule(**rule)" if isinstance(rule, dict) else ""
                raise TypeError(f"rules must be LayerRule objects, got {rule!r}{hint}")
        if self.weight_bits is None and self.activation_bits is None and not self.rules:
            raise ValueError(
                "weight_bits and activation_bits are both None and there are no rules: nothing to quantize"
            )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> QuantConfig:
        """Return the configuration from the output of :meth:`to_dict`."""
        return cls(**{**values, "rules": [LayerRule(**rule) for rule in values.get("rules", ())]})

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as plain data for a file: dictionaries, lists, strings and numbers."""
        return {**asdict(self), "rules": [asdict(rule) for rule in self.rules]}


def config_differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Describe the differences between two configurations; the text is empty if there are none."""
    return "; ".join(
        f"{key}: {before.get(key)!r} before, {now[key]!r} now" for key in now if before.get(key) != now[key]
    )
