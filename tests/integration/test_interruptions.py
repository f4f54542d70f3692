"""Errors, signals and full disks at every point of a run: state is restored, and the last checkpoint resumes."""

import errno
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from common import Order, all_callbacks
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import SIGTERMException
from models import ConvModule, Data, dataset, loader, trainer
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from lightning_qat_osc import (
    oscillation_states,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*below twice the momentum.*"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided.*"),
]


class Fragile(ConvModule):
    """Raises once, in the second call of a phase. Has a buffer, a metric, dropout and one optimizer for all fits."""

    def __init__(self, where=None, error=RuntimeError):
        super().__init__(lr=0.3, dropout=0.2)
        self.where, self.error, self.calls = where, error, []
        self.register_buffer("seen", torch.zeros(()))
        self.mean_loss = MeanMetric()
        self.kept = super().configure_optimizers()

    def configure_optimizers(self):
        return self.kept

    def maybe_break(self, phase):
        self.calls.append(phase)
        if phase == self.where and self.calls.count(phase) == 2:
            self.where = None
            raise self.error("user's error")

    def pass_or(self, phase):
        if torch.is_grad_enabled():
            return phase
        return "calibration" if self.trainer.global_step == 0 else "reestimation"

    def training_step(self, batch, batch_idx):
        self.seen += 1
        loss = super().training_step(batch, batch_idx)
        self.mean_loss.update(loss)
        self.log("mean_loss", self.mean_loss)
        self.maybe_break(self.pass_or("training"))
        return loss

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        if not self.trainer.sanity_checking:
            self.maybe_break("validation")

    def on_before_optimizer_step(self, optimizer):
        self.maybe_break("optimizer")

    def on_before_zero_grad(self, optimizer):
        self.maybe_break("zero_grad")

    def on_train_batch_end(self, *args):
        self.maybe_break("batch_end")


def forward_fn(module, batch):
    module.seen += 1
    module.mean_loss.update(module(batch[0]).sum())
    module.maybe_break(f"forward_fn in {module.pass_or('')}")


def picture(trainer, module, generator=None):
    """Copy everything that a pass may touch."""
    return {
        "modes": [m.training for m in module.modules()],
        "buffers": [b.clone() for b in module.buffers()],
        "parameters": [p.detach().clone() for p in module.parameters()],
        "momenta": [bn.momentum for bn in (module.bn1, module.bn2)],
        "metric": [module.mean_loss.mean_value.clone(), module.mean_loss.weight.clone()],
        "updates": module.mean_loss.update_count,
        "random": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
        "generator": None if generator is None else generator.get_state(),
    }


def same(a, b):
    if isinstance(a, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


class BeforeAndAfter(L.Callback):
    """First callback in the list: copies the state before each pass, and compares it after an error in the pass."""

    def __init__(self, generator):
        self.generator, self.before, self.compared = generator, None, 0

    def look(self, trainer, pl_module):
        self.before = picture(trainer, pl_module, self.generator)

    on_train_start = on_validation_epoch_start = on_train_end = look

    def on_exception(self, trainer, pl_module, exception):
        assert pl_module.trainer is trainer
        for key, value in picture(trainer, pl_module, self.generator).items():
            assert same(value, self.before[key]), key
        self.compared += 1


def assert_nothing_hangs_on(module, t):
    assert module.trainer is t
    assert all(not m._forward_pre_hooks and not m._forward_hooks for m in module.modules())
    assert not module.kept._optimizer_step_post_hooks
    assert all("weight" not in layer.__dict__ for layer in (module.stem, module.depthwise, module.point, module.head))
    assert [bn.momentum for bn in (module.bn1, module.bn2)] == [0.1, 0.1]
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def assert_goes_on(module, same_callbacks):
    """Check that the module computes and can be fitted again, with the interrupted callbacks and with new ones."""
    with torch.no_grad():
        assert module.eval()(dataset().tensors[0]).isfinite().all()
    module.train()
    for again in (same_callbacks, all_callbacks(forward_fn=same_callbacks[-1].forward_fn)):
        before = len(module.calls)
        t = trainer(again, max_epochs=2)
        t.fit(module, Data())
        assert t.global_step == 16
        assert module.calls[before:].count("training") == 16
        assert all(p.isfinite().all() for p in module.parameters())
        assert_nothing_hangs_on(module, t)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(
    "where", ["calibration", "reestimation", "forward_fn in calibration", "forward_fn in reestimation"]
)
def test_an_error_in_a_pass_leaves_no_trace(where, error):
    generator = torch.Generator().manual_seed(3)
    look = BeforeAndAfter(generator)
    own = all_callbacks(forward_fn=forward_fn if "forward_fn" in where else None)
    module = Fragile(where, error)
    t = trainer([look, *own])
    train = DataLoader(dataset(), batch_size=8, shuffle=True, generator=generator)
    with pytest.raises((RuntimeError, SystemExit)) as caught:
        t.fit(module, train, loader(16))
    assert caught.type is (RuntimeError if error is RuntimeError else SystemExit)
    assert module.where is None
    assert look.compared == 1
    assert_nothing_hangs_on(module, t)
    assert_goes_on(module, own)


@pytest.mark.parametrize("function", ["validate", "test"])
def test_an_error_in_a_pass_outside_fit_leaves_no_trace(function):
    class Outside(Fragile):
        def pass_or(self, phase):
            return phase if torch.is_grad_enabled() else f"pass in {self.trainer.state.fn.value}"

    class Look(BeforeAndAfter):
        on_test_epoch_start = BeforeAndAfter.look

    look, own, module = Look(None), all_callbacks(), Outside(f"pass in {function}")
    trainer(own).fit(module, Data())
    t = trainer([look, *own])
    with pytest.raises(RuntimeError, match="user's error"):
        getattr(t, function)(module, Data(), verbose=False)
    assert look.compared == 1
    assert_nothing_hangs_on(module, t)
    assert_goes_on(module, own)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["training", "validation", "optimizer", "zero_grad", "batch_end"])
