"""The quantized model as an ONNX file with integer weights and QuantizeLinear / DequantizeLinear pairs."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from lightning_qat_osc.arguments import call_arguments
from lightning_qat_osc.checks import check_count, check_file, check_module
from lightning_qat_osc.export.extras import require_extra
from lightning_qat_osc.export.pt2e import export_program
from lightning_qat_osc.files import written_whole

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
    r"""Write a quantized model as ONNX, with integer weights.

    A weight is an integer initializer under its key in the float model, followed by DequantizeLinear with its scale or
    scales; where inputs are quantized there are QuantizeLinear and DequantizeLinear. Weights of up to 4 bits are stored
    as int4 and cast to int8 (runtimes cast constants when they load them, and have kernels for 8 bits), all others, and
    all below opset 21, as int8. Inputs are uint8; where their grid is narrower than that, the integers are clipped to
    it.

    A QuantizeLinear stands as far up as it can without changing a result: above data movement, max pooling, and above
    ReLU and clipping, which become limits of the integers. There ONNX Runtime finds it behind the layer whose output it
    quantizes, and takes an integer kernel for both.

    Biases are in floating point. ONNX Runtime rounds those of convolutions between quantized tensors to multiples of
    the product of the scales of input and weight, for its integer kernel. Where that would be coarse, with
    less than 12 bits of input and weight together, and where no integer kernel follows from it, the bias is a Sum of
    its own, which no optimisation rounds. So it is in linear layers, whose integer kernel returns floating point.

    Args:
        module: A model with calibrated quantizers, in 32-bit floating point. It is left as it is.
        path: The file to write. A file that is there is replaced as the last step.
        example_input: What its forward takes: a tuple of positional arguments, a dictionary of keyword arguments, or
            one argument of any other type, as with Lightning's ``example_input_array``.
        opset_version: Version of ONNX's operators, at least 18. Below 21 there is no int4.
        dynamic_batch: Leave the first dimension open, in every tensor in which it is as long as in the first one.
        fold_batch_norm: Fold batch norms into the layers before them where that can be done.

    Raises:
        ImportError: If the packages of ``lightning-qat-osc[onnx]`` are not installed, or torch is older than 2.9.
        TypeError: If ``module`` is no module, or ``path`` no path.
        ValueError: If nothing in the module is quantized, a layer cannot be converted, the module is not in 32-bit
            floating point, or ``opset_version`` is below 18 or beyond what torch knows.
        RuntimeError: If torch cannot export the module; the message has torch's reason.
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
            f"torch.onnx cannot export an LSTM with proj_size, as '{projected[0]}' is: it drops the projection"
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
            f"opset_version must be one that this torch can write, got {opset_version}, for which it writes {written}"
        )
    onnx_graph.finish(exported.model, program)
    content = onnx_graph.checked(exported.model)
    with written_whole(path) as file:
        file.write_bytes(content)
