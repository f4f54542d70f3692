"""Options of the Trainer and kinds of data loaders, each with all five callbacks."""

import csv
import time

import lightning as L
import pytest
import torch
from common import all_callbacks, assert_same, snapshot
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from models import ConvModule, Data, dataset, loader, trainer
from reference import WeightLoop
from torch.utils.data import DataLoader, IterableDataset

from lightning_qat_osc import (
    BatchNormReestimation,
    IterativeFreezing,
    OscillationDampening,
    OscillationTracking,
    QuantizationAwareTraining,
    oscillation_states,
)

# the short runs here use a high momentum, so that something freezes
pytestmark = pytest.mark.filterwarnings("ignore:.*below twice the momentum.*")


def fit(module=None, *data, extra=(), **kwargs):
    torch.manual_seed(3)
    module = ConvModule(lr=0.3) if module is None else module
    t = trainer([*all_callbacks(), *extra], **kwargs)
    t.fit(module, *(data or (Data(),)))
    return module, t


class Integers(L.Callback):
    """Records the integers of every weight, computed independently, before the first step and after each."""

    def __init__(self):
        self.history = []

    def record(self, pl_module):
        layers = {name: m for name, m in pl_module.named_modules() if hasattr(m, "weight_quantizer")}
        self.history.append(
            {
                name: (m.weight.detach() / m.weight_quantizer.scale.detach()).round().clamp(-2, 1).flatten().tolist()
                for name, m in layers.items()
            }
        )

    def on_train_start(self, trainer, pl_module):
        self.record(pl_module)

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step > len(self.history) - 1:
            self.record(pl_module)


def assert_followed(module, history):
    """Check the states against the slow loop over the integers, with one step of the loop per optimizer step."""
    oscillated = False
    for name, state in oscillation_states(module).items():
        loops = [WeightLoop(int(z), 0.1) for z in history[0][name]]
        for step in history[1:]:
            for loop, z in zip(loops, step[name]):
                loop.step(int(z))
        free = (~state.frozen.flatten()).tolist()  # the loops do not freeze
        mine, theirs = state.frequency.flatten().tolist(), [loop.frequency for loop in loops]
        assert [f for f, keep in zip(mine, free) if keep] == pytest.approx(
            [f for f, keep in zip(theirs, free) if keep], abs=1e-6
        )
        oscillated |= any(theirs)
        assert state.weight_int.flatten().tolist() == history[-1][name]
    assert oscillated or len(history) < 16  # so that there is something to compare


# option, optimizer steps, validations
@pytest.mark.parametrize(
    ("options", "steps", "validations"),
    [
        ({"fast_dev_run": True}, 1, 1),
        ({"fast_dev_run": 3}, 3, 1),
        ({"limit_train_batches": 3}, 6, 2),
        ({"limit_train_batches": 0.5}, 8, 2),
        ({"limit_val_batches": 0}, 16, 0),
        ({"limit_val_batches": 0.5}, 16, 2),
        ({"val_check_interval": 3}, 16, 4),
        ({"val_check_interval": 0.25}, 16, 8),
        ({"val_check_interval": 5, "check_val_every_n_epoch": None, "max_epochs": 3}, 24, 4),
        ({"check_val_every_n_epoch": 2, "max_epochs": 4}, 32, 2),
        ({"max_steps": 5}, 5, 0),
        ({"max_steps": 5, "max_epochs": -1}, 5, 0),
        ({"max_time": {"minutes": 5}}, 16, 2),
        ({"num_sanity_val_steps": 0}, 16, 2),
        ({"num_sanity_val_steps": -1}, 16, 2),
        ({"reload_dataloaders_every_n_epochs": 1}, 16, 2),
        ({"accumulate_grad_batches": 3}, 6, 2),
        ({"detect_anomaly": True}, 16, 2),
        ({"deterministic": True}, 16, 2),
        ({"inference_mode": False}, 16, 2),
        ({"inference_mode": True}, 16, 2),
        ({"log_every_n_steps": 0}, 16, 2),
        ({"log_every_n_steps": 1}, 16, 2),
    ],
    ids=str,
)
def test_options(options, steps, validations):
    class Count(L.Callback):
        validations = 0

        def on_validation_epoch_end(self, trainer, pl_module):
            self.validations += not trainer.sanity_checking

    count, integers = Count(), Integers()
    module, t = fit(extra=(count, integers), **options)
    assert t.global_step == len(integers.history) - 1 == steps
    assert count.validations == validations
    assert_followed(module, integers.history)
    assert set(oscillation_states(module)) == {"stem", "depthwise", "point", "head"}
    # batch norm was re-estimated at the end of fit, under all options
    running = module.bn1.running_mean.clone()
    batches = 1 if options.get("fast_dev_run") is True else 3
    inputs = torch.cat([batch[0] for batch in list(loader())[:batches]])
    with torch.no_grad():
        seen = module.stem(inputs)
    assert torch.allclose(running, seen.mean((0, 2, 3)), atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"limit_val_batches": 0},
        {"num_sanity_val_steps": 0},
        {"num_sanity_val_steps": -1},
        {"val_check_interval": 0.25},
        {"inference_mode": False},
        {"log_every_n_steps": 1},
        {"detect_anomaly": True},
        {"reload_dataloaders_every_n_epochs": 1},
        {"max_time": {"minutes": 5}},
        {"max_steps": 16},
    ],
    ids=str,
)
def test_options_that_are_none_of_trainings_business_leave_it_alone(options):
    assert_same(snapshot(fit()[0]), snapshot(fit(**options)[0]))


