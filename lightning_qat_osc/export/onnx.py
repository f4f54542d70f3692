"""Export of a quantized model to ONNX, with integer weights and QuantizeLinear / DequantizeLinear pairs."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from lightning_qat_osc.arguments import call_arguments
from lightning_qat_osc.checks import check_count, check_file, check_module
from lightning_qat_osc.export.extras import require_extra
from lightning_qat_osc.export.pt2e import export_program
from lightning_qat_osc.files import atomic_write

__all__ = ["export_onnx"]


def export_onnx(
    module: nn.Module,
    path: str | os.PathLike[str],
    example_input: Any,
    *,
    opset_version: int = 21,
    dynamic_batch: bool = True,
    fold_batch_norm: bool = True,
) -> None:
    r"""Write a quantized model to an ONNX file, with integer weights.

    A weight is an integer initializer under its key in the float model, followed by a DequantizeLinear with its scale
    or scales. Quantized inputs pass through QuantizeLinear and DequantizeLinear. Weights of up to 4 bits are stored as
    int4 and cast to int8: runtimes cast constants when they load the file, and their kernels take 8 bits. All other
    weights, and all weights below opset 21, are stored as int8. Inputs are uint8; if their grid is narrower than that,
    the integers are clipped to the grid.

    A QuantizeLinear is moved up, toward the input, as far as results do not change: above data movement and max
    pooling, and above ReLU and clipping, which become limits of the integers. ONNX Runtime then finds it right after
    the layer whose output it quantizes, and uses an integer kernel for both.

    Biases are in floating point. For its integer kernel, ONNX Runtime rounds the bias of a convolution between
    quantized tensors to multiples of the product of the scales of input and weight. If these multiples are coarse
    (input and weight have fewer than 12 bits together), or if rounding does not lead to an integer kernel, the bias is
    added by a separate Sum, which no optimization rounds. Linear layers with a quantized input also have this Sum,
    since their integer kernel returns floating point.

    Args:
        module: A model with calibrated quantizers, in 32-bit floating point. It is not changed.
        path: The file to write. An existing file is replaced only in the last step.
        example_input: Input of the module's forward: a tuple of positional arguments, a dictionary of keyword
            arguments, or one argument of any other type, as with Lightning's ``example_input_array``.
        opset_version: Version of the ONNX operator set, at least 18. Below 21 there is no int4.
        dynamic_batch: Make the first dimension dynamic in every input tensor in which it has the same size as in the
            first one.
        fold_batch_norm: Fold batch norms into the layers before them where possible.

    Raises:
        ImportError: If the packages of ``lightning-qat-osc[onnx]`` are not installed, or torch is older than 2.9.
        TypeError: If ``module`` is not a module, or ``path`` is not a path.
        ValueError: If nothing in the module is quantized, a layer cannot be converted, the module is not in 32-bit
            floating point, or ``opset_version`` is below 18 or not supported by torch.
        RuntimeError: If torch cannot export the module; the message states the reason.
    """
    require_extra("onnx", "export_onnx")
    check_module("module", module)
    check_file("path", path)
    check_count("opset_version", opset_version)
    if opset_version < 18:
        raise ValueError(f"opset_version must be at least 18, got {opset_version}")
    projected = [name for name, m in module.named_modules() if isinstance(m, nn.LSTM) and m.proj_size > 0]
    if projected:
        raise RuntimeError(
            f"torch.onnx cannot export '{projected[0]}', an LSTM with proj_size: it would drop the projection"
        )
    from lightning_qat_osc.export import onnx_graph

    args, kwargs = call_arguments(example_input)
    program = export_program(module, example_input, dynamic_batch=dynamic_batch, fold_batch_norm=fold_batch_norm)
    try:
        exported = torch.onnx.export(
            program,
            args,
            kwargs=kwargs,
            opset_version=opset_version,
            custom_translation_table=onnx_graph.translations(),
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        raise RuntimeError(f"torch.onnx cannot export {type(module).__name__}: {error}") from error
    assert exported is not None
    written = exported.model.opset_imports.get("")
    if written != opset_version:
        raise ValueError(
            f"opset_version must be one that this version of torch can write, got {opset_version}, for which it writes "
            f"{written}"
        )
    onnx_graph.finish(exported.model, program)
    content = onnx_graph.checked(exported.model)
    with atomic_write(path) as file:
        file.write_bytes(content)
