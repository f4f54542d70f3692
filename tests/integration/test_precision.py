"""All callbacks together under each precision, with and without a gradient scaler."""

import copy
from itertools import islice

import lightning as L
import pytest
import torch
from common import (
    Record,
    all_callbacks,
    assert_frozen_weights_lie_on_the_grid,
    assert_states_are_those_of_slow_loops,
    freezing_threshold,
    frozen_weights,
    scales,
)
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from models import ConvModule, Data, Manual, loader, trainer
from test_resume import Order, assert_same
from torch.amp import GradScaler

from lightning_qat_osc import (
    OscillationDampening,
    OscillationState,
    QuantConfig,
    QuantizationAwareTraining,
    oscillation_states,
    quantize_model,
)
from lightning_qat_osc.functional import integer_grid
from lightning_qat_osc.lookup import quantized_weights, quantizers, scale_parameters
from lightning_qat_osc.oscillation import pass_on_gradient

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*below twice the momentum.*"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided.*"),
]

EPOCHS, STEPS = 7, 56
PRECISIONS = ["32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true"]


def precision(name, init_scale=2.0**8, growth_interval=1000):
    """Return arguments for the Trainer, which allows fp16 AMP only on GPUs, but whose plugin also runs on the CPU."""
    if name != "16-mixed":
        return {"precision": name}
    scaler = GradScaler("cpu", init_scale=init_scale, growth_interval=growth_interval)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}


def network(name):
    # Lightning loads a checkpoint before it converts the module to double
    return ConvModule(lr=0.3).double() if name == "64-true" else ConvModule(lr=0.3)


def fit(name, callbacks, max_epochs=EPOCHS, **kwargs):
    torch.manual_seed(11)
    module = network(name)
    t = trainer(callbacks, max_epochs=max_epochs, **precision(name), **kwargs)
    t.fit(module, Order(), loader(16))
    return module, t


@pytest.mark.parametrize("name", PRECISIONS)
def test_states_dtypes_and_frozen_weights_hold_in_every_precision(name):
    record = Record()
    module, t = fit(name, all_callbacks(record=record))
    assert torch.isfinite(t.callback_metrics["val_loss"])
    weight = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}.get(name, torch.float32)
    assert {w.weight.dtype for w in quantized_weights(module)} == {weight}
    assert {s.dtype for s in scale_parameters(module)} == {torch.float64 if name == "64-true" else torch.float32}
    for state in oscillation_states(module).values():
        assert (state.frequency.dtype, state.ema_int.dtype) == (torch.float32, torch.float32)
        assert (state.weight_int.dtype, state.direction.dtype) == (torch.int8, torch.int8)
    assert len(record.steps) == STEPS
    assert_states_are_those_of_slow_loops(module, record, lambda step, batch: freezing_threshold(step, STEPS))
    assert 0 < frozen_weights(module) < 128
    assert_frozen_weights_lie_on_the_grid(module)


