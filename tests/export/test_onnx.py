"""ONNX files: their contents, and that ONNX Runtime computes the same outputs as the quantized model."""

import copy

import hypothesis.strategies as st
import numpy as np
import onnx
import pytest
import torch
from calibrated import calibrated
from hypothesis import HealthCheck, Phase, given, settings
from marks import needs_onnx_export
from models import ConvModule, Data, trainer
from onnx import TensorProto, numpy_helper
from sessions import assert_close, initializers, operators, optimized_operators, run, session
from torch import nn
from torch.nn import functional as F

from lightning_qat_osc import IterativeFreezing, LayerRule, QuantConfig, QuantizationAwareTraining, oscillation_states
from lightning_qat_osc.export import integer_weights
from lightning_qat_osc.export.onnx import export_onnx
from lightning_qat_osc.surgery import quantize_model

pytestmark = needs_onnx_export


def network():
    """Return a network with all operations from a layer to the next quantizer: clip, pool, pad, reshape, and sum."""
    torch.manual_seed(3)

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(16, 16, 3, padding=1, groups=4)

        def forward(self, x):
            return x + self.conv(x)

    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU6(),
        nn.MaxPool2d(2),
        nn.ZeroPad2d((0, 1, 0, 1)),
        nn.Conv2d(8, 16, 3, stride=2),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        Residual(),
        nn.Conv2d(16, 16, 1),
        nn.Hardtanh(-0.1, 0.3),
        nn.Flatten(),
        nn.Linear(64, 24),
        nn.ReLU(),
        nn.Linear(24, 10),
    )
    with torch.no_grad():
        for _ in range(20):
            model(torch.randn(64, 3, 8, 8))
        for layer in model:
            if isinstance(layer, nn.BatchNorm2d):
                layer.weight.uniform_(0.5, 2.0)
                layer.bias.uniform_(-0.5, 0.5)
    return model.eval()


