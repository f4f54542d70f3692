"""Export of a quantized model as a torch.export graph with integer weights, as the backends of PT2E expect it."""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.utils import _pytree as pytree

from lightning_qat_osc.arguments import call_arguments
from lightning_qat_osc.export.convert import QuantizeInputs, integer_model
from lightning_qat_osc.export.folding import CannotFoldError, affine, scaled_channels
from lightning_qat_osc.export.integers import InputGrid, IntegerWeight

__all__ = ["export_program", "register_operators"]

_aten, _quantized = torch.ops.aten, torch.ops.quantized_decomposed
_CONVOLUTIONS = {
    _aten.conv1d.default,
    _aten.conv1d.padding,
    _aten.conv2d.default,
    _aten.conv2d.padding,
    _aten.conv3d.default,
    _aten.conv3d.padding,
}
_TRANSPOSED = {_aten.conv_transpose1d.default, _aten.conv_transpose2d.input, _aten.conv_transpose3d.input}


def export_program(
    module: nn.Module,
    example_input: Any,
    *,
    dynamic_batch: bool = True,
    fold_batch_norm: bool = True,
    input_dtype: torch.dtype = torch.uint8,
) -> ExportedProgram:
    """Export a quantized model as a graph with integer weights and explicit quantization of inputs.

    The graph computes what the fake-quantized model computes in evaluation mode. Weights are int8 tensors under the
    float model's keys, followed by ``quantized_decomposed.dequantize_per_channel``, or ``dequantize_per_tensor`` if a
    weight has a single scale. In convolutions and linear layers, a single scale is repeated for each channel instead,
    as the X86 lowering requires. Inputs pass through ``quantize_per_tensor`` and ``dequantize_per_tensor``, with a
    ``clamp`` of the integers in between if their grid is narrower than 8 bits. ``torchao.quantization.pt2e.lowering``
    and ExecuTorch's backends recognize these operators.

    ``quantize_per_tensor`` multiplies by the reciprocal of the scale, whereas training divides by the scale. A value
    within rounding error of the midpoint between two integers may therefore be rounded to the other one.

    Args:
        module: A model with calibrated quantizers, in 32-bit floating point. It is not changed.
        example_input: Input of the module's forward: a tuple of positional arguments, a dictionary of keyword
            arguments, or one argument of any other type, as with Lightning's ``example_input_array``. (To pass a
            dictionary as a single argument, put it into a tuple.)
        dynamic_batch: Make the first dimension dynamic in every input tensor in which it has the same size as in the
            first one.
        fold_batch_norm: Fold batch norms into the scales and the bias of the layers before them where possible, with
            the arithmetic of :func:`~lightning_qat_osc.export.folding.fold_batch_norm`: equal up to float rounding.
        input_dtype: Dtype of quantized inputs: ``torch.uint8``, or ``torch.int8`` with integers and zero points lower
            by 128, as ExecuTorch's XNNPACK requires.

    Returns:
        The exported program.

    Raises:
        TypeError: If ``module`` is not a module.
        ValueError: If nothing in the module is quantized, a layer cannot be converted, the module is not in 32-bit
            floating point, or ``input_dtype`` is not one of the two.
        RuntimeError: If torch cannot export the module; the message includes torch's reason.
    """
    if input_dtype not in (torch.uint8, torch.int8):
        raise ValueError(f"input_dtype must be torch.uint8 or torch.int8, got {input_dtype}")
    register_operators()
    args, kwargs = call_arguments(example_input)
    shapes = None
    if dynamic_batch:
        args, kwargs, shapes = _open_batch(args, kwargs)
    model = integer_model(module)
    odd = {p.dtype for p in model.module.parameters() if p.is_floating_point()} - {torch.float32}
    if odd:
        raise ValueError(f"module must be in torch.float32, but has parameters of {odd.pop()}: call module.float()")
    _traceable(model.module, input_dtype)
    program = _trace(model.module, args, kwargs, shapes, type(module).__name__)
    if any(isinstance(child, fx.GraphModule) for child in program.graph_module.children()):
        # inline the nested graphs of torch.no_grad() and autocast inside a forward
        program = program.run_decompositions({})
    graph_module = _unguarded(program)
    constants = _constants(graph_module)
    weights = _folded(graph_module.graph, constants, model.weights) if fold_batch_norm else model.weights
    _store_integers(graph_module.graph, constants, weights)
    for node in graph_module.graph.find_nodes(op="get_attr"):
        if not node.users:
            graph_module.graph.erase_node(node)
    # built from a dictionary, the module holds only the tensors that the graph reads
    return _trace(fx.GraphModule(constants, graph_module.graph), args, kwargs, shapes, type(module).__name__)