@pytest.mark.parametrize("name", PRECISIONS[1:])
def test_a_resumed_run_ends_with_the_same_bits_in_every_precision(name, tmp_path):
    class Crash(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            if trainer.global_step == 21:
                trainer.save_checkpoint(tmp_path / "stop.ckpt")
                raise KeyboardInterrupt

    unbroken, _ = fit(name, all_callbacks(), max_epochs=4)
    with pytest.raises(SystemExit):
        fit(name, [*all_callbacks(), Crash()], max_epochs=4)
    torch.manual_seed(99)
    resumed = network(name)
    t = trainer(all_callbacks(), max_epochs=4, **precision(name, init_scale=2.0))
    t.fit(resumed, Order(), loader(16), ckpt_path=tmp_path / "stop.ckpt")
    assert frozen_weights(resumed) > 0
    assert_same(unbroken, resumed)


class InfAt(L.Callback):
    """Puts an inf into a gradient at one step, and copies before and after each step what a skip must not change."""

    def __init__(self, qat, parameter, step):
        self.qat, self.parameter, self.step = qat, parameter, step
        self.before, self.after = [], []

    def on_train_batch_start(self, trainer, pl_module, *args):
        self.before.append(self.everything(trainer, pl_module))

    def on_after_backward(self, trainer, pl_module):
        if trainer.global_step == self.step:
            pl_module.get_parameter(self.parameter).grad.view(-1)[0] = torch.inf

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.after.append(self.everything(trainer, pl_module))

    def everything(self, trainer, pl_module):
        (adam,) = self.qat.state_dict()["scale_updates"]
        return copy.deepcopy(
            {
                "states": {n: s.state_dict() for n, s in oscillation_states(pl_module).items()},
                "parameters": dict(pl_module.named_parameters()),
                "adam": adam["state"],
                "optimizer": trainer.optimizers[0].state_dict()["state"],
            }
        )


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


@pytest.mark.parametrize("parameter", ["point.weight", "stem.weight_quantizer.scale", "head.bias"])
def test_a_step_that_the_scaler_skips_changes_nothing(parameter):
    callbacks = all_callbacks()
    look = InfAt(callbacks[0], parameter, step=40)
    module, t = fit("16-mixed", [*callbacks, look])
    assert any(s["frozen"].any() for s in look.before[40]["states"].values())
    assert same(look.before[40], look.after[40])
    assert t.scaler.get_scale() == 2.0**7  # it did skip
    for step in (39, 41):  # every part changes at the steps around it
        assert not any(same(look.before[step][part], look.after[step][part]) for part in look.before[0])
    assert all(p.isfinite().all() for p in module.parameters())
    assert_frozen_weights_lie_on_the_grid(module)


def test_a_loss_scale_that_begins_too_high_costs_steps_and_nothing_else():
    record = Record()
    torch.manual_seed(11)
    module = ConvModule(lr=0.3)
    t = trainer(all_callbacks(record=record), max_epochs=EPOCHS, **precision("16-mixed", init_scale=2.0**30))
    t.fit(module, Order(), loader(16))
    batches = [batch for _, batch, *_ in record.steps]
    skipped = STEPS - len(batches)
    assert 5 < skipped < 20
    assert t.scaler.get_scale() == 2.0 ** (30 - skipped)
    assert_states_are_those_of_slow_loops(module, record, lambda step, batch: freezing_threshold(batch, STEPS))
    assert frozen_weights(module) > 0


@pytest.mark.parametrize("clip", [False, True])
def test_a_gradient_scaler_of_the_modules_own(clip):
    class OwnScaler(Manual):
        def __init__(self):
            super().__init__()
            self.hparams.lr = 0.3
            self.scaler = GradScaler("cpu", init_scale=2.0**30, growth_interval=20)

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers(use_pl_optimizer=False)
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = torch.nn.functional.cross_entropy(self(batch[0]), batch[1])
            self.manual_backward(self.scaler.scale(loss))
            if clip:
                self.scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(self.parameters(), 10.0)
            self.scaler.step(optimizer)
            self.scaler.update()

    record, gradients = Record(), []

    class Gradients(L.Callback):
        def on_train_start(self, trainer, pl_module):  # after the hook that takes the gradients
            trainer.optimizers[0].register_step_pre_hook(
                lambda *args: gradients.append(pl_module.head.weight_quantizer.scale_grad.abs().item())
            )

    callbacks = all_callbacks(record=record, forward_fn=lambda module, batch: module(batch[0]))
    callbacks.insert(1, Gradients())
    module = OwnScaler()
    trainer(callbacks, max_epochs=EPOCHS).fit(module, Order(), loader(16))
    assert 5 < STEPS - len(record.steps) < 20
    assert_states_are_those_of_slow_loops(module, record, lambda step, batch: freezing_threshold(batch, STEPS))
    assert frozen_weights(module) > 0
    assert len(gradients) == len(record.steps)
    assert max(gradients) < 100  # they would be thousands with the loss scale


class ScaleGradients(L.Callback):
    def __init__(self):
        self.gradients, self.scales = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients.append(torch.cat([q.scale_grad for q in quantizers(pl_module)]).double())

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.scales.append(scales(pl_module).double())


def fine_run(name, **kwargs):
    """Train a few steps, none of which changes an integer, so that runs in other precisions stay close."""
    look = ScaleGradients()
    torch.manual_seed(11)
    module = ConvModule(lr=1e-4)
    qat = QuantizationAwareTraining(8, None, first_last_bits=None, scale_learning_rate=1e-3)
    trainer([qat, look], max_epochs=1, **precision(name, **kwargs)).fit(module, Order(), loader(16))
    return look


@pytest.mark.parametrize("scaler", [{"init_scale": 1.0}, {"init_scale": 2.0**12}, {"growth_interval": 2}])
def test_scales_learn_from_gradients_without_the_loss_scale(scaler):
    full, mixed = fine_run("32-true"), fine_run("16-mixed", **scaler)
    assert len(mixed.gradients) == 8
    # compare the gradients themselves, because Adam hides a constant factor
    for a, b in zip(mixed.gradients, full.gradients):
        assert (a - b).norm() < 0.02 * b.norm()
    assert ((full.scales[-1] / full.scales[0] - 1).abs() > 1e-4).all()  # they moved by more than the tolerance below
    for a, b in zip(mixed.scales, full.scales):
        assert torch.allclose(a, b, rtol=3e-5, atol=0)


@pytest.mark.parametrize("init_scale", [1.0, 2.0**12])
def test_dampening_weighs_the_same_whatever_the_loss_scale(init_scale):
    class Look(L.Callback):
        def __init__(self):
            self.gradients = []

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.gradients.append(pl_module.point.weight.grad.clone())
            self.weight = pl_module.point.weight.detach().clone()
            self.scale = pl_module.point.weight_quantizer.scale.detach().clone()

    before, after = Look(), Look()
    qat = QuantizationAwareTraining(2, None, first_last_bits=None)
    dampening = OscillationDampening(final_weight=0.5, initial_weight=0.5)
    t = trainer([qat, before, dampening, after], max_steps=3, **precision("16-mixed", init_scale=init_scale))
    t.fit(ConvModule(), Data())
    w, s = before.weight, before.scale
    inside = (w >= -2 * s) & (w <= s)
    expected = torch.where(inside, 0.5 * 2 * (w - s * torch.round(w / s)), 0.0)
    assert expected.abs().max() > 0.01
    assert torch.allclose(after.gradients[-1] - before.gradients[-1], expected, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "AdamW", "Adagrad"])
