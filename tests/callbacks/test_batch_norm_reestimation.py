import csv

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from models import ConvModule, Data, Manual, dataset, loader, trainer
from torch.optim.swa_utils import get_ema_avg_fn
from torch.utils.data import DataLoader, RandomSampler, Sampler
from torchmetrics import MeanMetric

from lightning_qat_osc import (
    BatchNormReestimation,
    OscillationTracking,
    QuantConfig,
    QuantizationAwareTraining,
    oscillation_states,
    quantize_model,
)
from lightning_qat_osc.callbacks import batch_norm_reestimation


def qat(**kwargs):
    return QuantizationAwareTraining(**{"weight_bits": 3, "activation_bits": 3, **kwargs})


def inputs_of(layer, module, batches):
    """Return the inputs that a layer sees with the module in evaluation mode and batch norm in training mode."""
    seen = []
    handle = layer.register_forward_pre_hook(lambda m, args: seen.append(args[0].double()))
    statistics = {k: v.clone() for k, v in module.state_dict().items() if "running" in k or "tracked" in k}
    module.eval()
    module.bn1.train()
    module.bn2.train()
    with torch.no_grad():
        for batch in batches:
            module(batch[0])
    handle.remove()
    module.load_state_dict(statistics, strict=False)
    return torch.cat(seen).transpose(0, 1).flatten(1)


def test_statistics_at_each_evaluation_are_those_of_the_batches():
    class Look(L.Callback):
        def __init__(self):
            self.looks = 0

        def look(self, pl_module):
            module = pl_module
            modes = [(m, m.training) for m in module.modules()]
            for bn in (module.bn1, module.bn2):
                x = inputs_of(bn, module, list(loader())[:5])
                assert torch.allclose(bn.running_mean.double(), x.mean(1), rtol=1e-4, atol=1e-6)
                assert torch.allclose(bn.running_var.double(), x.var(1), rtol=1e-4)
            for m, training in modes:
                m.training = training
            self.looks += 1

        def on_validation_epoch_start(self, trainer, pl_module):
            if not trainer.sanity_checking:
                self.look(pl_module)

        def on_test_epoch_start(self, trainer, pl_module):
            self.look(pl_module)

        def on_train_end(self, trainer, pl_module):
            self.look(pl_module)

    module, look = ConvModule(), Look()
    callbacks = [qat(), BatchNormReestimation(num_batches=5), look]
    t = trainer(callbacks, val_check_interval=0.5)
    t.fit(module, Data())
    assert look.looks == 5
    module.bn1.running_mean.fill_(float("nan"))
    t.test(module, Data(), verbose=False)
    t.validate(module, Data(), verbose=False)
    other = trainer([qat(), BatchNormReestimation(num_batches=5), look])
    other.test(module, Data(), verbose=False)
    assert look.looks == 8


class Busy(ConvModule):
    """Has dropout, random augmentation, metrics and a buffer."""

    def __init__(self):
        super().__init__(dropout=0.3)
        self.register_buffer("seen", torch.zeros(()))
        self.loss_forward, self.loss_update = MeanMetric(), MeanMetric()
        self.trained_on = []

    def on_train_batch_start(self, batch, batch_idx):
        self.trained_on.append(batch[1])

    def training_step(self, batch, batch_idx):
        self.seen += 1
        noisy = batch[0] + 0.1 * torch.randn_like(batch[0])
        loss = super().training_step((noisy, batch[1]), batch_idx)
        self.log("mean_loss", self.loss_forward(loss))  # torchmetrics keeps this tensor with its graph
        self.loss_update.update(loss)
        return loss


def shuffled(persistent=False, generator=False):
    own = torch.Generator().manual_seed(7) if generator else None
    sampler = RandomSampler(dataset(), generator=own) if generator else None
    workers = {"num_workers": 1, "persistent_workers": True} if persistent else {}
    return DataLoader(
        dataset(), batch_size=8, sampler=sampler, shuffle=None if generator else True, generator=own, **workers
    )


@pytest.mark.parametrize("data", ["shuffle", "generator", "persistent", "combined"])
def test_training_is_the_same_with_and_without(data):
    runs = []
    for callbacks in ([], [BatchNormReestimation(num_batches=3)]):
        train = shuffled(data == "persistent", data == "generator")
        if data == "combined":
            train = CombinedLoader([train, shuffled()], "max_size_cycle")
        torch.manual_seed(4)
        module = Busy() if data != "combined" else TwoLoaders()
        t = trainer([qat(), OscillationTracking(momentum=0.1), *callbacks], val_check_interval=3)
        t.fit(module, train, loader(16))
        runs.append(module)
    without, with_it = runs
    assert with_it.loss_update.compute() == without.loss_update.compute()
    assert with_it.loss_forward.update_count == without.loss_forward.update_count
    assert torch.equal(torch.cat(without.trained_on), torch.cat(with_it.trained_on))
    assert with_it.seen.item() == len(with_it.trained_on) == 16
    for (name, a), b in zip(without.named_parameters(), with_it.parameters()):
        assert torch.equal(a, b), name
    for name, state in oscillation_states(without).items():
        assert torch.equal(state.frequency, oscillation_states(with_it)[name].frequency)
    assert not torch.equal(without.bn1.running_mean, with_it.bn1.running_mean)


