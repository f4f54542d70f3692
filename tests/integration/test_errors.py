"""Invalid arguments and setups are refused before the first step; the error names argument, rule and value."""

import re
import tempfile

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from models import ConvModule, Data, dataset, loader, trainer
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_qat_osc import (
    BatchNormReestimation,
    IterativeFreezing,
    LayerRule,
    OscillationDampening,
    OscillationTracking,
    QuantConfig,
    QuantizationAwareTraining,
    dampening_loss,
    quantize_model,
)
from lightning_qat_osc.lookup import quantized_layers

NAN, INF = float("nan"), float("inf")


def qat(**kwargs):
    return QuantizationAwareTraining(**{"weight_bits": 2, "activation_bits": 3, **kwargs})


class Counted(ConvModule):
    """Counts the batches that it is trained on."""

    def __init__(self):
        super().__init__()
        self.trained = 0

    def on_train_batch_start(self, batch, batch_idx):
        self.trained += 1


class Bare(Counted):
    """Has no layer of a kind that can be quantized."""

    def __init__(self):
        super().__init__()
        self.stem = self.depthwise = self.point = self.head = None
        self.offset = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return x.mean((1, 2, 3), keepdim=True)[..., 0, 0] + self.offset


def refused(words, callbacks, data=None, module=None, error=MisconfigurationException, **kwargs):
    module = Counted() if module is None else module
    weights = {name: p.clone() for name, p in module.named_parameters()}
    t = trainer(callbacks, **kwargs)
    with pytest.raises(error, match=words):
        t.fit(module, Data() if data is None else data)
    assert module.trained == 0
    assert all(torch.equal(p, weights[name]) for name, p in module.named_parameters() if name in weights)
    assert all(not m._forward_pre_hooks and not m._forward_hooks for m in module.modules())
    return module


BITS = [
    (1, ValueError, "must be from 2 to 8(, or None for .*)?, got 1"),
    (9, ValueError, "must be from 2 to 8(, or None for .*)?, got 9"),
    (-4, ValueError, "must be from 2 to 8(, or None for .*)?, got -4"),
    (4.0, TypeError, "must be an integer from 2 to 8.*, got 4.0"),
    (NAN, TypeError, "must be an integer from 2 to 8.*, got nan"),
    (True, TypeError, "must be an integer from 2 to 8.*, got True"),
    ("4", TypeError, "must be an integer from 2 to 8.*, got '4'"),
    ("default", TypeError, "must be an integer from 2 to 8.*, got 'default'"),
    (torch.tensor(4), TypeError, "must be an integer from 2 to 8.*, got tensor"),
]
COUNTS = [
    (0, ValueError, "must be at least 1, got 0"),
    (-3, ValueError, "must be at least 1, got -3"),
    (2.0, TypeError, "must be an integer of at least 1, got 2.0"),
    (NAN, TypeError, "must be an integer of at least 1, got nan"),
    (INF, TypeError, "must be an integer of at least 1, got inf"),
    (True, TypeError, "must be an integer of at least 1, got True"),
    ("4", TypeError, "must be an integer of at least 1, got '4'"),
    (None, TypeError, "must be an integer of at least 1, got None"),
]


def numbers(interval, *outside):
    """Return rows of invalid values for an argument that must be a number in an interval."""
    rule = re.escape(interval)
    rows = [(value, ValueError, rf"must be in {rule}, got {value}$") for value in (*outside, NAN, INF, -INF)]
    wrong = [
        (value, TypeError, rf"must be a number in {rule}, got {re.escape(repr(value))}$") for value in ("0.1", True)
    ]
    return [*rows, *wrong]


def choice(*names):
    rule = ", ".join(map(repr, names))
    return [
        (value, ValueError, f"must be one of {rule}, got {value!r}") for value in ("max", None, 3, names[0].upper())
    ]


