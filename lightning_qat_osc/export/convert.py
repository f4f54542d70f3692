"""The plain model behind a quantized one: its own classes and keys, with weights that lie on their grid."""

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
from lightning_qat_osc.deepcopies import copied
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
from lightning_qat_osc.layers import calling_class, keep_off_fused_path, written_parameter
from lightning_qat_osc.lookup import quantized_layers
from lightning_qat_osc.quantized_layer import QuantizedLayer

__all__ = ["IntegerModel", "QuantizeInputs", "convert", "integer_model"]

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True, eq=False)
class QuantizeInputs:
    """The forward pre-hook that quantizes and dequantizes a layer's inputs, with the arithmetic of fake quantization.

    It holds plain numbers and pickles with its layer. Exporters look for it in ``layer._forward_pre_hooks`` and put
    a subclass with their own operators in its place.

    Attributes:
        grids: Name of an argument of the layer's forward -> its grid, None for full precision, in their order.
    """

    grids: dict[str, InputGrid | None]
    quantizes_inputs: ClassVar[bool] = True

    def __call__(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Replace the arguments."""

        def quantize(argument: str, x: Tensor) -> Tensor:
            grid = self.grids[argument]
            return x if grid is None else self.quantize(x, grid)

        return with_quantized_arguments(self.grids, quantize, args, kwargs)

    def quantize(self, x: Tensor, grid: InputGrid) -> Tensor:
        """Quantize and dequantize. Exporters override it with their own operators."""
        # a tensor: CUDA divides by a number by multiplying with its reciprocal
        scale = torch.full((1,), grid.scale, dtype=grid.dtype, device=x.device)
        n, p = grid.quant_min - grid.zero_point, grid.quant_max - grid.zero_point
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        if isinstance(x, Tensor) and x.requires_grad and not traced:
            return fake_quantize(x, scale, n, p)  # straight through: rounding has no gradient
        return ((x / scale).round().clamp(n, p) * scale).to(x.dtype)


@dataclass(frozen=True, eq=False)
class IntegerModel:
    """A converted model, and the integers that it is made of.

    Attributes:
        module: What :func:`convert` returns.
        weights: Key of a parameter in the module's state_dict -> its integers; shared weights are one object under each
            of their names. Where batch norm was folded in, these are the scales and integers that it left.
        layers: Names of the layers that had quantizers.
        folding: What became of its batch norms.
    """

    module: nn.Module
    weights: dict[str, IntegerWeight]
    layers: list[str]
    folding: Folding = field(default_factory=Folding)


def convert(module: Module, *, fold_batch_norm: bool = False) -> Module:
    """The plain model that a quantized one computes: no quantizers, weights at ``scale * integer``.

    A deep copy in evaluation mode. Each layer has its own class back, and the state_dict has the keys of the float
    model. Where only weights are quantized nothing of this package remains, and outputs equal the quantized model's to
    the bit. Where inputs are, the layer has one :class:`QuantizeInputs` among its forward pre-hooks, with the same
    arithmetic, so outputs are equal there too.

    MultiheadAttention keeps the subclass that calls its output projection: torch's own forward reads past that, and
    takes a fused path in evaluation that rounds otherwise. For the same reason TransformerEncoderLayer stays on its
    unfused path (``activation_relu_or_gelu`` is 0). A weight that its layer computed from other parameters
    (a parametrization, weight or spectral norm, pruning) is a plain parameter afterwards.

    Args:
        module: A model with quantizers, trained or loaded from a checkpoint. It is left as it is.
        fold_batch_norm: Fold batch norms into the layers before them, where a trace of the model shows that this
            changes nothing but rounding (:func:`~lightning_qat_osc.export.folding.fold_batch_norm`).

    Returns:
        The converted copy, of the same class.

    Raises:
        TypeError: If ``module`` is no module.
        ValueError: If nothing in the module is quantized.

    Warns:
        UserWarning: Of each batch norm that stays although it was to be folded, with the reason; of a weight that
            calibration in this process has seen read outside of its layer.
    """
    return cast(Module, integer_model(module, fold_batch_norm=fold_batch_norm).module)


def integer_model(module: nn.Module, *, fold_batch_norm: bool = False) -> IntegerModel:
    """:func:`convert`, with the integers: for exporters.

    Args:
        module: A model with quantizers. It is left as it is.
        fold_batch_norm: As for :func:`convert`.

    Returns:
        The converted copy and the integers of its weights.

    Raises:
        TypeError: As :func:`convert`.
        ValueError: As :func:`convert`.

    Warns:
        UserWarning: As :func:`convert`, of the line that called the caller.
    """
    check_module("module", module)
    weights, inputs = integer_weights(module), input_grids(module)
    if not weights and not inputs:
        raise ValueError(
            f"module must have quantizers with ranges to be exported, and {type(module).__name__} has none: train it "
            "with QuantizationAwareTraining, or load its checkpoint with load_quantized"
        )
    for name, layer in quantized_layers(module).items():
        for parameter, w in layer.weight_quantizers().items():
            if w.read_outside is not None and w.calibrated and w.bits is not None:
                warnings.warn(
                    f"The {parameter} of layer '{name}' is also read outside of the layer, by {w.read_outside}. If the "
                    "network's forward does that, and not a loss or an average, outputs differ: it reads full "
                    "precision in the quantized model, and scale times integer in what is made of it now. "
                    "A LayerRule with weight_bits=None for the layer leaves the weight as it is.",
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
    """A deep copy in evaluation mode in which every layer has its own class back, with its latent weights."""
    plain = copied(module).eval()
    layers = set(layers_by_every_name(plain).values())
    for layer in layers:
        for child in {*layer.parameter_quantizers.values(), *layer.argument_quantizers.values()}:
            delattr(layer, child)
        for attribute in QuantizedLayer.__annotations__.keys() & layer.__dict__.keys():
            del layer.__dict__[attribute]
        cast(nn.Module, layer).__class__ = layer.float_class
    return plain


def prepare_layers(module: nn.Module, names: Iterable[str]) -> None:
    """Let the layers of a float model compute as the quantized ones did, in place.

    Args:
        module: A model without quantizers.
        names: The layers that were quantized.
    """
    for name in names:
        layer = module.get_submodule(name)
        layer.__class__ = calling_class(type(layer))
    for child in module.modules():
        keep_off_fused_path(child)


@torch.no_grad()
def set_weights(module: nn.Module, weights: Mapping[str, IntegerWeight]) -> None:
    """Give the layers of a float model their weights from the grid, in place.

    They are new parameters: what else in the model reads a latent weight that only some of its layers quantize keeps
    that one.

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
    """Turn a weight that a layer computes from other parameters into one of its own."""
    if parametrize.is_parametrized(layer, parameter):
        # not remove_parametrizations: it takes the property from a class that the copied layer shares
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
                # torch wraps this hook when it is registered, and does not know it again when it removes it
                if isinstance(getattr(loading, "hook", loading), SpectralNormLoadStateDictPreHook):
                    del layer._load_state_dict_pre_hooks[handle]
        else:
            prune.remove(layer, parameter)  # type: ignore[no-untyped-call]


def quantize_inputs(module: nn.Module, inputs: Mapping[str, dict[str, InputGrid | None]]) -> None:
    """Let the layers of a float model quantize their inputs, in place.

    Args:
        module: A model without quantizers.
        inputs: Layer name -> argument of its forward -> grid, or None for full precision.
    """
    done: set[nn.Module] = set()
    for name, grids in inputs.items():
        layer = module.get_submodule(name)
        if layer not in done:  # it may have several names
            layer.register_forward_pre_hook(QuantizeInputs(grids), with_kwargs=True)
            done.add(layer)
