import copy
import io
import pickle

import pytest
import torch
from marks import needs_compiler
from torch import nn
from torch.nn import functional as F

from lightning_qat_osc import LayerRule, QuantConfig, functional, quantization_plan, quantize_model
from lightning_qat_osc.functional import fake_quantize
from lightning_qat_osc.lookup import quantized_layers
from lightning_qat_osc.quantized_layer import quantized_class
from lightning_qat_osc.quantizers import InputQuantizer, Quantizer, WeightQuantizer

LAYERS = {
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1, groups=2), (2, 4, 9)),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding_mode="reflect", padding=1), (2, 4, 9, 9)),
    "Conv3d": (lambda: nn.Conv3d(4, 6, 2, bias=False), (2, 4, 4, 4, 4)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 6, 3), (2, 4, 9)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(4, 6, 2), (2, 4, 3, 3, 3)),
    "Linear": (lambda: nn.Linear(4, 6), (2, 3, 4)),
    "Embedding": (lambda: nn.Embedding(10, 6, padding_idx=0), None),
}


def quantized(layer, granularity="per_tensor", bits=4):
    model = nn.Sequential(layer)
    quantize_model(model, QuantConfig(bits, bits, first_last_bits=None, weight_granularity=granularity))
    return model[0]


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("kind", LAYERS)
def test_layer_computes_with_quantized_weight_and_input(kind, granularity):
    make, shape = LAYERS[kind]
    layer = make()
    x = torch.randint(0, 10, (2, 5)) if shape is None else torch.randn(shape)
    plain = copy.deepcopy(layer)
    layer = quantized(layer, granularity)
    assert torch.equal(layer(x), plain(x))  # nothing is quantized before calibration
    w = layer.weight_quantizer
    word = w.calibrate(layer.weight)
    assert (word is not None) == (kind == "Embedding" and granularity == "per_channel")  # the padding row is 0
    dim = 1 if "Transpose" in kind else 0
    expected_shape = [layer.weight.shape[dim] if i == dim else 1 for i in range(layer.weight.dim())]
    assert list(w.scale.shape) == ([1] if granularity == "per_tensor" else expected_shape)
    plain.weight.data = fake_quantize(layer.weight, w.scale, -8, 7).data
    if shape is None:
        assert layer.input_quantizers() == {}
    else:
        layer.input_quantizer.calibrate(x.flatten(), x.min().item(), x.max().item())
        q = layer.input_quantizer
        x = fake_quantize(x, q.scale, 0, 15, zero_point=q.zero_point)
    assert torch.equal(layer(x), plain(x))
    assert len(plain.weight.unique()) <= 16 * w.scale.numel()


def test_float_keys_stay_and_a_float_checkpoint_loads():
    layer = nn.Conv2d(3, 4, 3)
    float_state = copy.deepcopy(layer.state_dict())
    layer = quantized(layer)
    assert isinstance(layer, nn.Conv2d)
    assert set(float_state) < set(layer.state_dict())
    layer.load_state_dict(float_state)
    assert not layer.weight_quantizer.calibrated


def test_checkpoint_brings_ranges_and_oscillation_history():
    layer = quantized(nn.Linear(3, 4))
    layer.weight_quantizer.calibrate(layer.weight)
    layer.input_quantizer.calibrate(torch.randn(50), -2.0, 2.0)
    layer.weight_quantizer.start_tracking(layer.weight).frequency.fill_(0.25)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = quantized(nn.Linear(3, 4))
    other.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(5, 3)
    assert torch.equal(other(x), layer(x))
    assert other.input_quantizer.zero_point == layer.input_quantizer.zero_point > 0
    assert torch.equal(other.weight_quantizer.oscillation.frequency, layer.weight_quantizer.oscillation.frequency)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles(duplicate):
    layer = quantized(nn.Conv2d(3, 4, 3))
    layer.weight_quantizer.calibrate(layer.weight)
    other = duplicate(layer)
    assert type(other) is type(layer) is quantized_class(nn.Conv2d)
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(layer(x), other(x))
    with torch.no_grad():
        other.weight.add_(1.0)
    assert not torch.equal(layer(x), other(x))


def test_everyone_else_sees_the_latent_weight():
    layer = quantized(nn.Linear(3, 4))
    latent = layer.weight
    layer.weight_quantizer.calibrate(latent)
    layer(torch.randn(2, 3))
    assert layer.weight is latent
    assert "weight" not in layer.__dict__
    with pytest.raises(RuntimeError):
        layer(torch.randn(2, 99))
    assert layer.weight is latent
    assert "weight" not in layer.__dict__


