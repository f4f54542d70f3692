"""Export with torch.export: integer weights, operators that backends know, outputs of the graph and its lowering."""

import collections
import copy
import importlib

import pytest
import torch
from calibrated import calibrated
from marks import needs_torchao
from sessions import assert_close
from test_onnx import CrossAttention, Switching, Words, images, network, outputs
from torch import nn

from lightning_qat_osc.export import integer_weights
from lightning_qat_osc.export.pt2e import export_program

quantized = torch.ops.quantized_decomposed


def rows_that_differ(y, expected):
    """Count rows that differ by more than rounding errors of sums, as where these decide a tie between integers."""
    return int(((y - expected).abs().flatten(1).amax(1) > 2e-6 * expected.abs().max()).sum())


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize(("weight_bits", "activation_bits"), [(8, 8), (4, 4), (3, 3), (2, None), (None, 5)])
def test_the_program_computes_the_quantized_model(weight_bits, activation_bits, fold):
    model = calibrated(network(), images(), weight_bits=weight_bits, activation_bits=activation_bits)
    program = export_program(model, images(2), fold_batch_norm=fold)
    x = 1.5 * images(500, seed=5)
    assert rows_that_differ(outputs(program.module(), x), outputs(model, x)) <= 25  # multiplies by 1 / scale
    operators = collections.Counter(node.target for node in program.graph.nodes)
    assert operators[quantized.dequantize_per_channel.default] == (0 if weight_bits is None else 6)
    assert operators[quantized.quantize_per_tensor.default] == (0 if activation_bits is None else 6)
    assert operators[torch.ops.aten.batch_norm.default] == (0 if fold and weight_bits else 2)


def test_weights_are_integers_under_the_float_models_keys():
    model = calibrated(network(), images(), weight_bits=3)
    state = export_program(model, images(2), fold_batch_norm=False).state_dict
    for name, weight in integer_weights(model).items():
        assert torch.equal(state[name], weight.values)
        assert torch.equal(state[f"{name}_scale"], weight.scale.expand(len(weight.values)))
    assert not [key for key, value in state.items() if "quantizer" in key or value.dtype == torch.float64]


def test_grids_hold_outside_of_their_range():
    model = calibrated(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(64, 4), weight_bits=4)
    x = 20 * torch.randn(100, 4)
    assert rows_that_differ(outputs(export_program(model, x).module(), x), outputs(model, x)) <= 2


def test_int8_inputs_are_the_same_numbers():
    model = calibrated(network(), images(), activation_bits=5)
    unsigned, signed = (export_program(model, images(2), input_dtype=d) for d in (torch.uint8, torch.int8))
    x = images(100)
    assert torch.equal(outputs(unsigned.module(), x), outputs(signed.module(), x))
    kinds = {n.args[5] for n in signed.graph.nodes if n.target == quantized.quantize_per_tensor.default}
    assert kinds == {torch.int8}
    with pytest.raises(ValueError, match=r"input_dtype must be torch.uint8 or torch.int8, got torch.int32"):
        export_program(model, images(2), input_dtype=torch.int32)


class Gain(nn.Linear):
    def __init__(self, width):
        super().__init__(width, width)
        self.weight_scale = nn.Parameter(torch.full((width,), 3.0))

    def forward(self, x):
        return super().forward(x) * self.weight_scale


def test_a_tensor_of_the_models_own_keeps_its_name_and_values():
    torch.manual_seed(0)
    x = torch.randn(32, 4)
    model = calibrated(nn.Sequential(nn.Linear(4, 6), Gain(6), nn.Linear(6, 2)), x, activation_bits=None)
    program = export_program(model, x)
    assert torch.equal(program.state_dict["1.weight_scale"], model[1].weight_scale)
    assert_close(outputs(program.module(), x), outputs(model, x), 1e-6)


class HalfBias(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight, self.bias * 0.5)


class PositiveGamma(nn.BatchNorm2d):
    def forward(self, x):
        gamma = self.weight.abs() + self.eps
        return nn.functional.batch_norm(x, self.running_mean, self.running_var, gamma, self.bias, False, 0.1, self.eps)


@pytest.mark.parametrize(
    ("conv", "norm"), [(HalfBias(3, 4, 3), nn.BatchNorm2d(4)), (nn.Conv2d(3, 4, 3), PositiveGamma(4))]
)
def test_a_batch_norm_beside_computed_parameters_stays(conv, norm):
    model = calibrated(nn.Sequential(conv, norm), images(), activation_bits=None)
    program = export_program(model, images(2))
    assert_close(outputs(program.module(), images(8)), outputs(model, images(8)), 1e-5)
    assert sum(node.target == torch.ops.aten.batch_norm.default for node in program.graph.nodes) == 1


