import pytest
import torch
from torch import nn
from torchmetrics import Metric

from lightning_qat_osc import LayerRule, QuantConfig, oscillation_states, quantization_plan, quantize_model
from lightning_qat_osc.lookup import quantized_layers, quantized_weights, scale_parameters
from lightning_qat_osc.plan import format_plan
from lightning_qat_osc.quantized_layer import QuantizedLayer
from lightning_qat_osc.surgery import unquantized_layers


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.features = nn.ModuleDict({"a": nn.Conv2d(4, 4, 1), "b": nn.Conv2d(4, 4, 1)})
        self.head = nn.Linear(4, 2)


def test_inserts_everywhere_once():
    net = Net()
    assert quantize_model(net, QuantConfig()) is net
    layers = quantized_layers(net)
    assert list(layers) == ["embed", "features.a", "features.b", "head"]
    assert layers["embed"].input_quantizers() == {}
    quantizers = [layer.weight_quantizer for layer in layers.values()]
    quantize_model(net, QuantConfig())
    assert quantizers == [layer.weight_quantizer for layer in quantized_layers(net).values()]
    assert len(scale_parameters(net)) == 7


def test_rules_set_bits_and_leave_layers_out():
    rules = (
        LayerRule(pattern="features.*", weight_bits=2),
        LayerRule(pattern="features.b", activation_bits=None),
        LayerRule(layer_type="Linear", weight_bits=None, activation_bits=None),
    )
    net = Net()
    config = QuantConfig(4, 8, rules=rules)
    quantize_model(net, config)
    assert not isinstance(net.head, QuantizedLayer)
    assert [net.features[k].weight_quantizer.bits for k in "ab"] == [2, 2]
    assert net.features["a"].input_quantizer.bits == 8
    assert net.features["b"].input_quantizers() == {}
    assert unquantized_layers(net, config) == []
    assert unquantized_layers(net, QuantConfig()) == ["head"]


def test_weights_only_and_activations_only():
    net = Net()
    quantize_model(net, QuantConfig(3, None))
    assert all(layer.input_quantizers() == {} for layer in quantized_layers(net).values())
    net = Net()
    quantize_model(net, QuantConfig(None, 3))
    assert all(layer.weight_quantizers() == {} for layer in quantized_layers(net).values())
    assert not isinstance(net.embed, QuantizedLayer)


def test_pattern_without_a_match_lists_near_names():
    with pytest.raises(ValueError, match=r"pattern='feature\.a'.*features\.a"):
        quantize_model(Net(), QuantConfig(rules=(LayerRule(pattern="feature.a", weight_bits=8),)))
    with pytest.raises(ValueError, match="without layer_type, it matches layers of type Conv2d, Embedding, Linear"):
        quantize_model(Net(), QuantConfig(rules=(LayerRule(layer_type="Conv1d", weight_bits=8),)))


def test_pattern_of_what_holds_layers():
    words = r"must match the whole name: 'features\.\*' matches the layers.*layer names include features\."
    with pytest.raises(ValueError, match=words):
        quantize_model(Net(), QuantConfig(rules=(LayerRule(pattern="features", weight_bits=8),)))


def test_arguments_of_another_kind():
    with pytest.raises(TypeError, match="config must be a QuantConfig, got 4"):
        quantize_model(Net(), 4)
    with pytest.raises(TypeError, match=r"module must be a module, got the class Net: pass an instance, Net\(\.\.\.\)"):
        quantize_model(Net, QuantConfig())
    with pytest.raises(TypeError, match=r"module must be a torch\.nn\.Module, got 'net'"):
        quantize_model("net", QuantConfig())


def test_contradictory_rules():
    rules = (LayerRule(pattern="head", weight_bits=8), LayerRule(layer_type="Linear", weight_bits=2))
    with pytest.raises(ValueError, match=r"layer 'head'.*weight_bits=8.*weight_bits=2"):
        quantize_model(Net(), QuantConfig(rules=rules))


def test_nothing_to_quantize():
    with pytest.raises(ValueError, match="no layer to quantize"):
        quantize_model(nn.ReLU(), QuantConfig())


