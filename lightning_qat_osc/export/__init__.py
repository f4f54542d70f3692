"""Export of trained quantized models: their integers, plain converted models, and files in several formats."""

from lightning_qat_osc.export.convert import IntegerModel, QuantizeInputs, convert, integer_model
from lightning_qat_osc.export.formats import ExportFormat, export_model
from lightning_qat_osc.export.integers import InputGrid, IntegerWeight, input_grids, integer_weights
from lightning_qat_osc.export.onnx import export_onnx
from lightning_qat_osc.export.packed import load_packed, save_packed
from lightning_qat_osc.export.pt2e import export_program
from lightning_qat_osc.export.torchao import convert_to_torchao

__all__ = [
    "ExportFormat",
    "InputGrid",
    "IntegerModel",
    "IntegerWeight",
    "QuantizeInputs",
    "convert",
    "convert_to_torchao",
    "export_model",
    "export_onnx",
    "export_program",
    "input_grids",
    "integer_model",
    "integer_weights",
    "load_packed",
    "save_packed",
]