@pytest.mark.filterwarnings("ignore:You requested to overfit.*")
@pytest.mark.parametrize("batches", [2, 0.5])
def test_overfitting_calibrates_and_trains_on_the_same_batches(batches):
    class Targets(ConvModule):
        seen = ()

        def training_step(self, batch, batch_idx):
            self.seen = (*self.seen, tuple(batch[1].tolist()))
            return super().training_step(batch, batch_idx)

    module, t = fit(Targets(lr=0.3), overfit_batches=batches)
    count = 2 if batches == 2 else 4
    assert t.global_step == 2 * count
    expected = {tuple(batch[1].tolist()) for batch in list(loader())[:count]}
    assert set(module.seen) == expected


@pytest.mark.parametrize("limit", [1, 0.5, 0])
def test_limited_tests(limit):
    module, _ = fit()
    t = trainer(all_callbacks(), limit_test_batches=limit, limit_predict_batches=limit)
    results = t.test(module, Data(), verbose=False)
    assert [set(result) for result in results] == ([{"test_loss"}] if limit else [])
    assert len(t.predict(module, Data()) or []) == (1 if limit else 0)


def test_time_that_is_up_stops_a_run():
    class Slow(ConvModule):
        def on_train_batch_start(self, batch, batch_idx):
            time.sleep(0.02)

    integers = Integers()
    module, t = fit(Slow(lr=0.3), extra=(integers,), max_time={"seconds": 0.4}, max_epochs=50)
    assert 1 <= t.global_step < 400
    assert_followed(module, integers.history)


# Lightning's message about what barebones leaves out
@pytest.mark.filterwarnings("ignore:.*Trainer\\(barebones=True\\)` started running.*")
def test_barebones_runs_without_a_log():
    class Silent(ConvModule):
        def log(self, *args, **kwargs):
            raise AssertionError("nobody is to log")

        def training_step(self, batch, batch_idx):
            return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx):
            self(batch[0])

    callbacks = all_callbacks()
    callbacks[-1] = BatchNormReestimation(num_batches=3, log_divergence=True)
    torch.manual_seed(3)
    module = Silent(lr=0.3)
    t = L.Trainer(accelerator="cpu", devices=1, barebones=True, max_epochs=2, callbacks=callbacks)
    t.fit(module, Data())
    assert t.global_step == 16
    assert_same(snapshot(fit()[0]), snapshot(module))


