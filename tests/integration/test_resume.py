"""A run that is stopped and resumed ends with the same bits as a run that was never stopped."""

import lightning as L
import pytest
import torch
from common import Order, all_callbacks
from lightning.pytorch.callbacks import ModelCheckpoint
from models import ConvModule, Data, loader, trainer

from lightning_qat_osc import (
    oscillation_states,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*below twice the momentum.*"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided.*"),
]


def fit():
    torch.manual_seed(11)
    module = ConvModule(lr=0.3)
    trainer(all_callbacks(), max_epochs=4).fit(module, Order(), loader(16))
    return module


def stop_at(path, step):
    """Start a run of full length, save a checkpoint after the given step, and stop with an error right after it."""

    class Crash(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            if trainer.global_step == step:
                trainer.save_checkpoint(path / "stop.ckpt")

        def on_train_batch_start(self, trainer, pl_module, *args):
            if trainer.global_step == step:
                raise KeyboardInterrupt

    torch.manual_seed(11)
    t = trainer([*all_callbacks(), Crash()], max_epochs=4)
    with pytest.raises(SystemExit):
        t.fit(ConvModule(lr=0.3), Order(), loader(16))


def assert_same(a, b):
    assert a.state_dict().keys() == b.state_dict().keys()
    for (name, p), q in zip(a.state_dict().items(), b.state_dict().values()):
        assert torch.equal(p, q) if torch.is_tensor(p) else p == q, name
    states, others = oscillation_states(a), oscillation_states(b)
    for name, state in states.items():
        for key, value in state.state_dict().items():
            assert torch.equal(value, others[name].state_dict()[key]), (name, key)


@pytest.fixture(scope="module")
def unbroken():
    module = fit()
    assert sum(int(s.frozen.sum()) for s in oscillation_states(module).values()) > 0
    return module


def test_two_runs_are_the_same(unbroken):
    assert_same(unbroken, fit())


@pytest.mark.parametrize("epochs", [1, 3])
def test_resume_at_the_end_of_an_epoch(unbroken, tmp_path, epochs):
    class Crash(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == epochs:
                raise KeyboardInterrupt

    torch.manual_seed(11)
    t = trainer(
        [*all_callbacks(), ModelCheckpoint(tmp_path, filename="stop"), Crash()], max_epochs=4, enable_checkpointing=True
    )
    with pytest.raises(SystemExit):
        t.fit(ConvModule(lr=0.3), Order(), loader(16))
    torch.manual_seed(99)
    resumed = ConvModule(lr=0.3)
    trainer(all_callbacks(), max_epochs=4).fit(resumed, Order(), loader(16), ckpt_path=tmp_path / "stop.ckpt")
    assert_same(unbroken, resumed)


@pytest.mark.parametrize("step", [1, 13, 27])
def test_resume_in_mid_epoch(unbroken, tmp_path, step):
    stop_at(tmp_path, step)
    torch.manual_seed(99)
    resumed = ConvModule(lr=0.3)
    t = trainer(all_callbacks(), max_epochs=4)
    t.fit(resumed, Order(), loader(16), ckpt_path=tmp_path / "stop.ckpt")
    assert t.global_step == 32
    assert_same(unbroken, resumed)


def test_checkpoint_holds_only_what_weights_only_loading_takes(tmp_path):
    stop_at(tmp_path, 13)
    checkpoint = torch.load(tmp_path / "stop.ckpt", weights_only=True)
    assert any(key.endswith("oscillation.frequency") for key in checkpoint["state_dict"])


def test_evaluation_of_a_checkpoint_is_that_of_the_run(tmp_path):
    torch.manual_seed(11)
    module = ConvModule(lr=0.3)
    t = trainer([*all_callbacks(), ModelCheckpoint(tmp_path, monitor="val_loss")], enable_checkpointing=True)
    t.fit(module, Data())
    best = t.checkpoint_callback.best_model_score.item()
    loss = t.test(module, Data(), ckpt_path="best", verbose=False)[0]["test_loss"]
    assert loss == pytest.approx(best, rel=1e-5)
    other = ConvModule(lr=0.3)
    same = [*all_callbacks(), ModelCheckpoint(tmp_path, monitor="val_loss")]
    fresh = trainer(same, enable_checkpointing=True).test(
        other, Data(), ckpt_path=t.checkpoint_callback.best_model_path, verbose=False
    )
    assert fresh[0]["test_loss"] == pytest.approx(best, rel=1e-5)
