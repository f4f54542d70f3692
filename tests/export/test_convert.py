"""The converted model computes what the quantized one computes, and is a plain model."""

import abc
import copy
import pickle
import threading

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from calibrated import calibrated
from hypothesis import HealthCheck, given, settings
from models import ConvModule, Data, trainer
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import pack_padded_sequence

from lightning_qat_osc import (
    IterativeFreezing,
    LayerRule,
    QuantConfig,
    QuantizationAwareTraining,
    oscillation_states,
    quantize_model,
)
from lightning_qat_osc.export import QuantizeInputs, convert, input_grids, integer_weights
from lightning_qat_osc.lookup import quantized_layers


class Only(nn.Module):
    """Wraps one layer and passes it all arguments."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *args, **kwargs):
        return self.layer(*args, **kwargs)


class SamePadding(nn.Conv2d):
    def forward(self, x, pad=1):
        return nn.functional.conv2d(nn.functional.pad(x, [pad] * 4), self.weight, self.bias)


x16 = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(3))
LAYERS = {
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1, groups=2), (torch.randn(2, 4, 9),)),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding_mode="reflect", padding=1), (torch.randn(2, 4, 9, 9),)),
    "Conv3d": (lambda: nn.Conv3d(4, 6, 2, bias=False), (torch.randn(2, 4, 4, 4, 4),)),
    "SamePadding": (lambda: SamePadding(4, 6, 3), (torch.randn(2, 4, 9, 9),)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 6, 3), (torch.randn(2, 4, 9),)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (torch.randn(2, 4, 5, 5),)),
    "Linear": (lambda: nn.Linear(16, 6), (x16,)),
    "Bilinear": (lambda: nn.Bilinear(16, 16, 6), (x16, x16 + 1)),
    "Embedding": (lambda: nn.Embedding(10, 6, padding_idx=0), (torch.randint(0, 10, (2, 5)),)),
    "EmbeddingBag": (lambda: nn.EmbeddingBag(10, 6), (torch.randint(0, 10, (2, 5)),)),
    "self-attention": (lambda: nn.MultiheadAttention(16, 2, batch_first=True), (x16, x16, x16)),
    "cross-attention": (lambda: nn.MultiheadAttention(16, 2, kdim=8, vdim=8), (x16, x16[..., :8], x16[..., 8:])),
    "encoder layer": (lambda: nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), (x16,)),
    "LSTM": (lambda: nn.LSTM(16, 8, 2, bidirectional=True), (x16,)),
    "GRU": (lambda: nn.GRU(16, 8), (x16,)),
    "RNNCell": (lambda: nn.RNNCell(16, 8), (x16[0],)),
    "weight norm": (lambda: nn.utils.weight_norm(nn.Linear(16, 6)), (x16,)),
    "spectral norm": (lambda: nn.utils.spectral_norm(nn.Linear(16, 6)), (x16,)),
    "parametrized": (lambda: parametrizations.spectral_norm(nn.Linear(16, 6)), (x16,)),
    "pruned": (lambda: prune.l1_unstructured(nn.Linear(16, 6), "weight", 0.5), (x16,)),
}

old_norms = pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated.*:FutureWarning")


def assert_equal(one, other):
    one, other = (torch.utils._pytree.tree_leaves(x) for x in (one, other))
    assert len(one) == len(other) > 0
    assert all(torch.equal(a, b) for a, b in zip(one, other))


@old_norms
@pytest.mark.parametrize("activation_bits", [None, 4])
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("kind", LAYERS)
def test_outputs_equal_to_the_bit(kind, granularity, activation_bits):
    make, inputs = LAYERS[kind]
    model = calibrated(Only(make()), *inputs, activation_bits=activation_bits, weight_granularity=granularity)
    plain = convert(model)
    with torch.no_grad():
        assert_equal(plain(*inputs), model(*inputs))
    assert_equal(plain(*inputs), model(*inputs))
    assert quantized_layers(plain) == {}
    hooks = [h for m in plain.modules() for h in m._forward_pre_hooks.values()]
    quantizes_inputs = activation_bits is not None and "Embedding" not in kind
    assert all(isinstance(h, QuantizeInputs) for h in hooks)
    assert len(hooks) == len(input_grids(model))
    assert bool(hooks) == quantizes_inputs
    plain.load_state_dict(plain.state_dict())
    again = pickle.loads(pickle.dumps(plain))
    assert_equal(again(*inputs), plain(*inputs))


@pytest.mark.parametrize("name", [k for k in LAYERS if k[0].isupper()])
def test_a_converted_layer_is_what_it_was_before(name):
    make, inputs = LAYERS[name]
    before = make()
    plain = convert(calibrated(Only(copy.deepcopy(before)), *inputs, activation_bits=None)).layer
    assert type(plain) is type(before)
    assert vars(plain).keys() == vars(before).keys()
    assert list(plain.state_dict()) == list(before.state_dict())
    assert all(a.requires_grad == b.requires_grad for a, b in zip(plain.parameters(), before.parameters()))


def test_nothing_of_this_package_is_left_where_only_weights_are_quantized():
    model = calibrated(
        Only(nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU())), torch.randn(1, 2, 5, 5), activation_bits=None
    )
    # the pickle names every class and function that it needs
    stream = pickle.dumps(convert(model).layer)
    assert b"lightning_qat_osc" not in stream
    assert b"lightning_qat_osc" in pickle.dumps(model.layer)


def test_the_model_is_left_as_it_is():
    model = calibrated(ConvModule(), torch.randn(2, 1, 6, 6)).train()
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    convert(model)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))
    assert len(quantized_layers(model)) == 4


@pytest.mark.filterwarnings("ignore:.*below twice the momentum.*")
def test_a_module_of_a_trainer_with_its_last_loss_on_it():
    module = ConvModule(lr=0.3)
    freezing = IterativeFreezing(threshold=0.12, final_threshold=0.05, momentum=0.1)
    t = trainer([QuantizationAwareTraining(2, 3, scale_learning_rate=0.01), freezing], max_epochs=6)
    t.fit(module, Data())
    module.last_loss = module(torch.randn(2, 1, 6, 6)).sum()  # a tensor with an autograd graph
    plain = convert(module)
    x = torch.randn(4, 1, 6, 6)
    assert torch.equal(plain(x), module.eval()(x))
    assert type(plain) is ConvModule
    assert list(plain.state_dict()) == list(ConvModule().state_dict())
    assert sum(int(state.frozen.sum()) for state in oscillation_states(module).values()) > 0
    for name, state in oscillation_states(module).items():
        integers = integer_weights(module)[f"{name}.weight"]
        assert torch.equal(integers.values[state.frozen], state.weight_int[state.frozen])
        assert torch.equal(integers.values, state.weight_int)


def test_integers_and_grids_are_those_of_a_loop():
    x = torch.randn(50, 16)
    model = calibrated(Only(nn.Linear(16, 6)), x, weight_bits=3, activation_bits=5, weight_granularity="per_channel")
    layer = model.layer
    (weight,) = integer_weights(model).values()
    for row in range(6):
        scale = layer.weight_quantizer.scale[row, 0].item()
        for column in range(16):
            z = round(np.float32(layer.weight[row, column].item()) / np.float32(scale))
            assert weight.values[row, column] == max(-4, min(3, z))
            product = np.float32(weight.values[row, column].item()) * np.float32(scale)
            assert weight.dequantize()[row, column].item() == product
    assert (weight.bits, weight.quant_min, weight.quant_max, weight.channel_axis) == (3, -4, 3, 0)
    grid = input_grids(model)["layer"]["input"]
    assert (grid.bits, grid.quant_min, grid.quant_max) == (5, 0, 31)
    expected = torch.clamp(torch.round(x / torch.tensor(grid.scale)) + grid.zero_point, 0, 31)
    expected = (expected - grid.zero_point) * torch.tensor(grid.scale)
    (args, _) = QuantizeInputs({"input": grid})(layer, (x,), {})
    assert torch.equal(args[0], expected)


def test_arguments_by_keyword_and_packed_sequences():
    model = calibrated(Only(nn.GRU(16, 8)), x16)
    plain = convert(model)
    packed = pack_padded_sequence(x16, torch.tensor([3, 3, 2, 1, 1]))
    assert_equal(plain(input=x16), model(input=x16))
    assert_equal(plain(packed)[0].data, model(packed)[0].data)
    attention = calibrated(Only(nn.MultiheadAttention(16, 2)), x16, x16 + 1, x16)
    plain = convert(attention)
    for call in ((x16, x16 + 1, x16), (x16, x16, x16), (x16, x16 + 1, x16 - 1)):
        assert_equal(plain(call[0], key=call[1], value=call[2]), attention(call[0], key=call[1], value=call[2]))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 16)
        self.head = nn.Linear(16, 10, bias=False)
        self.head.weight = self.embedding.weight
        self.alias = self.head

    def forward(self, tokens):
        return self.head(self.embedding(tokens))


def test_shared_weights_stay_shared():
    tokens = torch.randint(0, 10, (2, 5))
    model = calibrated(Tied(), tokens)
    weights = integer_weights(model)
    assert set(weights) == {"embedding.weight", "head.weight", "alias.weight"}
    assert weights["embedding.weight"] is weights["head.weight"] is weights["alias.weight"]
    plain = convert(model)
    assert plain.head.weight is plain.embedding.weight
    assert torch.equal(plain(tokens), model(tokens))


def test_a_weight_that_only_some_layers_quantize_is_untied():
    tokens = torch.randint(0, 10, (2, 5))
    model = calibrated(Tied(), tokens, rules=(LayerRule(pattern="head", weight_bits=None, activation_bits=None),))
    plain = convert(model)
    assert torch.equal(plain.head.weight, model.head.weight)
    assert len(plain.embedding.weight.unique()) <= 16
    assert torch.equal(plain(tokens), model(tokens))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    x = torch.randn(4, 16)
    model = calibrated(Only(nn.Linear(16, 6)), x).to(dtype)
    assert_equal(convert(model)(x.to(dtype)), model(x.to(dtype)))


def test_a_double_model_brought_to_single_precision():
    x = torch.randn(200, 16)
    model = calibrated(Only(nn.Linear(16, 6)).double(), x.double()).float()
    assert model.layer.weight_quantizer.scale.dtype == torch.float64
    assert_equal(convert(model)(x), model(x))


def test_memory_format_stays():
    model = calibrated(Only(nn.Conv2d(4, 6, 3)), torch.randn(1, 4, 5, 5)).to(memory_format=torch.channels_last)
    assert convert(model).layer.weight.is_contiguous(memory_format=torch.channels_last)


def test_one_layer_by_itself():
    layer = nn.Linear(16, 6)
    calibrated_layer = calibrated(layer, x16)
    assert set(integer_weights(layer)) == {"weight"}
    plain = convert(calibrated_layer)
    assert type(plain) is nn.Linear
    assert torch.equal(plain(x16), layer(x16))


def test_a_class_made_from_a_parametrization_is_not_changed_for_the_original():
    model = calibrated(Only(parametrizations.weight_norm(nn.Linear(16, 6))), x16)
    y = model(x16)
    plain = convert(model)
    assert type(plain.layer) is nn.Linear
    assert set(plain.state_dict()) == {"layer.bias", "layer.weight"}
    assert torch.equal(model(x16), y)
    assert torch.equal(plain(x16), y)


def test_what_is_converted_passes_gradients_through_and_is_not_quantized_again():
    model = calibrated(nn.Sequential(nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)), x16)
    plain = convert(model)
    (expected,) = torch.autograd.grad(model(x16).sum(), model[0].bias)
    (found,) = torch.autograd.grad(plain(x16).sum(), plain[0].bias)
    assert torch.equal(plain(x16), model(x16))
    assert torch.equal(found, expected)
    assert expected.abs().sum() > 0
    with pytest.raises(ValueError, match=r"layer '.' was created by convert.* load_from_checkpoint"):
        quantize_model(plain, QuantConfig(3, 4))


class OwnAttention(nn.MultiheadAttention):
    """A subclass without a forward of its own."""


class AbstractFirst(abc.ABC, nn.MultiheadAttention):
    """A subclass with an abstract class as its first base, and therefore a different memory layout."""


@pytest.mark.parametrize("kind", [OwnAttention, AbstractFirst])
def test_an_attention_of_a_class_of_its_own(kind):
    model = calibrated(Only(kind(16, 2)), x16, x16, x16)
    plain = convert(model)
    assert isinstance(plain.layer, kind)
    for copy_of_it in (plain, copy.deepcopy(plain), pickle.loads(pickle.dumps(plain))):
        assert_equal(copy_of_it(x16, x16, x16), model(x16, x16, x16))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated")
def test_what_is_converted_can_be_traced():
    model = calibrated(nn.Sequential(nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 4)), x16)
    traced = torch.jit.trace(convert(model), x16)
    assert_equal(traced(x16), model(x16))


def test_a_model_without_ranges_is_refused():
    with pytest.raises(
        ValueError, match="Linear has no calibrated quantizers to export: train it with QuantizationAwareTraining"
    ):
        convert(nn.Linear(3, 4))
    with pytest.raises(ValueError, match="Only has no calibrated quantizers"):
        convert(quantize_model(Only(nn.Linear(3, 4)), QuantConfig()))
    model = calibrated(Only(nn.Linear(16, 6)), x16)
    with torch.no_grad():
        model.layer.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="weight 'layer.weight' must not contain NaN"):
        convert(model)
    with torch.no_grad():
        model.layer.weight.zero_()
        model.layer.weight_quantizer.scale.fill_(-1.0)
    with pytest.raises(ValueError, match="scale of weight 'layer.weight' must be positive"):
        convert(model)


@settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_layer_of_any_shape(data):
    draw = data.draw
    transposed, dims = draw(st.booleans()), draw(st.integers(0, 3))
    groups = draw(st.sampled_from([1, 2, 3]))
    channels = groups * draw(st.integers(1, 3))
    out = groups * draw(st.integers(1, 3))
    torch.manual_seed(draw(st.integers(0, 1000)))
    if dims == 0:
        layer, x = nn.Linear(channels, out, bias=draw(st.booleans())), torch.randn(3, channels)
    else:
        kind = getattr(nn, f"Conv{'Transpose' if transposed else ''}{dims}d")
        stride, kernel = draw(st.integers(1, 3)), draw(st.integers(1, 3))
        layer = kind(channels, out, kernel, stride=stride, groups=groups, bias=draw(st.booleans()))
        x = torch.randn(2, channels, *[5] * dims)
    model = calibrated(
        Only(layer),
        x,
        weight_bits=draw(st.integers(2, 8)),
        activation_bits=draw(st.one_of(st.none(), st.integers(2, 8))),
        weight_granularity=draw(st.sampled_from(["per_tensor", "per_channel"])),
    )
    assert torch.equal(convert(model)(x), model(x))
    (weight,) = integer_weights(model).values()
    assert weight.values.min() >= weight.quant_min
    assert weight.values.max() <= weight.quant_max


def test_a_compiled_module_is_converted_and_not_called():
    model = calibrated(ConvModule(), torch.randn(4, 1, 6, 6))
    model.compile(backend="eager")
    x = torch.randn(4, 1, 6, 6)
    expected = model(x)
    plain = convert(model)
    with torch.no_grad():
        model.head.weight.zero_()
    assert torch.equal(plain(x), expected)


class TiedByAFunction(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.hidden = nn.Embedding(20, 8), nn.Linear(8, 8)

    def forward(self, tokens):
        return nn.functional.linear(self.hidden(self.embedding(tokens)).relu(), self.embedding.weight)


def test_a_weight_that_a_function_reads_too_is_told():
    tokens = torch.randint(20, (64,))
    model = calibrated(TiedByAFunction(), tokens, weight_bits=2, activation_bits=None)
    with pytest.warns(UserWarning, match="weight of layer 'embedding' is also read outside of the layer, by linear"):
        plain = convert(model)
    assert not torch.equal(plain(tokens), model(tokens))


def test_losses_that_a_module_keeps_are_copied_too():
    model = calibrated(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), torch.randn(8, 4))
    model.losses = {"of each batch": [model(torch.randn(8, 4)).sum()]}
    copied, own = convert(model).losses["of each batch"][0], model.losses["of each batch"][0]
    assert copied is not own
    assert torch.equal(copied, own)
    model[1].lock = threading.Lock()
    with pytest.raises(
        TypeError, match="Sequential cannot be copied, because of its attribute '1.lock': cannot pickle"
    ):
        convert(model)