RANGES = choice("mse", "minmax", "percentile", "lsq")
FLAGS = [(value, TypeError, f"must be True or False, got {value!r}") for value in ("yes", 1, None)]
FUNCTIONS = [(value, TypeError, f"must be a function, got {value!r}") for value in ("f", 3)]
ARGUMENTS = {
    (QuantizationAwareTraining, "weight_bits"): BITS,
    (QuantizationAwareTraining, "activation_bits"): BITS,
    (QuantizationAwareTraining, "first_last_bits"): BITS,
    (QuantizationAwareTraining, "weight_granularity"): choice("per_tensor", "per_channel"),
    (QuantizationAwareTraining, "weight_range"): RANGES,
    (QuantizationAwareTraining, "activation_range"): RANGES,
    (QuantizationAwareTraining, "calibration_batches"): COUNTS,
    (QuantizationAwareTraining, "scale_learning_rate"): numbers("[0, inf)", -1e-3),
    (QuantizationAwareTraining, "fused"): FLAGS,
    (QuantizationAwareTraining, "recompute"): FLAGS,
    (QuantizationAwareTraining, "print_plan"): FLAGS,
    (QuantizationAwareTraining, "plan_path"): [
        (5, TypeError, "must be the path of a file, got 5"),
        (tempfile.gettempdir(), ValueError, "must be the path of a file, and .* is a folder"),
    ],
    (QuantizationAwareTraining, "forward_fn"): FUNCTIONS,
    (QuantConfig, "weight_bits"): BITS,
    (QuantConfig, "weight_range"): RANGES,
    (OscillationTracking, "momentum"): numbers("(0, 1]", 0.0, -0.1, 1.5),
    (OscillationTracking, "max_bits"): [*BITS, (None, TypeError, "must be an integer from 2 to 8, got None")],
    (OscillationDampening, "final_weight"): numbers("[0, inf)", -1.0),
    (OscillationDampening, "initial_weight"): numbers("[0, inf)", -1.0),
    (OscillationDampening, "anneal_start"): numbers("[0, 1)", -0.1, 1.0, 2.0),
    (OscillationDampening, "aggregation"): choice("sum", "mean", "kernel_mean"),
    (OscillationDampening, "max_bits"): BITS,
    (IterativeFreezing, "threshold"): [
        *numbers("(0, 1]", 0.0, -0.1, 1.5),
        (None, TypeError, r"must be a number in \(0, 1\], got None"),
    ],
    (IterativeFreezing, "final_threshold"): numbers("(0, 1]", 0.0, -0.1, 1.5),
    (IterativeFreezing, "anneal_start"): numbers("[0, 1)", -0.1, 1.0, 2.0),
    (IterativeFreezing, "momentum"): numbers("(0, 1]", 0.0, -0.1, 1.5),
    (IterativeFreezing, "max_bits"): BITS,
    (BatchNormReestimation, "num_batches"): COUNTS,
    (BatchNormReestimation, "log_divergence"): FLAGS,
    (BatchNormReestimation, "forward_fn"): FUNCTIONS,
}