def register_operators() -> None:
    """Register ``quantized_decomposed`` by importing a private module, here only; torch's compiler imports it, too."""
    importlib.import_module("torch.ao.quantization.fx._decomposed")


def _open_batch(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Return the arguments of a call, with a batch of 1 doubled, and a specification of their batch dimensions."""
    leaves, tree = pytree.tree_flatten((args, kwargs))
    rows = [len(x) for x in leaves if isinstance(x, Tensor) and x.dim()]
    shapes: Any = ShapesCollection()  # type: ignore[no-untyped-call]
    batch = Dim("batch")
    for i, x in enumerate(leaves):
        if isinstance(x, Tensor) and x.dim() and len(x) == rows[0]:
            if rows[0] == 1:  # torch treats a dimension of size 1 as a constant
                leaves[i] = torch.cat([x, x])
            shapes[leaves[i]] = {0: batch}
    args, kwargs = pytree.tree_unflatten(leaves, tree)
    return args, kwargs, shapes


def _trace(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any, name: str) -> ExportedProgram:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*_flat_weights.* were assigned during export.*")  # torch's RNNs
            return torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        raise RuntimeError(
            f"torch.export cannot export {name}: {error}\nIf the batch dimension is the reason, use "
            "dynamic_batch=False (--fixed-batch on the command line), which fixes the batch size to that of "
            "example_input."
        ) from error


def _unguarded(program: ExportedProgram) -> fx.GraphModule:
    """Return a program's module without checks of input shapes. Older versions of torch do not add such checks."""
    guards = {"check_guards": False} if "check_guards" in inspect.signature(program.module).parameters else {}
    return program.module(**guards)


@dataclass(frozen=True, eq=False)
class _QuantizeInputs(QuantizeInputs):
    """:class:`QuantizeInputs` with operators that the exported graph keeps."""

    dtype: torch.dtype

    def quantize(self, x: Tensor, grid: InputGrid) -> Tensor:
        """Quantize and dequantize."""
        lower = 128 if self.dtype == torch.int8 else 0
        low, high = grid.quant_min - lower, grid.quant_max - lower
        limits = torch.iinfo(self.dtype)
        arguments = grid.scale, grid.zero_point - lower, limits.min, limits.max, self.dtype
        integers = _quantized.quantize_per_tensor(x, *arguments)
        if (low, high) != (limits.min, limits.max):
            # a clamp, because the X86 lowering ignores the limits of quantize_per_tensor when fusing it with a layer
            integers = integers.clamp(low, high)
        return cast(Tensor, _quantized.dequantize_per_tensor(integers, *arguments))


def _traceable(module: nn.Module, input_dtype: torch.dtype) -> None:
    """Make the layers of a converted model quantize inputs with operators that the exported graph keeps, in place."""
    for layer in module.modules():
        for key, hook in layer._forward_pre_hooks.items():
            if isinstance(hook, QuantizeInputs):
                layer._forward_pre_hooks[key] = _QuantizeInputs(hook.grids, input_dtype)


def _is(node: Any, targets: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def _constants(graph_module: fx.GraphModule) -> dict[str, Any]:
    """Return the tensors and control-flow graphs that a graph reads, by target of its ``get_attr`` nodes."""
    graph_module.graph.eliminate_dead_code()
    constants: dict[str, Any] = {}
    for node in graph_module.graph.find_nodes(op="get_attr"):
        value: Any = graph_module
        for part in node.target.split("."):
            value = getattr(value, part)
        constants[node.target] = value.detach() if isinstance(value, Tensor) else value
    return constants


def _folded(
    graph: fx.Graph, constants: dict[str, Any], weights: Mapping[str, IntegerWeight]
) -> dict[str, IntegerWeight]:
    """Fold batch norms into the quantized layers before them, and return the integers of all weights."""
    weights = dict(weights)
    for node in graph.find_nodes(op="call_function", target=_aten.batch_norm.default):
        layer, *statistics, training, _, epsilon = node.args[:8]
        axis = _folding_axis(layer, weights)
        if training or axis is None:
            continue
        bias = layer.args[2] if len(layer.args) > 2 else None
        if any(n is not None and n.op != "get_attr" for n in (bias, *statistics)):  # not constant
            continue
        gamma, beta, mean, variance = (None if n is None else constants[n.target] for n in statistics)
        weight = layer.args[1]
        try:
            old_bias = None if bias is None else constants[bias.target]
            factor, new_bias = affine(old_bias, gamma, beta, cast(Tensor, mean), cast(Tensor, variance), epsilon)
            weights[weight.target] = scaled_channels(weights[weight.target], factor, axis)
        except CannotFoldError:
            continue
        name = weight.target.removesuffix("weight") + "bias"
        while name in constants and (bias is None or bias.target != name or len(bias.users) > 1):
            name += "_folded"
        constants[name] = new_bias.float()
        with graph.inserting_before(layer):
            layer.args = (*layer.args[:2], graph.create_node("get_attr", name), *layer.args[3:])
        node.replace_all_uses_with(layer)
        graph.erase_node(node)
    return weights


def _folding_axis(layer: Any, weights: Mapping[str, IntegerWeight]) -> int | None:
    """Return the weight's output channel dimension if a batch norm can be folded into the layer, else None."""
    axis = _channel_axis(layer)
    if axis is None or len(layer.users) > 1 or layer.args[1].target not in weights or len(layer.args[1].users) > 1:
        return None
    if layer.meta["val"].dim() != layer.args[1].meta["val"].dim():
        return None  # linear on [N, L, C], where the channels of batch norm are L, or a convolution without a batch
    groups = layer.args[6] if axis == 1 and len(layer.args) > 6 else 1
    return axis if groups == 1 else None


def _store_integers(graph: fx.Graph, constants: dict[str, Any], weights: Mapping[str, IntegerWeight]) -> None:
    """Replace weights with their integers, and insert a dequantization for each use."""
    for node in graph.find_nodes(op="get_attr"):
        weight = weights.get(node.target)
        if weight is None:
            continue
        constants[node.target] = weight.values
        grids: dict[int, tuple[str, str]] = {}  # by output channel dimension; users may differ in it
        for user in list(node.users):
            limits = weight.quant_min, weight.quant_max, torch.int8
            axis = _channel_axis(user) if weight.channel_axis is None else weight.channel_axis
            with graph.inserting_before(user):
                if axis is None:
                    arguments = node, weight.scale.item(), 0, *limits
                    dequantized = graph.call_function(_quantized.dequantize_per_tensor.default, arguments)
                else:
                    if axis not in grids:
                        scale, zero_point = (_unused(f"{node.target}_{n}", constants) for n in ("scale", "zero_point"))
                        channels = weight.values.shape[axis]
                        constants[scale] = weight.scale.float().flatten().expand(channels).clone()
                        constants[zero_point] = torch.zeros(channels, dtype=torch.int64)
                        grids[axis] = scale, zero_point
                    grid = (graph.create_node("get_attr", name) for name in grids[axis])
                    arguments = node, *grid, axis, *limits
                    dequantized = graph.call_function(_quantized.dequantize_per_channel.default, arguments)
            user.replace_input_with(node, dequantized)


def _unused(name: str, constants: Mapping[str, Any]) -> str:
    """Return a name that no tensor of the model has."""
    while name in constants:
        name += "_of_grid"
    return name


def _channel_axis(layer: Any) -> int | None:
    """Return the weight's output channel dimension, or None if no backend requires per-channel scales."""
    if _is(layer, _TRANSPOSED):
        return 1
    return 0 if _is(layer, {*_CONVOLUTIONS, _aten.linear.default}) else None
