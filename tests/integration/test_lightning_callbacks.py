"""Lightning's own callbacks, each together with all five of ours."""

import copy
import csv
import math

import lightning as L
import pytest
import torch
from common import all_callbacks, assert_same, snapshot
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    BatchSizeFinder,
    DeviceStatsMonitor,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    ModelSummary,
    OnExceptionCheckpoint,
    RichModelSummary,
    RichProgressBar,
    StochasticWeightAveraging,
    ThroughputMonitor,
    Timer,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_summary import summarize
from models import ConvModule, Data, dataset, loader, trainer
from reference import WeightLoop
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_avg_fn
from torch.utils.data import DataLoader, TensorDataset

from lightning_qat_osc import (
    BatchNormReestimation,
    IterativeFreezing,
    OscillationDampening,
    OscillationTracking,
    QuantizationAwareTraining,
    oscillation_states,
)

pytestmark = [
    # the short runs here use a high momentum, so that something freezes
    pytest.mark.filterwarnings("ignore:.*below twice the momentum.*"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided.*"),
]


def qat():
    return all_callbacks()[0]


def others():
    return all_callbacks()[1:]


def frozen_share(module):
    frozen = torch.cat([s.frozen.flatten() for s in oscillation_states(module).values()])
    return frozen.double().mean().item()


def integers(layer):
    scale = layer.weight_quantizer.scale.detach()
    return (layer.weight.detach() / scale).round().clamp(-2, 1)


class AtValidation(L.Callback):
    """Keeps the share of frozen weights at the end of each validation."""

    def __init__(self):
        self.shares = []

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.shares.append(frozen_share(pl_module))


class CrashAt(L.Callback):
    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            raise KeyboardInterrupt


def test_the_best_checkpoint_by_an_oscillation_figure_is_that_of_its_epoch(tmp_path):
    at = AtValidation()
    best = ModelCheckpoint(tmp_path, monitor="oscillation/frozen", mode="max", filename="{epoch}")
    t = trainer([*all_callbacks(), at, best], max_epochs=5, enable_checkpointing=True)
    t.fit(ConvModule(lr=0.3), Data())
    assert len(at.shares) == 5
    assert at.shares[0] < max(at.shares)
    assert best.best_model_score.item() == pytest.approx(max(at.shares))
    epoch = at.shares.index(max(at.shares))
    assert best.best_model_path.endswith(f"epoch={epoch}.ckpt")
    saved = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    frozen = torch.cat([value.flatten() for name, value in saved.items() if name.endswith("oscillation.frozen")])
    assert frozen.double().mean().item() == pytest.approx(max(at.shares))


def test_training_stops_early_at_an_oscillation_figure():
    at, module = AtValidation(), ConvModule(lr=0.3)
    stop = EarlyStopping("oscillation/frozen", mode="max", patience=100, stopping_threshold=0.01)
    t = trainer([*all_callbacks(), at, stop], max_epochs=12)
    t.fit(module, Data())
    assert [share > 0.01 for share in at.shares] == [False] * (len(at.shares) - 1) + [True]
    assert 1 < t.current_epoch == len(at.shares) < 12


class Averages(L.Callback):
    """Averages the parameters independently, and checks frozen integers wherever averaged weights may be in place."""

    def __init__(self, decay):
        self.decay, self.average, self.looks = decay, None, []

    def on_train_batch_end(self, trainer, pl_module, *args):
        now = {name: p.detach().double() for name, p in pl_module.named_parameters()}
        if self.average is None:
            self.average = now
        else:
            self.average = {n: self.decay * a + (1 - self.decay) * now[n] for n, a in self.average.items()}

    def look(self, pl_module):
        states = oscillation_states(pl_module)
        layers = dict(pl_module.named_modules())
        held = [  # exactly s z, which a mean of values before and after freezing is not
            (layers[name].weight == layers[name].weight_quantizer.scale * s.weight_int)[s.frozen]
            for name, s in states.items()
        ]
        self.looks.append((sum(len(h) for h in held), all(bool(h.all()) for h in held)))

    def on_validation_batch_start(self, trainer, pl_module, *args):
        if not trainer.sanity_checking:
            self.look(pl_module)


def test_averaged_weights_are_those_of_the_mean_and_keep_frozen_integers():
    module, averages = ConvModule(lr=1.0), Averages(0.8)
    averaging = lightning_callbacks.WeightAveraging(avg_fn=get_ema_avg_fn(0.8))
    tracking, dampening, _, batch_norm = others()
    freezing = IterativeFreezing(threshold=0.1)  # freezes many weights in mid-epoch, at the second oscillation
    trainer([qat(), averaging, tracking, dampening, freezing, batch_norm, averages], max_epochs=8).fit(module, Data())
    averages.look(module)
    assert all(held for _, held in averages.looks)
    assert averages.looks[-1][0] >= 2
    frozen = {f"{name}.weight": s.frozen for name, s in oscillation_states(module).items()}
    for name, p in module.named_parameters():
        free = ~frozen.get(name, torch.zeros_like(p, dtype=torch.bool))
        assert torch.allclose(p.detach().double()[free], averages.average[name][free], rtol=1e-4, atol=1e-6), name


def test_a_run_with_averaged_weights_resumes_to_the_same_bits(tmp_path):
    def fit(*extra, ckpt_path=None):
        torch.manual_seed(5)
        module = ConvModule(lr=0.3)
        averaging = lightning_callbacks.WeightAveraging(avg_fn=get_ema_avg_fn(0.8))
        t = trainer([qat(), averaging, *others(), *extra], max_epochs=4, enable_checkpointing=bool(extra))
        t.fit(module, Data(), ckpt_path=ckpt_path)
        return module

    unbroken = fit()
    with pytest.raises(SystemExit):
        fit(ModelCheckpoint(tmp_path, filename="stop"), CrashAt(2))
    assert frozen_share(unbroken) > 0
    assert_same(snapshot(unbroken), snapshot(fit(ckpt_path=tmp_path / "stop.ckpt")))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("WeightAveraging", {}),
        ("EMAWeightAveraging", {}),
        ("StochasticWeightAveraging", {"swa_lrs": 0.1}),
    ],
)
def test_a_copy_of_the_model_made_before_the_quantizers_is_refused(name, arguments):
    if not hasattr(lightning_callbacks, name):
        pytest.skip(f"this Lightning has no {name}")
    module = ConvModule()
    before = copy.deepcopy(module.state_dict())
    t = trainer([getattr(lightning_callbacks, name)(**arguments), *all_callbacks()])
    with pytest.raises(MisconfigurationException, match=f"QuantizationAwareTraining must come before {name}"):
        t.fit(module, Data())
    assert t.global_step == 0
    assert_same(before, module.state_dict())  # no quantizers were inserted