@pytest.mark.parametrize(("every", "rows"), [(0, 0), (1, 16), (5, 3)])
def test_logging_at_the_steps_that_loggers_take(tmp_path, every, rows):
    logger = CSVLogger(tmp_path)
    fit(logger=logger, log_every_n_steps=every, limit_val_batches=0)
    names = ["oscillation/frequency", "oscillation/dampening_weight", "oscillation/freeze_threshold"]
    if rows == 0:
        assert not logger.experiment.metrics
        return
    with open(f"{logger.log_dir}/metrics.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    for name in names:
        assert len([line for line in lines if line[name]]) == rows


class Stream(IterableDataset):
    def __iter__(self):
        return iter(dataset())


def test_a_stream_needs_to_be_told_its_end_before_the_first_step():
    module = ConvModule(lr=0.3)
    for callbacks, what in (
        (all_callbacks(), "dampening weight"),
        ([*all_callbacks()[:2], all_callbacks()[3]], "freezing threshold"),
    ):
        t = trainer(callbacks)
        with pytest.raises(MisconfigurationException, match=rf"The {what}.*max_steps=.*limit_train_batches="):
            t.fit(module, DataLoader(Stream(), batch_size=8), loader(16))
        assert t.global_step == 0


@pytest.mark.parametrize(
    ("options", "steps"),
    [({"max_steps": 11}, 11), ({"max_steps": 11, "max_epochs": -1}, 11), ({"limit_train_batches": 5}, 10)],
)
def test_a_stream_that_is_told_its_end_trains_as_a_loader_with_a_length(options, steps):
    module, t = fit(None, DataLoader(Stream(), batch_size=8), loader(16), **options)
    assert t.global_step == steps
    assert_same(snapshot(fit(None, loader(), loader(16), **options)[0]), snapshot(module))


def test_a_stream_without_schedules_needs_no_end():
    torch.manual_seed(3)
    callbacks = all_callbacks()
    callbacks[2] = OscillationDampening(final_weight=1e-2, initial_weight=1e-2)
    callbacks[3] = IterativeFreezing(threshold=0.2)
    t = trainer(callbacks)
    t.fit(ConvModule(lr=0.3), DataLoader(Stream(), batch_size=8), loader(16))
    assert t.global_step == 16


def test_persistent_workers_change_nothing():
    module, _ = fit(None, loader(num_workers=1, persistent_workers=True), loader(16))
    assert_same(snapshot(fit(None, loader(), loader(16))[0]), snapshot(module))


def test_persistent_workers_of_a_stream():
    data = DataLoader(Stream(), batch_size=8, num_workers=1, persistent_workers=True)
    module, _ = fit(None, data, loader(16), limit_train_batches=5)
    assert_same(
        snapshot(fit(None, DataLoader(Stream(), batch_size=8), loader(16), limit_train_batches=5)[0]), snapshot(module)
    )


class Several(ConvModule):
    """Sums the losses over all loaders."""

    def training_step(self, batch, batch_idx):
        parts = batch.values() if isinstance(batch, dict) else batch
        parts = [part for part in parts if part is not None]
        self.count = getattr(self, "count", 0) + torch.is_grad_enabled()
        return sum(torch.nn.functional.cross_entropy(self(part[0]), part[1]) for part in parts)


@pytest.mark.parametrize("as_dict", [True, False])
@pytest.mark.parametrize(("mode", "steps"), [("min_size", 4), ("max_size", 8), ("max_size_cycle", 8)])
def test_combined_loaders(mode, steps, as_dict):
    parts = [loader(64), loader(32)]
    combined = CombinedLoader({"a": parts[0], "b": parts[1]} if as_dict else parts, mode)
    module, integers = Several(lr=0.1), Integers()
    _, t = fit(module, combined, loader(16), extra=(integers,), max_epochs=1)
    assert t.global_step == steps
    assert_followed(module, integers.history)
    assert module.depthwise.input_quantizer.calibrated


def test_a_combined_loader_serves_reestimation_outside_fit():
    class Combined(Data):
        def train_dataloader(self):
            return CombinedLoader([loader(64), loader(32)], "max_size_cycle")

    module, _ = fit(Several(lr=0.1), Combined())
    mean = module.bn1.running_mean.clone()
    module.bn1.reset_running_stats()
    trainer(all_callbacks()).test(module, Combined(), verbose=False)
    assert torch.allclose(module.bn1.running_mean, mean)  # the same batches as at the end of fit


@pytest.mark.parametrize("loaders", [[loader(), loader()], {"a": loader(), "b": loader()}], ids=["list", "dict"])
def test_several_loaders_without_a_combined_one(loaders):
    module = Several(lr=0.1)
    _, t = fit(module, loaders, loader(16))
    assert t.global_step == module.count == 16


@pytest.mark.parametrize("missing", ["loader", "step"])
@pytest.mark.filterwarnings("ignore:.*You defined a `validation_step` but have no `val_dataloader`.*")
@pytest.mark.filterwarnings("ignore:.*You passed in a `val_dataloader` but have no `validation_step`.*")
def test_runs_without_validation(missing):
    class WithoutStep(ConvModule):
        validation_step = L.LightningModule.validation_step

    if missing == "loader":
        module, _ = fit(None, loader())
    else:
        torch.manual_seed(3)  # before the weights are drawn, as in fit
        module, _ = fit(WithoutStep(lr=0.3), loader(), loader(16))
    assert_same(snapshot(fit()[0]), snapshot(module))


@pytest.mark.filterwarnings("ignore:.*`training_step` returned `None`.*")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_skipped_steps_leave_the_states_alone(accumulate):
    class Skips(ConvModule):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if torch.is_grad_enabled() and batch_idx in (2, 3, 6) else loss

    changes = []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.before = snapshot(pl_module)

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            after = snapshot(pl_module)
            changes.append({n for n, v in after.items() if not torch.equal(v, self.before[n]) and "bn" not in n})

    fit(Skips(lr=0.3), extra=(Watch(),), accumulate_grad_batches=accumulate)
    steps = [bool(change) for change in changes]
    expected = [b not in (2, 3, 6) for b in range(8)] if accumulate == 1 else [b in (1, 5, 7) for b in range(8)]
    assert steps == expected * 2


def test_a_second_insertion_is_refused_in_setup_where_lightning_lets_it_pass():
    class Mine(QuantizationAwareTraining):
        pass

    module = ConvModule()
    with pytest.raises(MisconfigurationException, match="only one QuantizationAwareTraining"):
        trainer([*all_callbacks(), Mine(2, 3)]).fit(module, Data())
    assert not hasattr(module.stem, "weight_quantizer")
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `QuantizationAwareTraining`"):
        trainer([*all_callbacks(), *all_callbacks()[:1]])


@pytest.mark.parametrize("late", [OscillationTracking, OscillationDampening, IterativeFreezing, BatchNormReestimation])
def test_the_wrong_order_is_refused(late):
    t = trainer([late(), QuantizationAwareTraining(2, 3)])
    with pytest.raises(MisconfigurationException, match=f"must come before {late.__name__}"):
        t.fit(ConvModule(), Data())
    assert t.global_step == 0


class NanAt(ConvModule):
    """Its loss is NaN (or inf) at one step."""

    def __init__(self, step, value=float("nan")):
        super().__init__(lr=0.3)
        self.step, self.value = step, value

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * self.value if torch.is_grad_enabled() and self.global_step == self.step else loss


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("step", "every", "found"),
    [(0, 50, 1), (5, 1, 6), (5, 50, 8), (5, 0, 8), (9, 4, 12)],
)
def test_a_loss_that_is_nan_is_told_and_nothing_of_it_evaluated_or_saved(tmp_path, value, step, every, found):
    class Evaluated(L.Callback):
        finite = ()

        def on_validation_epoch_start(self, trainer, pl_module):
            self.finite = (*self.finite, all(bool(p.isfinite().all()) for p in pl_module.parameters()))

    evaluated, checkpoint = Evaluated(), ModelCheckpoint(tmp_path, save_last=True)
    torch.manual_seed(3)
    t = trainer([*all_callbacks(), evaluated, checkpoint], log_every_n_steps=every, enable_checkpointing=True)
    with pytest.raises(MisconfigurationException, match=f"not finite after optimizer step {found}: a loss"):
        t.fit(NanAt(step, value), Data())
    if every > 0:
        assert all(evaluated.finite)
        assert list(tmp_path.glob("*.ckpt")) or step < 8
        for path in tmp_path.glob("*.ckpt"):
            state = torch.load(path, weights_only=True)["state_dict"]
            assert all(bool(v.isfinite().all()) for v in state.values())


