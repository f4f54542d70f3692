"""All callbacks together, under each way in which Lightning and torch take an optimizer step."""

import csv

import lightning as L
import pytest
import torch
from common import (
    DAMPENING,
    FINAL_THRESHOLD,
    THRESHOLD,
    Record,
    all_callbacks,
    annealed,
    assert_frozen_weights_lie_on_the_grid,
    assert_states_are_those_of_slow_loops,
    freezing_threshold,
    frozen_weights,
    scales,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from models import ConvModule, Data, Manual, loader, trainer
from test_resume import Order, assert_same
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler

from lightning_qat_osc.lookup import quantized_layers, quantized_weights, quantizers, scale_parameters

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*below twice the momentum.*"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided.*"),
    # torch's own warning: SequentialLR passes an epoch to its schedulers
    pytest.mark.filterwarnings("ignore:.*The epoch parameter in `scheduler.step.*"),
]


def read_csv(logger):
    with open(f"{logger.log_dir}/metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("accumulate", [1, 3, 8])
@pytest.mark.parametrize(
    "clipping",
    [
        {},
        {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "norm"},
        {"gradient_clip_val": 0.02, "gradient_clip_algorithm": "value"},
    ],
    ids=["unclipped", "norm", "value"],
)
def test_states_advance_once_a_step_under_accumulation_and_clipping(accumulate, clipping):
    record, module = Record(), ConvModule(lr=0.5)
    epochs = {1: 6, 3: 12, 8: 30}[accumulate]
    t = trainer(all_callbacks(record=record), max_epochs=epochs, accumulate_grad_batches=accumulate, **clipping)
    t.fit(module, Data())
    length = epochs * {1: 8, 3: 3, 8: 1}[accumulate]
    assert len(record.steps) == t.global_step == length
    assert_states_are_those_of_slow_loops(module, record, lambda step, batch: freezing_threshold(step, length))
    assert_frozen_weights_lie_on_the_grid(module)
    assert frozen_weights(module) > 0 or clipping  # clipped steps are short


def test_a_layer_that_is_called_several_times_a_step_advances_once():
    class Twice(ConvModule):
        def forward(self, x):
            x = F.relu(self.bn1(self.stem(x)))
            x = F.relu(self.bn2(self.depthwise(F.relu(self.depthwise(x)))))
            return self.head(F.relu(self.point(x)).mean((2, 3)))

    record, module = Record(), Twice(lr=0.5)
    trainer(all_callbacks(record=record), max_epochs=6).fit(module, Data())
    assert len(record.steps) == 48
    assert_states_are_those_of_slow_loops(module, record, lambda step, batch: freezing_threshold(step, 48))
    assert_frozen_weights_lie_on_the_grid(module)
    assert frozen_weights(module) > 0


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping_cuts_the_weights_gradients_and_not_the_scales(algorithm):
    class Steps(L.Callback):
        def __init__(self):
            self.gradients, self.scales = [], []

        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            if trainer.global_step == 1:
                self.gradients = [p.grad.clone() for p in pl_module.parameters() if p.grad is not None]
                self.scales = scales(pl_module)

    clipped, free = Steps(), Steps()
    for steps, arguments in ((free, {}), (clipped, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": algorithm})):
        torch.manual_seed(4)
        trainer([*all_callbacks(), steps], max_epochs=1, **arguments).fit(ConvModule(), Data())
    assert len(clipped.gradients) == 10  # of weights, biases and batch norm, but not of scales

    def largest(gradients):
        sizes = torch.stack([g.norm() if algorithm == "norm" else g.abs().max() for g in gradients])
        return sizes.norm() if algorithm == "norm" else sizes.max()

    assert largest(free.gradients) > 0.02
    assert largest(clipped.gradients) <= 0.01 * 1.001
    assert torch.equal(clipped.scales, free.scales)


def run_network(module, batch):
    return module(batch[0])


class AnyManual(Manual):
    """Manual optimization, with or without Lightning's optimizer wrapper, and with or without a closure."""

    def __init__(self, wrapped=True, closure=False, weight_decay=0.0):
        super().__init__()
        self.wrapped, self.closure = wrapped, closure
        self.hparams.lr, self.hparams.weight_decay = 0.5, weight_decay

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers(use_pl_optimizer=self.wrapped)

        def closure():
            optimizer.zero_grad()
            loss = F.cross_entropy(self(batch[0]), batch[1])
            self.manual_backward(loss)
            return loss

        if self.closure:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("closure", [True, False])
def test_manual_optimization_is_the_same_run_with_lightnings_wrapper_or_without(wrapped, closure):
    runs = []
    for module in (AnyManual(weight_decay=0.01), AnyManual(wrapped, closure, weight_decay=0.01)):
        torch.manual_seed(5)
        module.apply(lambda m: m.reset_parameters() if hasattr(m, "reset_parameters") else None)
        record = Record()
        trainer(all_callbacks(record=record, forward_fn=run_network), max_epochs=6).fit(module, Data())
        assert_states_are_those_of_slow_loops(module, record, lambda step, batch: freezing_threshold(step, 48))
        assert frozen_weights(module) > 0
        runs.append(module)
    assert_same(*runs)


def test_automatic_and_manual_optimization_are_the_same_run():
    runs = []
    for kind in (lambda: ConvModule(lr=0.5), AnyManual):
        torch.manual_seed(5)
        module = kind()
        trainer(all_callbacks(forward_fn=run_network), max_epochs=6).fit(module, Data())
        runs.append(module)
    assert frozen_weights(runs[0]) > 0
    assert_same(*runs)


class Networks(nn.Module):
    def __init__(self, *widths):
        super().__init__()
        self.first, self.second = nn.Linear(widths[0], widths[1]), nn.Linear(widths[1], widths[2])

    def forward(self, x):
        return self.second(F.relu(self.first(x)))


def test_weights_of_two_optimizers_are_told():
    class Two(Manual):
        def configure_optimizers(self):
            return [torch.optim.SGD(self.parameters(), lr=0.1), torch.optim.SGD(self.head.parameters(), lr=0.1)]

        def optimizers(self, *args, **kwargs):
            return super().optimizers(*args, **kwargs)[0]

    with pytest.warns(UserWarning, match="More than one optimizer has .* 'head', .* only in the steps of the first"):
        trainer(all_callbacks()[:1], max_steps=2).fit(Two(), Data())


class Gan(L.LightningModule):
    """A tiny GAN; either optimizer may step more often than the other."""

    def __init__(self, critic_steps=1, generator_every=1, wrapped=True, toggle=False):
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.critic = Networks(4, 6, 8), Networks(8, 6, 1)
        self.critic_steps, self.generator_every = critic_steps, generator_every
        self.wrapped, self.toggle = wrapped, toggle

    def forward(self, z):
        return self.critic(self.generator(z))

    def training_step(self, batch, batch_idx):
        generator, critic = self.optimizers(use_pl_optimizer=self.wrapped)
        real = batch[0].flatten(1)[:, :8]
        for _ in range(self.critic_steps):
            fake = self.generator(torch.randn(len(real), 4)).detach()
            self.one_step(critic, lambda fake=fake: self.loss(self.critic(fake)) + self.loss(-self.critic(real)))
        if (batch_idx + 1) % self.generator_every == 0:
            self.one_step(generator, lambda: self.loss(-self(torch.randn(len(real), 4))))

    @staticmethod
    def loss(logits):
        return F.softplus(logits).mean()

    def one_step(self, optimizer, loss):
        if self.toggle:
            self.toggle_optimizer(optimizer)
        optimizer.zero_grad()
        self.manual_backward(loss())
        optimizer.step()
        if self.toggle:
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self):
        generator = torch.optim.Adam(self.generator.parameters(), lr=0.2, betas=(0.5, 0.9))
        return generator, torch.optim.SGD(self.critic.parameters(), lr=0.5, momentum=0.9)


def run_gan(module, batch):
    return module(torch.randn(8, 4))


GANS = [
    {},
    {"critic_steps": 3},
    {"generator_every": 4},
    {"critic_steps": 2, "generator_every": 2, "wrapped": False},
    {"toggle": True},
]


@pytest.mark.parametrize("arguments", GANS)
def test_each_weight_is_followed_at_the_steps_of_the_optimizer_that_owns_it(arguments):
    record = Record()
    module = Gan(**arguments)
    trainer(all_callbacks(record=record, forward_fn=run_gan, activation_bits=4), max_epochs=9).fit(module, loader())
    taken = [sum(optimizer == i for optimizer, *_ in record.steps) for i in (0, 1)]
    assert taken == [72 // arguments.get("generator_every", 1), 72 * arguments.get("critic_steps", 1)]
    networks = {(optimizer, name.split(".")[0]) for optimizer, _, latent, _ in record.steps for name in latent}
    assert networks == {(0, "generator"), (1, "critic")}
    # the threshold is annealed by batches, however often each optimizer steps
    assert_states_are_those_of_slow_loops(module, record, lambda step, batch: freezing_threshold(batch, 72))
    assert frozen_weights(module) > 2
    assert_frozen_weights_lie_on_the_grid(module)
    # a scale moves only in the steps of the optimizer of its weight
    belongs = torch.tensor([0] * 4 + [1] * 4)
    moved = [torch.zeros(8, dtype=torch.bool), torch.zeros(8, dtype=torch.bool)]
    for (_, _, _, before), (optimizer, _, _, after) in zip(record.steps, record.steps[1:]):
        assert torch.equal(before[belongs != optimizer], after[belongs != optimizer])
        moved[optimizer] |= before != after
    assert torch.equal(moved[0] | moved[1], torch.ones(8, dtype=torch.bool))


@pytest.mark.parametrize("arguments", GANS[:4])
def test_schedules_end_with_the_run_and_figures_are_logged_however_often_optimizers_step(arguments, tmp_path):
    logger = CSVLogger(tmp_path)
    t = trainer(all_callbacks(forward_fn=run_gan), max_epochs=5, logger=logger, log_every_n_steps=7)
    t.fit(Gan(**arguments), loader())
    rows = [row for row in read_csv(logger) if row["oscillation/dampening_weight"]]
    batches = [int(row["step"]) for row in rows]
    assert batches == [6, 13, 20, 27, 34]
    lambdas = [float(row["oscillation/dampening_weight"]) for row in rows]
    assert lambdas == pytest.approx([annealed(0.0, DAMPENING, batch, 40) for batch in batches])
    assert all(row["oscillation/frequency/critic.first"] for row in rows)
    if "generator_every" not in arguments:
        thresholds = [float(row["oscillation/freeze_threshold"]) for row in rows]
        assert thresholds == pytest.approx([annealed(THRESHOLD, FINAL_THRESHOLD, batch, 40) for batch in batches])


@pytest.mark.parametrize(
    ("ends", "length"),
    [
        ({"max_steps": 40, "max_epochs": -1}, 20),  # two optimizers
        ({"max_steps": 40, "max_epochs": 100}, 20),
        ({"max_steps": 1000, "max_epochs": 3}, 24),
    ],
)
def test_schedules_end_with_a_manual_run_whatever_ends_it(ends, length, tmp_path):
    logger = CSVLogger(tmp_path)
    t = trainer(all_callbacks(forward_fn=run_gan), logger=logger, log_every_n_steps=1, **ends)
    t.fit(Gan(), loader())
    lambdas = [float(value) for row in read_csv(logger) if (value := row["oscillation/dampening_weight"])]
    assert len(lambdas) == length
    # logged at the generator's step: the last of each batch, and the second of its two if max_steps ends the run
    assert lambdas == pytest.approx([annealed(0.0, DAMPENING, b + (length == 20) / 2, length) for b in range(length)])


def test_a_resumed_gan_ends_with_the_same_bits(tmp_path):
    class Crash(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            if trainer.fit_loop.total_batch_idx == 20:
                trainer.save_checkpoint(tmp_path / "stop.ckpt")
                raise KeyboardInterrupt

    class Seed(L.Callback):  # gives each batch the same noise in every run
        def on_train_batch_start(self, trainer, pl_module, *args):
            torch.manual_seed(trainer.fit_loop.total_batch_idx)

    def run(*more, **kwargs):
        torch.manual_seed(3)
        module = Gan(critic_steps=2)
        t = trainer([*all_callbacks(forward_fn=run_gan), Seed(), *more], max_epochs=5)
        t.fit(module, Order(), **kwargs)
        return module

    unbroken = run()
    assert frozen_weights(unbroken) > 0
    with pytest.raises(SystemExit):
        run(Crash())
    assert_same(unbroken, run(ckpt_path=tmp_path / "stop.ckpt"))


class MadeEarly(ConvModule):
    """Its optimizer is built in ``__init__``, or from parameters that were listed there."""

    def __init__(self, build):
        super().__init__()
        self.listed = list(self.parameters())
        self.optimizer = torch.optim.SGD(self.listed, lr=0.5, momentum=0.9, weight_decay=0.1) if build else None

    def configure_optimizers(self):
        return self.optimizer or torch.optim.SGD(self.listed, lr=0.5, momentum=0.9, weight_decay=0.1)


@pytest.mark.parametrize("build", [True, False])
def test_parameters_listed_before_insertion(build, tmp_path):
    def run(*more, **kwargs):
        torch.manual_seed(6)
        module, record = MadeEarly(build), Record()
        t = trainer([*all_callbacks(record=record), *more], max_epochs=6)
        t.fit(module, Order(), loader(16), **kwargs)
        return module, record

    class Crash(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            if trainer.global_step == 29:
                trainer.save_checkpoint(tmp_path / "stop.ckpt")
                raise KeyboardInterrupt

    module, record = run()
    assert all((scales(module) != record.steps[0][3])[[1, 3, 5, 7]])
    assert_states_are_those_of_slow_loops(module, record, lambda step, batch: freezing_threshold(step, 48))
    assert frozen_weights(module) > 0
    with pytest.raises(SystemExit):
        run(Crash())
    assert_same(module, run(ckpt_path=tmp_path / "stop.ckpt")[0])


SCHEDULERS = {
    "lambda": (lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.95**step), 0.5),
    "onecycle": (lambda o: lr_scheduler.OneCycleLR(o, 0.8, total_steps=33), 0.8),
    "cosine": (lambda o: lr_scheduler.CosineAnnealingLR(o, 32), 0.5),
    "plateau": (lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0, threshold=10.0), 0.5),
    "sequential": (
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.LinearLR(o, 0.1, total_iters=8), lr_scheduler.CosineAnnealingLR(o, 24)], milestones=[8]
        ),
        0.5,
    ),
    "chained": (
        lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.LinearLR(o, 0.1), lr_scheduler.ExponentialLR(o, 0.97)]),
        0.5,
    ),
}