@pytest.mark.parametrize("last", [IterativeFreezing, BatchNormReestimation])
def test_averaged_weights_that_come_too_late_are_refused(last):
    averaging = lightning_callbacks.WeightAveraging()
    t = trainer([qat(), last(), averaging])
    with pytest.raises(MisconfigurationException, match=f"WeightAveraging must come before {last.__name__}"):
        t.fit(ConvModule(), Data())
    assert t.global_step == 0


def test_frozen_weights_that_come_too_late_for_averaged_ones_are_refused():
    averaging = lightning_callbacks.WeightAveraging()
    t = trainer([qat(), averaging, BatchNormReestimation(), IterativeFreezing()])
    with pytest.raises(MisconfigurationException, match="IterativeFreezing must come before BatchNormReestimation"):
        t.fit(ConvModule(), Data())
    assert t.global_step == 0


class EpochStarts(L.Callback):
    def __init__(self):
        self.parameters = []

    def on_train_epoch_start(self, trainer, pl_module):
        self.parameters.append({n: p.detach().double().clone() for n, p in pl_module.named_parameters()})


# SWA averages at the start of each epoch from the second on; its extra epoch only re-estimates batch norm
@pytest.mark.filterwarnings("ignore:.*SWA is currently only supported every epoch.*")
@pytest.mark.filterwarnings("ignore:.*`lr_scheduler.step.*` before `optimizer.step.*")
def test_stochastic_weight_averaging_ends_with_the_mean_of_its_epochs():
    module, starts = ConvModule(lr=0.3), EpochStarts()
    averaging = StochasticWeightAveraging(swa_lrs=0.3, swa_epoch_start=2, annealing_epochs=1)
    t = trainer([qat(), starts, averaging, *others()], max_epochs=4)
    t.fit(module, Data())
    assert t.global_step == 4 * 8 + 1  # Lightning ends the extra epoch with a step without gradients
    states = oscillation_states(module)
    frozen = {f"{name}.weight": s.frozen for name, s in states.items()}
    assert any(bool(f.any()) for f in frozen.values())
    for name, p in module.named_parameters():
        mean = torch.stack([at[name] for at in starts.parameters[1:4]]).mean(0)
        free = ~frozen.get(name, torch.zeros_like(p, dtype=torch.bool))
        assert torch.allclose(p.detach().double()[free], mean[free], rtol=1e-4, atol=1e-6), name
    for name, state in states.items():
        layer = dict(module.named_modules())[name]
        assert torch.equal(layer.weight[state.frozen], (layer.weight_quantizer.scale * state.weight_int)[state.frozen])


