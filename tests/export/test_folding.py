"""Batch-norm folding keeps the function and the integers, and warnings name what cannot be folded."""

import copy

import hypothesis.strategies as st
import pytest
import torch
from calibrated import calibrated
from hypothesis import HealthCheck, given, settings
from models import ConvModule
from torch import nn
from torch.nn import functional as F

from lightning_qat_osc import LayerRule
from lightning_qat_osc.export import convert, integer_model, integer_weights, load_packed, save_packed

NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def used(norm, seed=0, negative=False):
    """Give a batch norm random statistics and parameters, as after training, and return it."""
    generator = torch.Generator().manual_seed(seed)
    norm.running_mean.copy_(torch.randn(norm.num_features, generator=generator))
    norm.running_var.copy_(torch.rand(norm.num_features, generator=generator) + 0.1)
    if norm.affine:
        with torch.no_grad():
            norm.weight.copy_(torch.rand(norm.num_features, generator=generator) + 0.2)
            norm.bias.copy_(torch.randn(norm.num_features, generator=generator))
            if negative:
                norm.weight.neg_()
    return norm


def reference(layer, norm, x):
    """Compute layer and batch norm in double precision, without folding."""
    layer, norm = copy.deepcopy(layer).double(), copy.deepcopy(norm).double()
    return norm(layer(x.double()))


def assert_close(out, expected):
    assert torch.allclose(out.double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.filterwarnings("ignore:Batch norm .* is not folded")
@settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_the_same_function_and_the_same_integers(data):
    draw = data.draw
    dims, transposed = draw(st.integers(0, 3)), draw(st.booleans())
    groups = 1 if transposed else draw(st.sampled_from([1, 2]))
    channels, out = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    torch.manual_seed(draw(st.integers(0, 1000)))
    bias, bits = draw(st.booleans()), draw(st.integers(2, 8))
    if dims == 0:
        layer, x = nn.Linear(channels, out, bias=bias), torch.randn(4, channels)
    else:
        kind = getattr(nn, f"Conv{'Transpose' if transposed else ''}{dims}d")
        layer = kind(channels, out, draw(st.integers(1, 3)), stride=draw(st.integers(1, 2)), groups=groups, bias=bias)
        x = torch.randn(2, channels, *[5] * dims)
    norm = used(NORMS[max(dims, 1)](out, affine=draw(st.booleans())), negative=draw(st.booleans()))
    granularity = draw(st.sampled_from(["per_tensor", "per_channel"]))
    activation_bits = draw(st.sampled_from([None, 4]))
    model = nn.Sequential(layer, norm)
    model = calibrated(model, x, weight_bits=bits, activation_bits=activation_bits, weight_granularity=granularity)
    plain, before = convert(model), integer_weights(model)["0.weight"]
    folded = integer_model(model, fold_batch_norm=True)
    axis = 1 if transposed and dims else 0
    if folded.folding.kept:
        assert norm.weight.min() < 0
        assert before.values.min() == before.quant_min
        assert torch.equal(folded.module(x), plain(x))
        return
    assert folded.folding.into == {"1": "0"}
    assert set(folded.module.state_dict()) == {"0.weight", "0.bias"}
    weight = folded.weights["0.weight"]
    sign = norm.weight.sign() if norm.affine else torch.ones(out)
    sign = sign.view([-1 if i == axis else 1 for i in range(before.values.dim())])
    assert torch.equal(weight.values, before.values * sign.char())
    assert weight.scale.shape[axis] == out
    assert weight.channel_axis == axis
    assert (weight.scale > 0).all()
    assert torch.equal(folded.module[0].weight, weight.dequantize())
    quantized_input = plain[0]._forward_pre_hooks
    x_q = x if not quantized_input else next(iter(quantized_input.values()))(plain[0], (x,), {})[0][0]
    assert_close(folded.module(x), reference(plain[0], norm, x_q))


def test_the_module_of_the_tests():
    x = torch.randn(8, 1, 6, 6)
    model = ConvModule()
    used(model.bn1)
    used(model.bn2)
    model = calibrated(model, x, weight_bits=8, activation_bits=None)
    folded = convert(model, fold_batch_norm=True)
    assert type(folded) is ConvModule
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert set(folded.state_dict()) == {
        f"{name}.{key}" for name in ("stem", "depthwise", "point", "head") for key in ("weight", "bias")
    }
    assert_close(folded(x), convert(model).double()(x.double()))
    assert all(isinstance(m, nn.BatchNorm2d) for m in (model.bn1, model.bn2))  # the original is unchanged


def test_a_negative_gamma_negates_integers_but_not_off_the_grid():
    x = torch.randn(4, 3)
    layer, norm = nn.Linear(3, 2), nn.BatchNorm1d(2).eval()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.3, -0.7, 0.1], [-0.8, 0.2, 0.7]]))
        norm.weight.copy_(torch.tensor([-2.0, 1.0]))
    model = calibrated(nn.Sequential(layer, norm), x, activation_bits=None)
    model[0].weight_quantizer.set_range(torch.tensor([0.1]), -8, 7)
    folded = integer_model(model, fold_batch_norm=True)
    assert folded.weights["0.weight"].values.tolist() == [[-3, 7, -1], [-8, 2, 7]]
    assert folded.weights["0.weight"].scale.flatten().tolist() == pytest.approx([0.2, 0.1], rel=1e-4)
    with torch.no_grad():
        norm.weight.neg_()
    with pytest.warns(
        UserWarning, match="'1' is not folded: channel 1 has a negative gamma and an integer weight of -8"
    ):
        kept = convert(model, fold_batch_norm=True)
    assert torch.equal(kept(x), model(x))
    assert isinstance(kept[1], nn.BatchNorm1d)


