"""Every kind of layer computes with quantized weights and inputs, and warnings name what is not quantized."""

import abc
import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence

from lightning_qat_osc import LayerRule, QuantConfig, fake_quantize, quantization_plan, quantize_model
from lightning_qat_osc.calibration import Calibrator
from lightning_qat_osc.lookup import quantized_layers, quantized_weights

RECURRENT = "ignore:.*recurrent state.*stay in full precision"
CONFIG = QuantConfig(4, 4, first_last_bits=None)


def calibrated(model, *batches, config=CONFIG):
    """Quantize a model, calibrate it on the batches, and return the calibration's messages."""
    quantize_model(model, config)
    calibrator = Calibrator(model, config)
    training = model.training
    with torch.no_grad(), calibrator.observe():
        model.eval()
        for batch in batches:
            model(*batch) if isinstance(batch, tuple) else model(**batch)
    model.train(training)
    return calibrator.finish()


def on_grid(quantizer, x):
    q = quantizer
    return fake_quantize(x, q.scale, q.quant_min, q.quant_max, zero_point=q.zero_point).detach()


def attention(**kwargs):
    return nn.MultiheadAttention(8, 2, **{"batch_first": True, **kwargs})


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("mask", ["none", "bool", "float", "per head", "padding", "padding and mask", "causal"])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"batch_first": False},
        {"bias": False},
        {"add_bias_kv": True, "add_zero_attn": True},
        {"kdim": 6, "vdim": 4},
    ],
    ids=str,
)
def test_attention_is_torchs_where_nothing_is_quantized_yet(arguments, mask, need_weights):
    plain = attention(**arguments).eval()
    quantized = copy.deepcopy(plain)
    quantize_model(quantized, CONFIG)
    n, length, source = 3, 5, 7
    q, k, v = torch.randn(n, length, 8), torch.randn(n, source, plain.kdim), torch.randn(n, source, plain.vdim)
    hidden = torch.zeros(n, source, dtype=torch.bool)
    hidden[:, 5:] = True
    blocked = torch.rand(length, source) > 0.7
    blocked[:, 0] = False
    options = {
        "none": {},
        "bool": {"attn_mask": blocked},
        "float": {"attn_mask": torch.randn(length, source)},
        "per head": {"attn_mask": torch.randn(n * 2, length, source)},
        "padding": {"key_padding_mask": hidden},
        "padding and mask": {"key_padding_mask": hidden, "attn_mask": blocked},
        "causal": {"attn_mask": torch.ones(length, source, dtype=torch.bool).triu(1), "is_causal": True},
    }[mask]
    if not plain.batch_first:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    with torch.enable_grad():  # keeps torch off its fused path
        for average in (True, False):
            expected, weights = plain(q, k, v, need_weights=need_weights, average_attn_weights=average, **options)
            out, own = quantized(q, k, v, need_weights=need_weights, average_attn_weights=average, **options)
            assert torch.allclose(out, expected, atol=1e-6)
            assert (own is None) == (weights is None)
            assert own is None or torch.allclose(own, weights, atol=1e-6)


def test_attention_without_a_batch_dimension():
    plain = attention()
    quantized = copy.deepcopy(plain)
    quantize_model(quantized, CONFIG)
    x = torch.randn(5, 8)
    for a, b in zip(quantized(x, x, x), plain(x, x, x)):
        assert a.shape == b.shape
        assert torch.allclose(a, b, atol=1e-6)
    with pytest.raises(RuntimeError, match="attn_mask"):
        quantized(x, x, x, is_causal=True)


