"""Conversion of a quantized model to a plain one with the original classes and keys, and weights on their grid."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm, SpectralNormLoadStateDictPreHook
from torch.nn.utils.weight_norm import WeightNorm

from lightning_qat_osc.arguments import with_quantized_arguments
from lightning_qat_osc.checks import check_module
from lightning_qat_osc.deepcopies import deep_copy
from lightning_qat_osc.export.folding import Folding
from lightning_qat_osc.export.folding import fold_batch_norm as fold
from lightning_qat_osc.export.integers import (
    InputGrid,
    IntegerWeight,
    argument_grids,
    input_grids,
    integer_weights,
    layers_by_every_name,
)
from lightning_qat_osc.functional import fake_quantize
from lightning_qat_osc.layers import calling_class, disable_fused_path, written_parameter
from lightning_qat_osc.lookup import quantized_layers
from lightning_qat_osc.quantized_layer import QuantizedLayer

__all__ = ["IntegerModel", "QuantizeInputs", "convert", "integer_model"]

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True, eq=False)
class QuantizeInputs:
    """A forward pre-hook that quantizes and dequantizes a layer's inputs, with the arithmetic of fake quantization.

    It holds only plain numbers and is pickled with its layer. Exporters look for it in ``layer._forward_pre_hooks`` and
    replace it with a subclass that uses their own operators.

    Attributes:
        grids: Name of an argument of the layer's forward -> its grid, or None for full precision, in argument order.
    """

    grids: dict[str, InputGrid | None]
    quantizes_inputs: ClassVar[bool] = True

    def __call__(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of the call with quantized inputs."""

        def quantize(argument: str, x: Tensor) -> Tensor:
            grid = self.grids[argument]
            return x if grid is None else self.quantize(x, grid)

        return with_quantized_arguments(self.grids, quantize, args, kwargs)

    def quantize(self, x: Tensor, grid: InputGrid) -> Tensor:
        """Quantize and dequantize a tensor. Exporters override this with their own operators."""
        # a tensor, because CUDA divides by a Python number by multiplying with its reciprocal
        scale = torch.full((1,), grid.scale, dtype=grid.dtype, device=x.device)
        n, p = grid.quant_min - grid.zero_point, grid.quant_max - grid.zero_point
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        if isinstance(x, Tensor) and x.requires_grad and not traced:
            return fake_quantize(x, scale, n, p)  # straight-through estimator: rounding has no gradient
        return ((x / scale).round().clamp(n, p) * scale).to(x.dtype)


@dataclass(frozen=True, eq=False)
class IntegerModel:
    """A converted model, and the integers of its weights.

    Attributes:
        module: What :func:`convert` returns.
        weights: Key of a parameter in the module's state_dict -> its integers; a shared weight is one object under each
            of its names. Where a batch norm was folded in, these are the scales and integers after folding.
        layers: Names of the layers that had quantizers.
        folding: Which batch norms were folded, and why the others were not.
    """

    module: nn.Module
    weights: dict[str, IntegerWeight]
    layers: list[str]
    folding: Folding = field(default_factory=Folding)


def convert(module: Module, *, fold_batch_norm: bool = False) -> Module:
    """Convert a quantized model to a plain one: no quantizers, weights at ``scale * integer``.

    The result is a deep copy in evaluation mode. Each layer has its original class again, and the state_dict has the
    keys of the float model. If only weights are quantized, nothing of this package remains, and outputs equal the
    quantized model's bit for bit. A layer with quantized inputs has one :class:`QuantizeInputs` among its forward
    pre-hooks, with the same arithmetic, so its outputs are equal, too. (When no gradients are recorded, torch may
    sum in another order in ``batch_first`` recurrent layers and in linear layers with non-contiguous inputs: their
    outputs are equal up to rounding.)

    MultiheadAttention keeps the subclass that calls its output projection: torch's own forward reads the weight of the
    projection without calling it, and takes a fused path in evaluation that rounds differently. For the same reason,
    TransformerEncoderLayer stays on its unfused path (``activation_relu_or_gelu`` is 0). A weight that its layer
    computed from other parameters (a parametrization, weight or spectral norm, pruning) becomes a plain parameter.

    Args:
        module: A model with quantizers, trained or loaded from a checkpoint. It is not changed.
        fold_batch_norm: Fold batch norms into the layers before them where a trace of the model shows that this
            changes only rounding (:func:`~lightning_qat_osc.export.folding.fold_batch_norm`).

    Returns:
        The converted copy, of the same class.

    Raises:
        TypeError: If ``module`` is not a module.
        ValueError: If nothing in the module is quantized.

    Warns:
        UserWarning: For each batch norm that was to be folded and cannot be, with the reason; for each weight that is
            also read outside of its layer, if calibration in this process observed that.
    """
    return cast(Module, integer_model(module, fold_batch_norm=fold_batch_norm).module)


