"""Linear weights as torchao tensors."""

import io

import pytest
import torch
from calibrated import calibrated
from marks import needs_torchao
from sessions import assert_close
from test_onnx import Attention, Words, images, network, outputs
from torch import nn

from lightning_qat_osc.export import integer_weights
from lightning_qat_osc.export.torchao import convert_to_torchao

pytestmark = [
    needs_torchao,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_outputs_are_equal(bits, granularity):
    model = calibrated(network(), images(), weight_bits=bits, activation_bits=None, weight_granularity=granularity)
    converted = convert_to_torchao(model)
    x, expected = images(100), outputs(model, images(100))
    if bits == 8:
        assert_close(outputs(converted, x), expected)
    else:
        assert torch.equal(outputs(converted, x), expected)


def test_the_tensors_hold_the_trained_integers():
    for bits, kind in ((8, "Int8Tensor"), (4, "IntxUnpackedToInt8Tensor")):
        model = calibrated(network(), images(), weight_bits=bits, weight_granularity="per_channel")
        converted = convert_to_torchao(model)
        weight = converted[14].weight
        assert type(weight).__name__ == kind
        assert torch.equal(weight.qdata, integer_weights(model)["14.weight"].values)
        assert torch.equal(weight.dequantize(), integer_weights(model)["14.weight"].dequantize())
        assert type(converted[0].weight) is nn.Parameter
    assert weight.target_dtype == torch.int4


def test_quantized_inputs_attention_and_shared_weights():
    for make, x in ((Attention, torch.randn(4, 5, 8)), (Words, torch.randint(20, (4, 5)))):
        torch.manual_seed(0)
        model = calibrated(make(), x, weight_bits=4, activation_bits=5)
        assert_close(outputs(convert_to_torchao(model), x), outputs(model, x), 1e-6)


def test_a_state_dict_is_saved_and_loaded_as_weights_only():
    model = calibrated(network(), images(), weight_bits=4)
    converted, file = convert_to_torchao(model), io.BytesIO()
    torch.save(converted.state_dict(), file)
    file.seek(0)
    other = convert_to_torchao(calibrated(network(), images(seed=3), weight_bits=4))
    other.load_state_dict(torch.load(file, weights_only=True), assign=True)
    assert torch.equal(other[14].weight.dequantize(), converted[14].weight.dequantize())


def test_what_has_no_linear_layer_is_refused():
    model = calibrated(nn.Sequential(nn.Conv2d(3, 4, 3)), images())
    with pytest.raises(ValueError, match="Sequential has no linear layer with a quantized weight"):
        convert_to_torchao(model)


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setattr("lightning_qat_osc.export.extras.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"lightning-qat-osc\[torchao\]"):
        convert_to_torchao(nn.Linear(2, 2))


def test_other_precisions_are_refused_and_shared_weights_stay_shared():
    model = calibrated(nn.Sequential(nn.Linear(8, 8)).bfloat16(), torch.randn(4, 8).bfloat16(), activation_bits=None)
    with pytest.raises(ValueError, match="module must be in torch.float32, but has weights of torch.bfloat16"):
        convert_to_torchao(model)
    tied = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    tied[1].weight = tied[0].weight
    converted = convert_to_torchao(calibrated(tied, torch.randn(4, 8), activation_bits=None))
    assert converted[0].weight is converted[1].weight


class Halved(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, 0.5 * self.weight, self.bias)


def test_a_linear_layer_with_a_forward_of_its_own_is_converted_plainly():
    x = torch.randn(16, 8)
    model = calibrated(nn.Sequential(nn.Linear(8, 8), Halved(8, 4)), x, activation_bits=None)
    converted = convert_to_torchao(model)
    assert type(converted[1].weight) is nn.Parameter
    assert type(converted[0].weight) is not nn.Parameter
    assert_close(outputs(converted, x), outputs(model, x))