def test_attention_quantizes_every_projection_and_self_attention_its_input_once():
    model, x = attention(), torch.randn(3, 5, 8)
    assert calibrated(model, (x, x, x)) == []
    layers = quantized_layers(model)
    assert list(layers) == ["", "out_proj"]
    inputs = model.input_quantizers()
    assert [q.active for q in inputs.values()] == [True, False, False]
    plain = attention()
    plain.load_state_dict(model.state_dict(), strict=False)
    plain.in_proj_weight.data = on_grid(model.in_proj_weight_quantizer, model.in_proj_weight)
    seen = []
    model.out_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    out, _ = model(x, x, x)
    x_q = on_grid(inputs["query"], x)
    plain.out_proj.weight.data, plain.out_proj.bias.data = torch.eye(8), torch.zeros(8)
    assert torch.allclose(plain(x_q, x_q, x_q)[0], seen[0], atol=1e-6)
    projection = model.out_proj
    expected = F.linear(
        on_grid(projection.input_quantizer, seen[0]), on_grid(projection.weight_quantizer, projection.weight)
    )
    assert torch.allclose(out, expected + projection.bias, atol=1e-6)
    assert [line.layer for line in quantization_plan(model)] == ["", "out_proj"]
    assert [w.name for w in quantized_weights(model)] == [".in_proj_weight", "out_proj"]
    out.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_evaluates_as_it_trains(need_weights):
    model, x = attention(), torch.randn(3, 5, 8)
    calibrated(model, (x, x, x))
    trained, _ = model(x, x, x, need_weights=need_weights)
    with torch.no_grad():  # where torch's own attention takes its fused path, which bypasses the layers
        evaluated, _ = model.eval()(x, x, x, need_weights=need_weights)
    assert torch.allclose(evaluated, trained, atol=1e-6)


def test_a_layer_called_several_times_has_one_range_and_the_sum_of_the_gradients():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return self.linear(torch.tanh(self.linear(x)))

    model, x = Twice(), torch.randn(3, 4)
    calibrated(model, (x,))
    assert list(quantized_layers(model)) == ["linear"]
    layer, q = model.linear, model.linear.input_quantizer
    w = fake_quantize(layer.weight, layer.weight_quantizer.scale, -8, 7)

    def once(x):
        return F.linear(fake_quantize(x, q.scale, q.quant_min, q.quant_max, zero_point=q.zero_point), w, layer.bias)

    expected = once(torch.tanh(once(x)))
    out, parameters = model(x), list(model.parameters())
    assert torch.allclose(out, expected, atol=1e-6)
    for ours, theirs in zip(
        torch.autograd.grad(out.square().sum(), parameters), torch.autograd.grad(expected.square().sum(), parameters)
    ):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_what_attention_leaves_in_full_precision_is_told_once():
    model = nn.ModuleDict({"a": attention(), "b": attention()})
    with pytest.warns(UserWarning, match="^MultiheadAttention a, b: its projected .* scores stay in full precision"):
        quantize_model(model, CONFIG)


def test_cross_attention_has_a_range_for_each_input():
    model = attention(kdim=6, vdim=4)
    q, k, v = torch.randn(3, 5, 8), 10.0 * torch.randn(3, 7, 6), 0.1 * torch.randn(3, 7, 4)
    calibrated(model, {"query": q, "key": k, "value": v})
    scales = [quantizer.scale.item() for quantizer in model.input_quantizers().values()]
    assert scales[2] < scales[0] < scales[1]
    assert [line.layer for line in quantization_plan(model)] == ["", ".k_proj_weight", ".v_proj_weight", "out_proj"]
    assert all(len(on_grid(w.quantizer, w.weight).unique()) <= 16 for w in quantized_weights(model))


def test_an_attention_that_is_left_out_keeps_its_projection():
    model = nn.Sequential(attention(), nn.Linear(8, 2))
    quantize_model(model, QuantConfig(rules=(LayerRule("0", weight_bits=None, activation_bits=None),)))
    assert list(quantized_layers(model)) == ["1"]


def test_an_attention_with_a_forward_of_its_own_is_named():
    class Scaled(nn.MultiheadAttention):
        def forward(self, x):
            return super().forward(x, x, x, need_weights=False)[0]

    model = Scaled(8, 2, batch_first=True)
    with pytest.warns(UserWarning, match="output projection of attention '' stays in full precision: Scaled"):
        quantize_model(model, QuantConfig(4, None))
    for w in model.weight_quantizers().values():
        w.calibrate(model.in_proj_weight)
    plain = copy.deepcopy(model)
    assert list(quantized_layers(model)) == [""]
    assert torch.isfinite(plain(torch.randn(2, 3, 8))).all()