def test_a_gamma_of_zero_and_one_too_small_for_a_scale():
    x = torch.randn(4, 3)
    norm = used(nn.BatchNorm1d(3))
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.0, 1e-38, 1.0]))
    model = calibrated(nn.Sequential(nn.Linear(3, 3), norm), x, activation_bits=None)
    folded = integer_model(model, fold_batch_norm=True)
    weight = folded.weights["0.weight"]
    assert (weight.scale > 0).all()
    assert weight.values[0].tolist() == weight.values[1].tolist() == [0, 0, 0]
    assert weight.values[2].any()
    assert_close(folded.module(x), convert(model).double()(x.double()))


def test_full_precision_layers_are_folded_too():
    x = torch.randn(4, 3, 5, 5)
    full = LayerRule(pattern="0", weight_bits=None, activation_bits=None)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)]
    model = calibrated(nn.Sequential(*layers), x, activation_bits=None, rules=(full,))
    used(model[1])
    folded = convert(model, fold_batch_norm=True)
    assert isinstance(folded[1], nn.Identity)
    assert_close(folded(x), convert(model).double()(x.double()))


class Padded(nn.Conv2d):
    """A convolution that overrides forward but only pads and convolves."""

    def forward(self, x):
        return F.conv2d(F.pad(x, [1, 1, 1, 1]), self.weight, self.bias, self.stride)


class Activated(nn.Conv2d):
    """A convolution whose forward also applies an activation."""

    def forward(self, x):
        return F.relu(F.conv2d(x, self.weight, self.bias))


class ActivatedByDefault(nn.Conv2d):
    """A convolution that applies an activation unless ``raw`` is given."""

    def forward(self, x, raw=None):
        out = F.conv2d(x, self.weight, self.bias)
        return F.relu(out) if raw is None else out


class Remembering(nn.Conv2d):
    """A convolution that keeps its output in an attribute, where it may be read later."""

    def forward(self, x):
        self.last = F.conv2d(x, self.weight, self.bias)
        return self.last


class OwnConvolution(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return F.conv2d(input, weight.abs(), bias)


class OwnNorm(nn.BatchNorm2d):
    def forward(self, x):
        return F.relu(super().forward(x))


class Net(nn.Module):
    """A convolution and a batch norm; ``call`` is the forward pass."""

    def __init__(self, call, conv=None, norm=None):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1, bias=False) if conv is None else conv
        self.norm = used(nn.BatchNorm2d(3)) if norm is None else norm
        self.call = call
        self.nothing = nn.Identity()

    def forward(self, x):
        return self.call(self, x)


def plainly(net, x):
    return net.norm(net.conv(x))


def unpacked(net, x):
    y = net.conv(x)
    first, second = net.norm(y).split([1, 2], dim=1)
    return torch.cat([first, second], dim=1)


class Optional(Net):
    """A Net with an optional argument, ``skip``, and others that it ignores."""

    def forward(self, x, skip=None, sizes=(1, [2]), *, scale=1.0, name="", **more):
        return self.call(self, x, skip)


