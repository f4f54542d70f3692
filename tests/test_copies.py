"""Copies of a network in the same module have the grids of the original."""

import copy
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from models import trainer
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

from lightning_qat_osc import (
    IterativeFreezing,
    LayerRule,
    OscillationDampening,
    OscillationTracking,
    QuantConfig,
    QuantizationAwareTraining,
    quantize_model,
)
from lightning_qat_osc.calibration import Calibrator
from lightning_qat_osc.callbacks._unsupported import warn_about_teachers
from lightning_qat_osc.copies import untrained_copies
from lightning_qat_osc.lookup import quantizers


def network(width=8):
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))


def data(n=64):
    x = torch.randn(n, 8, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, 2.0 * x[:, :1] - x[:, 1:2]), batch_size=8)


class Base(L.LightningModule):
    """A network and, if given, ``other``, which is made from it."""

    def __init__(self, other=None, *, requires_grad=False):
        super().__init__()
        torch.manual_seed(0)
        self.net = network()
        if other is not None:
            self.other = other(self.net)
            self.other.requires_grad_(requires_grad)

    def training_step(self, batch, batch_idx):
        return (self.net(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.01)


class Averages(Base):
    def on_train_batch_end(self, *args):
        self.other.update_parameters(self.net)


class Taught(Base):
    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            target = self.other(batch[0])
        return super().training_step(batch, batch_idx) + (self.net(batch[0]) - target).square().mean()


def average(net):
    return AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))


def later(net):
    """Return an average that already differs from the network, as after some training."""
    averaged = average(net)
    with torch.no_grad():
        for p in averaged.parameters():
            p.mul_(0.9)
    return averaged


def grids(module):
    return [(q.bits, q.zero_point, q.quant_max, q.calibrated) for q in quantizers(module)]


@pytest.mark.parametrize("other", [average, later])
def test_an_average_that_training_does_not_call(other):
    module = Averages(other)
    trainer([QuantizationAwareTraining(4, 8)], max_epochs=20, limit_val_batches=0).fit(module, data())
    assert [q.bits for q in quantizers(module.net)] == [8, None, 4, 8, 8, 8]
    assert grids(module.other) == grids(module.net)
    x = data().dataset.tensors[0]
    assert (module.other(x) - module.net(x)).abs().mean() < 0.1 * module.net(x).abs().mean()


@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_copy_that_is_called(requires_grad):
    module = Taught(copy.deepcopy, requires_grad=requires_grad)
    words = r"other\.0, other\.2, other\.4 run in training and are copies .*LayerRule\(pattern='other\.\*'"
    with pytest.warns(UserWarning, match=words):
        trainer([QuantizationAwareTraining(4, 8)], max_epochs=1, limit_val_batches=0).fit(module, data())
    assert [q.bits for q in quantizers(module.net)] == [8, None, 4, 8, 8, 8]
    assert grids(module.other) == grids(module.net)


def test_an_average_that_wants_gradients_is_no_part_of_the_network():
    module = Averages(average, requires_grad=True)
    trainer([QuantizationAwareTraining(4, 8)], max_epochs=2, limit_val_batches=0).fit(module, data())
    assert [q.bits for q in quantizers(module.net)] == [8, None, 4, 8, 8, 8]
    assert grids(module.other) == grids(module.net)


@pytest.mark.filterwarnings("ignore:.*run in training and are copies")
def test_ddp_does_not_wait_for_the_scales_of_a_copy():
    class Look(L.Callback):
        def on_train_end(self, trainer, pl_module):
            assert all(q.scale.requires_grad for q in quantizers(pl_module.net))
            assert not any(q.scale.requires_grad for q in quantizers(pl_module.other))
            warn_about_teachers(SimpleNamespace(strategy=DDPStrategy()), pl_module)  # must not warn

    module = Taught(copy.deepcopy)
    for _ in range(2):
        trainer([QuantizationAwareTraining(4, 8), Look()], max_epochs=1, limit_val_batches=0).fit(module, data())