@pytest.mark.parametrize("padded", [False, True])
def test_transformer_encoder_evaluates_as_it_trains(padded):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2)
    x = torch.randn(3, 5, 8)
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[0, 3:] = mask[1, 4:] = True
    options = {"src_key_padding_mask": mask} if padded else {}
    calibrated(encoder, {"src": x, **options})
    quantize_model(encoder, CONFIG)  # adds nothing
    assert [child.activation_relu_or_gelu for child in encoder.layers] == [0, 0]
    assert list(quantized_layers(encoder))[:4] == [
        "layers.0.self_attn",
        "layers.0.self_attn.out_proj",
        "layers.0.linear1",
        "layers.0.linear2",
    ]
    trained = encoder(x, **options)
    encoder.eval()
    assert torch.allclose(encoder(x, **options), trained, atol=1e-5)
    with torch.no_grad():
        evaluated = encoder(x, **options)
    assert torch.allclose(evaluated[~mask] if padded else evaluated, trained[~mask] if padded else trained, atol=1e-5)
    again = pickle.loads(pickle.dumps(encoder))
    with torch.no_grad():
        assert torch.equal(again(x, **options), evaluated)


@pytest.mark.filterwarnings(RECURRENT)
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.LSTM(4, 6, 2, batch_first=True, bidirectional=True),
        lambda: nn.LSTM(4, 6, proj_size=3, batch_first=True),
        lambda: nn.GRU(4, 6, 2, batch_first=True),
        lambda: nn.RNN(4, 6, batch_first=True),
        lambda: nn.LSTMCell(4, 6),
        lambda: nn.GRUCell(4, 6),
        lambda: nn.RNNCell(4, 6),
    ],
)
def test_recurrent_layers_quantize_every_weight(make):
    plain, x = make(), torch.randn(3, 5, 4)
    x = x[:, 0] if isinstance(plain, nn.RNNCellBase) else x
    model = copy.deepcopy(plain)
    with pytest.warns(UserWarning, match="recurrent state"):
        quantize_model(model, CONFIG)
    calibrated(model, (x,))
    names = [name for name, _ in plain.named_parameters() if name.startswith("weight")]
    assert list(model.weight_quantizers()) == names
    for name in names:
        getattr(plain, name).data = on_grid(getattr(model, f"{name}_quantizer"), getattr(model, name))
    first, expected = model(x), plain(on_grid(model.input_quantizer, x))
    first, expected = (first[0], expected[0]) if isinstance(first, tuple) else (first, expected)
    assert torch.allclose(first, expected, atol=1e-6)
    first.sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if name != "bias_hh_l1_reverse")
    assert all(getattr(model, name).requires_grad for name in names)  # the latent weights are restored


@pytest.mark.filterwarnings(RECURRENT)
def test_packed_sequences():
    model, x = nn.LSTM(4, 6, batch_first=True), torch.randn(3, 5, 4)
    packed = pack_padded_sequence(x, torch.tensor([5, 4, 2]), batch_first=True)
    calibrated(model, (packed,))
    plain = nn.LSTM(4, 6, batch_first=True)
    plain.load_state_dict(model.state_dict(), strict=False)
    for name in model.weight_quantizers():
        getattr(plain, name).data = on_grid(getattr(model, f"{name}_quantizer"), getattr(model, name))
    expected, _ = plain(packed._replace(data=on_grid(model.input_quantizer, packed.data)))
    assert torch.allclose(model(packed)[0].data, expected.data, atol=1e-6)


def test_bilinear_and_embedding_bag():
    model, a, b = nn.Bilinear(3, 4, 5), torch.randn(2, 3), 10 * torch.randn(2, 4)
    calibrated(model, {"input2": b, "input1": a})
    first, second = model.input1_quantizer, model.input2_quantizer
    expected = F.bilinear(on_grid(first, a), on_grid(second, b), on_grid(model.weight_quantizer, model.weight))
    assert torch.allclose(model(a, input2=b), expected + model.bias)
    bag, indices = nn.EmbeddingBag(10, 4), torch.randint(10, (3, 2))
    calibrated(bag, (indices,))
    assert torch.allclose(bag(indices), F.embedding_bag(indices, on_grid(bag.weight_quantizer, bag.weight)))