def test_a_program_is_saved_and_runs_without_the_models_class(tmp_path):
    model = calibrated(network(), images())
    torch.export.save(export_program(model, images(2)), tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    assert rows_that_differ(outputs(loaded, images(64)), outputs(model, images(64))) <= 3


def test_shared_weights_and_attention():
    for make, x in ((Words, torch.randint(20, (4, 5))), (CrossAttention, torch.randn(4, 5, 8))):
        for granularity in ("per_tensor", "per_channel"):
            torch.manual_seed(0)
            model = calibrated(make(), x, weight_granularity=granularity)
            assert_close(outputs(export_program(model, x).module(), x), outputs(model, x), 1e-5)


def classifier():
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU6(),
        nn.Conv2d(16, 32, 3, stride=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 24),
        nn.ReLU(),
        nn.Linear(24, 10),
    )
    model(images())
    return model.eval()


def lowered(model, x):
    lowering = importlib.import_module("torchao.quantization.pt2e.lowering")
    importlib.import_module("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")  # registers patterns
    with torch.no_grad():
        program = export_program(model, x, dynamic_batch=False)
        return lowering.lower_pt2e_quantized_to_x86(program.module(), (copy.deepcopy(x),))


@needs_torchao
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize(("weight_bits", "activation_bits"), [(8, 8), (4, 4), (2, 3)])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_torchao_lowers_it_to_integer_kernels(weight_bits, activation_bits, granularity):
    bits = {"weight_bits": weight_bits, "activation_bits": activation_bits}
    model = calibrated(classifier(), images(), weight_granularity=granularity, **bits)
    x = 3 * images(64, seed=5)  # so that grids saturate
    graph = lowered(model, x)
    kernels = [str(n.target) for n in graph.graph.nodes if str(n.target).startswith(("onednn.qconv", "onednn.qlinear"))]
    assert len(kernels) == 4
    expected, y = outputs(model, x), outputs(graph, x)
    assert rows_that_differ(y, expected) <= 6
    assert (y - expected).abs().max() < 0.5 * expected.std()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("bits", [8, 3])
def test_inductor_compiles_the_program(bits):
    from torch._inductor import config

    model = calibrated(network(), images(), weight_bits=bits, activation_bits=bits)
    x = 3 * images(64, seed=5)
    program = export_program(model, x, dynamic_batch=False)
    with config.patch(freezing=True), torch.no_grad():
        y = torch.compile(program.module())(x)
    assert rows_that_differ(y, outputs(model, x)) <= 6


@pytest.mark.parametrize("length", [4, 6])
def test_a_norm_behind_a_convolution_without_a_batch_stays(length):
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(length)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.2, 3)
    x = torch.randn(3, length)  # [C, L]; batch norm takes L as the channels
    model = calibrated(nn.Sequential(nn.Conv1d(3, 4, 1), norm), x, activation_bits=None)
    program = export_program(model, x, dynamic_batch=False)
    with torch.no_grad():
        assert torch.allclose(program.module()(x), model(x), atol=1e-6)


class TiedConvolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Conv2d(3, 8, 3, padding=1), nn.ConvTranspose2d(8, 3, 3, padding=1)
        self.decoder.weight = self.encoder.weight

    def forward(self, x):
        return self.decoder(self.encoder(x).relu())


@pytest.mark.parametrize("activation_bits", [None, 8])
def test_a_weight_of_a_convolution_and_a_transposed_one(activation_bits):
    x = torch.randn(2, 3, 6, 6)
    model = calibrated(TiedConvolutions(), x, activation_bits=activation_bits)
    torch.testing.assert_close(export_program(model, x).module()(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_forward_that_switches_gradients_and_autocast():
    x = torch.randn(16, 6)
    model = calibrated(Switching(), x)
    program = export_program(model, x)
    assert torch.equal(program.module()(x), outputs(model, x))
    assert len(program.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)) == 3


class Controlled(nn.Module):
    """Branches on values, in the form that torch can trace."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x):
        hidden = self.first(x)
        return self.last(torch.cond(hidden.sum() > 0, lambda y: y.relu(), lambda y: y.sigmoid(), (hidden,)))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # from torch, while it traces the branches
def test_control_flow_stays_in_the_graph():
    with torch.compiler.set_stance("force_eager"):  # as in the callbacks' calibration passes
        model = calibrated(Controlled(), torch.randn(8, 4)).eval()
    program = export_program(model, torch.randn(8, 4)).module()
    for x in (torch.randn(5, 4), -torch.randn(5, 4).abs(), torch.randn(5, 4).abs()):
        with torch.no_grad():
            assert torch.allclose(program(x), model(x), atol=1e-5)