class TwoLoaders(Busy):
    def on_train_batch_start(self, batch, batch_idx):
        super().on_train_batch_start(batch[0], batch_idx)

    def training_step(self, batch, batch_idx):
        return super().training_step(batch[0], batch_idx) + super().training_step(batch[1], batch_idx) * 0

    def on_train_batch_end(self, *args):
        self.seen -= 1  # training_step counts twice per step


def test_the_same_batches_each_time():
    module = ConvModule()
    module.means = []

    class Keep(L.Callback):
        def on_test_epoch_start(self, trainer, pl_module):
            module.means.append(module.bn1.running_mean.clone())

    t = trainer([qat(), BatchNormReestimation(num_batches=2), Keep()], max_epochs=1)
    t.fit(module, Data(shuffle=True))
    for _ in range(2):
        torch.rand(3)
        t.test(module, Data(shuffle=True), verbose=False)
    assert torch.equal(*module.means)


def test_divergence_is_logged(tmp_path):
    logger = CSVLogger(tmp_path)
    t = trainer([qat(), BatchNormReestimation(num_batches=5, log_divergence=True)], logger=logger)
    t.fit(ConvModule(), Data())
    with open(f"{logger.log_dir}/metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["batch_norm/divergence"]]
    assert len(rows) == 2
    for row in rows:
        layers = [float(row[f"batch_norm/divergence/{name}"]) for name in ("bn1", "bn2")]
        assert float(row["batch_norm/divergence"]) == pytest.approx(max(layers))
        assert min(layers) > 0


def test_validate_and_then_fit_with_metrics():
    module, data = Busy(), Data()
    t = trainer([qat(), BatchNormReestimation(num_batches=2)])
    t.fit(module, data)
    t.validate(module, data, verbose=False)
    trainer([qat(), BatchNormReestimation(num_batches=2)]).fit(module, data)
    assert module.loss_update.compute().isfinite()


def test_a_datamodule_that_sets_up_by_stage():
    class ByStage(Data):
        def setup(self, stage):
            if stage == "fit":
                self.train_set = loader()

        def train_dataloader(self):
            return self.train_set

    module = ConvModule()
    trainer([qat()], max_epochs=1).fit(module, ByStage())
    mean = module.bn1.running_mean.clone()
    trainer([qat(), BatchNormReestimation()]).test(module, ByStage(), verbose=False)
    assert not torch.equal(module.bn1.running_mean, mean)


def test_training_data_that_cannot_be_made_outside_fit_is_told():
    class OnlyInFit(Data):
        def train_dataloader(self):
            if self.trainer.state.fn != "fit":
                raise AttributeError("no train_set")
            return super().train_dataloader()

    module = ConvModule()
    trainer([qat()], max_epochs=1).fit(module, OnlyInFit())
    mean = module.bn1.running_mean.clone()
    with (
        pytest.warns(UserWarning, match="AttributeError: no train_set"),
        pytest.warns(UserWarning, match="statistics stay as they are"),
    ):
        trainer([qat(), BatchNormReestimation()]).test(module, OnlyInFit(), verbose=False)
    assert torch.equal(module.bn1.running_mean, mean)


def test_a_module_in_evaluation_mode_is_reestimated_before_test():
    module = ConvModule()
    trainer([qat()], max_epochs=1).fit(module, Data())
    module.eval()
    mean = module.bn1.running_mean.clone()
    trainer([qat(), BatchNormReestimation()]).test(module, Data(), verbose=False)
    assert not torch.equal(module.bn1.running_mean, mean)


@pytest.mark.parametrize("signature", ["batch", "keywords", "star"])
def test_signatures_of_training_step(signature):
    class OneArgument(ConvModule):
        def training_step(self, batch):
            return super().training_step(batch, 0)

    class Keywords(ConvModule):
        def training_step(self, batch, **kwargs):
            return super().training_step(batch, 0)

    class Star(ConvModule):
        def training_step(self, *args):
            return super().training_step(*args)

    module = {"batch": OneArgument, "keywords": Keywords, "star": Star}[signature]()
    trainer([qat(), BatchNormReestimation(num_batches=2)], max_epochs=1).fit(module, Data())


def test_frozen_batch_norm_stays():
    class Frozen(ConvModule):
        def on_train_epoch_start(self):
            self.bn1.eval()

    module = Frozen()
    mean = module.bn1.running_mean.clone()
    trainer([qat(), BatchNormReestimation()]).fit(module, Data())
    assert torch.equal(module.bn1.running_mean, mean)
    assert module.bn2.running_mean.abs().sum() > 0


@pytest.mark.filterwarnings("ignore:Found 1 module.* in eval mode")
def test_frozen_batch_norm_stays_in_an_evaluation_by_another_trainer():
    class Frozen(ConvModule):
        def __init__(self):
            super().__init__()
            self.bn1.eval()

    module = Frozen()
    trainer([qat()], max_epochs=1).fit(module, Data())
    mean = module.bn1.running_mean.clone(), module.bn2.running_mean.clone()
    trainer([qat(), BatchNormReestimation()]).test(module, Data(), verbose=False)
    assert torch.equal(module.bn1.running_mean, mean[0])
    assert not torch.equal(module.bn2.running_mean, mean[1])


def test_frozen_layers_are_those_of_the_module_that_is_evaluated():
    frozen, free = ConvModule(), ConvModule()
    for module in (frozen, free):
        trainer([qat()], max_epochs=1).fit(module, Data())
    frozen.bn1.eval()
    callback = BatchNormReestimation()
    for module in (frozen, free):
        mean = module.bn1.running_mean.clone()
        trainer([qat(), callback]).test(module, Data(), verbose=False)
        assert torch.equal(module.bn1.running_mean, mean) is (module is frozen)


def test_evaluation_without_training_data_keeps_the_statistics():
    module = ConvModule()
    trainer([qat()]).fit(module, Data())
    mean = module.bn1.running_mean.clone()
    with pytest.warns(UserWarning, match="no training data"):
        trainer([qat(), BatchNormReestimation()]).validate(module, loader(16), verbose=False)
    assert torch.equal(module.bn1.running_mean, mean)


def test_manual_optimization_takes_a_function():
    with pytest.raises(MisconfigurationException, match="forward_fn"):
        trainer([qat(), BatchNormReestimation()]).fit(Manual(), Data())
    calls = []

    def forward(module, batch):
        calls.append(1)
        module(batch[0])

    module = Manual()
    trainer([qat(), BatchNormReestimation(num_batches=4, forward_fn=forward)], max_epochs=1).fit(module, Data())
    assert len(calls) == 8  # 4 before validation and 4 at the end of fit
    x = inputs_of(module.bn1, module, list(loader())[:4])
    assert torch.allclose(module.bn1.running_mean.double(), x.mean(1), rtol=1e-4, atol=1e-6)


def test_after_averaged_weights_are_swapped_in():
    means = {}

    class Look(L.Callback):
        def on_validation_epoch_start(self, trainer, pl_module):
            if not trainer.sanity_checking:
                means["estimated"] = pl_module.bn1.running_mean.clone()
                means["averaged"] = inputs_of(pl_module.bn1, pl_module, list(loader())[:5]).mean(1)

    averaging = WeightAveraging(avg_fn=get_ema_avg_fn(0.9))
    trainer([qat(), averaging, BatchNormReestimation(num_batches=5), Look()]).fit(ConvModule(), Data())
    assert torch.allclose(means["estimated"].double(), means["averaged"], rtol=1e-4, atol=1e-6)


def test_an_error_in_a_pass_leaves_everything_as_it_was():
    class Fails(ConvModule):
        def training_step(self, batch, batch_idx):
            if not torch.is_grad_enabled() and self.global_step:
                raise RuntimeError("user's error")
            return super().training_step(batch, batch_idx)

    module = Fails()
    t = trainer([qat(), BatchNormReestimation()])
    with pytest.raises(RuntimeError, match="user's error"):
        t.fit(module, Data())
    assert module.trainer is t
    assert all(not m._forward_hooks for m in module.modules())
    assert module.bn1.momentum == 0.1


def test_without_quantization_it_says_what_is_missing():
    with pytest.raises(MisconfigurationException, match="add QuantizationAwareTraining"):
        trainer([BatchNormReestimation()]).fit(ConvModule(), Data())


def test_unsuited_arguments():
    with pytest.raises(ValueError, match="num_batches must be at least 1, got 0"):
        BatchNormReestimation(num_batches=0)


class MadeLate(ConvModule):
    """Creates its layers in configure_model."""

    def __init__(self):
        super().__init__()
        self.made = False
        for name in ("stem", "bn1", "depthwise", "bn2", "point", "head"):
            delattr(self, name)

    def configure_model(self):
        if not self.made:
            self.made = True
            for name, layer in ConvModule().named_children():
                setattr(self, name, layer)
            quantize_model(self, QuantConfig(3, 3))


@pytest.mark.filterwarnings("ignore:.*callbacks used to create.*", "ignore:.*dataloader is not resumable.*")
def test_layers_made_in_configure_model_are_found_after_a_resume_and_in_a_test(tmp_path, monkeypatch):
    calls = []
    reestimate = batch_norm_reestimation.reestimate_batch_norm
    monkeypatch.setattr(
        batch_norm_reestimation, "reestimate_batch_norm", lambda *a, **k: (calls.append(1), reestimate(*a, **k))[1]
    )
    saving = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=4)
    kwargs = {"max_epochs": 1, "val_check_interval": 3, "num_sanity_val_steps": 0}
    trainer([qat(), BatchNormReestimation(3), saving], enable_checkpointing=True, **kwargs).fit(MadeLate(), Data())
    assert len(calls) == 3  # before two validations and at the end of fit
    calls.clear()
    trainer([qat(), BatchNormReestimation(3)], **kwargs).fit(MadeLate(), Data(), ckpt_path=tmp_path / "step=4.ckpt")
    assert len(calls) == 2
    calls.clear()
    trainer([qat(), BatchNormReestimation(3)]).test(
        MadeLate(), Data(), ckpt_path=tmp_path / "step=8.ckpt", verbose=False
    )
    assert len(calls) == 1


