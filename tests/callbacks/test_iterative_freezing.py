import csv
import math

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from models import ConvModule, Data, trainer
from reference import masked_fake_quantize
from torch.optim.swa_utils import get_ema_avg_fn

from lightning_qat_osc import (
    IterativeFreezing,
    OscillationTracking,
    QuantizationAwareTraining,
    oscillation_states,
)
from lightning_qat_osc.lookup import quantized_weights

pytestmark = pytest.mark.filterwarnings("ignore:.*below twice the momentum.*")


def qat(**kwargs):
    return QuantizationAwareTraining(**{"weight_bits": 2, "activation_bits": None, "first_last_bits": None, **kwargs})


def freezing(**kwargs):
    return IterativeFreezing(**{"threshold": 0.15, "momentum": 0.1, **kwargs})


class Held(L.Callback):
    """Checks that the integer of a weight in the forward pass does not change after the step that freezes it."""

    def __init__(self):
        self.frozen, self.integers, self.checks = {}, {}, 0

    def look(self, pl_module):
        for name, w, q in quantized_weights(pl_module):
            integer = torch.clamp(torch.round(w.detach() / q.scale.detach()), -2, 1)
            state = q.oscillation
            if name in self.frozen:
                was = self.frozen[name]
                assert state.frozen[was].all()
                assert torch.equal(integer[was], self.integers[name][was])
                self.checks += int(was.sum())
            self.frozen[name], self.integers[name] = state.frozen.clone(), integer

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.look(pl_module)

    def on_validation_batch_start(self, trainer, pl_module, *args):
        if not trainer.sanity_checking:
            self.look(pl_module)


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("tracked", [False, True])
def test_a_frozen_integer_never_changes_again(optimizer, tracked):
    held, module = Held(), ConvModule(lr=0.5 if optimizer == "SGD" else 0.1, weight_decay=0.1, optimizer=optimizer)
    tracking = [OscillationTracking(momentum=0.1)] if tracked else []
    trainer([qat(scale_learning_rate=0.02), *tracking, freezing(), held], max_epochs=8).fit(module, Data())
    assert held.checks > 50
    states = oscillation_states(module)
    frozen = sum(int(s.frozen.sum()) for s in states.values())
    assert 0 < frozen < sum(s.frozen.numel() for s in states.values())


def test_alone_or_beside_tracking_in_either_order_is_the_same_run():
    runs = []
    for callbacks in (
        [freezing()],
        [OscillationTracking(momentum=0.1), freezing(momentum=None)],
        [freezing(momentum=None), OscillationTracking(momentum=0.1)],
    ):
        torch.manual_seed(2)
        module = ConvModule(lr=0.5)
        trainer([qat(), *callbacks], max_epochs=5).fit(module, Data())
        runs.append((module, oscillation_states(module)))
    assert runs[0][1]["point"].frozen.any()
    for module, states in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(module.parameters(), runs[0][0].parameters()))
        for name, state in states.items():
            assert torch.equal(state.frequency, runs[0][1][name].frequency)
            assert torch.equal(state.frozen, runs[0][1][name].frozen)


class Gradients(L.Callback):
    """Compares gradients with autograd through the paper's masked forward, at every step with frozen weights."""

    def __init__(self):
        self.owed = 0

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        point = pl_module.point
        q = point.weight_quantizer
        state = q.oscillation
        if not state.frozen.any():
            return
        # run the same batch through a forward pass with the masked weight
        s = q.scale.detach().clone().requires_grad_()
        w = point.weight.detach().clone().requires_grad_()
        masked = masked_fake_quantize(w, s, -2, 1, state.frozen, state.weight_int)
        features = pl_module.features
        out = torch.nn.functional.conv2d(features, masked, point.bias.detach())
        loss = torch.nn.functional.cross_entropy(
            torch.nn.functional.linear(
                torch.relu(out).mean((2, 3)),
                pl_module.head.weight_quantizer(pl_module.head.weight).detach(),
                pl_module.head.bias.detach(),
            ),
            pl_module.labels,
        )
        loss.backward()
        assert torch.allclose(q.scale_grad, s.grad, rtol=1e-3, atol=1e-5)
        assert torch.allclose(point.weight.grad, torch.where(state.frozen, 0.0, w.grad), rtol=1e-3, atol=1e-6)
        self.owed += 1


class KeepsFeatures(ConvModule):
    def training_step(self, batch, batch_idx):
        self.labels = batch[1]
        return super().training_step(batch, batch_idx)

    def forward(self, x):
        x = torch.relu(self.bn1(self.stem(x)))
        x = torch.relu(self.bn2(self.depthwise(x)))
        self.features = x.detach()
        return self.head(torch.relu(self.point(x)).mean((2, 3)))


def test_the_scale_learns_from_frozen_integers_as_in_the_paper():
    gradients = Gradients()
    module = KeepsFeatures(lr=0.5)
    trainer([qat(scale_learning_rate=0.01), freezing(), gradients], max_epochs=6).fit(module, Data())
    assert gradients.owed > 10