def with_a_forward_of_its_own():
    layer = nn.Linear(4, 4)
    layer.forward = lambda x: nn.functional.linear(x, layer.weight)
    return layer


def test_unsupported_layers_are_named_with_the_way_to_leave_them_out():
    for make, words in (
        (lambda: nn.Linear(4, 4, dtype=torch.complex64), "weight of torch.complex64"),
        (lambda: nn.EmbeddingBag(4, 4, sparse=True), "sparse gradients"),
        (lambda: nn.LazyLinear(4), "is lazy"),
        (lambda: nn.Embedding(4, 4, sparse=True), "sparse gradients"),
        (lambda: nn.Embedding(4, 4, max_norm=2.0), "max_norm=2.0, .* off their grid"),
        (with_a_forward_of_its_own, "a forward that was set on the instance"),
    ):
        net = Net()
        net.odd = make()
        with pytest.raises(ValueError, match=f"layer 'odd' .*{words}.*LayerRule"):
            quantize_model(net, QuantConfig())
        assert not quantized_layers(net)  # nothing was half done
        quantize_model(net, QuantConfig(rules=(LayerRule("odd", weight_bits=None, activation_bits=None),)))
        assert len(quantized_layers(net)) == 4


def test_layers_that_share_a_weight_share_its_quantizer():
    net = Net()
    net.output = nn.Linear(4, 10, bias=False)
    net.output.weight = net.embed.weight
    quantize_model(net, QuantConfig(3, None, first_last_bits=None))
    assert net.output.weight_quantizer is net.embed.weight_quantizer
    for layer in quantized_layers(net).values():
        layer.weight_quantizer.calibrate(layer.weight)
    assert [w.name for w in quantized_weights(net)] == ["embed", "features.a", "features.b", "head"]
    net.embed.weight_quantizer.start_tracking(net.embed.weight)
    assert list(oscillation_states(net)) == ["embed"]
    assert len(scale_parameters(net)) == 4
    late = nn.Linear(4, 10, bias=False)
    late.weight = net.embed.weight
    net.late = late  # created after the first call
    quantize_model(net, QuantConfig(3, None, first_last_bits=None))
    assert late.weight_quantizer is net.embed.weight_quantizer
    other = Net()
    other.output = nn.Linear(4, 10, bias=False)
    other.output.weight = other.embed.weight
    with pytest.raises(ValueError, match="and 'output' share a weight"):
        quantize_model(other, QuantConfig(rules=(LayerRule("output", weight_bits=8),)))
    assert not quantized_layers(other)  # nothing was half done


def test_another_configuration_is_refused():
    net = Net()
    rules = [LayerRule("head", weight_bits=2)]
    quantize_model(net, QuantConfig(3, 4, rules=rules))
    quantize_model(net, QuantConfig(3, 4, rules=tuple(rules)))  # the same
    net = Net()
    quantize_model(net, QuantConfig(3, 4))
    with pytest.raises(ValueError, match="weight_bits: 3 before, 2 now; activation_bits: 4 before, 8 now"):
        quantize_model(net, QuantConfig(2, 8))


class NetworkInMetric(Metric):
    def __init__(self):
        super().__init__()
        self.inception = nn.Linear(2, 2)

    def update(self):
        pass

    def compute(self):
        return torch.zeros(())


def test_networks_inside_metrics_are_left_alone():
    net = Net()
    net.fid = NetworkInMetric()
    quantize_model(net, QuantConfig())
    assert "fid.inception" not in quantized_layers(net)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"weight_bits": 1}, ValueError, "weight_bits must be from 2 to 8, or None for full precision, got 1"),
        ({"weight_bits": 9}, ValueError, "weight_bits must be from 2 to 8, or None for full precision, got 9"),
        ({"activation_bits": 3.0}, TypeError, "activation_bits must be an integer"),
        ({"first_last_bits": True}, TypeError, "first_last_bits must be an integer"),
        ({"weight_range": "max"}, ValueError, "weight_range must be one of 'mse'"),
        ({"activation_range": "max"}, ValueError, "activation_range must be one of"),
        ({"weight_granularity": "per_row"}, ValueError, "weight_granularity must be one of"),
        ({"weight_bits": None, "activation_bits": None}, ValueError, "nothing to quantize"),
        (
            {"rules": LayerRule("a", weight_bits=2)},
            TypeError,
            r"rules must be a list of LayerRule objects, got LayerRule",
        ),
        ({"rules": ["a"]}, TypeError, "rules must be LayerRule objects, got 'a'"),
    ],
)
def test_config_errors(arguments, error, words):
    with pytest.raises(error, match=words):
        QuantConfig(**arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"weight_bits": 4}, ValueError, "needs a pattern or a layer_type"),
        ({"pattern": "a"}, ValueError, "must set weight_bits or activation_bits"),
        ({"pattern": "a", "weight_bits": 0}, ValueError, "LayerRule.weight_bits must be from 2 to 8"),
        ({"pattern": "a", "activation_bits": "4"}, TypeError, "LayerRule.activation_bits must be an integer"),
    ],
)
def test_rule_errors(arguments, error, words):
    with pytest.raises(error, match=words):
        LayerRule(**arguments)