def test_an_error_in_training_lets_go_of_everything(where, error):
    own, module = all_callbacks(), Fragile(where, error)
    t = trainer(own)
    with pytest.raises((RuntimeError, SystemExit)):
        t.fit(module, Data())
    assert module.where is None
    assert_nothing_hangs_on(module, t)
    assert_goes_on(module, own)


def run(extra=(), seed=11, ckpt_path=None, **kwargs):
    torch.manual_seed(seed)
    module = ConvModule(lr=0.3)
    checkpointing = any(isinstance(c, ModelCheckpoint) for c in extra)
    t = trainer([*all_callbacks(), *extra], max_epochs=4, enable_checkpointing=checkpointing, **kwargs)
    t.fit(module, Order(), loader(16), ckpt_path=ckpt_path)
    assert t.global_step == 32
    return module


def assert_same(a, b):
    assert a.state_dict().keys() == b.state_dict().keys()
    for (name, p), q in zip(a.state_dict().items(), b.state_dict().values()):
        assert torch.equal(p, q), name
    others = oscillation_states(b)
    for name, state in oscillation_states(a).items():
        for key, value in state.state_dict().items():
            assert torch.equal(value, others[name].state_dict()[key]), (name, key)


@pytest.fixture(scope="module")
def unbroken():
    module = run()
    assert sum(int(s.frozen.sum()) for s in oscillation_states(module).values()) > 0
    return module


def at_the_end(path):
    """Return a callback that saves a checkpoint only when the run is interrupted."""
    return ModelCheckpoint(path, filename="stop", save_on_exception=True, every_n_epochs=100)


class Sigterm(L.Callback):
    """Sends SIGTERM to the process at a given point of the run."""

    def __init__(self, hook, step):
        self.step, self.sent = step, False
        setattr(self, hook, self.send)

    def send(self, trainer, pl_module, *args):
        if trainer.global_step >= self.step and not trainer.sanity_checking and not self.sent:
            self.sent = True
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    ("hook", "step"),
    [
        ("on_train_start", 0),  # equivalent to a signal in calibration: the handler only sets a flag
        ("on_train_batch_start", 5),
        ("on_before_optimizer_step", 12),
        ("on_train_batch_end", 19),
        ("on_validation_epoch_start", 16),
    ],
)
def test_sigterm_ends_the_run_behind_a_checkpoint_that_resumes(unbroken, tmp_path, hook, step):
    sigterm = Sigterm(hook, step)
    with pytest.raises(SIGTERMException):
        run([sigterm, at_the_end(tmp_path)])
    assert sigterm.sent
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert_same(unbroken, run(seed=99, ckpt_path=tmp_path / "stop.ckpt"))


