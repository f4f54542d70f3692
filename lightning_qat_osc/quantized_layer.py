"""The quantized form of a layer: a subclass of its class whose forward quantizes and then calls the layer's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_qat_osc.arguments import with_quantized_arguments
from lightning_qat_osc.config import QuantConfig
from lightning_qat_osc.functional import fake_quantize_pair
from lightning_qat_osc.layers import calling_class, weight_names, written_parameter
from lightning_qat_osc.modes import evaluation_mode
from lightning_qat_osc.quantizers import InputQuantizer, Quantizer, WeightQuantizer
from lightning_qat_osc.recomputation import Recipe, recomputed

__all__ = ["QuantizedLayer", "latent_weight", "quantized_class"]


class QuantizedLayer(nn.Module):
    """What :func:`quantized_class` adds to a layer's class: quantizers as children, and a forward that calls them.

    The layer keeps its own parameters and their names, so that checkpoints of the float model load, and its own
    forward, which sees quantized weights where it reads ``self.weight``. All other code sees the latent weights.

    The quantizer of the parameter ``weight`` is the child ``weight_quantizer``, and so on for other parameters. If one
    argument of ``forward`` is quantized, its quantizer is ``input_quantizer``; if several are, each quantizer is named
    after its argument, such as ``query_quantizer``.

    Attributes:
        quant_config: The configuration with which the quantizers were inserted.
        parameter_quantizers: Name of a parameter -> name of its quantizer.
        argument_quantizers: Name of an argument of ``forward`` -> name of its quantizer.
    """

    float_class: type[nn.Module]
    """The class that the layer had before it was quantized."""
    float_forward: Callable[..., Any]
    """The forward of that class, or a replacement that calls submodules whose weights the original only reads."""
    quant_config: QuantConfig
    parameter_quantizers: dict[str, str]
    argument_quantizers: dict[str, str]

    def add_quantizers(
        self, config: QuantConfig, weights: Mapping[str, WeightQuantizer], inputs: Mapping[str, InputQuantizer]
    ) -> None:
        """Add quantizers as children.

        Args:
            config: The configuration that the quantizers follow.
            weights: Name of a parameter -> its quantizer. Layers that share a parameter share its quantizer.
            inputs: Name of an argument of ``forward`` -> its quantizer, in the order of the arguments.
        """
        self.quant_config = config
        self.parameter_quantizers = {name: f"{name}_quantizer" for name in weights}
        only = len(inputs) == 1
        self.argument_quantizers = {name: "input_quantizer" if only else f"{name}_quantizer" for name in inputs}
        for name, weight_quantizer in weights.items():
            self.add_module(self.parameter_quantizers[name], weight_quantizer)
        for name, input_quantizer in inputs.items():
            self.add_module(self.argument_quantizers[name], input_quantizer)
        self.train(self.training)

    def weight_quantizers(self) -> dict[str, WeightQuantizer]:
        """Return a dictionary: name of a parameter -> its quantizer."""
        return {name: getattr(self, child) for name, child in self.parameter_quantizers.items()}

    def input_quantizers(self) -> dict[str, InputQuantizer]:
        """Return a dictionary: name of an argument of ``forward`` -> its quantizer."""
        return {name: getattr(self, child) for name, child in self.argument_quantizers.items()}

    def quantizers(self) -> list[Quantizer]:
        """Return all quantizers of the layer, those of weights first."""
        return [*self.weight_quantizers().values(), *self.input_quantizers().values()]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Quantize the inputs and the weights, then run the layer's own forward on them."""
        recipes: list[tuple[Tensor, Recipe]] = []
        waiting = {name: getattr(self, name) for name in self.parameter_quantizers}
        substitutes: dict[str, Any] = {}

        def quantize(argument: str, x: Tensor) -> Tensor:
            quantizer = getattr(self, self.argument_quantizers[argument])
            if waiting:
                name, weight = next(iter(waiting.items()))
                weight_quantizer = getattr(self, self.parameter_quantizers[name])
                both = _quantized_together(quantizer, x, weight_quantizer, weight, recipes)
                if both is not None:
                    x_q, substitutes[name] = both
                    del waiting[name]
                    return x_q
            return _quantized(quantizer, x, recipes)

        args, kwargs = with_quantized_arguments(self.argument_quantizers, quantize, args, kwargs)
        for name, weight in waiting.items():
            substitutes[name] = _quantized(getattr(self, self.parameter_quantizers[name]), weight, recipes)
        idle = [q.scale.sum() for q in self.quantizers() if not q.active]
        if idle:
            # DDP waits for a gradient of every parameter, so a scale that is not in use gets a gradient of 0
            name = next(iter(substitutes)) if substitutes else weight_names(self)[0]
            substitutes[name] = substitutes.get(name, getattr(self, name)) + 0.0 * sum(idle)
        if not recipes:
            return _forward_with(self, substitutes, args, kwargs)
        with recomputed(recipes):
            return _forward_with(self, substitutes, args, kwargs)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, *keys_and_errors: list[str]
    ) -> None:
        """Load the layer, and report what the state quantizes but this layer leaves in full precision.

        If the state has weights of the layer but no quantizers, the layer's quantizers become stale.
        """
        self.float_class._load_from_state_dict(self, state_dict, prefix, metadata, strict, *keys_and_errors)
        inside = [key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)]
        own = [key for key in inside if "." not in key or key.startswith("parametrizations.")]
        weights = [key for key in own for name in weight_names(self) if name in key]  # weights, or what computes them
        if weights and not any("_quantizer." in key for key in inside):
            for quantizer in self.quantizers():
                quantizer.stale = True
        for key in state_dict if strict else ():
            child = key.removeprefix(prefix).removesuffix(".grid")
            if child.endswith("_quantizer") and "." not in child and child not in self._modules:
                what = child.removesuffix("_quantizer")
                keys_and_errors[-1].append(
                    f"layer '{prefix.rstrip('.')}' was quantized with a different configuration: its {what} has bits "
                    "in the state_dict, but is in full precision here"
                )

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle a reference to the layer's own class, since the quantized class is created at run time."""
        state = cast(tuple[Any, ...], super().__reduce_ex__(max(protocol, 2)))[2]
        return _new_quantized, (self.float_class,), state