def hooked(norm):
    norm.register_forward_hook(lambda *args: None)
    return norm


@pytest.mark.parametrize(
    "make",
    [
        lambda: Net(plainly),
        lambda: Net(plainly, conv=Padded(3, 3, 3, bias=False)),
        lambda: Net(lambda net, x: net.norm(input=net.conv(x))),
        lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.Dropout(0.5), nn.Identity(), nn.BatchNorm2d(3)),
        lambda: nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3)),
        lambda: Net(unpacked),
        lambda: Optional(lambda net, x, skip: net.norm(net.conv(x)) if skip is None else net.norm(net.conv(x)) + skip),
    ],
)
def test_what_can_be_folded(make):
    x = torch.randn(4, 3, 5, 5)
    model = calibrated(make(), x, weight_bits=8, activation_bits=None)
    folded = convert(model, fold_batch_norm=True)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert_close(folded(x), convert(model).double()(x.double()))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Net(lambda n, x: n.norm(n.conv(x)) + n.norm(x)), "it is called more than once"),
        (lambda: Net(lambda n, x: n.norm(n.conv(n.conv(x)))), "'conv' is called more than once"),
        (lambda: Net(lambda n, x: n.norm(y := n.conv(x)) + y), "the output of 'conv' is also used elsewhere"),
        (lambda: Net(lambda n, x: n.norm(n.conv(x)) + n.conv.weight.sum()), "weight of 'conv' is read outside"),
        (lambda: Net(lambda n, x: n.norm(n.conv(x)) + n.norm.running_mean.sum()), "running_mean of 'norm' is read"),
        (lambda: Net(lambda n, x: n.norm(y := n.nothing(n.conv(x))) + y), "but from Identity"),
        (lambda: Net(lambda n, x: n.norm(hooked(n.nothing)(n.conv(x)))), "but from Identity"),
        (
            lambda: Net(lambda n, x: n.norm(F.relu(n.conv(x)))),
            "not come from a convolution or linear layer, but from relu",
        ),
        (lambda: Net(lambda n, x: n.conv(n.norm(x))), "not come from a convolution or linear layer, but from x"),
        (lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.BatchNorm2d(3)), "linear layer, but from ReLU"),
        (lambda: Net(lambda n, x: n.conv(x)), "no call to it was found when the model was traced"),
        (lambda: Net(plainly, norm=nn.BatchNorm2d(3, track_running_stats=False)), "it has no running statistics"),
        (lambda: Net(plainly, norm=OwnNorm(3)), "OwnNorm overrides forward"),
        (lambda: Net(plainly, norm=hooked(nn.BatchNorm2d(3))), "it or 'conv' has forward hooks"),
        (lambda: Net(plainly, conv=Activated(3, 3, 1)), "Activated 'conv' overrides forward"),
        (lambda: Net(plainly, conv=ActivatedByDefault(3, 3, 1)), "ActivatedByDefault 'conv' overrides forward"),
        (lambda: Net(plainly, conv=Remembering(3, 3, 1)), "Remembering 'conv' overrides forward"),
        (lambda: Net(plainly, conv=OwnConvolution(3, 3, 1)), "OwnConvolution 'conv' overrides forward"),
        (
            lambda: Net(plainly, conv=nn.ConvTranspose2d(3, 3, 1, groups=3)),
            "'conv' is a transposed convolution with groups",
        ),
        (
            lambda: Net(plainly, conv=nn.Linear(5, 5), norm=nn.BatchNorm2d(3)),
            "it has 3 channels, but 'conv' has 5 output channels",
        ),
    ],
)
def test_what_cannot_be_folded_is_named_and_computes_as_before(make, reason):
    x = torch.randn(4, 3, 5, 5)
    model = calibrated(make(), x, activation_bits=None)
    plain = convert(model)
    with pytest.warns(UserWarning, match=reason):
        folded = convert(model, fold_batch_norm=True)
    assert torch.equal(folded(x), plain(x))
    assert folded.state_dict().keys() == plain.state_dict().keys()


def test_a_full_precision_weight_that_is_computed_is_not_folded():
    x = torch.randn(4, 3, 5, 5)
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
    rules = (LayerRule("0", weight_bits=None),)
    model = calibrated(nn.Sequential(conv, nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)), x, activation_bits=None, rules=rules)
    with pytest.warns(UserWarning, match="the weight of '0' is computed from other parameters"):
        folded = convert(model, fold_batch_norm=True)
    assert torch.equal(folded(x), convert(model)(x))