def images(n=256, seed=7):
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def outputs(model, *inputs):
    with torch.no_grad():
        return model(*inputs)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Return a function that creates a quantized network and its file, once for each choice of bits and granularity."""
    made = {}

    def get(weight_bits, activation_bits, granularity="per_channel"):
        key = weight_bits, activation_bits, granularity
        if key not in made:
            bits = {"weight_bits": weight_bits, "activation_bits": activation_bits}
            model = calibrated(network(), images(), weight_granularity=granularity, **bits)
            path = tmp_path_factory.mktemp("onnx") / "model.onnx"
            export_onnx(model, path, images(2))
            made[key] = model, path
        return made[key]

    return get


WIDTHS = [(8, 8), (4, 8), (4, 4), (3, 3), (2, 5), (8, 6), (7, 7), (3, None), (None, 8)]


@pytest.mark.parametrize(
    ("weight_bits", "activation_bits", "granularity"),
    [(*widths, "per_channel") for widths in WIDTHS] + [(*widths, "per_tensor") for widths in WIDTHS[:3:2]],
)
def test_onnx_runtime_computes_the_quantized_model(exported, weight_bits, activation_bits, granularity):
    model, path = exported(weight_bits, activation_bits, granularity)
    x = 1.5 * images(1000, seed=11)  # wider than in calibration, so that grids saturate
    expected = outputs(model, x)
    exact = run(path, x, optimized=False)[0]
    rows = (exact - expected).abs().amax(1) > 2e-6 * expected.abs().max()
    assert rows.sum() <= 5  # where rounding errors of sums decide a tie between two integers
    assert ((exact - expected).abs().max() / expected.std()) < 0.5
    optimized = run(path, x)[0]
    if weight_bits and activation_bits and weight_bits + activation_bits >= 12:
        # int32 biases shift each integer by at most one
        assert (optimized - expected).abs().mean() < 0.02 * expected.std()
        assert (optimized.argmax(1) == expected.argmax(1)).float().mean() > 0.98
    else:
        rows = (optimized - expected).abs().amax(1) > 2e-6 * expected.abs().max()
        assert rows.sum() <= 5


def test_without_int32_biases_8_bits_are_exact_too(exported):
    import onnxruntime

    model, path = exported(8, 8)
    x = images(500)
    s = onnxruntime.InferenceSession(
        str(path), providers=["CPUExecutionProvider"], disabled_optimizers=["WeightBiasQuantization"]
    )
    y = torch.from_numpy(s.run(None, {"input": x.numpy()})[0])
    expected = outputs(model, x)
    assert ((y - expected).abs().amax(1) > 2e-6 * expected.abs().max()).sum() <= 5


def test_integer_kernels_at_8_bits(exported):
    _, path = exported(8, 8)
    found = optimized_operators(path)
    # the residual's convolution and the one before it stay float: a sum reads their outputs in full precision
    assert found["QLinearConv"] == 2
    assert found["MatMulIntegerToFloat"] == 2
    assert found["Gemm"] == found["MatMul"] == 0


def test_weights_are_integers_under_the_float_models_keys(exported):
    for bits, dtype in ((8, TensorProto.INT8), (5, TensorProto.INT8), (4, TensorProto.INT4), (2, TensorProto.INT4)):
        model = calibrated(network(), images(), weight_bits=bits, activation_bits=8)
        _, path = exported(bits, 8, "per_tensor")
        stored = initializers(path)
        weights = integer_weights(model)
        for name, weight in weights.items():
            assert stored[name].data_type == dtype
            assert np.array_equal(numpy_helper.to_array(stored[name]).astype(np.int8), weight.values.numpy())
        assert not any(
            x.data_type == TensorProto.FLOAT and len(x.dims) > 1 and max(x.dims) > 24 for x in stored.values()
        )
        shapes = {tuple(sorted(weight.values.shape)) for weight in weights.values()}
        assert not [
            n for n, x in stored.items() if x.data_type == TensorProto.FLOAT and tuple(sorted(x.dims)) in shapes
        ]


def test_per_tensor_scales_are_scalars_and_channels_have_their_own(exported):
    for granularity, shape in (("per_tensor", []), ("per_channel", [24])):
        _, path = exported(4, 4, granularity)
        dequantize = [n for n in onnx.load(path).graph.node if n.op_type == "DequantizeLinear"]
        (scale,) = [n.input[1] for n in dequantize if n.input[0].startswith("12.weight")]
        assert list(initializers(path)[scale].dims) == shape


def test_below_opset_21_there_is_no_int4(tmp_path):
    model = calibrated(network(), images(), weight_bits=3, activation_bits=3)
    export_onnx(model, tmp_path / "18.onnx", images(2), opset_version=18)
    assert {x.data_type for x in initializers(tmp_path / "18.onnx").values()} >= {TensorProto.INT8}
    assert not {x.data_type for x in initializers(tmp_path / "18.onnx").values()} & {TensorProto.INT4}
    assert onnx.load(tmp_path / "18.onnx").opset_import[0].version == 18
    assert_close(run(tmp_path / "18.onnx", images(100))[0], outputs(model, images(100)))


def test_quantizers_stand_behind_the_layers(exported):
    for bits in (8, 3):
        _, path = exported(8, bits)
        graph = onnx.load(path).graph
        producers = {output: node for node in graph.node for output in node.output}
        above = [
            producers[n.input[0]].op_type for n in graph.node if n.op_type == "QuantizeLinear" and n.input[0] != "input"
        ]
        # quantizers moved above ReLU6, max pooling, padding, Hardtanh, Flatten, and ReLU, except the ReLU whose output
        # a sum reads too
        assert set(above) <= {"Conv", "Sum", "Add", "Relu"}
        assert operators(path)["BatchNormalization"] == 0


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_the_batch_is_open(exported, rows):
    model, path = exported(4, 4)
    assert session(path).get_inputs()[0].shape == ["batch", 3, 8, 8]
    assert session(path).get_outputs()[0].shape == ["batch", 10]
    assert_close(run(path, images(rows))[0], outputs(model, images(rows)))


def test_a_fixed_batch_and_an_example_of_one_row(tmp_path):
    model = calibrated(network(), images(), weight_bits=4)
    export_onnx(model, tmp_path / "fixed.onnx", images(1), dynamic_batch=False)
    assert session(tmp_path / "fixed.onnx").get_inputs()[0].shape == [1, 3, 8, 8]
    export_onnx(model, tmp_path / "open.onnx", images(1))
    assert_close(run(tmp_path / "open.onnx", images(3))[0], outputs(model, images(3)))


def test_a_weight_in_full_precision_stays_so(tmp_path):
    # by default, ONNX Runtime quantizes such weights where it finds them between quantized tensors
    rules = tuple(LayerRule(pattern=name, weight_bits=None) for name in ("0", "5", "12"))
    model = calibrated(network(), images(), weight_bits=3, activation_bits=8, rules=rules)
    export_onnx(model, tmp_path / "model.onnx", images(2))
    expected, y = outputs(model, images()), run(tmp_path / "model.onnx", images())[0]
    assert ((y - expected).abs().amax(1) > 2e-6 * expected.abs().max()).sum() <= 5


def test_frozen_weights_come_out_as_they_froze(tmp_path):
    module = ConvModule()
    qat = QuantizationAwareTraining(2, 3, first_last_bits=None, scale_learning_rate=0.01)
    trainer([qat, IterativeFreezing(0.12, 0.11, momentum=0.05)], max_epochs=6).fit(module, Data())
    export_onnx(module, tmp_path / "model.onnx", torch.randn(2, 1, 6, 6), fold_batch_norm=False)
    stored, frozen = initializers(tmp_path / "model.onnx"), 0
    for name, state in oscillation_states(module).items():
        integers = torch.from_numpy(numpy_helper.to_array(stored[f"{name}.weight"]).astype(np.int8))
        assert torch.equal(integers[state.frozen], state.weight_int[state.frozen])
        frozen += int(state.frozen.sum())
    assert frozen > 0


class Pair(nn.Module):
    """Two inputs, one by keyword, and named outputs."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(6, 5), nn.Linear(4, 5)

    def forward(self, left, *, right, scale=None):
        total = self.left(left) + self.right(right)
        return {"total": total if scale is None else total * scale, "parts": (left.sum(1), right.sum(1))}