def test_conv1d_of_transformers():
    model, x = pytest.importorskip("transformers.pytorch_utils").Conv1D(6, 4), torch.randn(2, 3, 4)
    calibrated(model, (x,), config=QuantConfig(4, 4, first_last_bits=None, weight_granularity="per_channel"))
    assert model.weight_quantizer.scale.shape == (1, 6)
    expected = on_grid(model.input_quantizer, x) @ on_grid(model.weight_quantizer, model.weight)
    assert torch.allclose(model(x), expected + model.bias, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*is deprecated.*:FutureWarning")
@pytest.mark.parametrize(
    "norm",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        lambda layer: torch.nn.utils.prune.l1_unstructured(layer, "weight", 0.5),
    ],
    ids=["weight_norm", "spectral_norm", "old weight_norm", "old spectral_norm", "pruned"],
)
def test_computed_weights_are_quantized_and_named(norm):
    model, x = nn.Sequential(norm(nn.Linear(4, 6))), torch.randn(3, 4)
    torch.manual_seed(0)
    plain = nn.Sequential(norm(nn.Linear(4, 6)))
    plain.load_state_dict(model.state_dict())
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    with pytest.warns(UserWarning, match="Layer '0' computes its weight from other parameters"):
        quantize_model(model, CONFIG)
    calibrated(model, (x,))
    assert all(torch.equal(b, dict(model.named_buffers())[name]) for name, b in buffers.items())
    assert quantized_weights(model) == []
    model.eval(), plain.eval()
    out = model(x)
    plain(x)
    weight = on_grid(model[0].weight_quantizer, plain[0].weight)
    expected = F.linear(on_grid(model[0].input_quantizer, x), weight, plain[0].bias)
    assert torch.allclose(out, expected, atol=1e-6)
    out.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert torch.equal(model[0].weight, plain[0].weight)  # outside of forward, the weight is the latent one
    assert model(x).shape == (3, 6)


COMPUTED = {
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "old weight_norm": nn.utils.weight_norm,
    "pruned": lambda layer, name: torch.nn.utils.prune.l1_unstructured(layer, name, 0.5),
}


@pytest.mark.filterwarnings("ignore:.*is deprecated.*:FutureWarning", RECURRENT)
@pytest.mark.parametrize("norm", COMPUTED.values(), ids=COMPUTED.keys())
@pytest.mark.parametrize("make", [nn.GRUCell, nn.LSTM])
def test_computed_weights_of_recurrent_layers(make, norm):
    x = torch.randn(5, 6)
    suffix = "" if make is nn.GRUCell else "_l0"
    layer = make(6, 8)
    for name in (f"weight_ih{suffix}", f"weight_hh{suffix}"):
        norm(layer, name)
    model = nn.Sequential(layer)
    with pytest.warns(UserWarning, match=f"computes its weight_ih{suffix}, weight_hh{suffix} from other parameters"):
        quantize_model(model, CONFIG)
    calibrated(model, (x,))
    assert list(layer.weight_quantizers()) == [f"weight_ih{suffix}", f"weight_hh{suffix}"]
    assert quantized_weights(model) == []
    plain = make(6, 8)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            latent = getattr(layer, name)
            parameter.copy_(on_grid(getattr(layer, f"{name}_quantizer"), latent) if "weight" in name else latent)
    expected, out = plain(on_grid(layer.input_quantizer, x)), model(x)
    if make is nn.LSTM:
        expected, out = expected[0], out[0]
    assert torch.allclose(out, expected, atol=1e-6)
    out.sum().backward()
    assert all(q.scale.grad is not None for q in layer.quantizers())


@pytest.mark.filterwarnings("ignore:ParametrizedMultiheadAttention.*stay in full precision")
def test_a_computed_weight_of_attention():
    model, x = nn.utils.parametrizations.weight_norm(attention(), "in_proj_weight"), torch.randn(3, 5, 8)
    with pytest.warns(UserWarning, match="computes its in_proj_weight from other parameters"):
        quantize_model(model, CONFIG)
    calibrated(model, (x, x, x))
    plain = attention()
    with torch.no_grad():
        plain.in_proj_weight.copy_(on_grid(model.in_proj_weight_quantizer, model.in_proj_weight))
        plain.out_proj.weight.copy_(model.out_proj.weight)
    model.out_proj.weight_quantizer.calibrated = model.out_proj.input_quantizer.calibrated = False
    inside = on_grid(model.query_quantizer, x)
    assert torch.allclose(model(x, x, x)[0], plain(inside, inside, inside)[0], atol=1e-6)
    model(x, x, x)[0].sum().backward()
    assert model.in_proj_weight_quantizer.scale.grad is not None