class SamePadding(nn.Conv2d):
    """A layer that overrides forward and adds a keyword argument."""

    def forward(self, x, pad=1):
        return F.conv2d(F.pad(x, [pad] * 4), self.weight, self.bias)


def test_layers_with_forwards_of_their_own():
    layer = quantized(SamePadding(3, 4, 3), bits=3)
    layer.weight_quantizer.calibrate(layer.weight)
    x = torch.randn(1, 3, 8, 8)
    weight = fake_quantize(layer.weight, layer.weight_quantizer.scale, -4, 3)
    assert torch.equal(layer(x=x, pad=2), F.conv2d(F.pad(x, [2] * 4), weight, layer.bias))


def test_scale_keeps_its_precision_under_a_cast():
    layer = quantized(nn.Linear(3, 4))
    layer.weight_quantizer.calibrate(layer.weight)
    scale = layer.weight_quantizer.scale.clone()
    layer.bfloat16()
    assert layer.weight.dtype == torch.bfloat16
    assert torch.equal(layer.weight_quantizer.scale, scale)
    assert layer(torch.randn(2, 3).bfloat16()).dtype == torch.bfloat16
    assert layer.double().weight_quantizer.scale.dtype == torch.float64


def test_unused_scales_get_a_zero_gradient():
    layer = quantized(nn.Linear(3, 4))
    layer.input_quantizer.bits = None
    layer.weight_quantizer.calibrate(layer.weight)
    x = torch.randn(2, 3)
    y = layer(x)
    y.square().sum().backward()
    assert layer.input_quantizer.scale.grad.item() == 0.0
    assert layer.weight_quantizer.scale.grad.item() != 0.0
    assert layer.weight.grad.abs().sum() > 0


@pytest.mark.filterwarnings("ignore:.*stay in full precision")
@pytest.mark.parametrize(
    ("make", "shapes"),
    [
        (lambda: nn.LSTM(4, 6), [(3, 2, 4)]),
        (lambda: nn.GRUCell(4, 6), [(2, 4)]),
        (lambda: nn.MultiheadAttention(8, 2), [(3, 2, 8)] * 3),
        (lambda: nn.MultiheadAttention(8, 2, kdim=4, vdim=4), [(3, 2, 8), (3, 2, 4), (3, 2, 4)]),
    ],
)
def test_inputs_alone_of_layers_without_a_weight_of_that_name(make, shapes):
    layer = make()
    config = QuantConfig(None, 8, first_last_bits=None)
    quantize_model(nn.ModuleList([layer]), config)
    xs = [torch.randn(shape) for shape in shapes]
    out = layer(*xs)
    (out[0] if isinstance(out, tuple) else out).sum().backward()
    assert all(q.scale.grad.item() == 0.0 for q in layer.quantizers())
    assert quantization_plan(nn.ModuleList([layer]))[0].weight_bits is None


def test_a_state_dict_without_the_quantizer_leaves_its_history_alone():
    layer = quantized(nn.Linear(3, 4))
    layer.weight_quantizer.calibrate(layer.weight)
    state = layer.weight_quantizer.start_tracking(layer.weight)
    layer.load_state_dict({"bias": torch.zeros(4)}, strict=False)
    assert layer.weight_quantizer.oscillation is state
    before_tracking = {k: v for k, v in layer.state_dict().items() if "oscillation" not in k}
    layer.load_state_dict(before_tracking, strict=False)
    assert layer.weight_quantizer.oscillation is None


def test_memory_for_a_module_from_the_meta_device():
    with torch.device("meta"):
        model = nn.Sequential(quantized(nn.Linear(3, 4)))
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(float("nan"))  # as uninitialized memory may be
    for module in model.modules():  # as Lightning and FSDP do
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert model(torch.randn(2, 3)).isfinite().all()
    assert model[0].weight_quantizer.grid.tolist() == [4, 0, 0, 0, 0]


def test_zero_weight_can_leave_zero():
    layer = quantized(nn.Linear(16, 4))
    nn.init.zeros_(layer.weight)
    assert "all zero" in layer.weight_quantizer.calibrate(layer.weight)
    assert layer.weight_quantizer.scale.item() == pytest.approx(1 / (4 * 7))


