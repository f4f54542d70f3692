"""Export of a quantized model to a file in a format chosen by name."""

from __future__ import annotations

from os import PathLike
from typing import Any, Literal

import torch
from torch import nn

from lightning_qat_osc.checks import check_choice, check_file, check_module
from lightning_qat_osc.export.extras import require_extra
from lightning_qat_osc.export.onnx import export_onnx
from lightning_qat_osc.export.packed import save_packed
from lightning_qat_osc.export.pt2e import export_program
from lightning_qat_osc.files import atomic_write

__all__ = ["SUFFIXES", "ExportFormat", "export_model", "require_packages"]

ExportFormat = Literal["packed", "onnx", "torch"]
"""``packed``: safetensors with b bits per weight, read by :func:`~lightning_qat_osc.export.load_packed`.
``onnx``: ONNX with QuantizeLinear and DequantizeLinear. ``torch``: a ``torch.export`` program with integer weights,
which runs without the model's class."""

SUFFIXES: dict[ExportFormat, str] = {"packed": ".safetensors", "onnx": ".onnx", "torch": ".pt2"}
"""Format -> suffix of its files."""


def require_packages(export_format: ExportFormat) -> None:
    """Check that the packages that a format needs are installed.

    Raises:
        ImportError: If one is not (the message names the extra to install), or torch is too old for the format.
    """
    if export_format != "torch":
        require_extra(export_format, f"format '{export_format}'")


def export_model(
    module: nn.Module,
    path: str | PathLike[str],
    export_format: ExportFormat,
    example_input: Any = None,
    *,
    dynamic_batch: bool = True,
) -> None:
    """Write a quantized model to a file in a given format.

    Args:
        module: A model with quantizers, trained or loaded from a checkpoint. It is not changed.
        path: The file. It is written under a temporary name in the same folder, and then renamed.
        export_format: "packed", "onnx" or "torch".
        example_input: Input of the module's forward, for "onnx" and "torch": a tuple of positional arguments,
            a dictionary of keyword arguments, or one argument of any other type.
        dynamic_batch: Make the batch size of "onnx" and "torch" dynamic; otherwise it is fixed to that of the example.

    Raises:
        ImportError: If a package that the format needs is not installed, or torch is too old for the format.
        TypeError: If ``module`` is not a module, or ``path`` is not a path.
        ValueError: If the format is unknown, nothing in the module is quantized, a layer cannot be exported, or
            ``example_input`` is missing.
        RuntimeError: If torch cannot export the module.
    """
    check_choice("export_format", export_format, ExportFormat)
    if export_format == "packed":
        save_packed(module, path)
        return
    if example_input is None:
        raise ValueError(f"example_input must be an input of the module's forward for '{export_format}', got None")
    if export_format == "onnx":
        export_onnx(module, path, example_input, dynamic_batch=dynamic_batch)
        return
    check_module("module", module)
    check_file("path", path)
    with atomic_write(path) as temporary:
        torch.export.save(export_program(module, example_input, dynamic_batch=dynamic_batch), temporary)
