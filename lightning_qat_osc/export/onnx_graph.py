"""The changes of export_onnx to the graph translated by torch. Only :mod:`.onnx` may import this: it needs onnx."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import onnx
import onnx_ir as ir
import torch
from ml_dtypes import int4
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedNodesPass
from onnxscript import opset18 as op
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

__all__ = ["checked", "finish", "translations"]

_quantized = torch.ops.quantized_decomposed
_MOVES_DATA = {"Flatten", "MaxPool", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
_COARSE = 12  # with fewer bits of input and weight together, multiples of the product of their scales are too coarse

Array = np.ndarray[Any, Any]
Grids = Mapping[str, tuple[int, int]]


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return the custom translations of the quantization operators for torch.onnx."""
    return {
        _quantized.quantize_per_tensor.default: _quantize,
        _quantized.dequantize_per_tensor.default: _dequantize,
        _quantized.dequantize_per_channel.default: _dequantize_channels,
    }


def _scalar(value: float, dtype: int) -> Any:
    return op.Constant(value=cast(Any, ir.tensor(np.array(value, ir.DataType(dtype).numpy()))))


def _quantize(x: Any, scale: float, zero_point: int, quant_min: int, quant_max: int, dtype: int) -> Any:
    return op.QuantizeLinear(x, _scalar(scale, ir.DataType.FLOAT), _scalar(zero_point, dtype))  # saturates


def _dequantize(
    integers: Any,
    scale: float,
    zero_point: int,
    quant_min: int,
    quant_max: int,
    dtype: int,
    out_dtype: int | None = None,
) -> Any:
    return op.DequantizeLinear(integers, _scalar(scale, ir.DataType.FLOAT), _scalar(zero_point, dtype))


def _dequantize_channels(
    integers: Any,
    scales: Any,
    zero_points: Any,
    axis: int,
    quant_min: int,
    quant_max: int,
    dtype: int,
    out_dtype: int | None = None,
) -> Any:
    return op.DequantizeLinear(integers, scales, axis=axis)  # all zero points of weights are 0


def finish(model: ir.Model, program: ExportedProgram) -> None:
    """Bring a translated model into the form that :func:`~lightning_qat_osc.export.export_onnx` describes, in place.

    Args:
        model: The translation of ``program``.
        program: What :func:`~lightning_qat_osc.export.export_program` returned.
    """
    graph, grids = model.graph, _weight_grids(program)
    steps: list[tuple[set[str], Callable[[ir.Node], None]]] = [
        ({"DequantizeLinear"}, _one_scale),
        ({"DequantizeLinear"}, _lower),
        ({"Gemm", "MatMul"}, _linear),
        ({"Conv", "ConvTranspose"}, lambda node: _convolution(node, grids)),
        ({"QuantizeLinear"}, _raise),
    ]
    for kinds, change in steps:
        for node in [node for node in graph if node.op_type in kinds]:
            change(node)
    RemoveUnusedNodesPass()(model)
    for name, (low, high) in grids.items():
        # torch.onnx stores equal tensors only once, so a name may be missing
        if graph.opset_imports[""] >= 21 and low >= -8 and high <= 7 and name in graph.initializers:
            _store_as_int4(graph.initializers[name])
    _name_batch(graph)
    _name_outputs(graph, program)
    ClearMetadataAndDocStringPass()(model)  # they contain paths of source files


def checked(model: ir.Model) -> bytes:
    """Return the content of the file, after ONNX's full check.

    Raises:
        onnx.checker.ValidationError: If the model is not valid ONNX.
    """
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    return cast(bytes, proto.SerializeToString())


def _weight_grids(program: ExportedProgram) -> dict[str, tuple[int, int]]:
    """Return the limits of the integers of every weight, by name of its initializer."""
    names = program.graph_signature.inputs_to_buffers
    grids = {}
    for node in program.graph.nodes:
        if node.target in (_quantized.dequantize_per_tensor.default, _quantized.dequantize_per_channel.default):
            name = names.get(node.args[0].name)
            if name is not None:
                grids[name] = node.args[-3:-1]
    return grids


def _range(dtype: ir.DataType) -> tuple[int, int]:
    info = np.iinfo(dtype.numpy())
    return int(info.min), int(info.max)