@pytest.mark.parametrize(("of", "name"), ARGUMENTS, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_an_argument_that_cannot_be_is_named_with_its_rule_and_value(of, name):
    for value, error, words in ARGUMENTS[of, name]:
        with pytest.raises(error, match=f"^{name} {words}"):
            of(**{name: value})


@pytest.mark.parametrize("name", ["weight_bits", "activation_bits"])
def test_bits_of_a_rule_are_held_to_the_same(name):
    for value, error, words in BITS:
        if value != "default":
            with pytest.raises(error, match=rf"^LayerRule\.{name} {words}"):
                LayerRule("head", **{name: value})


def test_a_rule_names_layers_and_types_by_strings():
    with pytest.raises(TypeError, match=r"^LayerRule\.pattern must be a string, got 3"):
        LayerRule(3, weight_bits=4)
    with pytest.raises(TypeError, match=r"^LayerRule\.layer_type must be a string, .*; use its name, 'Conv2d'"):
        LayerRule(layer_type=nn.Conv2d, weight_bits=4)


def test_a_rule_for_inputs_that_are_indices():
    words = (
        r"^LayerRule\(layer_type='Embedding'\) sets activation_bits, "
        "but matches only Embedding, whose inputs are indices"
    )
    with pytest.raises(ValueError, match=words):
        quantize_model(nn.Embedding(3, 4), QuantConfig(rules=[LayerRule(layer_type="Embedding", activation_bits=4)]))


def test_bits_in_place_of_a_type():
    with pytest.raises(TypeError, match=r"^LayerRule\.layer_type must be a string, got 8"):
        LayerRule("head", 8)


@pytest.mark.parametrize(
    ("name", "meaning"),
    [
        ("weight_bits", "full precision"),
        ("activation_bits", "full precision"),
        ("first_last_bits", "the same bits as the .*"),
    ],
)
def test_full_precision_is_no_width(name, meaning):
    with pytest.raises(ValueError, match=f"^{name} must be from 2 to 8, or None for {meaning}, got 32"):
        QuantizationAwareTraining(**{name: 32})


def test_what_can_be_meant_is_taken():
    QuantizationAwareTraining(2, None, first_last_bits=None, scale_learning_rate=0)
    OscillationTracking(momentum=1, max_bits=8)
    OscillationDampening(0, initial_weight=0.0, anneal_start=0)
    IterativeFreezing(1, 1.0, anneal_start=0.999)
    BatchNormReestimation(1)


@pytest.mark.parametrize(
    ("rules", "error", "words"),
    [
        (
            [{"pattern": "head", "weight_bits": 4}],
            TypeError,
            r"rules must be LayerRule objects, got \{'pattern': 'head', .*\}; convert it with LayerRule\(\*\*rule\)",
        ),
        (["head"], TypeError, "rules must be LayerRule objects, got 'head'"),
        (LayerRule("head", weight_bits=4), TypeError, "rules must be a list of LayerRule objects"),
    ],
)
def test_a_rule_that_is_none(rules, error, words):
    with pytest.raises(error, match=words):
        qat(rules=rules)


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ([LayerRule("haed", weight_bits=4)], r"LayerRule\(pattern='haed'\) matches no layer; layer names include head"),
        (
            [LayerRule("head", "Conv2d", weight_bits=4)],
            "matches no layer; without layer_type, it matches layers of type Linear",
        ),
        (
            [LayerRule("point", weight_bits=3), LayerRule(layer_type="Conv2d", weight_bits=4)],
            r"contradict each other for layer 'point': LayerRule\(pattern='point'\) sets weight_bits=3, "
            r"LayerRule\(layer_type='Conv2d'\) sets weight_bits=4",
        ),
        (
            [LayerRule("*", activation_bits=None), LayerRule("head", activation_bits=8)],
            "contradict each other for layer 'head'.*activation_bits=None.*activation_bits=8",
        ),
    ],
)
def test_rules_that_match_nothing_or_contradict_each_other(rules, words):
    module = refused(words, [qat(rules=rules)], error=ValueError)
    assert not quantized_layers(module)


def test_nothing_is_left_to_quantize():
    everything = [LayerRule("*", weight_bits=None, activation_bits=None)]
    refused("arguments of QuantizationAwareTraining leave every layer in full precision", [qat(rules=everything)])
    refused("Bare has no layer to quantize: it contains none of Conv", [qat()], module=Bare())


def test_rules_that_agree_do_not_contradict_each_other():
    module = ConvModule()
    rules = (LayerRule("point", weight_bits=3), LayerRule(layer_type="Conv2d", weight_bits=3))
    quantize_model(module, QuantConfig(rules=rules))
    assert module.point.weight_quantizer.bits == 3


def both(threshold, final=None, momentum=0.1):
    return [qat(), OscillationTracking(momentum=momentum), IterativeFreezing(threshold, final)]


