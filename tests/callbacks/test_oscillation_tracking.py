import csv

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from models import ConvModule, Data, trainer
from reference import WeightLoop
from torch.nn.utils import prune

from lightning_qat_osc import (
    BatchNormReestimation,
    IterativeFreezing,
    OscillationTracking,
    QuantizationAwareTraining,
    oscillation_states,
)
from lightning_qat_osc.lookup import quantized_weights


def qat(**kwargs):
    return QuantizationAwareTraining(**{"weight_bits": 2, "activation_bits": None, "first_last_bits": None, **kwargs})


class Record(L.Callback):
    """Records the integers of every weight, computed independently, before the first step and after each."""

    def __init__(self):
        self.history, self.steps = [], []

    def record(self, pl_module):
        self.history.append(
            {
                w.name: torch.clamp(torch.round(w.weight.detach() / w.quantizer.scale.detach()), -2, 1).int().flatten()
                for w in quantized_weights(pl_module)
            }
        )

    def on_train_start(self, trainer, pl_module):
        self.record(pl_module)

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step > len(self.history) - 1:
            self.record(pl_module)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_states_are_those_of_the_slow_loop_over_a_real_run(accumulate):
    record, module = Record(), ConvModule(lr=0.5)
    tracking = OscillationTracking(momentum=0.1)
    t = trainer([qat(), tracking, record], max_epochs=6, accumulate_grad_batches=accumulate)
    t.fit(module, Data())
    assert len(record.history) == t.global_step + 1 == 6 * (8 if accumulate == 1 else 3) + 1
    states = oscillation_states(module)
    assert set(states) == {"stem", "depthwise", "point", "head"}
    for name, state in states.items():
        integers = [step[name].tolist() for step in record.history]
        loops = [WeightLoop(z, 0.1) for z in integers[0]]
        for step in integers[1:]:
            for loop, z in zip(loops, step):
                loop.step(z)
        assert state.weight_int.flatten().tolist() == [loop.integer for loop in loops]
        assert state.frequency.flatten().tolist() == pytest.approx([loop.frequency for loop in loops], abs=1e-6)
        assert state.ema_int.flatten().tolist() == pytest.approx([loop.ema for loop in loops], abs=1e-5)
        assert state.frequency.shape == dict(module.named_modules())[name].weight.shape
    assert sum(state.frequency.sum() for state in states.values()) > 0


def test_evaluation_reestimation_and_sanity_checking_leave_the_states_alone():
    runs = []
    for extra, kwargs in (
        ([], {"limit_val_batches": 0, "num_sanity_val_steps": 0}),
        ([BatchNormReestimation(num_batches=3)], {"val_check_interval": 2, "num_sanity_val_steps": 2}),
    ):
        torch.manual_seed(1)
        module = ConvModule(lr=0.5)
        t = trainer([qat(), OscillationTracking(momentum=0.1), *extra], **kwargs)
        t.fit(module, Data())
        t.validate(module, Data(), verbose=False)
        runs.append(oscillation_states(module))
    for name, state in runs[0].items():
        for key in ("weight_int", "frequency", "ema_int", "direction"):
            assert torch.equal(getattr(state, key), getattr(runs[1][name], key))


def test_logs_every_n_steps_per_layer_and_in_total(tmp_path):
    logger = CSVLogger(tmp_path)
    module = ConvModule(lr=0.5)
    t = trainer([qat(), OscillationTracking(momentum=0.1)], logger=logger, log_every_n_steps=4, max_epochs=1)
    t.fit(module, Data())
    with open(f"{logger.log_dir}/metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("oscillation/frequency")]
    assert [int(row["step"]) for row in rows] == [3, 7, 7]  # every fourth of 8 steps, and the validation at the end
    states = oscillation_states(module)
    f = {name: state.frequency for name, state in states.items()}
    everything = torch.cat([x.flatten() for x in f.values()])
    last = {key: float(value) for key, value in rows[-1].items() if value}
    for key, value in {
        "oscillation/frequency": everything.mean(),
        "oscillation/frequency/point": f["point"].mean(),
        "oscillation/oscillating": (everything > 0.005).float().mean(),
        "oscillation/oscillating/depthwise": (f["depthwise"] > 0.005).float().mean(),
        "oscillation/frozen": torch.zeros(()),
        "oscillation/frozen/head": torch.zeros(()),
    }.items():
        assert last[key] == pytest.approx(value.item(), abs=1e-6), key


def test_steps_that_do_not_log_compute_no_figures(monkeypatch):
    computed = []
    compute = OscillationTracking._log
    monkeypatch.setattr(OscillationTracking, "_log", lambda self, *a, **k: (computed.append(1), compute(self, *a, **k)))
    t = trainer([qat(), OscillationTracking()], log_every_n_steps=100, max_epochs=1, limit_val_batches=0)
    t.fit(ConvModule(), Data())
    assert computed == [1]  # the last batch of the epoch


def test_checkpoints_and_early_stopping_can_use_the_figures(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, monitor="oscillation/oscillating", filename="{epoch}-{step}")
    stopping = EarlyStopping("oscillation/frequency", stopping_threshold=1.0)
    t = trainer(
        [qat(), OscillationTracking(), checkpoint, stopping], enable_checkpointing=True, log_every_n_steps=1000,
        val_check_interval=3, max_epochs=3,
    )  # fmt: skip
    t.fit(ConvModule(), Data())
    assert checkpoint.best_model_path
    assert t.global_step == 3  # stopped at the first validation


def test_without_quantization_it_says_what_is_missing():
    with pytest.raises(MisconfigurationException, match="add QuantizationAwareTraining"):
        trainer([OscillationTracking()]).fit(ConvModule(), Data())
    with pytest.raises(MisconfigurationException, match="must come before OscillationTracking"):
        trainer([OscillationTracking(), qat()]).fit(ConvModule(), Data())


def test_nothing_to_track_is_told():
    with pytest.warns(UserWarning, match="max_bits=4 or fewer"):
        trainer([qat(weight_bits=8), OscillationTracking()], max_steps=1).fit(ConvModule(), Data())


@pytest.mark.filterwarnings("ignore:.*not tracked, dampened or frozen.*")
def test_nothing_to_track_but_computed_weights_is_told():
    module = ConvModule()
    for layer in (module.depthwise, module.point):
        prune.l1_unstructured(layer, "weight", 0.5)
    with pytest.warns(UserWarning, match=r"depthwise, point are computed .*nothing to track"):
        trainer([qat(first_last_bits=8), OscillationTracking()], max_steps=1).fit(module, Data())


def test_momenta_that_differ_are_an_error():
    callbacks = [qat(), OscillationTracking(momentum=0.01), IterativeFreezing(momentum=0.02)]
    with pytest.raises(MisconfigurationException, match=r"momentum.*0\.01.*0\.02"):
        trainer(callbacks).fit(ConvModule(), Data())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"momentum": 0.0}, r"momentum must be in \(0, 1\], got 0.0"),
        ({"momentum": 1.5}, "momentum"),
        ({"momentum": float("nan")}, "momentum"),
        ({"max_bits": 9}, "max_bits must be from 2 to 8, got 9"),
    ],
)
def test_unsuited_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        OscillationTracking(**arguments)
