"""Each optimizer step is one step of scales and oscillations, however the optimizer is implemented."""

import copy
from collections import OrderedDict, defaultdict
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from models import ConvModule, Data, trainer
from torch.nn import functional as F

from lightning_qat_osc import (
    IterativeFreezing,
    OscillationTracking,
    QuantizationAwareTraining,
    oscillation_states,
    sweep,
)
from lightning_qat_osc.callbacks import _tracks_oscillation, oscillation_tracking
from lightning_qat_osc.callbacks._optimizer_steps import OptimizerStepHooks
from lightning_qat_osc.lookup import quantized_weights, scale_parameters


def callbacks(**kwargs):
    return [
        QuantizationAwareTraining(2, 3, first_last_bits=None, **kwargs),
        OscillationTracking(0.1),
        IterativeFreezing(0.3),
    ]


class OwnAdamW(torch.optim.AdamW):
    def step(self, closure=None):
        return super().step(closure)


class Raising(OwnAdamW):
    """Raises in its third step, before anything has moved."""

    steps = 0

    def step(self, closure=None):
        self.steps += 1
        if self.steps == 3:
            raise FloatingPointError
        return super().step(closure)


class Chosen(ConvModule):
    def __init__(self, kind, manual=False):
        super().__init__()
        self.kind = kind
        self.automatic_optimization = not manual

    def training_step(self, batch, batch_idx):
        if self.automatic_optimization:
            return super().training_step(batch, batch_idx)
        optimizer = self.optimizers(use_pl_optimizer=False)

        def closure():
            optimizer.zero_grad()
            loss = F.cross_entropy(self(batch[0]), batch[1])
            self.manual_backward(loss)
            return loss

        try:
            optimizer.step(closure)
        except FloatingPointError:
            optimizer.zero_grad()
        return None

    def configure_optimizers(self):
        return self.kind(self.parameters(), lr=0.05)


def trained(kind, manual=False, **kwargs):
    if manual:
        kwargs["forward_fn"] = lambda module, batch: module(batch[0])
    torch.manual_seed(0)
    module = Chosen(kind, manual)
    trainer(callbacks(**kwargs), max_epochs=3).fit(module, Data())
    return module


@pytest.mark.parametrize("manual", [False, True])
def test_a_step_that_calls_the_one_it_inherits_is_one(manual):
    own, plain = trained(OwnAdamW, manual), trained(torch.optim.AdamW, manual)
    assert sum(s.frequency.sum() for s in oscillation_states(plain).values()) > 0
    for key, value in plain.state_dict().items():
        assert torch.equal(value, own.state_dict()[key]), key


def test_a_step_that_raised_does_not_hide_those_after_it():
    module = trained(Raising, manual=True)
    assert sum(s.frequency.sum() for s in oscillation_states(module).values()) > 0


class TwoGradients(torch.optim.Optimizer):
    """Evaluates its closure twice, as SAM does."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure):
        with torch.enable_grad():
            closure()
            loss = closure()
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                p.sub_(p.grad, alpha=self.param_groups[0]["lr"])
        return loss


@pytest.mark.parametrize("manual", [False, True])
def test_an_optimizer_that_evaluates_twice_leaves_the_scales_alone(manual):
    module, start = trained(TwoGradients, manual, scale_learning_rate=0.0), trained(TwoGradients, manual)
    assert any(not torch.equal(a, b) for a, b in zip(scale_parameters(module), scale_parameters(start)))
    assert all(scale.grad is None for scale in scale_parameters(module))
    torch.manual_seed(0)
    fresh = Chosen(TwoGradients, manual)
    kwargs = {"forward_fn": lambda module, batch: module(batch[0])} if manual else {}
    trainer(callbacks(scale_learning_rate=0.0, **kwargs), max_steps=1).fit(fresh, Data())
    for a, b in zip(scale_parameters(module), scale_parameters(fresh)):
        assert torch.equal(a, b)


def test_figures_are_computed_once_a_step_under_accumulation(monkeypatch):
    calls = []
    log = oscillation_tracking.OscillationTracking._log
    monkeypatch.setattr(
        oscillation_tracking.OscillationTracking,
        "_log",
        lambda self, *args, on_step: (calls.append(on_step), log(self, *args, on_step=on_step)),
    )
    trainer(callbacks(), max_epochs=1, accumulate_grad_batches=4, log_every_n_steps=1).fit(ConvModule(), Data())
    assert calls.count(True) == 2  # 8 batches, accumulated by 4


class Wrapper(torch.optim.Optimizer):
    """Deliberately does not call ``super().__init__``, like some wrappers of optimizers."""

    def __init__(self, parameters, lr):
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
        self.inner = torch.optim.SGD(parameters, lr)
        self.param_groups, self.defaults, self.state = self.inner.param_groups, self.inner.defaults, defaultdict(dict)

    def step(self, closure=None):
        return self.inner.step(closure)


def test_an_optimizer_that_calls_no_hooks_is_refused():
    with pytest.raises(MisconfigurationException, match=r"Wrapper.step calls no optimizer hooks.*Optimizer.__init__"):
        trained(Wrapper)


class MadeAnew(ConvModule):
    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.trainer.strategy.setup_optimizers(self.trainer)


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_optimizers_that_are_made_anew_are_followed(weight_decay):
    torch.manual_seed(0)
    module = MadeAnew(lr=0.3, weight_decay=weight_decay)
    trainer(callbacks(), max_epochs=3).fit(module, Data())
    weights = quantized_weights(module)
    for name, weight, q in weights:
        assert torch.equal(q.oscillation.weight_int, q.to_int(weight)), name
    assert sum(q.oscillation.frequency.sum() for *_, q in weights) > 0
    assert all((s > 0).all() for s in scale_parameters(module))


class Elsewhere(ConvModule):
    """Steps with an optimizer that the Trainer does not know."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        self.own = torch.optim.SGD(self.parameters(), lr=0.05)

    def training_step(self, batch, batch_idx):
        self.own.zero_grad()
        F.cross_entropy(self(batch[0]), batch[1]).backward()
        self.own.step()