def test_keywords_several_inputs_and_named_outputs(tmp_path):
    a, b = torch.randn(8, 6), torch.randn(8, 4)
    model = calibrated_with(Pair(), left=a, right=b)
    export_onnx(model, tmp_path / "pair.onnx", {"left": a, "right": b})
    s = session(tmp_path / "pair.onnx")
    assert [i.name for i in s.get_inputs()] == ["left", "right"]
    assert [o.name for o in s.get_outputs()] == ["total", "parts_0", "parts_1"]
    y = run(tmp_path / "pair.onnx", a[:3], b[:3])
    expected = model(a[:3], right=b[:3])
    assert_close(y[0], expected["total"].detach())
    assert_close(y[2], expected["parts"][1])


def calibrated_with(model, **kwargs):
    class Call(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, *args):
            return self.model(**kwargs)

    return calibrated(Call(), None).model


class OneDictionary(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, batch):
        return self.layer(batch["x"])


def test_a_dictionary_that_is_one_argument_goes_into_a_tuple(tmp_path):
    x = torch.randn(8, 4)
    model = calibrated(OneDictionary(), {"x": x})
    export_onnx(model, tmp_path / "model.onnx", ({"x": x},))
    assert_close(run(tmp_path / "model.onnx", x)[0], outputs(model, {"x": x}))


class Attention(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **kwargs)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


class CrossAttention(Attention):
    def forward(self, x):
        return self.attention(x, x.flip(1), 2 * x)[0]


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.layer = kind(8, 6, batch_first=True)

    def forward(self, x):
        return self.layer(x)[0]