@pytest.mark.parametrize(("threshold", "final"), [(0.05, None), (0.0999, None), (0.05, 0.3), (0.05, 0.01)])
@pytest.mark.parametrize("own", [False, True])
def test_a_threshold_that_begins_below_the_momentum_is_refused(threshold, final, own):
    callbacks = [qat(), IterativeFreezing(threshold, final, momentum=0.1)] if own else both(threshold, final)
    refused(rf"threshold must be at least the momentum, 0\.1, got {threshold}", callbacks)


@pytest.mark.parametrize(("threshold", "final"), [(0.1, None), (0.15, None), (0.3, 0.05), (0.12, 0.05)])
def test_one_below_twice_the_momentum_is_warned_of(threshold, final):
    with pytest.warns(UserWarning, match="below twice the momentum 0.1"):
        trainer(both(threshold, final), max_steps=1).fit(ConvModule(), Data())


# (0.4, 0.1) with momentum 0.1 is 10 times the paper's (0.04, 0.01) with momentum 0.01
@pytest.mark.parametrize(("threshold", "final"), [(0.21, None), (0.4, 0.1)])
def test_one_above_twice_the_momentum_is_not(threshold, final):
    trainer(both(threshold, final), max_steps=1).fit(ConvModule(), Data())


def test_evaluation_does_not_mind_the_threshold():
    with pytest.warns(UserWarning, match="no ranges yet"):
        trainer(both(0.05)).validate(ConvModule(), Data(), verbose=False)


def test_two_momenta_for_one_state():
    callbacks = [qat(), OscillationTracking(momentum=0.1), IterativeFreezing(0.5, momentum=0.2)]
    refused(r"same momentum, got OscillationTracking\(momentum=0.1\), IterativeFreezing\(momentum=0.2\)", callbacks)


OTHERS = {
    "OscillationTracking": lambda: OscillationTracking(),
    "OscillationDampening": lambda: OscillationDampening(),
    "IterativeFreezing": lambda: IterativeFreezing(0.5),
    "BatchNormReestimation": lambda: BatchNormReestimation(),
}


@pytest.mark.parametrize("name", OTHERS)
def test_without_quantization_there_is_nothing_to_do(name):
    refused(rf"{name} needs quantized weights: add QuantizationAwareTraining", [OTHERS[name]()])


@pytest.mark.parametrize("name", OTHERS)
def test_one_of_a_kind(name):
    if name == "BatchNormReestimation":  # Lightning itself refuses two stateful callbacks of a type
        with pytest.raises(RuntimeError, match=f"more than one stateful callback of type `{name}`"):
            trainer([qat(), OTHERS[name](), OTHERS[name]()])
        return
    words = f"the Trainer's callbacks must contain at most one {name}, got 2"
    refused(words, [qat(), OTHERS[name](), OTHERS[name]()])


@pytest.mark.parametrize(("bits", "word"), [(8, "the least is 8"), (None, "none is quantized")])
@pytest.mark.parametrize("verb", ["track", "freeze", "dampen"])
def test_nothing_that_oscillates(bits, word, verb):
    other = {"track": OscillationTracking(), "freeze": IterativeFreezing(0.5), "dampen": OscillationDampening()}[verb]
    said = f"No weight is quantized to max_bits=4 or fewer .{word}.*: there is nothing to {verb}"
    with pytest.warns(UserWarning, match=said):
        trainer([qat(weight_bits=bits), other], max_steps=1).fit(ConvModule(), Data())


@pytest.mark.parametrize("name", OTHERS)
def test_quantization_comes_first(name):
    refused(f"QuantizationAwareTraining must come before {name} in the Trainer's callbacks", [OTHERS[name](), qat()])


class Renamed(QuantizationAwareTraining):
    """Has its own key in checkpoints, so Lightning accepts it next to a QuantizationAwareTraining."""


def test_a_second_quantization_is_refused():
    with pytest.raises(RuntimeError, match="QuantizationAwareTraining"):  # from Lightning, at creation of the Trainer
        trainer([qat(), qat()])
    words = "only one QuantizationAwareTraining can quantize a module"
    module = refused(words, [qat(), Renamed(2, 3)])
    assert not quantized_layers(module)