def test_shared_weights_and_statistics_that_are_not_finite():
    x = torch.randn(4, 3, 5, 5)
    tied = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))
    tied[2].weight = tied[0].weight
    calibrated(tied, x)
    with pytest.warns(UserWarning, match="'0' shares a parameter"):
        left = convert(tied, fold_batch_norm=True)
    assert torch.equal(left(x), convert(tied)(x))
    model = calibrated(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), x)
    model[1].running_var.fill_(float("nan"))
    with pytest.warns(UserWarning, match="statistics or parameters are not finite"):
        convert(model, fold_batch_norm=True)


class Branching(nn.Module):
    """Cannot be traced as a whole, so its submodules are traced separately."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
        self.norm = nn.BatchNorm2d(3)
        self.last = None

    def forward(self, x):
        self.last = x
        y = self.body(x)
        return self.norm(y) if y.sum() > 0 else y


def test_below_a_module_that_cannot_be_traced():
    x = torch.randn(4, 3, 5, 5)
    model = calibrated(Branching(), x)
    with pytest.warns(
        UserWarning, match="'norm' is not folded: no call to it was found .*; the model cannot be traced"
    ):
        folded = convert(model, fold_batch_norm=True)
    assert isinstance(folded.body[1], nn.Identity)
    assert torch.equal(folded.last, x)  # not a proxy
    assert_close(folded(x), convert(model).double()(x.double()))
    aliased = Branching()
    aliased.other = aliased.body[0]
    aliased = calibrated(aliased, x)
    with (
        pytest.warns(UserWarning, match="'norm' is not folded"),
        pytest.warns(UserWarning, match="'body.0' has several"),
    ):
        convert(aliased, fold_batch_norm=True)


class Padding(nn.Module):
    """Computes its padding from the shape of its input, as ports of TensorFlow networks do."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, bias=False)
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(self.conv(F.pad(x, [int(x.shape[-1]) % 2 + 1] * 4)))


@pytest.mark.filterwarnings("ignore:Batch norm .* is not folded")
def test_the_nearest_module_that_cannot_be_traced_is_named():
    model = calibrated(nn.Sequential(Padding(), nn.Sequential(Padding())), torch.randn(4, 3, 5, 5))
    kept = integer_model(model, fold_batch_norm=True).folding.kept
    assert set(kept) == {"0.norm", "1.0.norm"}
    words = "no call to it was found when the model was traced; '1.0' cannot be traced: TypeError: int() argument"
    assert kept["1.0.norm"].startswith(words)


def test_a_norm_of_two_names_in_one_module_is_folded_under_both():
    class Named(Net):
        def __init__(self):
            super().__init__(lambda net, x: net.alias(net.conv(x)))
            self.alias = self.norm

    x = torch.randn(4, 3, 5, 5)
    model = calibrated(Named(), x, weight_bits=8, activation_bits=None)
    folded = convert(model, fold_batch_norm=True)
    assert isinstance(folded.norm, nn.Identity)
    assert isinstance(folded.alias, nn.Identity)
    assert_close(folded(x), convert(model).double()(x.double()))


def added_to_itself(net, x, skip):
    y = net.conv(x)
    return net.norm(y) + (y if skip is None else skip)


def through_one_or_the_other(net, x, skip):
    return net.norm(net.conv(x) if skip is None else net.nothing(net.other(x)))


def norm_of_what_is_given(net, x, skip):
    return net.norm(x if skip is None else net.conv(skip))


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (added_to_itself, "the output of 'conv' is also used elsewhere"),
        (through_one_or_the_other, "the layer before it differs between a call with all arguments"),
        (norm_of_what_is_given, "not come from a convolution or linear layer, but from x"),
    ],
)
def test_what_a_forward_does_without_an_argument_counts(call, reason):
    model = Optional(call)
    model.other = nn.Conv2d(3, 3, 1)
    x = torch.randn(4, 3, 5, 5)
    model = calibrated(model, x, activation_bits=None, rules=(LayerRule("other", weight_bits=None),))
    with pytest.warns(UserWarning, match=f"'norm' is not folded: .*{reason}"):
        folded = convert(model, fold_batch_norm=True)
    plain = convert(model)
    assert torch.equal(folded(x), plain(x))
    assert torch.equal(folded(x, x), plain(x, x))