def test_threshold_is_annealed_logged_and_off_before_the_start(tmp_path):
    class Look(L.Callback):
        def __init__(self):
            self.frozen = []

        def on_train_batch_end(self, trainer, pl_module, *args):
            self.frozen.append(sum(int(s.frozen.sum()) for s in oscillation_states(pl_module).values()))

    logger, look = CSVLogger(tmp_path), Look()
    callback = freezing(threshold=0.12, final_threshold=0.05, anneal_start=0.5)
    t = trainer([qat(), callback, look], max_epochs=6, logger=logger, log_every_n_steps=1)
    t.fit(ConvModule(lr=0.5), Data())
    assert look.frozen[:24] == [0] * 24
    assert look.frozen[-1] > 0
    with open(f"{logger.log_dir}/metrics.csv", newline="") as file:
        values = [
            float(r["oscillation/freeze_threshold"]) for r in csv.DictReader(file) if r["oscillation/freeze_threshold"]
        ]
    cosine = [0.05 + 0.035 * (1 + math.cos(math.pi * max(0, t - 24) / 24)) for t in range(48)]
    assert values == pytest.approx(cosine)


def test_frozen_weights_hold_under_an_averaged_model():
    held, module = Held(), ConvModule(lr=0.5)
    averaging = WeightAveraging(avg_fn=get_ema_avg_fn(0.9))
    trainer([qat(scale_learning_rate=0.01), averaging, freezing(), held], max_epochs=6).fit(module, Data())
    assert held.checks > 100
    for _, w, q in quantized_weights(module):
        frozen = q.oscillation.frozen
        assert torch.equal(q.to_int(w)[frozen], q.oscillation.weight_int[frozen])


def test_a_threshold_below_twice_the_momentum_is_explained():
    with pytest.warns(UserWarning, match=r"0\.015 is below twice the momentum 0\.01: one oscillation"):
        trainer([qat(), IterativeFreezing(0.015)], max_steps=1).fit(ConvModule(), Data())


def test_without_quantization_it_says_what_is_missing():
    with pytest.raises(MisconfigurationException, match="IterativeFreezing needs quantized weights"):
        trainer([IterativeFreezing()]).fit(ConvModule(), Data())


def test_a_run_without_a_known_end():
    with pytest.raises(MisconfigurationException, match=r"freezing threshold.*max_steps"):
        trainer([qat(), IterativeFreezing(0.04, 0.02)], max_epochs=-1).fit(ConvModule(), Data())
    trainer([qat(), IterativeFreezing(0.04)], max_epochs=-1, max_time={"seconds": 1}).fit(ConvModule(), Data())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"threshold": 0.0}, r"threshold must be in \(0, 1\], got 0.0"),
        ({"threshold": float("nan")}, "threshold"),
        ({"final_threshold": -0.1}, "final_threshold"),
        ({"anneal_start": -0.1}, "anneal_start"),
        ({"momentum": 2.0}, "momentum"),
    ],
)
def test_unsuited_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        IterativeFreezing(**arguments)


def froze(**kwargs):
    """Return a trained module with frozen weights, and their number."""
    torch.manual_seed(0)
    module = ConvModule(lr=0.5)
    trainer([qat(**kwargs), freezing()], max_epochs=8).fit(module, Data())
    return module, sum(int(s.frozen.sum()) for s in oscillation_states(module).values())


@pytest.mark.parametrize("others", [list, lambda: [OscillationTracking(momentum=0.1)]])
def test_frozen_weights_that_nobody_holds_are_free_and_said_to_be(others):
    module, frozen = froze()
    assert frozen > 0
    with pytest.warns(UserWarning, match=f"{frozen} weights that an earlier run froze have been unfrozen.*add Iterat"):
        trainer([qat(), *others()], max_epochs=1).fit(module, Data())
    assert not any(s.frozen.any() for s in oscillation_states(module).values())


def test_frozen_weights_of_too_many_bits_are_free():
    module, frozen = froze(weight_bits=3)
    assert frozen > 0
    with (
        pytest.warns(UserWarning, match=f"{frozen} weights .* unfrozen.*raise its max_bits=2, which excludes them"),
        pytest.warns(UserWarning, match="nothing to freeze"),
    ):
        trainer([qat(weight_bits=3), freezing(max_bits=2)], max_epochs=1).fit(module, Data())
    assert not any(s.frozen.any() for s in oscillation_states(module).values())


def test_frozen_weights_that_are_held_stay_frozen():
    module, _ = froze()
    before = {name: s.frozen.clone() for name, s in oscillation_states(module).items()}
    trainer([qat(), freezing()], max_epochs=1).fit(module, Data())
    for name, state in oscillation_states(module).items():
        assert state.frozen[before[name]].all()


def test_a_parameter_that_takes_a_weights_place_goes_on_as_it():
    class Replaces(ConvModule):
        def on_train_epoch_start(self):
            if self.current_epoch == 4:
                old = self.depthwise.weight
                self.depthwise.weight = torch.nn.Parameter(old.detach().clone())
                group = self.optimizers().param_groups[0]
                group["params"] = [self.depthwise.weight if p is old else p for p in group["params"]]

    torch.manual_seed(0)
    module = Replaces(lr=0.3)
    callbacks = [QuantizationAwareTraining(2, 3), IterativeFreezing(threshold=0.06, momentum=0.05)]
    trainer(callbacks, max_epochs=8).fit(module, Data())
    q = module.depthwise.weight_quantizer
    assert q.oscillation.frozen.any()
    assert torch.equal(q.to_int(module.depthwise.weight), q.oscillation.weight_int)