@pytest.mark.parametrize("first", ["validation", "checkpoint"])
def test_nan_is_found_ahead_of_a_validation_or_checkpoint_in_mid_epoch(tmp_path, first):
    class Evaluated(L.Callback):
        steps = ()

        def on_validation_epoch_start(self, trainer, pl_module):
            self.steps = (*self.steps, trainer.global_step)

    evaluated, checkpoint = Evaluated(), ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1)
    options = {"val_check_interval": 3} if first == "validation" else {}
    t = trainer([*all_callbacks(), evaluated, checkpoint], enable_checkpointing=True, num_sanity_val_steps=0, **options)
    with pytest.raises(MisconfigurationException, match="not finite after optimizer step 6: a loss"):
        t.fit(NanAt(4), Data())
    assert evaluated.steps == ((3,) if first == "validation" else ())
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["epoch=0-step=3.ckpt"]


@pytest.mark.filterwarnings("ignore:.*`training_step` returned `None`.*")
def test_a_batch_with_a_nan_loss_can_be_left_out():
    class Careful(NanAt):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss if loss.isfinite() else None

    integers = Integers()
    module, _ = fit(Careful(5), extra=(integers,), max_steps=16)
    assert_followed(module, integers.history)
    assert all(bool(value.isfinite().all()) for value in snapshot(module).values())


@pytest.mark.filterwarnings("ignore:.*Error detected in.*")
def test_anomaly_detection_has_the_first_word():
    with pytest.raises(RuntimeError, match="nan values"):
        fit(NanAt(5), detect_anomaly=True)
