"""The optional packages that exports need."""

from __future__ import annotations

from importlib.util import find_spec

import torch

__all__ = ["require_extra"]

_PACKAGES = {
    "packed": ("safetensors",),
    "onnx": ("onnx", "onnx_ir", "onnxscript", "ml_dtypes"),
    "torchao": ("torchao",),
}
_TORCH = {"onnx": "2.9", "torchao": "2.10"}  # first with reliable exports; first that torchao 0.18 imports in


def require_extra(extra: str, what: str) -> None:
    """Check that the packages of one of the project's extras are installed, and that torch is new enough for it.

    Args:
        extra: Name of the extra.
        what: What needs the extra, for the error message.

    Raises:
        ImportError: If a package is missing (the message names the extra to install), or torch is too old.
    """
    missing = [package for package in _PACKAGES[extra] if find_spec(package) is None]
    if missing:
        raise ImportError(f'{what} needs {", ".join(missing)}: pip install "lightning-qat-osc[{extra}]"')
    if extra in _TORCH and torch.__version__ < _TORCH[extra]:
        raise ImportError(f"{what} needs torch {_TORCH[extra]} or later, got torch {torch.__version__}")