def _forward_with(
    layer: QuantizedLayer, substitutes: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run the layer's own forward with quantized weights in place of the latent ones."""
    latent = layer._parameters
    if torch.compiler.is_compiling() and all(name in latent for name in substitutes):
        layer._parameters = {**latent, **substitutes}  # torch 2.9 does not trace changes of __dict__
        try:
            return _run(layer, args, kwargs)
        finally:
            layer._parameters = latent
    # an instance attribute takes precedence over nn.Module's lookup of the parameter of that name
    before = {name: layer.__dict__[name] for name in substitutes if name in layer.__dict__}
    layer.__dict__.update(substitutes)
    try:
        return _run(layer, args, kwargs)
    finally:
        for name in substitutes:
            del layer.__dict__[name]
        layer.__dict__.update(before)


def _run(layer: QuantizedLayer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if isinstance(layer, nn.RNNBase):
        return _recurrent_forward(layer, *args, **kwargs)
    return layer.float_forward(*args, **kwargs)


def _recurrent_forward(layer: QuantizedLayer, *args: Any, **kwargs: Any) -> Any:
    """Run a recurrent layer with quantized weights in ``_flat_weights``, the list from which it reads them."""
    latent = layer.__dict__["_flat_weights"]
    layer.__dict__["_flat_weights"] = [getattr(layer, name) for name in cast(Any, layer)._flat_weights_names]
    try:
        return layer.float_forward(*args, **kwargs)
    finally:
        layer.__dict__["_flat_weights"] = latent


def _quantized(quantizer: Quantizer, x: Tensor, recipes: list[tuple[Tensor, Recipe]]) -> Tensor:
    quantized: Tensor = quantizer(x)
    _note_recipe(quantizer, x, quantized, recipes)
    return quantized


def _quantized_together(
    quantizer: Quantizer, x: Tensor, other: Quantizer, weight: Tensor, recipes: list[tuple[Tensor, Recipe]]
) -> tuple[Tensor, Tensor] | None:
    """Quantize an input and a weight in one kernel, or return None if they must be quantized separately."""
    if torch.compiler.is_compiling() or not all(q.fused and q.active and not q.hooked for q in (quantizer, other)):
        return None
    both = fake_quantize_pair((x, weight), (quantizer.scale, other.scale), (quantizer.limits, other.limits))
    if both is not None:
        _note_recipe(quantizer, x, both[0], recipes)
        _note_recipe(other, weight, both[1], recipes)
    return both


def _note_recipe(quantizer: Quantizer, x: Tensor, quantized: Tensor, recipes: list[tuple[Tensor, Recipe]]) -> None:
    # in compiled code, the compiler decides what to keep and what to recompute
    if quantizer.recompute and quantizer.active and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        recipes.append((quantized, quantizer.recipe(x)))


def quantized_class(layer_class: type[nn.Module]) -> type[nn.Module]:
    """Return the quantized form of a layer's class: a subclass whose forward is :meth:`QuantizedLayer.forward`.

    Args:
        layer_class: Class of a layer.

    Returns:
        The quantized class, always the same one for the same argument.
    """
    return _make_class(cast(Any, layer_class))


@cache
def _make_class(layer_class: Any) -> type[nn.Module]:
    # the layer's class is the first base, so that instances have its layout; what must override it is set here
    bases = (calling_class(layer_class), QuantizedLayer)
    attributes = {
        "__module__": layer_class.__module__,
        "__doc__": layer_class.__doc__,
        "__reduce_ex__": QuantizedLayer.__reduce_ex__,
        "_load_from_state_dict": QuantizedLayer._load_from_state_dict,
        "float_class": layer_class,
        "float_forward": bases[0].forward,
        "forward": QuantizedLayer.forward,
    }
    if hasattr(layer_class, "reset_parameters"):
        attributes["reset_parameters"] = _reset_parameters
    for parent in layer_class.__mro__:
        for name, value in vars(parent).items():
            if isinstance(value, property) and "weight" in name:
                attributes.setdefault(name, _substitutable(name, value))
    return type(f"Quantized{layer_class.__name__}", bases, attributes)


def _reset_parameters(layer: QuantizedLayer, *args: Any, **kwargs: Any) -> Any:
    """Reset the weights, as between folds of a cross-validation, and mark ranges and histories as stale."""
    returned = cast(Any, layer.float_class).reset_parameters(layer, *args, **kwargs)
    for quantizer in layer.quantizers():
        quantizer.stale = True
    return returned


def _substitutable(name: str, computed: property) -> property:
    """Return a property that reads a computed weight, or, while ``forward`` runs, the quantized one in its place."""
    assert computed.fget is not None
    compute = computed.fget

    def read(layer: nn.Module) -> Any:
        return layer.__dict__[name] if name in layer.__dict__ else compute(layer)

    return property(read, computed.fset, computed.fdel)


def _new_quantized(layer_class: type[nn.Module]) -> nn.Module:
    quantized = quantized_class(layer_class)
    return quantized.__new__(quantized)


@torch.no_grad()
def latent_weight(layer: nn.Module, parameter: str) -> Tensor:
    """Return a weight before quantization. If it is not a parameter, compute it, without advancing a norm's buffers.

    Args:
        layer: A layer, quantized or not.
        parameter: Name of the weight.
    """
    own = layer._parameters.get(parameter)
    if own is not None:
        return own
    with evaluation_mode(layer):  # in training mode, spectral norm iterates whenever its weight is read
        for hook in layer._forward_pre_hooks.values():
            if written_parameter(hook) == parameter:
                hook(layer, ())
        return cast(Tensor, getattr(layer, parameter))