def test_what_a_forward_of_its_own_makes_of_the_weight_is_told():
    class WeightStandardized(nn.Conv2d):
        def forward(self, x):
            weight = self.weight
            return self._conv_forward(x, (weight - weight.mean((1, 2, 3), keepdim=True)), self.bias)

    class Padded(nn.Conv2d):
        def forward(self, x):
            return self._conv_forward(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias)

    x = torch.randn(2, 3, 5, 5)
    words = calibrated(nn.Sequential(Padded(3, 4, 3), WeightStandardized(4, 4, 3)), (x,))
    assert len(words) == 1
    assert words[0].startswith("Layer '1' applies ")
    assert words[0].endswith(" to its quantized weight; the result may be off the grid.")


def test_a_weight_that_is_used_past_its_layer_is_told():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.hidden = nn.Embedding(10, 4), nn.Linear(4, 4)

        def forward(self, x):
            return F.linear(self.hidden(self.embedding(x)), self.embedding.weight)

    words = calibrated(Tied(), (torch.randint(10, (3,)),))
    assert words == [
        "The weight of layer 'embedding' is also read outside of the layer, by linear, where it is in full precision."
    ]


def test_parameters_outside_the_layers_are_named_once():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.position = nn.Parameter(torch.randn(1, 5, 4))
            self.token = nn.Parameter(torch.randn(1, 1, 4))
            self.norm = nn.LayerNorm((5, 4))
            self.linear = nn.Linear(4, 4)

    net = Net()
    with pytest.warns(UserWarning, match="stay in full precision: position[.]$"):
        quantize_model(net, CONFIG)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_model(net, CONFIG)


def test_keyword_calls_in_any_order():
    layer, x = nn.ConvTranspose2d(2, 3, 3, stride=2), torch.randn(1, 2, 4, 4)
    calibrated(layer, {"output_size": [10, 10], "input": x})
    assert layer.input_quantizer.active
    assert layer.weight_quantizer.active
    assert torch.equal(layer(output_size=[10, 10], input=x), layer(x, [10, 10]))

    class Handing(nn.Linear):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    layer, x = Handing(4, 4), torch.randn(2, 4)
    calibrated(layer, (x,))
    assert torch.equal(layer(input=x), layer(x))
    assert layer.input_quantizer.active


def test_methods_of_the_layer_are_its_own():
    class Helps(nn.Linear):
        def _run(self, x):
            return F.linear(x, self.weight, self.bias)

        _forward_with = _recurrent_forward = _run

        def forward(self, x):
            return self._run(x) + self._forward_with(x) + self._recurrent_forward(x)

    layer, x = Helps(4, 4), torch.randn(2, 4)
    calibrated(layer, (x,))
    x_q, w_q = layer.input_quantizer(x), layer.weight_quantizer(layer.weight)
    assert not x_q.equal(x)
    assert torch.allclose(layer(x), 3 * F.linear(x_q, w_q, layer.bias), atol=1e-6)


class Abstract(abc.ABC):  # noqa: B024
    """A base without instance attributes. Classes that list it first have a different memory layout."""


class AbstractLSTM(Abstract, nn.LSTM):
    def forward(self, x):
        return super().forward(2 * x)[0]


class AbstractConv(Abstract, nn.Conv1d):
    pass


@pytest.mark.parametrize("make", [lambda: AbstractLSTM(3, 4), lambda: AbstractConv(4, 4, 2)], ids=["lstm", "conv"])
@pytest.mark.filterwarnings(RECURRENT)
def test_a_class_behind_an_abstract_one(make):
    layer = make()
    x = torch.randn(5, 4, layer.weight_ih_l0.shape[1] if isinstance(layer, nn.LSTM) else 6)
    before = layer(x)
    model = nn.Sequential(layer)
    quantize_model(model, CONFIG)
    assert torch.equal(model(x), before)
    calibrated(model, (x,))
    plain = make()
    plain.load_state_dict(layer.state_dict(), strict=False)
    with torch.no_grad():
        for name, quantizer in layer.weight_quantizers().items():
            getattr(plain, name).copy_(quantizer(getattr(layer, name)))
    (quantized_input,) = (quantizer(x) for quantizer in layer.input_quantizers().values())
    assert not quantized_input.equal(x)
    assert torch.allclose(model(x), plain(quantized_input), atol=1e-6)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))
