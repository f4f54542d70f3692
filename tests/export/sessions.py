"""Helpers that run ONNX files in ONNX Runtime, with and without its graph optimizations."""

import collections

import numpy as np
import onnx
import onnxruntime
import torch
from onnxruntime import GraphOptimizationLevel as Level

onnxruntime.set_default_logger_severity(3)


def session(path, *, optimized=True, save_to=None):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = Level.ORT_ENABLE_ALL if optimized else Level.ORT_DISABLE_ALL
    if save_to is not None:
        options.optimized_model_filepath = str(save_to)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(path, *inputs, optimized=True):
    """Run a file and return all its outputs as tensors."""
    s = session(path, optimized=optimized)
    feed = {i.name: x.numpy() for i, x in zip(s.get_inputs(), inputs)}
    return [torch.from_numpy(np.asarray(y)) for y in s.run(None, feed)]


def operators(path):
    return collections.Counter(node.op_type for node in onnx.load(path).graph.node)


def optimized_operators(path):
    """Count the operators of a graph after ONNX Runtime's optimizations."""
    optimized = path.with_suffix(".optimized.onnx")
    session(path, save_to=optimized)
    return operators(optimized)


def initializers(path):
    return {x.name: x for x in onnx.load(path).graph.initializer}


def assert_close(y, expected, tolerance=2e-6):
    """Assert equality up to rounding errors of sums, as a fraction of the largest expected value."""
    error = (y - expected).abs().max() / expected.abs().max().clamp_min(1e-12)
    assert error <= tolerance, error