class Later(nn.Module):
    """Cannot be traced, and reads a value that its body stored during the forward pass."""

    def __init__(self, body, left):
        super().__init__()
        self.body, self.left = body, left

    def forward(self, x):
        y = self.body(x)
        return y + self.left(self.body) if y.isfinite().all() else y


def in_an_attribute(net, x):
    net.last = net.conv(x)
    return net.norm(net.last)


def in_a_dictionary(net, x):
    net.seen = {"outputs": [net.conv(x)]}
    return net.norm(net.seen["outputs"][0])


def behind_nothing(net, x):
    net.last = net.nothing(net.conv(x))
    return net.norm(net.last)


def by_a_hook():
    outputs, inner = [], nn.Sequential(nn.Conv2d(3, 3, 1))
    inner.register_forward_hook(lambda module, args, output: outputs.append(output))
    return Later(nn.Sequential(inner, used(nn.BatchNorm2d(3))), lambda body: outputs[-1])


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Later(Net(in_an_attribute), lambda net: net.last), "the output of 'body.conv' is kept"),
        (lambda: Later(Net(in_a_dictionary), lambda net: net.seen["outputs"][0]), "the output of 'body.conv' is kept"),
        (lambda: Later(Net(behind_nothing), lambda net: net.last), "but from Identity"),
        (by_a_hook, "the output of 'body.0.0' is kept in an attribute or by a hook"),
    ],
)
def test_an_output_that_is_read_later_is_not_folded(make, reason):
    x = torch.randn(4, 3, 5, 5)
    model = calibrated(make(), x, activation_bits=None)
    with pytest.warns(UserWarning, match=reason):
        folded = convert(model, fold_batch_norm=True)
    assert torch.equal(folded(x), convert(model)(x))


class Counting:
    """A mixin with a buffer, which forward reassigns, and containers, which forward changes in place."""

    def count(self):
        self.register_buffer("calls", torch.zeros(()))
        self.inputs, self.by_name, self.seen = [1], {"inputs": (["a"],)}, {2}
        return self

    def forward(self, x):
        self.calls = self.calls + 1
        self.inputs.append(x)
        self.by_name["inputs"][0].append(x)
        self.by_name["last"] = x
        self.seen.add(x)
        return self.compute(x)


class CountingLayer(Counting, nn.Conv2d):
    def compute(self, x):
        return F.conv2d(x, self.weight, self.bias)


class CountingNet(Counting, nn.Sequential):
    def compute(self, x):
        return nn.Sequential.forward(self, x)


@pytest.mark.filterwarnings("ignore:Batch norm .* is not folded")
@pytest.mark.parametrize(
    "make",
    [
        lambda: Net(plainly, conv=CountingLayer(3, 3, 1).count()),
        lambda: CountingNet(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).count(),
    ],
)
def test_buffers_and_containers_are_left_as_they_were(make):
    x = torch.randn(4, 3, 5, 5)
    model = calibrated(make(), x)
    (counting,) = (m for m in model.modules() if hasattr(m, "by_name"))
    counting.inputs, counting.by_name, counting.seen = [1], {"inputs": (["a"],)}, {2}
    folded = integer_model(model, fold_batch_norm=True)
    assert folded.folding.into or torch.__version__ < "2.13"  # older versions may not trace buffer assignments
    (counting,) = (m for m in folded.module.modules() if hasattr(m, "by_name"))
    assert torch.equal(counting.calls, torch.ones(()))  # from the forward pass for calibration only
    assert counting.inputs == [1]
    assert counting.by_name == {"inputs": (["a"],)}
    assert counting.seen == {2}


def test_a_file_that_was_folded_does_not_fit_where_the_norm_is_another_module(tmp_path):
    x, layers = torch.randn(4, 3, 5, 5), lambda norm: nn.Sequential(nn.Conv2d(3, 3, 1), norm, nn.Conv2d(3, 3, 1))
    save_packed(calibrated(layers(nn.BatchNorm2d(3)), x), tmp_path / "m.safetensors", fold_batch_norm=True)
    load_packed(tmp_path / "m.safetensors", layers(nn.BatchNorm2d(3)))
    with pytest.raises(
        ValueError, match="does not fit Sequential: '1', folded into '0' in the file, is not a batch norm, but ReLU"
    ):
        load_packed(tmp_path / "m.safetensors", layers(nn.ReLU()))