SCRIPT = """
import sys, time, warnings
warnings.filterwarnings("ignore")
sys.path[:0] = sys.argv[2:4]
import torch
torch.set_num_threads(1)
import lightning as L
import test_interruptions as t

class Tell(L.Callback):
    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step == 10:
            print("ready", flush=True)
        if trainer.global_step >= 10:
            time.sleep(0.2)

t.run([Tell(), t.at_the_end(sys.argv[1])])
"""


def test_sigterm_from_outside(unbroken, tmp_path):
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": str(here.parent.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), str(here), str(here.parent)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert any(line == b"ready\n" for line in process.stdout)
        process.terminate()
        process.wait(timeout=60)
    checkpoint = torch.load(tmp_path / "stop.ckpt", weights_only=True)
    assert 10 <= checkpoint["global_step"] < 32
    assert_same(unbroken, run(seed=99, ckpt_path=tmp_path / "stop.ckpt"))


class FullDisk(TorchCheckpointIO):
    """Runs out of space after ``room`` checkpoints: writes a partial file and raises."""

    def __init__(self, room):
        self.room = room

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        self.room -= 1
        if self.room < 0:
            Path(f"{path}.part").write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        super().save_checkpoint(checkpoint, path, storage_options)


@pytest.mark.parametrize("room", [1, 3])
def test_a_full_disk_ends_the_run_and_the_last_good_checkpoint_resumes(unbroken, tmp_path, room):
    torch.manual_seed(11)
    module = ConvModule(lr=0.3)
    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=5, save_top_k=-1)
    own = all_callbacks()
    t = trainer([*own, checkpoint], max_epochs=4, enable_checkpointing=True, plugins=[FullDisk(room)])
    with pytest.raises(OSError, match="No space left"):
        t.fit(module, Order(), loader(16))
    assert t.global_step == 5 * (room + 1)
    assert all(not o._optimizer_step_post_hooks for o in t.optimizers)
    assert module.trainer is t
    assert all(m.training for m in module.modules())
    good = tmp_path / f"step={5 * room}.ckpt"
    assert_same(unbroken, run(seed=99, ckpt_path=good))
    trainer(own, max_epochs=1).fit(module, Data())


@pytest.mark.parametrize("where", ["training", "validation", "reestimation"])
def test_an_error_after_a_checkpoint_resumes_from_it(unbroken, tmp_path, where):
    class Breaks(ConvModule):
        def count(self, phase):
            if phase == where and self.trainer.global_step >= 20:
                raise RuntimeError("user's error")

        def training_step(self, batch, batch_idx):
            self.count("training" if torch.is_grad_enabled() else "reestimation")
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            self.count("validation")
            return super().validation_step(batch, batch_idx)

    torch.manual_seed(11)
    checkpoint = ModelCheckpoint(tmp_path, filename="last", every_n_train_steps=6)
    t = trainer([*all_callbacks(), checkpoint], max_epochs=4, enable_checkpointing=True)
    with pytest.raises(RuntimeError, match="user's error"):
        t.fit(Breaks(lr=0.3), Order(), loader(16))
    step = torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"]
    assert step == (18 if where == "training" else 24)
    assert_same(unbroken, run(seed=99, ckpt_path=tmp_path / "last.ckpt"))


@pytest.mark.parametrize("fails", ["write", "replace"])
def test_a_plan_that_cannot_be_written_leaves_the_earlier_one(tmp_path, monkeypatch, fails):
    path = tmp_path / "plan.yaml"
    trainer(all_callbacks(plan_path=str(path)), max_steps=1).fit(ConvModule(), Data())
    earlier = path.read_text()
    assert len(yaml.safe_load(earlier)) == 4
    no_space = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    write_text = Path.write_text

    def half(self, data, *args, **kwargs):
        write_text(self, data[: len(data) // 2], *args, **kwargs)
        raise no_space

    def no_replace(*args):
        raise no_space

    module = ConvModule()
    t = trainer(all_callbacks(plan_path=str(path)), max_steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(*(Path, "write_text", half) if fails == "write" else (os, "replace", no_replace))
        with pytest.raises(OSError, match="No space left"):
            t.fit(module, Data())
    assert path.read_text() == earlier
    assert list(tmp_path.iterdir()) == [path]
    trainer(all_callbacks(plan_path=str(path)), max_epochs=1).fit(module, Data())