def test_plan_and_states():
    net = Net()
    quantize_model(net, QuantConfig(3, 4))
    assert quantized_weights(net) == []  # no ranges yet
    for layer in quantized_layers(net).values():
        layer.weight_quantizer.calibrate(layer.weight)
    net.head.input_quantizer.calibrate(torch.linspace(0, 3, 100), 0.0, 3.0)
    plan = {line.layer: line for line in quantization_plan(net)}
    assert plan["head"].type == "Linear"
    assert plan["head"].shape == [2, 4]
    assert plan["head"].weight_bits == 3
    assert plan["head"].activation_range == pytest.approx([0.0, 3.0], rel=0.1)
    assert plan["features.a"].activation_bits is None
    assert "features.a" in format_plan(list(plan.values()))
    assert oscillation_states(net) == {}
    net.head.weight_quantizer.start_tracking(net.head.weight)
    assert oscillation_states(net)["head"].weight_int.shape == net.head.weight.shape
    assert [w.name for w in quantized_weights(net, max_bits=3)] == list(plan)
    assert quantized_weights(net, max_bits=2) == []


class WithAQuantizer(nn.Linear):
    def __init__(self, *args):
        super().__init__(*args)
        self.input_quantizer = nn.Hardtanh(-0.1, 0.1)


class NotYet(nn.Linear):
    @property
    def quantizers(self):
        raise RuntimeError("not set up yet")


class Given(nn.Linear):
    """Its weight is set from outside, before each call."""

    def __init__(self, *args):
        super().__init__(*args)
        del self.weight


class Sealed(nn.Linear):
    def __init_subclass__(cls, *, key):
        super().__init_subclass__()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (
            WithAQuantizer,
            "layer '1' already has an attribute 'input_quantizer', a name that the quantizers need. Leave it out with",
        ),
        (NotYet, "layer '1' already has an attribute 'quantizers', a name that the quantizers need"),
        (Given, "layer '1' has no weight of its own.*Leave it out with LayerRule"),
        (
            Sealed,
            "layer '1' cannot be quantized, because its class Sealed cannot be subclassed: .*key.* Leave it out with "
            "LayerRule",
        ),
    ],
)
def test_layers_that_have_no_room_for_quantizers_are_refused_first(kind, words):
    net = nn.Sequential(nn.Linear(4, 4), kind(4, 4))
    with pytest.raises(ValueError, match=words):
        quantize_model(net, QuantConfig())
    assert type(net[0]) is nn.Linear
    quantize_model(net, QuantConfig(rules=[LayerRule("1", weight_bits=None, activation_bits=None)]))
    assert type(net[1]) is kind


def test_a_history_comes_to_a_module_without_memory():
    def made():
        return quantize_model(nn.Sequential(nn.Linear(4, 4)), QuantConfig(3, 3))

    net = made()
    net[0].weight_quantizer.calibrate(net[0].weight)
    for _, weight, q in quantized_weights(net):
        q.start_tracking(weight).frequency.fill_(0.25)
    assert oscillation_states(net)
    with torch.device("meta"):
        other = made()
    other.load_state_dict(net.state_dict(), assign=True)
    for name, state in oscillation_states(net).items():
        assert torch.equal(oscillation_states(other)[name].frequency, state.frequency)