class Scheduled(ConvModule):
    def __init__(self, scheduler):
        super().__init__(lr=0.5)
        self.scheduler = scheduler

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        schedule = {"scheduler": SCHEDULERS[self.scheduler][0](optimizer), "interval": "step"}
        if self.scheduler == "plateau":
            schedule |= {"interval": "epoch", "monitor": "val_loss"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}


class Rates(L.Callback):
    def __init__(self, qat):
        self.qat, self.users, self.scales = qat, [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.users.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.scales.append(self.qat.state_dict()["scale_updates"][0]["param_groups"][0]["lr"])


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_scales_follow_any_schedule_and_resume_on_it(scheduler, tmp_path):
    class Crash(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            if trainer.global_step == 19:
                trainer.save_checkpoint(tmp_path / "stop.ckpt")
                raise KeyboardInterrupt

    def run(*more, **kwargs):
        torch.manual_seed(8)
        module, callbacks = Scheduled(scheduler), all_callbacks()
        rates = Rates(callbacks[0])
        trainer([*callbacks, rates, *more], max_epochs=4).fit(module, Order(), loader(16), **kwargs)
        return module, rates

    module, rates = run()
    peak = SCHEDULERS[scheduler][1]
    assert len(set(rates.users)) > 2
    assert rates.scales == pytest.approx([0.01 * user / peak for user in rates.users])
    with pytest.raises(SystemExit):
        run(Crash())
    resumed, later = run(ckpt_path=tmp_path / "stop.ckpt")
    assert len(later.users) == 13
    assert later.scales == pytest.approx([0.01 * user / peak for user in later.users])
    if scheduler != "plateau":  # which Lightning does not step in the resumed epoch, even without our callbacks
        assert later.users == rates.users[19:]
        assert_same(module, resumed)


OPTIMIZERS = {
    "SGD": {"lr": 0.3, "momentum": 0.9},
    "SGD-nesterov": {"lr": 0.3, "momentum": 0.9, "nesterov": True},
    "SGD-fused": {"lr": 0.3, "momentum": 0.9, "fused": True},
    "Adam": {"lr": 0.05},
    "Adam-fused": {"lr": 0.05, "fused": True},
    "Adam-foreach": {"lr": 0.05, "foreach": True},
    "AdamW": {"lr": 0.05},
    "AdamW-amsgrad": {"lr": 0.05, "amsgrad": True},
    "NAdam": {"lr": 0.05},
    "Adagrad": {"lr": 0.2},
    "RMSprop": {"lr": 0.02, "momentum": 0.9},
    "Adafactor": {"lr": 0.1},
}


class AnyOptimizer(ConvModule):
    def __init__(self, kind, decay):
        super().__init__()
        self.kind, self.decay = kind, decay

    def configure_optimizers(self):
        make = getattr(torch.optim, self.kind.split("-")[0])
        return make(self.parameters(), weight_decay=self.decay, **OPTIMIZERS[self.kind])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_frozen_weights_stay_where_they_are_under_any_optimizer(optimizer):
    class Held(L.Callback):
        frozen, checks = {}, 0

        def on_train_batch_end(self, trainer, pl_module, *args):
            assert_frozen_weights_lie_on_the_grid(pl_module)
            for name, w, q in quantized_weights(pl_module):
                was, z = self.frozen.get(name, (torch.zeros_like(w, dtype=torch.bool), q.oscillation.weight_int))
                assert torch.equal(q.oscillation.weight_int[was], z[was])
                assert q.oscillation.frozen[was].all()
                self.frozen[name] = q.oscillation.frozen.clone(), q.oscillation.weight_int.clone()
                self.checks += int(was.sum())

    record, held, module = Record(), Held(), AnyOptimizer(optimizer, 0.01)
    held.frozen = {}
    trainer([*all_callbacks(record=record), held], max_epochs=10).fit(module, Data())
    assert held.checks > 10
    assert_states_are_those_of_slow_loops(module, record, lambda step, batch: freezing_threshold(step, 80))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_users_optimizer_never_touches_a_scale(optimizer):
    class Watch(L.Callback):
        def on_train_start(self, trainer, pl_module):
            self.before = scales(pl_module)
            self.weights = pl_module.point.weight.detach().clone()

    watch, module = Watch(), AnyOptimizer(optimizer, 0.5)
    t = trainer([*all_callbacks(scale_learning_rate=0.0), watch], max_epochs=2)
    t.fit(module, Data())
    assert torch.equal(scales(module), watch.before)
    assert not torch.equal(module.point.weight, watch.weights)
    owned = {id(p) for p in t.optimizers[0].param_groups[0]["params"]}
    for scale in scale_parameters(module):
        assert id(scale) in owned
        # Adagrad creates its states, all zeros, in its constructor
        assert not any(torch.as_tensor(value).any() for value in t.optimizers[0].state[scale].values())


class TwoOptimizers(ConvModule):
    """Manual optimization with two optimizers, each of which gets a part of the named parameters.

    ``shapes``: the first gets all matrices, the second all vectors, including the scales. ``computed``: the second gets
    only the parameters from which the weight of the layer ``point`` is computed.
    """

    def __init__(self, split, order):
        super().__init__()
        self.automatic_optimization = False
        self.split, self.order = split, order
        nn.utils.parametrizations.spectral_norm(self.point)

    def configure_optimizers(self):
        first, second = [], []
        for name, p in self.named_parameters():
            chosen = p.ndim < 2 if self.split == "shapes" else name.startswith("point.parametrizations")
            (second if chosen else first).append((name, p))
        return [torch.optim.SGD(part, lr=0.1, weight_decay=0.5) for part in (first, second)]

    def training_step(self, batch, batch_idx):
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        for i in self.order:
            optimizers[i].step()


@pytest.mark.filterwarnings("ignore:.*computes its weight from other parameters")
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("split", ["shapes", "computed"])
def test_neither_of_two_optimizers_touches_a_scale(split, order):
    class Watch(L.Callback):
        def on_train_start(self, trainer, pl_module):
            self.before = scales(pl_module)

    watch, module = Watch(), TwoOptimizers(split, order)
    callbacks = all_callbacks(scale_learning_rate=0.0, forward_fn=run_network)
    t = trainer([*callbacks, watch], max_epochs=1)
    t.fit(module, Data())
    assert torch.equal(scales(module), watch.before)
    groups = [optimizer.param_groups[0] for optimizer in t.optimizers]
    names = {id(p): name for name, p in module.named_parameters()}
    for group in groups:
        assert group["param_names"] == [names[id(p)] for p in group["params"]]
    for name, layer in quantized_layers(module).items():
        for q in layer.quantizers():
            of = [any(q.scale is p for p in group["params"]) for group in groups]
            second = split == "computed" and name == "point"
            assert of == [not second, second]


@pytest.mark.parametrize("manual", [False, True])
def test_lbfgs_is_refused_before_the_first_step(manual):
    class Lbfgs(ConvModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = not manual

        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters())

        def training_step(self, batch, batch_idx):
            raise AssertionError("was refused before")

    with pytest.raises(MisconfigurationException, match="LBFGS evaluates the loss several times per step"):
        trainer(all_callbacks(forward_fn=run_network)).fit(Lbfgs(), Data())


def test_hooks_are_gone_after_fit_and_a_second_fit_takes_its_steps_once():
    module, callbacks = MadeEarly(True), all_callbacks()
    for _ in range(2):
        record = Record()
        trainer([callbacks[0], record, *callbacks[1:]], max_epochs=1).fit(module, Data())
        assert not module.optimizer._optimizer_step_pre_hooks
        assert len(module.optimizer._optimizer_step_post_hooks) == 2  # those of Record
        module.optimizer._optimizer_step_post_hooks.clear()
        assert len(record.steps) == 8
    assert all(q.scale_grad is None for q in quantizers(module))