class Averaged(Base):
    """Averages everything in the state_dict, including integers and masks."""

    def training_step(self, batch, batch_idx):
        return (self.net(batch[0]) - batch[1]).square().mean()

    @torch.no_grad()
    def on_train_batch_end(self, outputs, batch, batch_idx):
        for mine, its in zip(self.net.state_dict().values(), self.other.state_dict().values()):
            its.copy_(0.9 * its + 0.1 * mine)


def test_an_average_of_frozen_weights_is_left_to_its_owner():
    module = Averaged(copy.deepcopy)
    freezing = IterativeFreezing(threshold=0.02, momentum=0.02)
    t = trainer([QuantizationAwareTraining(2, None), freezing], max_epochs=6, limit_val_batches=0)
    with pytest.warns(UserWarning, match="below twice the momentum"):
        t.fit(module, data())
    with torch.no_grad():
        for q in quantizers(module.other):
            if getattr(q, "oscillation", None) is not None:
                q.oscillation.frozen.fill_(True)
        before = [p.clone() for p in module.other.parameters()]
        freezing.on_train_end(t, module)
    assert all(torch.equal(p, q) for p, q in zip(before, module.other.parameters()))


class Whole(Base):
    """Has layers of its own and a copy of the whole module."""

    def __init__(self):
        super().__init__()
        self.add_module("first", nn.Linear(8, 8))
        self.average = copy.deepcopy(self).requires_grad_(False)

    def forward(self, x):
        return self.net(self.first(x))

    def training_step(self, batch, batch_idx):
        return (self(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.01)


def test_a_copy_of_the_whole_module():
    module = Whole()
    trainer([QuantizationAwareTraining(4, 8)], max_epochs=1, limit_val_batches=0).fit(module, data())
    own = [*module.net.modules(), *module.first.modules()]
    grid = {name: grids(layer) for name, layer in module.named_modules() if layer in own and hasattr(layer, "weight")}
    assert len(grid) == 4
    assert {name: grids(module.average.get_submodule(name)) for name in grid} == grid


def test_a_teacher_of_the_same_architecture_is_no_copy():
    module = Taught(lambda net: network())
    words = r"other\.0, other\.2, other\.4 are quantized but not trained, and no .*LayerRule\(pattern='other\.\*'"
    with pytest.warns(UserWarning, match=words):
        trainer([QuantizationAwareTraining(4, 8)], max_epochs=1, limit_val_batches=0).fit(module, data())
    assert [q.bits for q in quantizers(module.other)] == [4, 8, 4, 8, 4, 8]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_which_scales_are_moved_with_the_network_goes_by_its_structure(device):
    module = Taught(copy.deepcopy)
    with torch.no_grad():
        for p in module.net.parameters():
            p.neg_()  # as far as training may move weights before a module is quantized again to resume a run
    quantize_model(module.to(device), QuantConfig(4, 8))
    assert all(q.scale.requires_grad for q in quantizers(module.net))
    assert not any(q.scale.requires_grad for q in quantizers(module.other))


def test_a_copy_with_rules_of_its_own():
    rules = [LayerRule("other.*", weight_bits=None, activation_bits=None)]
    module = Averages(average)
    module.on_train_batch_end = lambda *args: None
    trainer([QuantizationAwareTraining(4, 8, rules=rules)], max_epochs=1, limit_val_batches=0).fit(module, data())
    assert not quantizers(module.other)
    assert grids(module.net)[0] == (8, 0, 127, True)


def linears(**networks):
    layers = nn.ModuleDict(networks).named_modules()
    return {name: layer for name, layer in layers if isinstance(layer, nn.Linear)}


def test_two_networks_of_one_structure_have_a_copy_each():
    one, two = network(), network()
    layers = linears(one=one, two=two, a=copy.deepcopy(two), b=copy.deepcopy(one))
    trained = {name for name in layers if name.startswith(("one", "two"))}
    expected = {"a.0": "two.0", "a.2": "two.2", "a.4": "two.4", "b.0": "one.0", "b.2": "one.2", "b.4": "one.4"}
    assert untrained_copies(layers, trained) == expected
    with torch.no_grad():
        layers["a.2"].weight.mul_(3.0)  # now a copy of neither network
    assert untrained_copies(layers, trained) == {k: v for k, v in expected.items() if k[0] == "b"}


def test_blocks_that_begin_as_clones():
    block = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    blocks = nn.Sequential(*(copy.deepcopy(block) for _ in range(3)))
    layers = linears(net=blocks, average=copy.deepcopy(blocks))
    trained = {name for name in layers if name.startswith("net") and not name.startswith("net.0")}
    copies = untrained_copies(layers, trained)  # the first block of the network itself is no copy of the second
    assert copies == {f"average.{i}.{j}": f"net.{i}.{j}" for i in range(3) for j in range(2)}


def test_what_is_no_copy():
    net, single = network(), nn.Linear(8, 8)
    layers = linears(net=net, other=network(), one=single, same=copy.deepcopy(single))
    assert untrained_copies(layers, {"net.0", "net.2", "net.4", "one"}) == {}
    lazy = {**linears(net=net, average=copy.deepcopy(net)), "later.0": nn.LazyLinear(3)}
    assert len(untrained_copies(lazy, {"net.0", "net.2", "net.4"})) == 3


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.middle = nn.Embedding(16, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, i):
        return self.head(self.middle(self.embedding(i)).relu())


@pytest.mark.parametrize("called", [False, True])
def test_a_copy_with_a_tied_weight(called):
    net = Tied()
    model = nn.ModuleDict({"net": net, "average": copy.deepcopy(net).requires_grad_(False)})
    config = QuantConfig(4, 4)
    quantize_model(model, config)
    calibrator = Calibrator(model, config)
    with torch.no_grad(), calibrator.observe():
        for name in ("net", "average") if called else ("net",):
            model[name](torch.arange(8))
    words = calibrator.finish()
    layers = "Layers average.embedding, average.middle, average.head"
    assert [word.split(" run")[0] for word in words] == [layers] * called
    assert grids(model["average"]) == grids(model["net"])


def test_figures_are_of_the_weights_that_are_trained():
    logged = []
    for other, requires_grad in ((None, False), (copy.deepcopy, False), (copy.deepcopy, True)):
        torch.manual_seed(1)
        callbacks = [QuantizationAwareTraining(3, 3), OscillationTracking(momentum=0.05), OscillationDampening()]
        t = trainer(callbacks, max_epochs=10, log_every_n_steps=1, limit_val_batches=0)
        t.fit(Base(other, requires_grad=requires_grad), data())
        logged.append({k: v.item() for k, v in t.callback_metrics.items() if k.startswith("oscillation/")})
    assert logged[0] == logged[1] == logged[2]
    assert logged[0]["oscillation/dampening_loss"] > 0.0


@pytest.mark.parametrize(("frozen", "trained"), [("encoder", "decoder"), ("block1", "block2")])
def test_frozen_parts_that_look_like_trained_ones_learn_their_scales(frozen, trained):
    def attention_and_more(*more):
        return nn.ModuleDict({"attention": network(), "feed_forward": network(), **dict(more)})

    more = [("cross", network())] if trained == "decoder" else []
    module = nn.ModuleDict({frozen: attention_and_more(), trained: attention_and_more(*more)})
    module[frozen].requires_grad_(False)
    quantize_model(module, QuantConfig(4, 4))
    assert all(q.scale.requires_grad for q in quantizers(module))


def test_a_target_of_parts_of_the_network_is_a_copy():
    online = nn.ModuleDict({name: network() for name in ("encoder", "projector", "predictor")})
    target = nn.ModuleDict({name: copy.deepcopy(online[name]) for name in ("encoder", "projector")})
    module = nn.ModuleDict({"online": online, "target": target.requires_grad_(False)})
    quantize_model(module, QuantConfig(4, 4))
    assert all(q.scale.requires_grad for q in quantizers(online))
    assert not any(q.scale.requires_grad for q in quantizers(target))