class Nothing(IterableDataset):
    def __iter__(self):
        return iter(())


class Empty(L.LightningDataModule):
    def __init__(self, data):
        super().__init__()
        self.data = data

    def train_dataloader(self):
        return DataLoader(self.data, batch_size=8)

    def val_dataloader(self):
        return loader(16)


NO_BATCH = "training data must have at least 1 batch to initialize ranges from, got 0"


@pytest.mark.filterwarnings("ignore:Total length of .* across ranks is zero")
@pytest.mark.parametrize(
    "empty", [torch.utils.data.TensorDataset(torch.zeros(0, 1)), Nothing()], ids=["sized", "unsized"]
)
def test_calibration_on_no_data(empty):
    module = refused(NO_BATCH, [qat(), OscillationTracking()], Empty(empty))
    assert not any(layer.weight_quantizer.calibrated for layer in quantized_layers(module).values())


@pytest.mark.filterwarnings("ignore:Total length of .* across ranks is zero")
def test_calibration_on_no_data_of_a_full_dataset():
    class DropsAll(Data):
        def train_dataloader(self):
            return DataLoader(dataset(), batch_size=100, drop_last=True)

    refused(NO_BATCH, [qat()], DropsAll())


def test_limit_train_batches_of_zero_leaves_nothing_to_calibrate_on():
    refused(f"{NO_BATCH}, with limit_train_batches=0", [qat()], limit_train_batches=0)
    refused(f"{NO_BATCH}, with limit_train_batches=0.0", [qat()], limit_train_batches=0.0)


def test_a_run_that_is_over_or_calibrated_needs_no_data():
    module = ConvModule()
    trainer([qat()], max_epochs=0).fit(module, Data())
    trainer([qat()], max_epochs=1).fit(module, Data())
    trainer([qat()], limit_train_batches=0).fit(module, Data())


class BadLoss(Counted):
    """The loss of its first batches is NaN."""

    def __init__(self, bad, kind="tensor"):
        super().__init__()
        self.bad, self.kind, self.losses = bad, kind, 0

    def training_step(self, batch, batch_idx):
        self.losses += 1
        loss = super().training_step(batch, batch_idx) * (NAN if self.losses <= self.bad else 1.0)
        return {"loss": loss, "n": 8} if self.kind == "mapping" else loss


@pytest.mark.parametrize("kind", ["tensor", "mapping"])
def test_a_loss_of_nan_on_every_calibration_batch(kind):
    words = "loss of `training_step` must be a number, got nan for each of 4 calibration batches"
    module = refused(words, [qat()], module=BadLoss(4, kind))
    assert module.losses == 4
    assert not any(layer.weight_quantizer.calibrated for layer in quantized_layers(module).values())
    trainer([qat()], max_epochs=1).fit(module, Data())  # training can start after the loss is fixed
    assert module.trained == 8


def test_nan_in_a_weight_is_such_a_loss():
    module = Counted()
    with torch.no_grad():
        module.head.weight[0, 0] = NAN
    weight = module.head.weight.clone()
    with pytest.raises(MisconfigurationException, match="got nan"):
        trainer([qat()]).fit(module, Data())
    assert module.trained == 0
    assert torch.equal(module.head.weight.isnan(), weight.isnan())


def test_a_single_loss_of_nan_may_pass():
    module = BadLoss(1)
    trainer([qat()], max_epochs=1).fit(module, Data())
    assert module.trained == 8


class ReturnsNothing(Counted):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss if torch.is_grad_enabled() else None


def test_a_training_step_without_a_loss_may_pass():
    module = ReturnsNothing()
    trainer([qat()], max_epochs=1).fit(module, Data())
    assert module.trained == 8


def test_unknown_choices_of_the_functions():
    with pytest.raises(ValueError, match="aggregation must be 'sum', 'mean' or 'kernel_mean', got aggregation='max'"):
        dampening_loss(torch.ones(2), torch.ones(1), -2, 1, aggregation="max")