class Words(nn.Module):
    """An embedding whose weight the output layer shares."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
        self.head.weight = self.table.weight

    def forward(self, words):
        return self.head(self.table(words))


class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(20, 8, mode="sum"), nn.Linear(8, 3)

    def forward(self, words):
        return self.head(self.bag(words))


class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Bilinear(8, 8, 3)

    def forward(self, x):
        return self.layer(x, x.flip(-1))


SEQUENCES = (4, 5, 8)
LAYERS = {
    "attention": (Attention, SEQUENCES),
    "attention without bias": (lambda: Attention(bias=False), SEQUENCES),
    "cross attention": (CrossAttention, SEQUENCES),
    "encoder layer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), SEQUENCES),
    "transposed convolution": (lambda: nn.ConvTranspose2d(3, 4, 3, 2, 1, 1), (2, 3, 5, 5)),
    "transposed convolution in groups": (lambda: nn.ConvTranspose1d(4, 6, 3, groups=2), (2, 4, 7)),
    "transposed convolution and batch norm": (
        lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)),
        (4, 3, 5, 5),
    ),
    "linear and batch norm": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)),
        (9, 6),
    ),
    "linear of sequences": (lambda: nn.Sequential(nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 2)), SEQUENCES),
    "embedding": (Words, None),
    "embedding bag": (Bag, None),
    "bilinear": (Both, (4, 8)),
    "gru": (lambda: Recurrent(nn.GRU), SEQUENCES),
    "lstm": (lambda: Recurrent(nn.LSTM), SEQUENCES),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 2, 4, 4, 4)),
}


PER_TENSOR = ("attention", "embedding", "transposed convolution and batch norm", "linear of sequences")


@pytest.mark.filterwarnings("ignore:.*batch_first.*")
@pytest.mark.parametrize(
    ("name", "granularity"), [(n, "per_channel") for n in LAYERS] + [(n, "per_tensor") for n in PER_TENSOR]
)
def test_other_layers(name, granularity, tmp_path):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    x = torch.randint(20, (4, 5)) if shape is None else torch.randn(shape)
    model = make()
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        model(torch.randn(shape))
    model = calibrated(model.eval(), x, weight_bits=4, activation_bits=5, weight_granularity=granularity)
    export_onnx(model, tmp_path / "model.onnx", x)
    expected = outputs(model, x)
    for optimized in (False, True):
        assert_close(run(tmp_path / "model.onnx", x, optimized=optimized)[0], expected, 1e-5)
    if shape is not None and name != "transposed convolution in groups":
        assert operators(tmp_path / "model.onnx")["BatchNormalization"] == 0


@st.composite
def convolutions(draw):
    """Draw a convolution or a linear layer of any shape, and the shape of an input."""
    kind = draw(st.sampled_from(["Linear", "Conv1d", "Conv2d", "ConvTranspose1d", "ConvTranspose2d"]))
    batch, bias = draw(st.integers(1, 4)), draw(st.booleans())
    if kind == "Linear":
        dims = draw(st.integers(0, 2))
        inputs = draw(st.integers(1, 9))
        return nn.Linear(inputs, draw(st.integers(1, 6)), bias=bias), (batch, *[3] * dims, inputs)
    groups = draw(st.sampled_from([1, 2, 3]))
    inputs, outs = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    kernel, stride = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    keywords = {"stride": stride, "groups": groups, "bias": bias, "padding": draw(st.integers(0, kernel - 1))}
    if "Transpose" not in kind:
        modes = ["zeros", "reflect", "replicate", "circular"]
        keywords |= {"padding_mode": draw(st.sampled_from(modes)), "dilation": draw(st.integers(1, 2))}
        if keywords["padding_mode"] != "zeros":
            keywords["dilation"] = 1
    return getattr(nn, kind)(inputs, outs, kernel, **keywords), (
        batch,
        inputs,
        *[draw(st.integers(5, 7))] * int(kind[-2]),
    )


ANY = (
    convolutions(),
    st.integers(2, 8),
    st.sampled_from([None, *range(2, 9)]),
    st.sampled_from(["per_tensor", "per_channel"]),
    st.sampled_from([None, "relu", "hardtanh"]),
    st.integers(0, 2**31),
)


def examples(n):
    """Return settings for a search that does not shrink failures, because each export takes a second."""
    return settings(
        max_examples=n,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
        report_multiple_bugs=False,
    )


def check_any_layer(tmp_path_factory, layer_and_shape, weight_bits, activation_bits, granularity, activation, seed):
    layer, shape = layer_and_shape
    torch.manual_seed(seed)
    layer = copy.deepcopy(layer)
    for p in layer.parameters():
        nn.init.normal_(p)
    # a quantizer follows the layer, and ONNX Runtime may fuse the two
    activations = {None: nn.Identity(), "relu": nn.ReLU(), "hardtanh": nn.Hardtanh(-0.5, 0.7)}
    features = layer(torch.zeros(shape)).shape[-1]
    x = torch.randn(shape) + (1.0 if seed % 2 else 0.0)
    model = nn.Sequential(layer, activations[activation], nn.Linear(features, 3)).eval()
    bits = {"weight_bits": weight_bits, "activation_bits": activation_bits}
    model = calibrated(model, x, weight_granularity=granularity, **bits)
    path = tmp_path_factory.mktemp("any") / "model.onnx"
    export_onnx(model, path, x)
    x = 1.3 * torch.randn(2 * len(x), *shape[1:])
    expected = outputs(model, x)
    step = 0.0
    if activation_bits is not None:  # a tie or an int32 bias may shift one integer of the second layer's input
        step = (model[2].input_quantizer.scale * model[2].weight.abs().max()).item()
    for optimized in (False, True):
        error = (run(path, x, optimized=optimized)[0] - expected).abs().flatten()
        near = 1e-5 * expected.abs().max() + 1e-7
        off = error > near
        if optimized and activation_bits is not None and weight_bits + activation_bits >= 12:
            assert (error <= near + 3 * step).all()
        else:
            assert off.float().mean() <= 0.02 + 3 / len(error)
            assert (error <= near + 1.5 * step).all()


@examples(10)
@given(*ANY)
def test_any_layer(tmp_path_factory, layer_and_shape, weight_bits, activation_bits, granularity, activation, seed):
    check_any_layer(tmp_path_factory, layer_and_shape, weight_bits, activation_bits, granularity, activation, seed)


@pytest.mark.slow
@examples(300)
@given(*ANY)
def test_many_layers(tmp_path_factory, layer_and_shape, weight_bits, activation_bits, granularity, activation, seed):
    check_any_layer(tmp_path_factory, layer_and_shape, weight_bits, activation_bits, granularity, activation, seed)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.again, self.last = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(self.again(self.again(self.first(x)).relu()))


@pytest.mark.parametrize(("weight_bits", "activation_bits"), [(4, None), (8, None), (4, 8), (4, 4)])
def test_a_linear_layer_that_is_called_twice(tmp_path, weight_bits, activation_bits):
    torch.manual_seed(0)
    x = torch.randn(16, 5)
    model = calibrated(Twice(), x, weight_bits=weight_bits, activation_bits=activation_bits)
    export_onnx(model, tmp_path / "model.onnx", x)
    for optimized in (True, False):
        assert_close(run(tmp_path / "model.onnx", x, optimized=optimized)[0], model(x), 1e-5)


def test_a_model_without_ranges_is_refused(tmp_path):
    model = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(ValueError, match="has no calibrated quantizers"):
        export_onnx(model, tmp_path / "x.onnx", torch.ones(2, 3))
    quantize_model(model, QuantConfig())
    with pytest.raises(ValueError, match="no calibrated quantizers to export"):
        export_onnx(model, tmp_path / "x.onnx", torch.ones(2, 3))
    assert not list(tmp_path.iterdir())


def test_arguments_are_refused_by_name(tmp_path):
    model = calibrated(nn.Sequential(nn.Linear(3, 2)), torch.randn(4, 3))
    with pytest.raises(ValueError, match="opset_version must be at least 18, got 17"):
        export_onnx(model, tmp_path / "x.onnx", torch.ones(2, 3), opset_version=17)
    with pytest.raises(ValueError, match="opset_version must be one that this version of torch can write, got 99"):
        export_onnx(model, tmp_path / "x.onnx", torch.ones(2, 3), opset_version=99)
    with pytest.raises(TypeError, match="opset_version must be an integer of at least 1, got '21'"):
        export_onnx(model, tmp_path / "x.onnx", torch.ones(2, 3), opset_version="21")
    with pytest.raises(ValueError, match=r"torch\.float32.*torch\.float64"):
        export_onnx(model.double(), tmp_path / "x.onnx", torch.ones(2, 3).double())


def test_missing_packages_name_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_qat_osc.export.extras.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"onnx, onnx_ir, onnxscript, ml_dtypes: .*lightning-qat-osc\[onnx\]"):
        export_onnx(nn.Linear(3, 2), tmp_path / "x.onnx", torch.ones(2, 3))


def test_an_old_torch_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.__version__", type(torch.__version__)("2.8.0+cpu"))
    with pytest.raises(ImportError, match=r"export_onnx needs torch 2\.9 or later, got torch 2\.8\.0"):
        export_onnx(nn.Linear(3, 2), tmp_path / "x.onnx", torch.ones(2, 3))


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return self.layer(x) if x.sum() > 0 else x


class Inverse(Branch):
    def forward(self, x):
        return torch.linalg.eigvals(self.layer(x)[:2, :2]).real


def test_what_torch_cannot_export_is_named_and_leaves_the_earlier_file(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"earlier")
    for model in (Branch(), Inverse()):
        model = calibrated(model, torch.ones(4, 3))
        with pytest.raises(RuntimeError, match=f"cannot export {type(model).__name__}"):
            export_onnx(model, path, torch.ones(4, 3), dynamic_batch=False)
    assert path.read_bytes() == b"earlier"
    assert list(tmp_path.iterdir()) == [path]


def test_the_module_is_left_as_it_is(tmp_path):
    model = calibrated(network(), images(), weight_bits=4).train()
    before = copy.deepcopy(model.state_dict())
    export_onnx(model, tmp_path / "model.onnx", images(2))
    assert model.training
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))
    text = (tmp_path / "model.onnx").read_bytes()
    assert b".py" not in text  # no paths of source files


@pytest.mark.parametrize("extra", ["add_bias_kv", "add_zero_attn"])
def test_attention_with_a_row_of_its_own_has_an_open_batch(tmp_path, extra):
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **{extra: True})

        def forward(self, x):
            return self.attention(x, x, x)[0]

    torch.manual_seed(0)
    model = calibrated(Attends(), torch.randn(3, 5, 8), activation_bits=None)
    export_onnx(model, tmp_path / "m.onnx", torch.randn(3, 5, 8))
    x = torch.randn(7, 5, 8)
    with torch.no_grad():
        assert_close(run(tmp_path / "m.onnx", x)[0], model(x))


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_a_model_trained_in_double_precision_and_brought_to_single(tmp_path, granularity):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).double()
    model = calibrated(model, x.double(), activation_bits=None, weight_granularity=granularity).float()
    export_onnx(model, tmp_path / "m.onnx", x)
    with torch.no_grad():
        assert_close(run(tmp_path / "m.onnx", x)[0], model(x))


@pytest.mark.filterwarnings("ignore:.*LSTM with projections.*")
@pytest.mark.parametrize("bits", [4, 8])
def test_an_lstm_with_a_projection_is_refused(tmp_path, bits):
    class Projects(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(5, 6, batch_first=True, proj_size=3)

        def forward(self, x):
            return self.lstm(x)[0]

    x = torch.randn(2, 4, 5)
    model = calibrated(Projects(), x, weight_bits=bits, activation_bits=None)
    with pytest.raises(RuntimeError, match="drops the projection|'lstm'"):
        export_onnx(model, tmp_path / "m.onnx", x)


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_of_equal_integers_have_a_scale_each(tmp_path, bits):
    torch.manual_seed(0)
    one, other = nn.Linear(6, 6), nn.Linear(6, 6)
    other.load_state_dict({name: 4.0 * p for name, p in one.state_dict().items()})
    x = torch.randn(4, 6)
    model = calibrated(nn.Sequential(one, nn.ReLU(), other), x, weight_bits=bits, activation_bits=None)
    export_onnx(model, tmp_path / "model.onnx", x)
    assert_close(run(tmp_path / "model.onnx", x, optimized=False)[0], outputs(model, x))


def test_an_encoder_that_copies_its_layer(tmp_path):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    x = torch.randn(3, 4, 8)
    model = calibrated(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), x, activation_bits=None)
    export_onnx(model, tmp_path / "model.onnx", x)
    assert_close(run(tmp_path / "model.onnx", x, optimized=False)[0], outputs(model, x), 1e-5)


class SharedBias(nn.Module):
    def __init__(self):
        super().__init__()
        self.image, self.sequence = nn.Conv2d(3, 4, 3, padding=1), nn.Conv1d(3, 4, 3, padding=1)
        self.sequence.bias = self.image.bias

    def forward(self, x):
        return self.image(x).flatten(2) + self.sequence(x.flatten(2))


def test_a_bias_of_two_kinds_of_convolutions(tmp_path):
    x = torch.randn(2, 3, 4, 4)
    model = calibrated(SharedBias(), x)
    export_onnx(model, tmp_path / "model.onnx", x)
    assert_close(run(tmp_path / "model.onnx", x)[0], outputs(model, x))


class WithoutAuxiliary(nn.Module):
    def __init__(self, names):
        super().__init__()
        self.names = names
        self.hidden, self.head = nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x):
        hidden = self.hidden(x)
        values = None, hidden, self.head(hidden.relu())
        return values if self.names is None else dict(zip(self.names, values))


@pytest.mark.parametrize(
    ("names", "expected"),
    [(("aux", "hidden", "logits"), ["hidden", "logits"]), (None, ["output_1", "output_2"])],
)
def test_an_output_that_is_none_has_no_name(tmp_path, names, expected):
    x = torch.randn(3, 4)
    export_onnx(calibrated(WithoutAuxiliary(names), x), tmp_path / "model.onnx", x)
    assert {o.name: o.shape[1] for o in session(tmp_path / "model.onnx").get_outputs()} == dict(zip(expected, (5, 2)))


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        y = self.layer(x)
        return {"a": [y, y + 1.0], "a_0": y + 2.0}


def test_outputs_whose_names_would_be_one(tmp_path):
    x = torch.randn(3, 4)
    export_onnx(calibrated(Nested(), x), tmp_path / "model.onnx", x)
    names = [o.name for o in session(tmp_path / "model.onnx").get_outputs()]
    assert names == ["a_0", "a_1", "a_0_output"]


class Named(nn.Module):
    def __init__(self, key):
        super().__init__()
        self.first, self.second, self.key = nn.Linear(4, 4), nn.Linear(4, 3), key

    def forward(self, x):
        return {self.key: self.second(self.first(x).relu())}


@pytest.mark.parametrize("activation_bits", [None, 8])
@pytest.mark.parametrize("key", ["relu", "linear", "first.weight", "first.weight_scale", "val_1", "logits"])
def test_outputs_that_are_called_like_what_is_inside(tmp_path, key, activation_bits):
    x = torch.randn(3, 4)
    model = calibrated(Named(key), x, activation_bits=activation_bits)
    export_onnx(model, tmp_path / "model.onnx", x)
    ((name, out),) = ((o.name, o) for o in session(tmp_path / "model.onnx").get_outputs())
    assert name.removesuffix("_output") == key
    assert out.shape[1] == 3


@pytest.mark.parametrize("bias", [True, False])
def test_a_batch_norm_behind_a_linear_layer_in_full_precision(tmp_path, bias):
    x = torch.randn(8, 5)
    model = nn.Sequential(nn.Linear(5, 7, bias=bias), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3))
    model = calibrated(model, x, weight_bits=None, activation_bits=8)
    export_onnx(model, tmp_path / "model.onnx", x)
    assert_close(run(tmp_path / "model.onnx", x, optimized=False)[0], outputs(model, x), 1e-5)


class Sequences(nn.Conv1d):
    """A convolution over sequences of shape [N, L, C]."""

    def forward(self, x):
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


def test_the_bias_is_apart_where_data_move_ahead_of_a_convolution(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(32, 20, 8)
    layers = [Sequences(8, 16, 3), nn.ReLU(), Sequences(16, 16, 3), nn.ReLU(), Sequences(16, 16, 3)]
    model = calibrated(nn.Sequential(*layers), x)
    export_onnx(model, tmp_path / "model.onnx", x)
    assert operators(tmp_path / "model.onnx")["Sum"] == 3
    assert_close(run(tmp_path / "model.onnx", x)[0], outputs(model, x))


def test_every_initializer_is_used(tmp_path):
    x = torch.randn(4, 6)
    model = calibrated(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), x, weight_bits=3)
    export_onnx(model, tmp_path / "model.onnx", x)
    graph = onnx.load(tmp_path / "model.onnx").graph
    used = {name for node in graph.node for name in node.input}
    assert {initializer.name for initializer in graph.initializer} <= used


class Switching(nn.Module):
    """A backbone in torch.no_grad(), and a layer for which autocast is disabled."""

    def __init__(self):
        super().__init__()
        self.backbone, self.middle, self.head = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        with torch.no_grad():
            x = self.backbone(x).relu()
        with torch.autocast("cpu", enabled=False):
            x = self.middle(x).relu()
        return self.head(x)


def test_a_forward_that_switches_gradients_and_autocast(tmp_path):
    x = torch.randn(16, 6)
    model = calibrated(Switching(), x)
    export_onnx(model, tmp_path / "model.onnx", x)
    assert operators(tmp_path / "model.onnx")["QuantizeLinear"] == 3
    assert_close(run(tmp_path / "model.onnx", x)[0], outputs(model, x))


class Biased(nn.Conv2d):
    def forward(self, x, bias):
        return F.conv2d(x, self.weight, bias)


class ComputedBias(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = Biased(3, 4, 3)

    def forward(self, x, bias):
        return self.conv(x, 2.0 * bias)


@pytest.mark.parametrize("weight_bits", [4, None])
def test_a_bias_that_is_computed(tmp_path, weight_bits):
    x, bias = images(4), torch.randn(4)
    model = calibrated(ComputedBias(), x, bias, weight_bits=weight_bits)
    export_onnx(model, tmp_path / "model.onnx", (x, bias), dynamic_batch=False)
    for optimized in (False, True):
        assert_close(run(tmp_path / "model.onnx", x, bias, optimized=optimized)[0], outputs(model, x, bias))
