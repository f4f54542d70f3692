"""The quantized model as a torch.export graph with integer weights: the form that PT2E's backends take."""

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
    """Export a quantized model as a graph whose weights are integers and which says where inputs are quantized.

    It computes what the fake-quantized model computes in evaluation mode. Weights are int8 tensors under the float
    model's keys, followed by ``quantized_decomposed.dequantize_per_channel`` or, where a weight has one scale,
    ``dequantize_per_tensor``; but in convolutions and linear layers one scale stands once for each channel, as the X86
    lowering wants it.
    Inputs pass through ``quantize_per_tensor`` and ``dequantize_per_tensor``, with a ``clamp`` of the integers between
    where their grid is narrower than 8 bits. Those are the operators that ``torchao.quantization.pt2e.lowering`` and
    ExecuTorch's backends recognise.

    ``quantize_per_tensor`` multiplies by the reciprocal of the scale where training divides, so a value within a
    rounding error of the middle between two integers may come out at the other one.

    Args:
        module: A model with calibrated quantizers, in 32-bit floating point. It is left as it is.
        example_input: What its forward takes: a tuple of positional arguments, a dictionary of keyword arguments, or
            one argument of any other type, as with Lightning's ``example_input_array``. (A dictionary that is one
            argument goes into a tuple.)
        dynamic_batch: Leave the first dimension open, in every tensor in which it is as long as in the first one.
        fold_batch_norm: Fold batch norms into the scales and the bias of the layers before them where that can be done,
            with the arithmetic of :func:`~lightning_qat_osc.export.folding.fold_batch_norm`: equal to float rounding.
        input_dtype: Type of quantized inputs: ``torch.uint8``, or ``torch.int8`` with integers and zero points lower by
            128, as ExecuTorch's XNNPACK wants them.

    Returns:
        The exported program.

    Raises:
        TypeError: If ``module`` is no module.
        ValueError: If nothing in the module is quantized, a layer cannot be converted, or the module is not in 32-bit
            floating point.
        RuntimeError: If torch cannot export it; the message has torch's reason.
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
        raise ValueError(f"module must be in torch.float32, and has parameters of {odd.pop()}: call module.float()")
    _traceable(model.module, input_dtype)
    program = _trace(model.module, args, kwargs, shapes, type(module).__name__)
    if any(isinstance(child, fx.GraphModule) for child in program.graph_module.children()):
        # torch.no_grad() and autocast inside of a forward are graphs in the graph
        program = program.run_decompositions({})
    graph_module = _unguarded(program)
    constants = _constants(graph_module)
    weights = _folded(graph_module.graph, constants, model.weights) if fold_batch_norm else model.weights
    _store_integers(graph_module.graph, constants, weights)
    for node in graph_module.graph.find_nodes(op="get_attr"):
        if not node.users:
            graph_module.graph.erase_node(node)
    # a module made of a dictionary holds the tensors that the graph reads, and no others
    return _trace(fx.GraphModule(constants, graph_module.graph), args, kwargs, shapes, type(module).__name__)


def register_operators() -> None:
    """Make ``quantized_decomposed`` known, by a private module that torch's own compiler imports too: here alone."""
    importlib.import_module("torch.ao.quantization.fx._decomposed")


def _open_batch(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """The arguments of a call, with two rows instead of one, and which of their dimensions are the batch."""
    leaves, tree = pytree.tree_flatten((args, kwargs))
    rows = [len(x) for x in leaves if isinstance(x, Tensor) and x.dim()]
    shapes: Any = ShapesCollection()  # type: ignore[no-untyped-call]
    batch = Dim("batch")
    for i, x in enumerate(leaves):
        if isinstance(x, Tensor) and x.dim() and len(x) == rows[0]:
            if rows[0] == 1:  # torch takes a dimension of 1 for one that is always 1
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
            f"torch.export cannot export {name}: {error}\nWhere the batch dimension is the reason, "
            "dynamic_batch=False (--fixed-batch on the command line) exports the batch size of example_input alone."
        ) from error


def _unguarded(program: ExportedProgram) -> fx.GraphModule:
    """A program's module without checks of its inputs' shapes, which older torch does not put in."""
    guards = {"check_guards": False} if "check_guards" in inspect.signature(program.module).parameters else {}
    return program.module(**guards)


@dataclass(frozen=True, eq=False)
class _QuantizeInputs(QuantizeInputs):
    """The same with operators that a graph keeps."""

    dtype: torch.dtype

    def quantize(self, x: Tensor, grid: InputGrid) -> Tensor:
        """Quantize and dequantize."""
        lower = 128 if self.dtype == torch.int8 else 0
        low, high = grid.quant_min - lower, grid.quant_max - lower
        limits = torch.iinfo(self.dtype)
        arguments = grid.scale, grid.zero_point - lower, limits.min, limits.max, self.dtype
        integers = _quantized.quantize_per_tensor(x, *arguments)
        if (low, high) != (limits.min, limits.max):
            # not as the limits of quantize_per_tensor: the X86 lowering forgets those where it fuses it with a layer
            integers = integers.clamp(low, high)
        return cast(Tensor, _quantized.dequantize_per_tensor(integers, *arguments))


def _traceable(module: nn.Module, input_dtype: torch.dtype) -> None:
    """Let the layers of a converted model quantize their inputs with operators that a graph keeps, in place."""
    for layer in module.modules():
        for key, hook in layer._forward_pre_hooks.items():
            if isinstance(hook, QuantizeInputs):
                layer._forward_pre_hooks[key] = _QuantizeInputs(hook.grids, input_dtype)


def _is(node: Any, targets: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def _constants(graph_module: fx.GraphModule) -> dict[str, Any]:
    """The tensors, and the graphs of control flow, that a graph reads, by the names of its ``get_attr`` nodes."""
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
        if any(n is not None and n.op != "get_attr" for n in (bias, *statistics)):  # computed
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
    """The weight's dimension of output channels, of a quantized layer that nothing but a batch norm follows."""
    axis = _channel_axis(layer)
    if axis is None or len(layer.users) > 1 or layer.args[1].target not in weights or len(layer.args[1].users) > 1:
        return None
    if layer.meta["val"].dim() != layer.args[1].meta["val"].dim():
        return None  # linear's of [N, L, C], where batch norm takes L, or a convolution's without a batch
    groups = layer.args[6] if axis == 1 and len(layer.args) > 6 else 1
    return axis if groups == 1 else None


def _store_integers(graph: fx.Graph, constants: dict[str, Any], weights: Mapping[str, IntegerWeight]) -> None:
    """Put integers and their dequantization in the place of the weights, anew for each use."""
    for node in graph.find_nodes(op="get_attr"):
        weight = weights.get(node.target)
        if weight is None:
            continue
        constants[node.target] = weight.values
        grids: dict[int, tuple[str, str]] = {}  # by the dimension of output channels, of which two users may have two
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
    """A name that no tensor of the model has."""
    while name in constants:
        name += "_of_grid"
    return name


def _channel_axis(layer: Any) -> int | None:
    """The weight's dimension of output channels, or None where a backend does not ask for scales by channel."""
    if _is(layer, _TRANSPOSED):
        return 1
    return 0 if _is(layer, {*_CONVOLUTIONS, _aten.linear.default}) else None