@pytest.mark.filterwarnings("ignore:.*`lr_scheduler.step.*` before `optimizer.step.*")
@pytest.mark.xfail(strict=True, reason="it adds an epoch without steps of its own to the run before schedules are laid")
def test_schedules_end_with_the_steps_under_stochastic_weight_averaging(tmp_path):
    logger = CSVLogger(tmp_path)
    averaging = StochasticWeightAveraging(swa_lrs=0.3, swa_epoch_start=2)
    t = trainer([qat(), averaging, *others()], max_epochs=4, logger=logger, log_every_n_steps=1)
    t.fit(ConvModule(lr=0.3), Data())
    with open(f"{logger.log_dir}/metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["oscillation/dampening_weight"]]
    assert float(rows[-1]["oscillation/dampening_weight"]) == pytest.approx(1e-2, rel=0.01)


def test_learning_rates_are_logged_for_the_users_groups_alone(tmp_path):
    class Groups(ConvModule):
        def configure_optimizers(self):
            first, *rest = self.parameters()
            groups = [{"params": [first]}, {"params": rest, "lr": 0.02}]
            optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

    logger = CSVLogger(tmp_path)
    monitor = LearningRateMonitor("epoch", log_momentum=True, log_weight_decay=True)
    trainer([*all_callbacks(), monitor], logger=logger, log_every_n_steps=4).fit(Groups(), Data())
    with open(f"{logger.log_dir}/metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["lr-SGD/pg1"]]
    assert {key for key in rows[0] if key.startswith("lr-")} == {
        f"lr-SGD/pg{i}{what}" for i in (1, 2) for what in ("", "-momentum", "-weight_decay")
    }
    assert [float(row["lr-SGD/pg1"]) for row in rows] == [0.1, 0.05]
    assert [float(row["lr-SGD/pg2"]) for row in rows] == [0.02, 0.01]


class WithBackbone(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
        )
        self.head = nn.Linear(8, 3)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.head(self.backbone(batch[0]).mean((2, 3))), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.SGD(trained, lr=0.3, momentum=0.9, weight_decay=0.1)


class FromEpoch(BaseFinetuning):
    """Makes the backbone trainable from the given epoch on, also in a run that resumes after it."""

    def __init__(self, epoch, by_hand=False, train_bn=True):
        super().__init__()
        self.epoch, self.by_hand, self.train_bn = epoch, by_hand, train_bn

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.backbone, train_bn=self.train_bn)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch < self.epoch:
            return
        self.make_trainable(pl_module.backbone)
        if epoch == self.epoch:
            known = {id(p) for group in optimizer.param_groups for p in group["params"]}
            new = [p for p in pl_module.backbone.parameters() if self.by_hand or id(p) not in known]
            optimizer.add_param_group({"params": new, "lr": 0.3})


class Steps(L.Callback):
    """Records the backbone after each step, and checks that no optimizer has a parameter twice."""

    def __init__(self):
        self.weights, self.scales, self.integers, self.stripped = [], [], [], []

    def record(self, module):
        layers = [module.backbone[0], module.backbone[3]]
        self.weights.append([layer.weight.detach().clone() for layer in layers])
        self.scales.append(
            torch.cat([q.scale.detach() for m in layers for q in (m.weight_quantizer, m.input_quantizer)])
        )
        self.integers.append([integers(layer).int().flatten().tolist() for layer in layers])

    def on_train_start(self, trainer, pl_module):
        self.record(pl_module)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        # the user's optimizer must not see gradients of scales
        scales = [p for n, p in pl_module.named_parameters() if n.endswith("quantizer.scale")]
        self.stripped.append(all(p.grad is None for p in scales))

    def on_train_batch_end(self, trainer, pl_module, *args):
        for optimizer in trainer.optimizers:
            ids = [id(p) for group in optimizer.param_groups for p in group["params"]]
            assert len(ids) == len(set(ids))
        self.record(pl_module)


# Lightning's warning about batch norm that trains from the start
@pytest.mark.filterwarnings("ignore:.*already exist within another group of this optimizer.*")
@pytest.mark.parametrize("kind", ["BackboneFinetuning", "BaseFinetuning", "by hand"])
def test_a_frozen_backbone_is_quantized_and_tracked_from_its_first_step_on(kind):
    module, steps = WithBackbone(), Steps()
    finetuning = {
        "BackboneFinetuning": lambda: BackboneFinetuning(2, backbone_initial_lr=0.3, train_bn=True),
        "BaseFinetuning": lambda: FromEpoch(2),
        "by hand": lambda: FromEpoch(2, by_hand=True, train_bn=False),
    }[kind]()
    callbacks = all_callbacks()
    frozen_first = IterativeFreezing(threshold=1.0)
    callbacks[3] = frozen_first  # nothing freezes, so that the slow loop sees every integer
    t = trainer([callbacks[0], finetuning, *callbacks[1:], steps], max_epochs=7)
    t.fit(module, Data())
    assert len(steps.weights) == 7 * 8 + 1
    for before, after in zip(steps.weights[:17], steps.weights[1:17]):
        assert all(torch.equal(a, b) for a, b in zip(before, after))
    assert all(torch.equal(s, steps.scales[0]) for s in steps.scales[:17])
    assert not any(torch.equal(a, b) for a, b in zip(steps.weights[16], steps.weights[-1]))
    in_use = steps.scales[0] != 1.0
    assert in_use.all()
    assert (steps.scales[-1] != steps.scales[0]).all()
    assert all(steps.stripped)
    states = oscillation_states(module)
    for i, name in enumerate(("backbone.0", "backbone.3")):
        loops = [WeightLoop(z, 0.1) for z in steps.integers[0][i]]
        for step in steps.integers[17:]:
            for loop, z in zip(loops, step[i]):
                loop.step(z)
        assert states[name].frequency.flatten().tolist() == pytest.approx([w.frequency for w in loops], abs=1e-6)
        assert states[name].weight_int.flatten().tolist() == [w.integer for w in loops]
        assert states[name].frequency.any()


def test_backbone_weights_freeze_and_are_dampened_once_they_train():
    def fit(*extra):
        torch.manual_seed(3)
        module = WithBackbone()
        callbacks = [qat(), FromEpoch(1), OscillationTracking(momentum=0.1), *extra]
        trainer(callbacks, max_epochs=5).fit(module, Data())
        return module

    plain, dampened = fit(), fit(OscillationDampening(final_weight=1.0, anneal_start=0.0))
    frozen = fit(IterativeFreezing(threshold=0.12, final_threshold=0.05))

    def distance(module):  # mean distance of the latent weights from the grid
        layer = module.backbone[3]
        v = (layer.weight / layer.weight_quantizer.scale).detach().clamp(-2, 1)
        return (v - v.round()).abs().mean()

    assert distance(dampened) < 0.5 * distance(plain)
    state = oscillation_states(frozen)["backbone.3"]
    assert state.frozen.any()
    assert torch.equal(integers(frozen.backbone[3])[state.frozen], state.weight_int[state.frozen].float())


@pytest.mark.parametrize("stop", [1, 3])
def test_a_run_that_unfreezes_resumes_to_the_same_bits(tmp_path, stop):
    def fit(*extra, ckpt_path=None):
        torch.manual_seed(5)
        module = WithBackbone()
        t = trainer([qat(), FromEpoch(2), *others(), *extra], max_epochs=5, enable_checkpointing=bool(extra))
        t.fit(module, Data(), ckpt_path=ckpt_path)
        return module

    unbroken = fit()
    with pytest.raises(SystemExit):
        fit(ModelCheckpoint(tmp_path, filename="stop"), CrashAt(stop))
    assert_same(snapshot(unbroken), snapshot(fit(ckpt_path=tmp_path / "stop.ckpt")))


def test_weights_that_their_owner_holds_fixed_stay_so_while_their_scales_learn():
    module = ConvModule(lr=0.3)
    module.point.weight.requires_grad_(False)
    before = module.point.weight.clone()
    scales = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            scales.append(pl_module.point.weight_quantizer.scale.item())

    callbacks = all_callbacks()
    callbacks[0] = QuantizationAwareTraining(2, 3, first_last_bits=None, scale_learning_rate=0.3)  # integers change
    trainer([*callbacks, Look()], max_epochs=6).fit(module, Data())
    assert torch.equal(module.point.weight, before)
    assert len(set(scales)) == len(scales)
    assert not oscillation_states(module)["point"].frozen.any()


def test_batch_norm_that_finetuning_froze_keeps_its_statistics():
    module = WithBackbone()
    with torch.no_grad():
        module.backbone[1].running_var.fill_(4.0)
    callbacks = all_callbacks()
    trainer([callbacks[0], FromEpoch(9, train_bn=False), *callbacks[1:]], max_epochs=3).fit(module, Data())
    assert module.backbone[1].running_var.tolist() == [4.0] * 4
    assert module.backbone[1].running_mean.tolist() == [0.0] * 4


@pytest.mark.parametrize(
    ("schedule", "max_steps", "steps"), [({0: 4, 2: 2}, -1, 2 * 2 + 2 * 4), ({0: 2}, -1, 16), ({1: 8}, 9, 9)]
)
def test_schedules_end_with_the_run_under_scheduled_accumulation(tmp_path, schedule, max_steps, steps):
    logger = CSVLogger(tmp_path)
    callbacks = [*all_callbacks(), GradientAccumulationScheduler(schedule)]
    t = trainer(callbacks, max_epochs=4, max_steps=max_steps, logger=logger, log_every_n_steps=1)
    t.fit(ConvModule(lr=0.3), Data())
    assert t.global_step == steps
    with open(f"{logger.log_dir}/metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["oscillation/dampening_weight"]]
    # half a cosine that begins after a quarter of the steps; the last step has the index steps - 1
    expected = 1e-2 * 0.5 * (1 - math.cos(math.pi * (steps - 1 - steps / 4) / (steps - steps / 4)))
    assert float(rows[-1]["oscillation/dampening_weight"]) == pytest.approx(expected)


class Searched(ConvModule):
    """Has the attributes that Lightning's finders look for, and its own data loaders."""

    def __init__(self):
        super().__init__(lr=0.1)
        self.lr, self.batch_size = 0.1, 8

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9, weight_decay=0.1)

    def train_dataloader(self):
        return loader(batch_size=self.batch_size)

    def val_dataloader(self):
        return loader(32, 16)


class Begin(L.Callback):
    """Records the state before the first training step."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 0:
            self.state, self.size = snapshot(pl_module), len(batch[0])
            self.lr = trainer.optimizers[0].param_groups[0]["lr"]
            self.momenta = [s for s in trainer.optimizers[0].state.values() if s.get("momentum_buffer") is not None]


def searched(finder, tmp_path, **kwargs):
    torch.manual_seed(7)
    module, begin = Searched(), Begin()
    for name, value in kwargs.items():
        setattr(module, name, value)
    t = trainer([*([] if finder is None else [finder]), *all_callbacks(), begin], default_root_dir=tmp_path)
    t.fit(module)
    return module, begin


class InEpoch(LearningRateFinder):
    """Searches in the first epoch, as in Lightning's example of a custom finder, when ranges are already calibrated."""

    def on_fit_start(self, *args):
        pass

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 0:
            self.lr_find(trainer, pl_module)


@pytest.mark.parametrize("kind", [LearningRateFinder, InEpoch])
def test_a_search_for_the_learning_rate_leaves_no_trace(tmp_path, kind):
    finder = kind(min_lr=1e-3, max_lr=3.0, num_training_steps=24, early_stop_threshold=None)
    module, begin = searched(finder, tmp_path)
    found = finder.optimal_lr.suggestion()
    assert found == module.lr == begin.lr
    assert found != 0.1
    assert not begin.momenta
    plain, plainly = searched(None, tmp_path, lr=found)
    assert_same(plainly.state, begin.state)
    assert_same(snapshot(plain), snapshot(module))


def test_a_search_before_the_first_epoch_is_one_in_full_precision(tmp_path):
    active = []

    class Watched(Searched):
        def training_step(self, batch, batch_idx):
            if torch.is_grad_enabled():
                active.append(self.point.weight_quantizer.active)
            return super().training_step(batch, batch_idx)

    finder = LearningRateFinder(num_training_steps=12, early_stop_threshold=None)
    trainer([finder, *all_callbacks()], default_root_dir=tmp_path).fit(Watched())
    assert active == [False] * 12 + [True] * 16


def test_a_search_within_the_first_epoch_moves_scales_as_training_does(tmp_path):
    seen = {}

    class Watched(Searched):
        def training_step(self, batch, batch_idx):
            if torch.is_grad_enabled():
                scales = [p for n, p in self.named_parameters() if n.endswith("quantizer.scale")]
                seen.setdefault("positive", []).append(all(bool((s > 0).all()) for s in scales))
                seen.setdefault("on", []).append(self.point.weight_quantizer.active)
            return super().training_step(batch, batch_idx)

    finder = InEpoch(min_lr=1e-3, max_lr=3.0, num_training_steps=24, early_stop_threshold=None)
    trainer([finder, *all_callbacks()], default_root_dir=tmp_path, max_epochs=4).fit(Watched())
    assert len(seen["on"]) == 24 + 4 * 8
    assert all(seen["on"])
    assert all(seen["positive"])


def test_a_search_for_the_batch_size_leaves_no_trace(tmp_path):
    finder = BatchSizeFinder(steps_per_trial=2, init_val=4, max_trials=3)
    module, begin = searched(finder, tmp_path)
    assert finder.optimal_batch_size == module.batch_size == begin.size == 16
    assert not begin.momenta
    plain, plainly = searched(None, tmp_path, batch_size=16)
    assert_same(plainly.state, begin.state)
    assert_same(snapshot(plain), snapshot(module))


@pytest.mark.parametrize("depth", [1, -1])
def test_the_summary_counts_each_parameter_once(depth, capsys, caplog):
    module = ConvModule()
    weights = sum(p.numel() for p in module.parameters())
    with caplog.at_level("INFO", "lightning.pytorch"):
        trainer([*all_callbacks(), ModelSummary(depth)], max_steps=1, limit_val_batches=0).fit(module, Data())
    summary = summarize(module, max_depth=depth)
    assert summary.total_parameters == weights + 4 * 2  # a scale for each weight and each input
    assert summary.trainable_parameters == weights  # after fit, scales have requires_grad=False
    by_name = dict(zip(summary.layer_names, zip(summary.layer_types, summary.param_nums)))
    assert by_name["stem"] == ("QuantizedConv2d", 4 * 9 + 2)
    assert by_name["head"] == ("QuantizedLinear", 8 * 3 + 3 + 2)
    assert ("stem.weight_quantizer" in by_name) == (depth == -1)
    assert "QuantizedConv2d" in caplog.text


def test_rich_summary_and_progress_bar(capsys):
    bar = RichProgressBar()
    callbacks = [*all_callbacks(), RichModelSummary(2), bar]
    trainer(callbacks, max_epochs=1, enable_progress_bar=True, enable_model_summary=True).fit(ConvModule(), Data())
    out = capsys.readouterr().out
    assert "QuantizedConv2d" in out
    assert "WeightQuantizer" in out
    assert "Epoch 0/0" in out
    assert "8/8" in out


def test_pruning_is_refused_by_name():
    module = ConvModule()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(MisconfigurationException, match=r"QuantizationAwareTraining.*ModelPruning"):
        trainer([*all_callbacks(), ModelPruning("l1_unstructured", amount=0.5)]).fit(module, Data())
    assert_same(before, module.state_dict())


def test_a_network_pruned_before_keeps_its_mask():
    module = ConvModule()
    nn.utils.prune.l1_unstructured(module.point, "weight", amount=0.5)
    with pytest.warns(UserWarning, match="'point' computes its weight from other parameters"):
        trainer(all_callbacks()).fit(module, Data())
    assert module.point.weight_quantizer.calibrated
    assert (module.point.weight[module.point.weight_mask == 0] == 0).all()


def test_a_network_pruned_for_good_trains():
    module = ConvModule()
    nn.utils.prune.l1_unstructured(module.point, "weight", amount=0.5)
    nn.utils.prune.remove(module.point, "weight")
    trainer(all_callbacks()).fit(module, Data())
    assert module.point.weight_quantizer.calibrated


@pytest.mark.filterwarnings("ignore:.*you need to define a `flops_per_batch`.*")
@pytest.mark.parametrize("kind", ["timer", "throughput", "devices"])
def test_monitors(kind, tmp_path):
    torch.manual_seed(2)
    plain = ConvModule(lr=0.3)
    trainer(all_callbacks()).fit(plain, Data())
    if kind == "devices":
        pytest.importorskip("psutil")
    monitor = {
        "timer": lambda: Timer({"minutes": 5}, interval="step"),
        "throughput": lambda: ThroughputMonitor(lambda batch: len(batch[0])),
        "devices": lambda: DeviceStatsMonitor(cpu_stats=True),
    }[kind]()
    torch.manual_seed(2)
    module = ConvModule(lr=0.3)
    trainer([*all_callbacks(), monitor], logger=CSVLogger(tmp_path), log_every_n_steps=4).fit(module, Data())
    assert_same(snapshot(plain), snapshot(module))


class CrashInEpoch(L.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 19:
            raise KeyboardInterrupt


# Lightning's own warnings, whenever this callback is in the list
@pytest.mark.filterwarnings("ignore:.*was called without a model. The last model.*")
@pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available.*")
@pytest.mark.filterwarnings("ignore:.*dataloader is not resumable.*")
def test_a_run_resumes_from_the_checkpoint_of_its_exception(tmp_path):
    same = TensorDataset(*(t.repeat(8, *[1] * (t.dim() - 1)) for t in dataset(8).tensors))  # every batch is the same

    def fit(*extra):
        torch.manual_seed(5)
        module = ConvModule(lr=0.3)
        t = trainer([*all_callbacks(), *extra], max_epochs=4, enable_checkpointing=bool(extra))
        t.fit(module, DataLoader(same, batch_size=8), loader(16))
        assert t.global_step == 32
        return module

    unbroken = fit()
    with pytest.raises(SystemExit):
        fit(OnExceptionCheckpoint(tmp_path), CrashInEpoch())
    assert (tmp_path / "on_exception.ckpt").exists()
    assert_same(snapshot(unbroken), snapshot(fit(OnExceptionCheckpoint(tmp_path))))  # resumes automatically
