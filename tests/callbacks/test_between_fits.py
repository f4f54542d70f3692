"""What a module keeps from one fit to the next, and what it must not keep."""

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from models import ConvModule, Data, trainer
from torch import nn

from lightning_qat_osc import (
    IterativeFreezing,
    OscillationTracking,
    QuantConfig,
    QuantizationAwareTraining,
    load_quantized,
    oscillation_states,
    quantize_model,
)
from lightning_qat_osc.lookup import quantized_layers, quantized_weights, quantizers, scale_parameters

pytestmark = pytest.mark.filterwarnings("ignore:.*below twice the momentum.*")


def callbacks():
    return [
        QuantizationAwareTraining(2, 3, scale_learning_rate=0.02),
        OscillationTracking(momentum=0.1),
        IterativeFreezing(0.15, 0.1, anneal_start=0.0),
    ]


def fitted():
    module = ConvModule(lr=0.3, weight_decay=0.1)
    trainer(callbacks(), max_epochs=6).fit(module, Data())
    assert any(s.frozen.any() for s in oscillation_states(module).values())
    return module


def scales(module):
    return torch.cat([s.detach().flatten() for s in scale_parameters(module)])


@pytest.mark.parametrize("loaded", [False, True])
def test_a_fit_without_the_callbacks_leaves_scales_alone(tmp_path, loaded):
    module = ConvModule(lr=0.3, weight_decay=0.1)
    t = trainer(callbacks(), max_epochs=2)
    t.fit(module, Data())
    if loaded:
        t.save_checkpoint(tmp_path / "q.ckpt")
        module = load_quantized(ConvModule, tmp_path / "q.ckpt")
    before, weight = scales(module), module.point.weight.detach().clone()
    trainer([], max_epochs=1).fit(module, Data())
    assert torch.equal(scales(module), before)
    assert not torch.equal(module.point.weight, weight)
    trainer([QuantizationAwareTraining(2, 3)], max_epochs=1).fit(module, Data())
    now = scales(module)
    assert not torch.equal(now, before)
    assert bool((now > 0).all())


def test_scales_of_layers_that_were_frozen_in_between_stay():
    module = ConvModule()
    trainer([QuantizationAwareTraining(2, 3)], max_epochs=1).fit(module, Data())
    module.requires_grad_(False)
    module.head.requires_grad_(True)
    before = {id(q): q.scale.detach().clone() for q in quantizers(module)}
    trainer([QuantizationAwareTraining(2, 3)], max_epochs=1).fit(module, Data())
    for name, layer in quantized_layers(module).items():
        for q in layer.quantizers():
            assert q.scale.equal(before[id(q)]) == (name != "head")


def test_scales_that_learn_beside_frozen_weights_do_so_again():
    module = ConvModule()
    module.point.requires_grad_(False)
    trainer([QuantizationAwareTraining(2, 3)], max_epochs=1).fit(module, Data())
    before = [q.scale.detach().clone() for q in module.point.quantizers()]
    trainer([QuantizationAwareTraining(2, 3)], max_epochs=1).fit(module, Data())
    assert not any(q.scale.equal(old) for q, old in zip(module.point.quantizers(), before))


def test_an_exception_in_a_fit_leaves_scales_held():
    class Failing(ConvModule):
        def training_step(self, batch, batch_idx):
            if self.global_step == 3:
                raise ArithmeticError
            return super().training_step(batch, batch_idx)

    module = Failing()
    with pytest.raises(ArithmeticError):
        trainer([QuantizationAwareTraining(2, 3)]).fit(module, Data())
    assert not any(s.requires_grad for s in scale_parameters(module))


def histories(module):
    states = oscillation_states(module).items()
    return {n: {k: v.flatten().clone() for k, v in vars(s).items() if torch.is_tensor(v)} for n, s in states}


def test_histories_begin_anew_where_a_fit_without_tracking_has_moved_weights():
    module = fitted()
    before = histories(module)
    with torch.no_grad():
        for _, weight, q in quantized_weights(module, 4):
            moved = weight.view(-1)[::2]
            moved.copy_(q.scale * torch.where(q.to_int(moved) == 1, -2.0, 1.0))  # to another integer
    for half in (slice(0, None, 2), slice(1, None, 2)):
        assert any(history["frozen"][half].any() for history in before.values())
    begun = {}

    class Look(OscillationTracking):
        def on_train_start(self, trainer, pl_module):
            super().on_train_start(trainer, pl_module)
            begun.update(histories(pl_module))

    qat, _, freezing = callbacks()
    trainer([qat, Look(momentum=0.1), freezing], max_epochs=1).fit(module, Data())
    assert begun.keys() == before.keys() != set()
    for name, history in begun.items():
        assert not any(history[what][::2].any() for what in ("frequency", "direction", "frozen"))
        assert history["ema_int"][::2].equal(history["weight_int"][::2].float())
        for what, values in history.items():
            assert values[1::2].equal(before[name][what][1::2])  # weights that did not move keep their history


def test_weights_that_are_drawn_anew_begin_as_a_new_module_does():
    module = fitted()
    for layer in module.children():
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    fresh = ConvModule(lr=0.3, weight_decay=0.1)
    fresh.load_state_dict(module.state_dict(), strict=False)
    for each in (module, fresh):
        trainer(callbacks(), max_epochs=2).fit(each, Data())
    assert module.state_dict().keys() == fresh.state_dict().keys()
    for name, value in module.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[name]), name


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_weights_that_have_grown(granularity):
    def qat():
        return QuantizationAwareTraining(2, 3, weight_granularity=granularity)

    module = ConvModule()
    trainer([qat(), OscillationTracking()], max_epochs=1).fit(module, Data())
    module.head.weight = nn.Parameter(torch.cat([module.head.weight, torch.randn(2, 8)]).detach())
    module.head.bias = nn.Parameter(torch.zeros(5))
    again = trainer([qat(), OscillationTracking()], max_epochs=1)
    if granularity == "per_channel":
        with pytest.raises(MisconfigurationException, match="head were replaced by weights of other shapes"):
            again.fit(module, Data())
    else:
        again.fit(module, Data())


def test_layers_that_are_drawn_anew_with_arguments():
    class Gained(nn.Linear):
        def reset_parameters(self, gain=1.0):
            nn.init.constant_(self.weight, gain)
            return self

    layer = quantize_model(nn.Sequential(nn.Linear(4, 4), Gained(4, 4)), QuantConfig(3, 3))[1]
    assert layer.reset_parameters(gain=2.0) is layer
    assert bool((layer.weight == 2.0).all())


class Moving(ConvModule):
    """Also moves its weights after each step."""

    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        with torch.no_grad():
            self.point.weight.neg_()


def test_weights_that_are_moved_behind_each_step_are_resumed_as_they_were(tmp_path):
    class Save(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 2:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    whole, resumed = Moving(lr=0.3), Moving(lr=0.3)
    kwargs = {"max_epochs": 6, "limit_val_batches": 0}  # validation puts frozen weights back on the grid
    trainer([*callbacks(), Save()], **kwargs).fit(whole, Data())
    assert any(s.frozen.any() for s in oscillation_states(whole).values())
    trainer(callbacks(), **kwargs).fit(resumed, Data(), ckpt_path=tmp_path / "half.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