def integer_model(module: nn.Module, *, fold_batch_norm: bool = False) -> IntegerModel:
    """Do the work of :func:`convert`, and return the integers, too, for exporters.

    Args:
        module: A model with quantizers. It is not changed.
        fold_batch_norm: As for :func:`convert`.

    Returns:
        The converted copy and the integers of its weights.

    Raises:
        TypeError: As :func:`convert`.
        ValueError: As :func:`convert`.

    Warns:
        UserWarning: As :func:`convert`. The warning points to the line that called the caller of this function.
    """
    check_module("module", module)
    weights, inputs = integer_weights(module), input_grids(module)
    if not weights and not inputs:
        raise ValueError(
            f"{type(module).__name__} has no calibrated quantizers to export: train it with "
            "QuantizationAwareTraining, or load its checkpoint with load_quantized"
        )
    for name, layer in quantized_layers(module).items():
        for parameter, w in layer.weight_quantizers().items():
            if w.read_outside is not None and w.calibrated and w.bits is not None:
                warnings.warn(
                    f"The {parameter} of layer '{name}' is also read outside of the layer, by {w.read_outside}. If the "
                    "model's forward does this (rather than a loss or an average), the outputs of the converted model "
                    "differ: outside of the layer, the quantized model reads the full-precision weight, and the "
                    "converted one scale times integer. A LayerRule with weight_bits=None for the layer leaves the "
                    "weight as it is.",
                    stacklevel=3,
                )
    arguments = {name: dict(argument_grids(layer)) for name, layer in layers_by_every_name(module).items()}
    plain = without_quantizers(module)
    prepare_layers(plain, list(arguments))
    set_weights(plain, weights)
    quantize_inputs(plain, {name: arguments[name] for name in inputs})
    if not fold_batch_norm:
        return IntegerModel(plain, weights, list(arguments))
    weights, folding = fold(plain, weights)
    set_weights(plain, weights)
    for name, reason in folding.kept.items():
        warnings.warn(f"Batch norm '{name}' is not folded: {reason}.", stacklevel=3)
    return IntegerModel(plain, weights, list(arguments), folding)


def without_quantizers(module: Module) -> Module:
    """Return a deep copy in evaluation mode in which every layer has its original class and its latent weights."""
    plain = deep_copy(module).eval()
    layers = set(layers_by_every_name(plain).values())
    for layer in layers:
        for child in {*layer.parameter_quantizers.values(), *layer.argument_quantizers.values()}:
            delattr(layer, child)
        for attribute in QuantizedLayer.__annotations__.keys() & layer.__dict__.keys():
            del layer.__dict__[attribute]
        cast(nn.Module, layer).__class__ = layer.float_class
    return plain


def prepare_layers(module: nn.Module, names: Iterable[str]) -> None:
    """Make the layers of a float model compute as the quantized ones did, in place.

    Args:
        module: A model without quantizers.
        names: The layers that were quantized.
    """
    for name in names:
        layer = module.get_submodule(name)
        layer.__class__ = calling_class(type(layer))
    for child in module.modules():
        disable_fused_path(child)


@torch.no_grad()
def set_weights(module: nn.Module, weights: Mapping[str, IntegerWeight]) -> None:
    """Replace weights of a float model with their values on the grid, in place.

    The values are new parameters. If only some of the layers that share a latent weight quantize it, the others keep
    the latent weight.

    Args:
        module: A model without quantizers.
        weights: Key of a parameter -> its integers. One object under several keys becomes one parameter.
    """
    made: dict[int, nn.Parameter] = {}
    for key, weight in weights.items():
        name, _, parameter = key.rpartition(".")
        layer = module.get_submodule(name)
        _make_permanent(layer, parameter)
        before = getattr(layer, parameter)
        if id(weight) not in made:
            values = torch.empty_like(before).copy_(weight.dequantize())  # in the memory format of the latent weight
            made[id(weight)] = nn.Parameter(values, requires_grad=before.requires_grad)
        setattr(layer, parameter, made[id(weight)])
        if isinstance(layer, nn.RNNBase):
            layer.flatten_parameters()


def _make_permanent(layer: nn.Module, parameter: str) -> None:
    """Turn a weight that a layer computes from other parameters into a parameter of the layer."""
    if parametrize.is_parametrized(layer, parameter):
        # not remove_parametrizations: it deletes the property from a class that the original layer shares
        assert isinstance(layer.parametrizations, nn.ModuleDict)
        values = {key: getattr(layer, key) for key in layer.parametrizations}
        own_class = parametrize.type_before_parametrizations(layer)
        del layer.parametrizations
        layer.__class__ = own_class
        for key, value in values.items():
            layer.register_parameter(key, nn.Parameter(value.detach()))
    for hook in [hook for hook in layer._forward_pre_hooks.values() if written_parameter(hook) == parameter]:
        if isinstance(hook, WeightNorm):
            remove_weight_norm(layer, parameter)
        elif isinstance(hook, SpectralNorm):
            remove_spectral_norm(layer, parameter)
            for handle, loading in list(layer._load_state_dict_pre_hooks.items()):
                # torch wraps this hook when it registers it, and does not recognize it when it removes it
                if isinstance(getattr(loading, "hook", loading), SpectralNormLoadStateDictPreHook):
                    del layer._load_state_dict_pre_hooks[handle]
        else:
            prune.remove(layer, parameter)  # type: ignore[no-untyped-call]


def quantize_inputs(module: nn.Module, inputs: Mapping[str, dict[str, InputGrid | None]]) -> None:
    """Make the layers of a float model quantize their inputs, in place.

    Args:
        module: A model without quantizers.
        inputs: Layer name -> name of an argument of its forward -> grid, or None for full precision.
    """
    done: set[nn.Module] = set()
    for name, grids in inputs.items():
        layer = module.get_submodule(name)
        if layer not in done:  # a layer may have several names
            layer.register_forward_pre_hook(QuantizeInputs(grids), with_kwargs=True)
            done.add(layer)
