"""Exports of complete models from transformers: ONNX Runtime and torch.export compute the same outputs."""

import pytest
import torch
from models import trainer
from test_transformers import MODELS, Rows, Wrapped, pytestmark  # noqa: F401
from torch.utils.data import DataLoader

from lightning_qat_osc import BatchNormReestimation, IterativeFreezing, OscillationTracking, QuantizationAwareTraining
from lightning_qat_osc.export import integer_weights
from lightning_qat_osc.export.onnx import export_onnx
from lightning_qat_osc.export.pt2e import export_program

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def trained(name, bits):
    """Return a model after five training steps, with freezing at 4 bits, and its inputs without labels."""
    module = Wrapped(name)
    data = DataLoader(Rows(module.examples), batch_size=4)
    callbacks = [
        QuantizationAwareTraining(bits, bits, first_last_bits=8, scale_learning_rate=0.01, calibration_batches=2),
        *([OscillationTracking(momentum=0.1), IterativeFreezing(0.25)] if bits <= 4 else []),
        BatchNormReestimation(num_batches=2),
    ]
    torch.manual_seed(1)
    trainer(callbacks, max_epochs=-1, max_steps=5, num_sanity_val_steps=0).fit(module, data, data)
    model = module.model.eval()
    inputs = {key: value for key, value in module.examples.items() if key != "labels"}
    if name == "whisper":
        inputs["decoder_input_ids"] = module.examples["labels"]
    model.config.use_cache = False
    return model, inputs


def assert_equal(y, expected, name):
    """Check that nearly all values agree up to rounding errors of sums; a few may differ by an integer at a tie."""
    error = (y - expected).abs() / expected.abs().max()
    if name == "mobilenet_v2":  # such an integer affects every output
        assert error.max() < 0.1
    else:
        assert (error > 1e-5).float().mean() <= 0.05


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", [f.__name__ for f in MODELS])
def test_onnx_runtime_and_torch_export(name, bits, tmp_path):
    model, inputs = trained(name, bits)
    with torch.no_grad():
        expected = model(**inputs).logits
        program = export_program(model, inputs)
        from_program = program.module()(**inputs).logits
    assert_equal(from_program, expected, name)
    path = tmp_path / "model.onnx"
    export_onnx(model, path, inputs)
    weights, stored = integer_weights(model), {x.name for x in onnx.load(path).graph.initializer}
    assert {id(weights[key]) for key in stored & weights.keys()} == {id(weight) for weight in weights.values()}
    for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_ALL"):
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"], disabled_optimizers=["WeightBiasQuantization"]
        )
        for rows in (8, 3):
            feed = {i.name: inputs[i.name][:rows].numpy() for i in session.get_inputs()}
            y = torch.from_numpy(session.run(["logits"], feed)[0])
            assert_equal(y, expected[:rows], name)