@pytest.mark.filterwarnings("ignore:.*configure_optimizers.* returned `None`")
def test_steps_of_other_optimizers_are_refused():
    with pytest.raises(
        MisconfigurationException, match=r"SGD has taken a .* not one of the Trainer's optimizers.*call its step\(\)"
    ):
        trainer(callbacks(forward_fn=lambda module, batch: module(batch[0])), max_epochs=2).fit(Elsewhere(), Data())


class Around(torch.optim.Optimizer):
    """Steps with an inner optimizer, inside its own ``step`` or outside it, as in SAM's ``second_step``."""

    def __init__(self, parameters, lr):
        self.inner = torch.optim.SGD(parameters, lr)
        super().__init__(self.inner.param_groups, self.inner.defaults)
        self.param_groups = self.inner.param_groups

    def step(self, closure=None):
        loss = closure()
        self.inner.step()
        return loss

    def second_step(self):
        self.inner.step()


def test_an_optimizer_that_steps_with_another_is_followed():
    around, plain = trained(Around), trained(torch.optim.SGD)
    for key, value in plain.state_dict().items():
        assert torch.equal(value, around.state_dict()[key]), key


def test_a_step_past_the_optimizers_own_is_refused():
    class Twice(Chosen):
        def training_step(self, batch, batch_idx):
            F.cross_entropy(self(batch[0]), batch[1]).backward()
            self.optimizers(use_pl_optimizer=False).second_step()

    some = callbacks(forward_fn=lambda module, batch: module(batch[0]))
    with pytest.raises(MisconfigurationException, match="SGD has taken a step on quantized layers"):
        trainer(some, max_epochs=1).fit(Twice(Around, manual=True), Data())


class Averaging(ConvModule):
    """Accumulates gradients manually, and updates an average of the network in every batch."""

    def __init__(self, loads):
        super().__init__()
        self.automatic_optimization, self.loads = False, loads
        self.network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 8), torch.nn.Linear(8, 3))
        self.average = copy.deepcopy(self.network).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        F.cross_entropy(self.network(batch[0]), batch[1]).backward()
        if batch_idx % 4 == 3:
            self.optimizers().step()
            self.optimizers().zero_grad()
        if self.loads:
            self.average.load_state_dict(self.network.state_dict())
        else:
            with torch.no_grad():
                for p, average in zip(self.network.parameters(), self.average.parameters()):
                    average.lerp_(p, 0.1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.network.parameters(), lr=0.05)


@pytest.mark.filterwarnings("ignore:Layer .* was not called")
@pytest.mark.parametrize("loads", [False, True])
def test_an_average_that_moves_without_a_step_is_no_step(loads, monkeypatch):
    advanced = []

    def advance_states(*args):
        advanced.append(args)
        sweep.advance_states(*args)

    monkeypatch.setattr(_tracks_oscillation, "advance_states", advance_states)
    module = Averaging(loads)
    trainer(callbacks(forward_fn=lambda module, batch: module.network(batch[0])), max_epochs=2).fit(module, Data())
    assert len(advanced) == 4  # every fourth of 16 batches
    assert any((s.weight_int != 0).any() for s in oscillation_states(module).values())


class Guarded(ConvModule):
    """Some losses are NaN; a guard that runs after the callbacks' hook drops the resulting gradients."""

    def __init__(self, guard):
        super().__init__(lr=0.3)
        self.guard = guard

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.guard == "skip":
            return loss if batch_idx % 3 else None
        return loss if batch_idx % 3 else loss * float("nan")

    def drop(self):
        if not all(p.grad.isfinite().all() for p in self.parameters() if p.grad is not None):
            self.zero_grad()

    def on_before_optimizer_step(self, optimizer):
        if self.guard == "hook":
            self.drop()

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        if self.guard == "clipping":
            self.drop()


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`.*")
@pytest.mark.parametrize("guard", ["hook", "clipping"])
def test_a_step_whose_gradients_were_dropped_moves_nothing(guard):
    skipping, guarded = Guarded("skip"), Guarded(guard)
    guarded.load_state_dict(skipping.state_dict())
    for module in (skipping, guarded):
        trainer(callbacks(scale_learning_rate=0.02), max_epochs=4).fit(module, Data())
    assert any(s.frequency.any() for s in oscillation_states(guarded).values())
    for name, value in guarded.state_dict().items():
        assert torch.equal(value, skipping.state_dict()[name]), name


def test_a_step_that_was_skipped_leaves_nothing_for_the_next():
    one, other = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = torch.optim.SGD([one, other], lr=0.1)
    hooks, callback, steps = OptimizerStepHooks(), L.Callback(), []
    hooks.attach(SimpleNamespace(optimizers=[optimizer], fit_loop=SimpleNamespace(total_batch_idx=0)), [])
    hooks.add(callback, lambda _: None, steps.append)
    one.grad = torch.ones(2)
    hooks.begin(callback, optimizer)
    one.grad, other.grad = None, torch.ones(2)  # as if a gradient scaler had skipped the step
    hooks.begin(callback, optimizer)
    optimizer.step()
    assert steps == [optimizer]
    hooks.detach()