def test_one_zero_channel_is_told_and_the_others_estimated():
    layer = quantized(nn.Linear(16, 4), "per_channel")
    with torch.no_grad():
        layer.weight[2] = 0.0
    assert "1 of its 4 weight channels" in layer.weight_quantizer.calibrate(layer.weight)
    assert (layer.weight_quantizer.scale > 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_weight_is_told_and_the_rest_estimated(bad):
    layer = quantized(nn.Linear(16, 4))
    with torch.no_grad():
        layer.weight[0, 0] = bad
    assert "NaN or inf" in layer.weight_quantizer.calibrate(layer.weight)
    assert layer.weight_quantizer.scale.isfinite().all()


def test_scales_have_a_dimension():
    # FSDP2 refuses parameters of 0 dimensions
    layer = quantized(nn.Linear(3, 4))
    assert all(q.scale.dim() >= 1 for q in (layer.weight_quantizer, layer.input_quantizer))


def test_repr_tells_the_grid():
    layer = quantized(nn.Linear(3, 4))
    assert "no range yet" in repr(layer)
    layer.weight_quantizer.calibrate(layer.weight)
    assert "[-8, 7]" in repr(layer)


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_model_compiles_without_graph_break(backend):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.Flatten(), nn.Linear(64, 2))
    quantize_model(model, QuantConfig(3, 3))
    x = torch.randn(2, 3, 8, 8)
    for layer in quantized_layers(model).values():
        layer.weight_quantizer.calibrate(layer.weight)
        layer.input_quantizer.calibrate(x.flatten(), -2.0, 2.0)
    model[0].input_quantizer.bits = None
    eager = model(x)
    eager.sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend=backend)(x)
    compiled.sum().backward()
    assert torch.allclose(compiled, eager, atol=1e-6)
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad, gradients[name], rtol=1e-4, atol=1e-5), name


def test_uncalibrated_model_compiles():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4))
    quantize_model(model, QuantConfig(3, 3))
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.allclose(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x), atol=1e-6)


def test_direct_construction():
    w = WeightQuantizer(2, torch.randn(3, 3))
    assert w.calibrate(torch.tensor([[1.0, -1.0], [1.0, -1.0]])) is None
    assert (w.quant_min, w.quant_max) == (-2, 1)
    x = InputQuantizer(2)
    x.calibrate(torch.rand(100), 0.0, 1.0)
    assert (x.quant_min, x.quant_max, x.zero_point) == (0, 3, 0)


@needs_compiler
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from the compiler's own imports
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_a_small_weight_goes_with_a_large_input_unless_somebody_watches(monkeypatch, granularity, recompute):
    monkeypatch.setattr(functional, "SMALL", 300)  # between the weight's 216 elements and the input's 648
    layer = quantized(nn.Conv2d(4, 6, 3), granularity)
    x = torch.randn(2, 4, 9, 9)
    layer.weight_quantizer.calibrate(layer.weight)
    layer.input_quantizer.calibrate(x.flatten(), x.min().item(), x.max().item())
    parameters = list(layer.parameters())
    calls = []
    monkeypatch.setattr(Quantizer, "forward", lambda q, x: calls.append(q) or q._quantize(x, q.scale))

    def gradients(fused):
        for q in layer.quantizers():
            q.fused, q.recompute = fused, recompute
        calls.clear()
        out = layer(x)
        return out, torch.autograd.grad(out.square().sum(), parameters)

    out, wanted = gradients(False)
    assert calls == [layer.input_quantizer, layer.weight_quantizer]
    seen = []
    for watched in (None, *layer.quantizers()):
        seen.clear()
        handle = None if watched is None else watched.register_forward_hook(lambda m, args, out: seen.append(m))
        fused_out, got = gradients(True)
        assert calls == ([] if watched is None else [layer.input_quantizer, layer.weight_quantizer])
        assert seen == ([] if watched is None else [watched])
        assert torch.equal(fused_out, out)
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(got, wanted))
        if handle is not None:
            handle.remove()


class Adapted(nn.Linear):
    """A layer that contains other layers."""

    def __init__(self):
        super().__init__(4, 4)
        self.down, self.up = nn.Linear(4, 2), nn.Linear(2, 4)


def test_states_that_make_a_quantizer_stale():
    config = QuantConfig(4, None, rules=[LayerRule(pattern, weight_bits=None) for pattern in ("*down", "*up")])
    layer = quantize_model(nn.Sequential(Adapted()), config)[0]
    whole = {key: value for key, value in layer.state_dict().items() if "quantizer" not in key}
    for keys, stale in ((["down.weight", "up.weight"], False), (["bias"], False), (["weight"], True)):
        layer.load_state_dict({key: whole[key] for key in keys}, strict=False)
        assert layer.weight_quantizer.stale == stale
    layer.load_state_dict(layer.state_dict())
    assert not layer.weight_quantizer.stale


def test_a_scale_without_its_grid_is_told():
    layer = quantize_model(nn.Sequential(nn.Linear(4, 4)), QuantConfig(3, None))
    parameters = {name: p.detach() for name, p in layer.named_parameters()}  # parameters without buffers
    with pytest.warns(UserWarning, match="entries of 0.weight_quantizer, but not its buffer 'grid'"):
        layer.load_state_dict(parameters, strict=False)