def test_fused_optimizers_under_a_gradient_scaler_are_refused(optimizer):
    class Fused(ConvModule):
        def configure_optimizers(self):
            return getattr(torch.optim, optimizer)(self.parameters(), lr=0.01, fused=True)

    module = Fused()
    weights = {n: p.detach().clone() for n, p in module.named_parameters()}
    with pytest.raises(MisconfigurationException, match=f"{optimizer}.fused=True.*remove fused=True"):
        trainer(all_callbacks(), **precision("16-mixed")).fit(module, Data())
    assert all(torch.equal(module.get_parameter(n), w) for n, w in weights.items())


@pytest.mark.parametrize("name", ["32-true", "bf16-true"])
def test_reestimated_statistics_are_those_of_double_precision_to_a_rounding(name):
    module = ConvModule(lr=0.3)
    trainer(all_callbacks(), **precision(name)).fit(module, Data())
    copied = copy.deepcopy(module).eval()
    seen = {n: [] for n in ("bn1", "bn2")}
    for n, inputs in seen.items():
        bn = copied.get_submodule(n).train()
        bn.register_forward_pre_hook(lambda m, args, inputs=inputs: inputs.append(args[0].detach().double()))
    dtype = module.stem.weight.dtype
    with torch.no_grad():
        for x, _ in islice(loader(), 3):
            copied(x.to(dtype))
    unit = torch.finfo(dtype).eps
    for n, inputs in seen.items():
        bn, x = module.get_submodule(n), torch.cat(inputs).movedim(1, 0).flatten(1)
        assert bn.running_mean.dtype == dtype
        mean, var = bn.running_mean.double(), bn.running_var.double()
        assert torch.allclose(mean, x.mean(1), rtol=0, atol=2 * unit * x.abs().mean())
        assert torch.allclose(var, x.var(1), rtol=4 * unit)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(
    ("dtype", "smallest", "largest"),
    # in half precision, scale times integer must lie between the spacing of subnormals and the largest number
    [(torch.bfloat16, 1e-30, 1e30), (torch.float16, 1e-6, 500.0), (torch.float32, 1e-30, 1e30)],
)
def test_every_integer_survives_as_a_frozen_latent_weight(bits, dtype, smallest, largest):
    n, p = integer_grid(bits, signed=True)
    low, high = torch.tensor([smallest, largest]).double().log()
    s = torch.empty(2000, 1, dtype=torch.float64).uniform_(low, high).exp().float()
    z = torch.arange(n, p + 1, dtype=torch.int8).expand(2000, -1)
    state = OscillationState(z)
    state.frozen[:] = True
    w = torch.randn(z.shape).to(dtype)
    state.hold_frozen(w, s)
    assert w.dtype == dtype
    assert torch.equal((w.double() / s.double()).round().clamp(n, p), z.double())
    assert torch.equal(torch.clamp(torch.round(w / s), n, p), z.float())  # as in a forward pass in that precision


def test_what_frozen_weights_owe_their_scale_is_summed_in_its_precision():
    z = torch.randint(-8, 8, (64, 64), dtype=torch.int8)
    state = OscillationState(z)
    state.frozen[:] = torch.rand(64, 64) < 0.5
    g = torch.randn(64, 64).bfloat16()
    owed = (g.double() * z)[state.frozen].sum()
    scale_grad = torch.zeros(1)
    pass_on_gradient(scale_grad, g, state.weight_int, state.frozen)
    assert scale_grad.double() == pytest.approx(owed.item(), rel=1e-5)


@pytest.mark.parametrize(("name", "dtype"), [("bf16-true", torch.float32), ("64-true", torch.float64)])
def test_scales_made_in_configure_model_have_full_precision(name, dtype):
    class MadeLate(ConvModule):  # Lightning sets the default dtype around configure_model
        def configure_model(self):
            if not hasattr(self, "late"):
                self.late = torch.nn.Linear(3, 3)
                quantize_model(self, QuantConfig(2, 3, first_last_bits=None))

        def forward(self, x):
            return self.late(super().forward(x))

    module = MadeLate()
    trainer(all_callbacks(), max_epochs=1, **precision(name)).fit(module, Data())
    assert module.late.weight.dtype == {"bf16-true": torch.bfloat16, "64-true": torch.float64}[name]
    assert {s.dtype for s in scale_parameters(module)} == {dtype}