def _producer(value: ir.Value | None, kind: str) -> ir.Node | None:
    """Return the node that produces a value if it is of the given kind, else None."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == kind else None


def _content(value: ir.Value | None) -> Array | None:
    """Return the content of a constant value, or None if the value depends on the input."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def _constant(graph: ir.Graph, name: str, content: Array) -> ir.Value:
    """Return an initializer with this content: an existing one of this name, or a new one under a free name."""
    while name in graph.initializers and not np.array_equal(cast(Array, _content(graph.initializers[name])), content):
        name += "_too"  # weights with equal integers share an initializer but not their scales
    if name not in graph.initializers:
        tensor = ir.tensor(content, name=name)
        value = ir.Value(name=name, shape=ir.Shape(content.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        graph.register_initializer(value)
    return graph.initializers[name]


def _integer(graph: ir.Graph, value: int, dtype: ir.DataType) -> ir.Value:
    return _constant(graph, f"{dtype.numpy().name}_{value}", np.array(value, dtype.numpy()))


def _insert(before: ir.Node, kind: str, inputs: list[Any], like: ir.Value, /, **attributes: Any) -> ir.Value:
    """Insert a node and return its output, with the type and shape of ``like`` and a unique name derived from it."""
    graph, node = before.graph, ir.node(kind, inputs, attributes)
    assert graph is not None
    taken = {value.name for other in graph for value in other.outputs} | set(graph.initializers)
    name = f"{like.name}_{kind.lower()}"
    while name in taken:  # taken if a layer is called more than once
        name += "_again"
    graph.insert_before(before, node)
    (output,) = node.outputs
    output.name, output.type, output.shape = name, like.type, like.shape
    return output


def _one_scale(dequantize: ir.Node) -> None:
    """Replace equal scales with a single one: the graph of torch.export repeats a weight's scale for each channel."""
    graph, integers, scales = dequantize.graph, dequantize.inputs[0], _content(dequantize.inputs[1])
    if graph is not None and integers is not None and scales is not None and scales.ndim == 1 and len(set(scales)) == 1:
        dequantize.resize_inputs(2)  # torch 2.9 uses its own translation, which adds zero points of 0
        dequantize.replace_input_with(1, _constant(graph, f"{integers.name}_scale_of_all", scales[0]))
        del dequantize.attributes["axis"]


def _lower(dequantize: ir.Node) -> None:
    """Move a DequantizeLinear down, past nodes that move data or pad with 0, next to the layer that computes."""
    graph, integers = dequantize.graph, dequantize.inputs[0]
    assert graph is not None
    while integers is not None and integers.dtype is not None and not integers.is_initializer():
        floats = dequantize.outputs[0]
        if len(floats.uses()) != 1 or floats.is_graph_output():
            return
        (below,) = floats.consumers()
        pads = _padding(below) == 0.0
        if not (below.op_type in _MOVES_DATA or pads) or len(below.outputs) != 1 or below.inputs[0] is not floats:
            return
        if pads:
            zero_point = _content(dequantize.inputs[2])
            assert zero_point is not None
            below.replace_input_with(2, _integer(graph, int(zero_point), integers.dtype))
        moved = below.outputs[0]
        moved.replace_all_uses_with(floats, replace_graph_outputs=True)
        below.replace_input_with(0, integers)
        moved.type, floats.shape = integers.type, moved.shape
        dequantize.replace_input_with(0, moved)
        graph.remove(dequantize)
        graph.insert_after(below, dequantize)
        integers = moved


def _linear(product: ir.Node) -> None:
    """Turn a linear layer with a quantized input into a MatMul with transposed integers, and a Sum for the bias.

    ONNX Runtime would fuse MatMul and Add into a Gemm, which it computes in floating point or with a rounded bias. It
    does not fuse MatMul and Sum. If the input is not quantized, the weight passes through a Sum with one operand, since
    ONNX Runtime would otherwise use a kernel (MatMulNBits) that rounds the input to 8 bits.
    """
    x, weight, *rest = product.inputs
    if _producer(x, "DequantizeLinear") is None:
        if weight is not None and _is_dequantized(weight):
            product.replace_input_with(1, _insert(product, "Sum", [weight], weight))
        return
    transpose, output = _producer(weight, "Transpose"), product.outputs[0]
    if product.op_type == "Gemm":
        given = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0}  # the defaults
        given |= {key: attribute.value for key, attribute in product.attributes.items()}
        if weight is None or given["alpha"] != 1.0 or given["beta"] != 1.0 or given["transA"]:
            return
        factor = _transposed(product, weight) if given["transB"] else weight
        output = _insert(product, "MatMul", [x, factor], output)
        if rest:
            output = _insert(product, "Sum", [output, rest[0]], product.outputs[0])
        product.outputs[0].replace_all_uses_with(output, replace_graph_outputs=True)
        return
    if transpose is not None and transpose.inputs[0] is not None and len(transpose.inputs[0].shape or ()) == 2:
        product.replace_input_with(1, _transposed(product, transpose.inputs[0]))
        for user in output.consumers():
            if user.op_type == "Add" and any(value is not None and value.is_initializer() for value in user.inputs):
                user.op_type = "Sum"


def _is_dequantized(weight: ir.Value) -> bool:
    transpose = _producer(weight, "Transpose")
    return _producer(weight if transpose is None else transpose.inputs[0], "DequantizeLinear") is not None


def _transposed(product: ir.Node, weight: ir.Value) -> ir.Value:
    """Return the transposed weight; for a dequantized weight, the integers are transposed before DequantizeLinear."""
    dequantize = _producer(weight, "DequantizeLinear")
    integers = weight if dequantize is None else dequantize.inputs[0]
    assert integers is not None
    assert integers.shape is not None
    result = _insert(product, "Transpose", [integers], integers, perm=[1, 0])
    result.shape = ir.Shape(reversed(list(integers.shape)))
    if dequantize is None:
        return result
    axis = {"axis": 1 - dequantize.attributes["axis"].as_int()} if "axis" in dequantize.attributes else {}
    floats = _insert(product, "DequantizeLinear", [result, dequantize.inputs[1]], weight, **axis)
    floats.shape = result.shape
    return floats


def _convolution(node: ir.Node, grids: Grids) -> None:
    """Move the bias of a convolution into a Sum where the int32 bias of ONNX Runtime would differ too much.

    ONNX Runtime rounds biases to multiples of the product of the input's and the weight's scale. With 8 bits each, this
    is far below a step of the output; with few bits it is not. If the output is quantized, ONNX Runtime would also
    quantize a full-precision weight, and the bias of a transposed convolution, although it computes the latter in
    floating point. Both kinds of layers get a Sum, even without a bias.
    """
    dequantize = _producer(node.inputs[0], "DequantizeLinear")
    weight = _producer(node.inputs[1], "DequantizeLinear")
    if dequantize is None or node.graph is None:
        return
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if weight is not None and node.op_type == "Conv":
        assert weight.inputs[0] is not None
        _, quant_max = grids[str(weight.inputs[0].name)]
        integers = dequantize.inputs[0]
        while (above := None if integers is None else integers.producer()) is not None and _moves_data(above):
            integers = above.inputs[0]
        clip = _producer(integers, "Clip")
        limit = None if clip is None else _content(clip.inputs[2])
        bits = quant_max.bit_length() + 1 + (8 if limit is None else int(limit).bit_length())
        if bias is None or bits >= _COARSE:
            return
    output = node.outputs[0]
    shape = [-1] + [1] * (len(output.shape or ()) - 2)
    added = _content(bias)
    if bias is None:
        added, name = np.zeros((), np.float32), "no_bias"
    else:
        name = f"{bias.name}_of_channels"
        added = None if added is None else added.reshape(shape)
    product = _insert(node, node.op_type, [*node.inputs[:2]], output, **node.attributes)
    if added is not None:
        term = _constant(node.graph, name, added)
    else:  # the bias is not a constant
        term = _insert(node, "Reshape", [bias, _constant(node.graph, f"{name}_shape", np.array(shape))], output)
        term.shape = None
    total = _insert(node, "Sum", [product, term], output)
    output.replace_all_uses_with(total, replace_graph_outputs=True)


def _raise(quantize: ir.Node) -> None:
    """Move a QuantizeLinear up, toward the input, as far as the integers stay the same.

    Data movement commutes with quantization, and so does taking a maximum, since scales are positive. When a
    QuantizeLinear moves above a ReLU or a Clip, their limits become limits of the integers: rounding is monotonic.
    """
    graph, integers = quantize.graph, quantize.outputs[0]
    assert graph is not None
    assert integers.dtype is not None
    low, high = _range(integers.dtype)
    consumers = integers.consumers()
    if len(consumers) == 1 and consumers[0].op_type == "Clip":  # the grid is narrower than the type
        low, high = (int(cast(Array, _content(limit))) for limit in consumers[0].inputs[1:])
        consumers[0].outputs[0].replace_all_uses_with(integers)
        graph.remove(consumers[0], safe=True)
    while True:
        value = quantize.inputs[0]
        above = None if value is None else value.producer()
        if value is None or value.is_graph_output() or above is None or above.inputs[0] is None:
            break
        padding = _padding(above)
        moves = above.op_type in _MOVES_DATA or padding is not None
        if moves and len(above.outputs) == 1 and len(value.uses()) == 1:
            if padding is not None:
                padding = min(max(_to_integer(quantize, padding), low), high)
                above.replace_input_with(2, _integer(graph, padding, integers.dtype))
            quantize.replace_input_with(0, above.inputs[0])
            integers.replace_all_uses_with(value)
            value.type, integers.shape = integers.type, above.inputs[0].shape
            above.replace_input_with(0, integers)
            graph.remove(above)
            graph.insert_after(quantize, above)
            continue
        limits = _limits(above)
        if limits is None or any(user.op_type != "QuantizeLinear" for user in value.consumers()):
            break
        low, high = [min(max(_to_integer(quantize, limit), low), high) for limit in limits]
        quantize.replace_input_with(0, above.inputs[0])
    if (low, high) != _range(integers.dtype):
        _clip(quantize, low, high)


def _moves_data(node: ir.Node) -> bool:
    return node.op_type in _MOVES_DATA or node.op_type == "Pad"


def _padding(node: ir.Node) -> float | None:
    """Return the constant that a node pads with, or None if it does not pad with a constant."""
    mode = node.attributes.get("mode")
    if node.op_type != "Pad" or len(node.inputs) < 3 or (mode is not None and mode.as_string() != "constant"):
        return None
    content = _content(node.inputs[2])
    return None if content is None else float(content)


def _limits(node: ir.Node) -> tuple[float, float] | None:
    """Return the constants between which a node clips, or None if it does not."""
    if node.op_type == "Relu":
        return 0.0, float("inf")
    if node.op_type != "Clip":
        return None
    limits = [-float("inf"), float("inf")]
    for i, value in enumerate(node.inputs[1:]):
        content = _content(value)
        if value is not None and content is None:
            return None
        limits[i] = limits[i] if content is None else float(content)
    return limits[0], limits[1]


def _to_integer(quantize: ir.Node, value: float) -> int:
    """Return the integer that a QuantizeLinear maps a number to."""
    scale, zero_point = (_content(x) for x in quantize.inputs[1:])
    dtype = quantize.outputs[0].dtype
    assert scale is not None
    assert zero_point is not None
    assert dtype is not None
    return int(np.clip(np.rint(np.float32(value) / scale) + float(zero_point), *_range(dtype)))


def _clip(quantize: ir.Node, low: int, high: int) -> None:
    """Clip the integers of a QuantizeLinear to limits."""
    graph, integers = quantize.graph, quantize.outputs[0]
    assert graph is not None
    assert integers.dtype is not None
    clip = ir.node("Clip", [None, *(_integer(graph, limit, integers.dtype) for limit in (low, high))])
    clipped = clip.outputs[0]
    clipped.name, clipped.type, clipped.shape = f"{integers.name}_clip", integers.type, integers.shape
    integers.replace_all_uses_with(clipped)
    clip.replace_input_with(0, integers)
    graph.insert_after(quantize, clip)


def _store_as_int4(weight: ir.Value) -> None:
    """Store a weight as int4, two integers per byte, and cast it to the int8 that runtimes compute with."""
    assert weight.const_value is not None
    assert weight.graph is not None
    users, order = list(weight.uses()), {node: i for i, node in enumerate(weight.graph)}
    wide = _insert(
        min((node for node, _ in users), key=order.__getitem__), "Cast", [weight], weight, to=ir.DataType.INT8
    )
    weight.const_value = ir.tensor(weight.const_value.numpy().astype(int4), name=weight.name)
    weight.type = ir.TensorType(ir.DataType.INT4)
    for node, i in users:
        node.replace_input_with(i, wide)


def _name_batch(graph: ir.Graph) -> None:
    """Name the dynamic dimension ``batch``."""
    symbols = {d.value for x in graph.inputs for d in x.shape or () if isinstance(d, ir.SymbolicDim)}
    if len(symbols) != 1:
        return
    (symbol,) = symbols
    for value in [*graph.inputs, *(output for node in graph for output in node.outputs)]:
        if value.shape is not None:
            value.shape = ir.Shape(
                dimension.value.replace(str(symbol), "batch")
                if isinstance(dimension, ir.SymbolicDim) and dimension.value is not None
                else dimension
                for dimension in value.shape
            )


def _name_outputs(graph: ir.Graph, program: ExportedProgram) -> None:
    """Name outputs after their keys or positions, or ``output`` if there is only one."""
    spec = program.call_spec.out_spec
    assert spec is not None
    leaves, _ = pytree.tree_flatten_with_path(pytree.tree_unflatten(range(spec.num_leaves), spec))
    made: Sequence[object] = program.graph.output_node().args[0]
    made = made[len(made) - len(leaves) :]  # buffers that the forward changes come first
    inner = {value for node in graph for value in node.outputs} - set(graph.outputs)
    taken = {value.name for value in (*graph.inputs, *graph.initializers.values(), *inner)}
    for value, (path, _) in zip(graph.outputs, (leaf for leaf in leaves if made[leaf[1]] is not None)):
        name = "_".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)
        name = name if name and not name[0].isdigit() else f"output_{name}".rstrip("_")
        while name in taken:
            name += "_output"
        taken.add(name)
        value.name = name
