"""From a trained model to integers that run: what it computes, and the files that hold it."""

from lightning_qat_osc.export.convert import IntegerModel, QuantizeInputs, convert, integer_model
from lightning_qat_osc.export.integers import InputGrid, IntegerWeight, input_grids, integer_weights
from lightning_qat_osc.export.packed import load_packed, save_packed

__all__ = [
    "InputGrid",
    "IntegerModel",
    "IntegerWeight",
    "QuantizeInputs",
    "convert",
    "input_grids",
    "integer_model",
    "integer_weights",
    "load_packed",
    "save_packed",
]
