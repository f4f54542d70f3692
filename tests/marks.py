"""Marks that skip a test where the machine lacks what it needs."""

import shutil
from importlib.util import find_spec

import pytest
import torch

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="compiled kernels need a C++ compiler")
needs_torchao = pytest.mark.skipif(
    torch.__version__ < "2.10" or find_spec("torchao") is None,
    reason="torchao is not installed, or torch is too old for it",
)
needs_onnx_export = pytest.mark.skipif(torch.__version__ < "2.9", reason="export to ONNX needs torch 2.9")