class FrozenBackbone(ConvModule):
    """Has batch norm only in the frozen backbone, or in the other layers too."""

    def __init__(self, everywhere):
        super().__init__()
        self.bn1.running_mean.fill_(0.5)
        if not everywhere:
            self.bn2 = torch.nn.Identity()

    def on_train_epoch_start(self):
        self.bn1.eval()


@pytest.mark.parametrize("everywhere", [False, True])
def test_frozen_batch_norm_stays_in_test_too(tmp_path, everywhere):
    def callbacks():
        return [qat(), BatchNormReestimation(num_batches=2)]

    module, t = FrozenBackbone(everywhere), trainer(callbacks())
    t.fit(module, Data())
    t.save_checkpoint(tmp_path / "last.ckpt")
    module.train()
    expected = t.test(module, Data(), verbose=False)
    again = FrozenBackbone(everywhere)
    assert trainer(callbacks()).test(again, Data(), ckpt_path=tmp_path / "last.ckpt", verbose=False) == expected
    for one in (module, again):
        assert torch.equal(one.bn1.running_mean, torch.full((4,), 0.5))


def test_a_data_module_that_augments_sees_a_training_trainer():
    class Augments(Data):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return (batch[0] + 2.0 if self.trainer.training else batch[0]), batch[1]

    means = []

    class Look(L.Callback):
        def on_validation_epoch_start(self, trainer, pl_module):
            means.append(pl_module.bn1.running_mean.clone())

    module, augments = ConvModule(), Augments()
    t = trainer([qat(), BatchNormReestimation(num_batches=8), Look()], num_sanity_val_steps=0)
    t.fit(module, augments)
    assert torch.equal(means[-1], module.bn1.running_mean)  # from on_train_end, after no further step
    assert augments.trainer is t


class OwnBatches(Sampler):
    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)

    def __iter__(self):
        return iter(torch.randperm(64, generator=self.generator).view(8, 8).tolist())

    def __len__(self):
        return 8


@pytest.mark.parametrize("kind", ["generator", "batch_sampler"])
def test_generators_of_a_loader_give_the_same_batches_each_time(kind):
    class Spy(ConvModule):
        def training_step(self, batch, batch_idx):
            (train if torch.is_grad_enabled() else passes).append(batch[0][:, 0, 0, 0].tolist())
            return super().training_step(batch, batch_idx)

    runs = []
    for more in ([], [BatchNormReestimation(num_batches=1)]):
        passes, train = [], []
        batches = {"batch_sampler": OwnBatches()}
        if kind == "generator":
            batches = {"batch_size": 8, "shuffle": True, "generator": torch.Generator().manual_seed(0)}
        torch.manual_seed(0)
        t = trainer([qat(calibration_batches=1), *more], max_epochs=3, num_sanity_val_steps=0)
        t.fit(Spy(), DataLoader(dataset(), **batches), loader(32, 16))
        runs.append(train)
    assert runs[0] == runs[1]
    assert passes[1] == passes[2] == passes[3]
