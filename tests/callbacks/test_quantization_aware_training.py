import copy
import math
import sys

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from models import ConvModule, Data, Manual, dataset, loader, trainer
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_avg_fn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from lightning_qat_osc import (
    LayerRule,
    OscillationTracking,
    QuantConfig,
    QuantizationAwareTraining,
    quantize_model,
)
from lightning_qat_osc.callbacks import quantization_aware_training
from lightning_qat_osc.callbacks._scale_updates import ScaleUpdates
from lightning_qat_osc.lookup import quantized_layers, quantizers, scale_parameters


def qat(**kwargs):
    return QuantizationAwareTraining(**{"weight_bits": 3, "activation_bits": 3, **kwargs})


def scales(module):
    return torch.cat([s.detach().flatten() for s in scale_parameters(module)])


def test_trains_on_the_grid_and_leaves_the_class_alone():
    module = ConvModule()
    before = {name: p.clone() for name, p in module.named_parameters()}
    trainer([qat()]).fit(module, Data())
    assert type(module) is ConvModule
    layers = quantized_layers(module)
    assert list(layers) == ["stem", "depthwise", "point", "head"]
    assert {n: layer.weight_quantizer.bits for n, layer in layers.items()} == {
        "stem": 8,
        "depthwise": 3,
        "point": 3,
        "head": 8,
    }
    assert module.stem.input_quantizer.bits is None
    assert module.eval()(torch.randn(4, 1, 6, 6)).isfinite().all()
    assert len(module.depthwise.weight_quantizer(module.depthwise.weight).unique()) <= 8
    assert all(not torch.equal(p, before[n]) for n, p in module.named_parameters() if n in before)


def test_fit_twice_then_validate_test_and_predict():
    module, data = ConvModule(), Data()
    first = trainer([qat()])
    first.fit(module, data)
    ranges = scales(module)
    first.fit_loop.max_epochs = 3
    first.fit(module, data)
    second = trainer([qat()])
    second.fit(module, data)
    assert len(quantized_layers(module)) == 4
    assert not torch.equal(scales(module), ranges)
    for t in (first, second, trainer([qat()])):
        losses = t.validate(module, data, verbose=False)[0], t.test(module, data, verbose=False)[0]
        assert losses[0]["val_loss"] == losses[1]["test_loss"]
        assert len(t.predict(module, data)) == 2


def test_evaluation_before_any_range_says_so():
    with pytest.warns(UserWarning, match="no ranges yet"):
        trainer([qat()]).validate(ConvModule(), Data(), verbose=False)


class ListsParameters(ConvModule):
    """Builds its optimizer before quantizers are inserted."""

    def __init__(self, scheduler=None, **kwargs):
        super().__init__(**kwargs)
        self.optimizer = torch.optim.SGD(
            [{"params": [self.stem.weight]}, {"params": [self.depthwise.weight, self.point.weight, self.head.weight]}],
            lr=0.01,
            momentum=0.9,
            weight_decay=0.5,
        )
        self.scheduler = scheduler

    def configure_optimizers(self):
        schedulers = {
            None: lambda o: None,
            "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, [lambda e: 0.5**e] * 2),
            "onecycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=100),
            "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
        }
        scheduler = schedulers[self.scheduler](self.optimizer)
        return [self.optimizer], [] if scheduler is None else [{"scheduler": scheduler, "interval": "step"}]


@pytest.mark.parametrize("scheduler", [None, "lambda", "onecycle", "cosine"])
def test_scales_train_also_when_the_optimizer_was_built_without_them(scheduler):
    module = ListsParameters(scheduler)
    trainer([qat(scale_learning_rate=1e-3)], max_epochs=1, limit_train_batches=1).fit(module, Data())
    initial = scales(module)
    trainer([qat(scale_learning_rate=1e-3)], max_epochs=1).fit(module, Data())
    moved = scales(module) != initial
    in_use = torch.tensor([s.item() != 1.0 for s in scale_parameters(module)])
    assert in_use.any()
    assert torch.equal(moved, in_use)
    assert len(module.optimizer.param_groups) == 2


class Watch(L.Callback):
    """Records the gradients of the scales before each step, and their values before the first step and after each."""

    def __init__(self):
        self.gradients, self.values = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        assert all(s.grad is None for s in scale_parameters(pl_module))
        self.gradients.append([q.scale_grad.clone() for q in quantizers(pl_module)])
        if not self.values:
            self.values.append(scales(pl_module))

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.values.append(scales(pl_module))


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW", "Adagrad"])
def test_scales_take_adams_steps_whatever_the_optimizer_and_its_decay(optimizer):
    watch = Watch()
    module = ConvModule(optimizer=optimizer, weight_decay=0.5, lr=0.02)
    trainer([qat(scale_learning_rate=2e-3), watch]).fit(module, Data())
    values = watch.values[0].double()
    mean = square = torch.zeros_like(values)
    for t, gradients in enumerate(watch.gradients, start=1):  # Adam, as in its paper
        g = torch.cat([x.flatten() for x in gradients]).double() * watch.values[t - 1].double()  # d/d(log s)
        mean, square = 0.9 * mean + 0.1 * g, 0.999 * square + 0.001 * g**2
        values = values * torch.exp(-2e-3 * (mean / (1 - 0.9**t)) / ((square / (1 - 0.999**t)).sqrt() + 1e-8))
        assert torch.allclose(watch.values[t].double(), values, rtol=1e-5)
    assert len(watch.gradients) == 16


def test_the_norm_that_clips_the_weights_is_theirs_alone():
    norms = []

    class Norms(ConvModule):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            norms.append(torch.nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None]))
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

        def on_before_zero_grad(self, optimizer):
            weights = [p.grad for n, p in self.named_parameters() if p.grad is not None and "quantizer" not in n]
            if weights:
                norms.append(torch.nn.utils.get_total_norm(weights))

    trainer([qat()], gradient_clip_val=0.5, max_epochs=1).fit(Norms(), Data())
    assert len(norms) == 15  # nothing is zeroed after the last step
    assert max(norms[::2]) > 0.5
    for unclipped, clipped in zip(norms[::2], norms[1::2]):
        assert clipped.item() == pytest.approx(min(0.5, unclipped.item()), rel=1e-3)


@pytest.mark.parametrize("scheduler", ["plateau", "cyclic", "warmup"])
def test_scales_never_learn_faster_than_asked(scheduler):
    class Scheduled(ConvModule):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)
            kinds = torch.optim.lr_scheduler
            if scheduler == "plateau":
                schedule = kinds.ReduceLROnPlateau(optimizer, factor=0.1, patience=0, threshold=10.0)
                return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val_loss"}}
            if scheduler == "cyclic":
                schedule = kinds.CyclicLR(optimizer, 1e-4, 0.1, step_size_up=4)
            else:
                schedule = kinds.LambdaLR(optimizer, lambda step: min(1.0, step / 8))
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    watch, callback = Watch(), qat(scale_learning_rate=1e-3)
    rates = []

    class Rate(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            rates.append(callback.state_dict()["scale_updates"][0]["param_groups"][0]["lr"])

    trainer([callback, watch, Rate()]).fit(Scheduled(), Data())
    assert max(rates) <= 1e-3
    if scheduler == "plateau":
        assert rates[0] == pytest.approx(1e-3)
        assert rates[-1] < 1e-3
    if scheduler == "warmup":
        assert rates[:9] == pytest.approx([1e-3 * min(1.0, t / 8) for t in range(9)])


def test_scales_follow_the_schedule():
    class Decaying(ConvModule):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step < 5))
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    watch = Watch()
    trainer([qat(), watch]).fit(Decaying(), Data())
    changes = [not torch.equal(a, b) for a, b in zip(watch.values, watch.values[1:])]
    assert changes == [True] * 5 + [False] * 11


def test_an_optimizer_without_a_learning_rate_of_its_own():
    class Relative(torch.optim.SGD):
        """Sets its learning rate in each step, as Adafactor does."""

        def step(self, closure=None):
            for group in self.param_groups:
                group["lr"] = 0.05
            loss = super().step(closure)
            for group in self.param_groups:
                group["lr"] = None
            return loss

    class Module(ConvModule):
        def configure_optimizers(self):
            optimizer = Relative(self.parameters(), lr=0.05)
            optimizer.param_groups[0]["lr"] = None
            return optimizer

    watch = Watch()
    trainer([qat(), watch]).fit(Module(), Data())
    assert all(not torch.equal(a, b) for a, b in zip(watch.values, watch.values[1:]))


def test_scale_learning_rate_of_zero_holds_the_ranges():
    watch = Watch()
    trainer([qat(scale_learning_rate=0.0), watch]).fit(ConvModule(weight_decay=0.1), Data())
    assert all(torch.equal(values, watch.values[0]) for values in watch.values)


class Busy(ConvModule):
    """Logs, draws random numbers and updates metrics and a buffer in its training step."""

    def __init__(self):
        super().__init__(dropout=0.3)
        self.accuracy = MulticlassAccuracy(3)
        self.mean_loss = MeanMetric()
        self.register_buffer("steps", torch.zeros(()))

    def training_step(self, batch, batch_idx):
        self.steps += 1
        self.logger.experiment.add_scalar("x", 1.0) if self.logger is not None else None
        logits = self(batch[0] + 0.01 * torch.randn_like(batch[0]))
        self.log("accuracy", self.accuracy(logits, batch[1]))
        loss = F.cross_entropy(logits, batch[1])
        self.mean_loss.update(loss)
        return loss


def test_calibration_leaves_no_trace():
    module = Busy()
    seen = {}

    class Look(L.Callback):
        def on_train_start(self, trainer, pl_module):
            seen["rng"] = torch.get_rng_state()
            seen["state"] = {k: v.clone() for k, v in pl_module.state_dict().items() if torch.is_tensor(v)}
            seen["updates"] = pl_module.accuracy.update_count
            seen["training"] = all(m.training for m in pl_module.modules())

    # the same record, taken before and after calibration
    before, after = Look(), Look()
    looks = []
    for order in ([before, qat()], [qat(), after]):
        torch.manual_seed(1)
        copied = copy.deepcopy(module)
        trainer(order, max_epochs=1).fit(copied, Data(shuffle=True))
        looks.append(dict(seen))
        assert copied.steps.item() == 8
    assert torch.equal(looks[0]["rng"], looks[1]["rng"])
    assert looks[0]["updates"] == looks[1]["updates"] == 0
    assert looks[1]["training"]
    changed = {k for k, v in looks[1]["state"].items() if not torch.equal(v, looks[0]["state"][k])}
    assert changed
    assert all(k.endswith(("_quantizer.scale", "_quantizer.grid")) for k in changed)


def test_training_goes_on_as_if_there_had_been_no_calibration():
    class Order(L.Callback):
        def __init__(self):
            self.batches = []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.batches.append(batch[1])

    orders = []
    for callbacks in ([], [qat()]):
        order = Order()
        torch.manual_seed(3)
        trainer([*callbacks, order]).fit(ConvModule(), Data(shuffle=True))
        orders.append(torch.cat(order.batches))
    assert torch.equal(*orders)


def test_plan_is_printed_and_written_before_training(tmp_path, caplog):
    path = tmp_path / "plans" / "plan.yaml"
    rules = [LayerRule("point", weight_bits=2)]
    with caplog.at_level("INFO"):
        trainer([qat(plan_path=str(path), print_plan=True, rules=rules)], max_steps=1).fit(ConvModule(), Data())
    plan = {line["layer"]: line for line in yaml.safe_load(path.read_text())}
    assert plan["point"]["weight_bits"] == 2
    assert plan["stem"]["activation_bits"] is None
    assert plan["head"]["type"] == "Linear"
    assert plan["depthwise"]["activation_range"][1] > 0
    assert "depthwise" in caplog.text


def test_a_network_that_was_never_trained_gets_ranges_that_let_it_train():
    class Look(L.Callback):
        inputs, gradients = [], []

        def on_train_start(self, trainer, pl_module):
            pl_module.head.register_forward_pre_hook(lambda m, args: self.inputs.append(args[0].detach()))

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.gradients.append(pl_module.stem.weight.grad.clone())

    look, module = Look(), ConvModule()
    for conv in (module.stem, module.depthwise):
        torch.nn.init.normal_(conv.weight, std=1e-3)  # in evaluation mode, batch norm would pass the small values on
    trainer([qat(first_last_bits=None), look], max_steps=1, limit_val_batches=0).fit(module, Data())
    q = module.point.input_quantizer
    assert q.scale.item() * 7 > 0.5  # normalized values, not thousandths
    assert (look.gradients[0] != 0).any()
    assert module.bn1.num_batches_tracked.item() == 1


def test_manual_optimization_takes_its_ranges_from_the_first_steps():
    module = Manual()
    watch = Watch()
    trainer([qat(calibration_batches=3, scale_learning_rate=1e-3), watch]).fit(module, Data())
    changes = [not torch.equal(a, b) for a, b in zip(watch.values, watch.values[1:])]
    assert changes == [False, False] + [True] * 14
    assert all(not m._forward_pre_hooks for m in module.modules())


def test_manual_optimization_with_a_function():
    module, batches = Manual(), []

    def forward(m, batch):
        batches.append(len(batch[0]))
        m(batch[0])

    watch = Watch()
    trainer([qat(forward_fn=forward, calibration_batches=2), watch]).fit(module, Data())
    assert batches == [8, 8]
    assert watch.values[0][0] != 1.0


class MadeLate(ConvModule):
    def __init__(self, quantize):
        super().__init__()
        self.quantize = quantize

    def configure_model(self):
        if not hasattr(self, "late"):
            self.late = nn.Linear(3, 3)
        if self.quantize:
            quantize_model(self, QuantConfig(3, 3))

    def forward(self, x):
        return self.late(super().forward(x))


def test_layers_made_in_configure_model():
    with pytest.raises(MisconfigurationException, match=r"late.*quantize_model"):
        trainer([qat()]).fit(MadeLate(False), Data())
    module = MadeLate(True)
    trainer([qat()]).fit(module, Data())
    assert module.late.weight_quantizer.bits == 8  # the last layer


def test_a_second_one_is_refused():
    with pytest.raises(RuntimeError, match="more than one stateful callback"):
        trainer([qat(), qat()])


def test_a_weight_that_is_parametrized_after_the_quantizers_is_refused():
    class Late(ConvModule):
        def setup(self, stage):
            nn.utils.parametrizations.weight_norm(self.depthwise)

    with pytest.raises(MisconfigurationException, match="quantizers of depthwise have no effect.*in __init__"):
        trainer([qat()]).fit(Late(), Data())


def test_another_configuration_for_the_same_module_is_refused():
    module = ConvModule()
    trainer([qat()], max_steps=1).fit(module, Data())
    words = "already quantized with a different configuration: weight_bits: 3 before, 2 now"
    with pytest.raises(ValueError, match=words):
        trainer([qat(weight_bits=2)], max_steps=1).fit(module, Data())


def test_an_optimizer_without_lightnings_wrapper():
    class Raw(Manual):
        def optimizers(self):
            return super().optimizers(use_pl_optimizer=False)

    trainer([qat()], max_epochs=1).fit(Raw(), Data())


def test_no_optimizer_at_all():
    class Without(ConvModule):
        def configure_optimizers(self):
            return None

    with pytest.warns(UserWarning, match="no optimizer"):
        trainer([qat()], max_epochs=1).fit(Without(), Data())


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided.*")
@pytest.mark.parametrize("use_buffers", [True, False])
def test_checkpoints_of_an_averaged_model_are_quantized(tmp_path, use_buffers):
    averaging = WeightAveraging(avg_fn=get_ema_avg_fn(0.9), use_buffers=use_buffers)
    tracking = OscillationTracking()
    t = trainer([qat(), averaging, tracking, ModelCheckpoint(tmp_path)], enable_checkpointing=True)
    t.fit(ConvModule(), Data())
    loss = t.validate(t.lightning_module, Data(), verbose=False)[0]["val_loss"]
    fresh = ConvModule()
    with pytest.warns(UserWarning, match="outside the 'fit' stage"):
        again = trainer([qat(), averaging.__class__(), tracking]).test(
            fresh, Data(), ckpt_path=t.checkpoint_callback.best_model_path, verbose=False
        )
    assert all(q.active for q in quantizers(fresh) if q.bits is not None)
    assert fresh.point.input_quantizer.quant_max == 7
    if use_buffers:
        assert again[0]["test_loss"] == pytest.approx(loss, rel=1e-3)


def test_a_frozen_teacher_is_not_the_last_layer():
    class Distilled(ConvModule):
        def __init__(self):
            super().__init__()
            self.teacher = nn.Linear(36, 3).requires_grad_(False)

        def training_step(self, batch, batch_idx):
            target = self.teacher(batch[0].flatten(1)).softmax(1)
            return super().training_step(batch, batch_idx) + F.cross_entropy(self(batch[0]), target) + target.sum() * 0

    module = Distilled()
    with pytest.warns(UserWarning, match="Layers teacher are quantized but not trained, and no trained layer uses"):
        trainer([qat()], max_steps=1).fit(module, Data())
    assert (module.stem.weight_quantizer.bits, module.head.weight_quantizer.bits) == (8, 8)
    assert module.teacher.weight_quantizer.bits == 3


def test_lbfgs_is_refused():
    class Lbfgs(ConvModule):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters())

    with pytest.raises(MisconfigurationException, match="LBFGS"):
        trainer([qat()]).fit(Lbfgs(), Data())


def test_a_checkpoint_of_another_quantization_is_refused(tmp_path):
    t = trainer([qat()])
    t.fit(ConvModule(), Data())
    t.save_checkpoint(tmp_path / "a.ckpt")
    other = trainer([qat(weight_bits=4, rules=[LayerRule("head", weight_bits=6)])], max_epochs=3)
    with pytest.raises(ValueError, match=r"with a different configuration: weight_bits: 3 before, 4 now; rules"):
        other.fit(ConvModule(), Data(), ckpt_path=tmp_path / "a.ckpt")


def test_unsuited_arguments():
    for arguments, words in (
        ({"calibration_batches": 0}, "calibration_batches must be at least 1, got 0"),
        ({"scale_learning_rate": -1.0}, r"scale_learning_rate must be in \[0, inf\), got -1.0"),
        ({"scale_learning_rate": float("nan")}, "scale_learning_rate"),
        ({"weight_bits": 12}, "weight_bits must be from 2 to 8, or None for full precision, got 12"),
    ):
        with pytest.raises(ValueError, match=words):
            qat(**arguments)


def test_data_that_can_be_read_only_once_is_refused():
    module = ConvModule()
    t = trainer([qat()], max_steps=2)
    with pytest.raises(MisconfigurationException, match="only once"):
        t.fit(module, iter(list(loader())), loader())


def test_an_exception_in_training_lets_go_of_everything():
    class Fails(Manual):
        def training_step(self, batch, batch_idx):
            if batch_idx == 1:
                raise RuntimeError("user's error")
            return super().training_step(batch, batch_idx)

    module = Fails()
    t = trainer([qat()])
    with pytest.raises(RuntimeError, match="user's error"):
        t.fit(module, Data())
    assert all(not m._forward_pre_hooks for m in module.modules())
    assert all(not o._optimizer_step_post_hooks for o in t.optimizers)


@pytest.mark.parametrize("problem", [None, "RuntimeError: no compiler"])
def test_fused_kernels_are_chosen_at_fit_and_do_without_a_compiler(problem, monkeypatch):
    monkeypatch.setattr(quantization_aware_training, "why_nothing_compiles", lambda device: problem)
    module = ConvModule()
    t = trainer([QuantizationAwareTraining(3, 3, fused=True)], max_epochs=1)
    if problem is None:
        t.fit(module, Data())
    else:
        with pytest.warns(UserWarning, match="fused=True needs torch.compile, .* eagerly: RuntimeError: no compiler"):
            t.fit(module, Data())
    assert {q.fused for q in quantizers(module)} == {problem is None}


def test_fused_is_a_truth_value():
    with pytest.raises(TypeError, match="fused must be True or False, got 'yes'"):
        QuantizationAwareTraining(fused="yes")


class LateBranch(ConvModule):
    """Has a layer that the first epoch does not call."""

    def __init__(self):
        super().__init__()
        self.extra = nn.Linear(8, 3)

    def training_step(self, batch, batch_idx):
        x = F.relu(self.bn2(self.depthwise(F.relu(self.bn1(self.stem(batch[0]))))))
        x = F.relu(self.point(x)).mean((2, 3))
        return F.cross_entropy(self.head(x) + (self.extra(x) if self.current_epoch else 0.0), batch[1])


@pytest.mark.filterwarnings("ignore:.*not called during calibration.*", "ignore:.*callbacks used to create.*")
def test_an_input_that_stays_in_full_precision_does_so_after_a_resume(tmp_path):
    torch.manual_seed(0)
    unbroken, resumed = LateBranch(), LateBranch()
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    trainer([qat(), saving], max_epochs=3, enable_checkpointing=True).fit(unbroken, Data())
    trainer([qat()], max_epochs=3).fit(resumed, Data(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert not resumed.extra.input_quantizer.active
    for key, value in unbroken.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


def test_a_resume_that_failed_leaves_nothing_for_the_next_fit(tmp_path):
    class Fails(ConvModule):
        def configure_optimizers(self):
            raise RuntimeError("no optimizers")

    def state(callback):
        torch.manual_seed(0)
        module = ConvModule()
        trainer([callback], max_epochs=1).fit(module, Data())
        return module.state_dict()

    t = trainer([qat()], max_epochs=1)
    t.fit(ConvModule(), Data())
    t.save_checkpoint(tmp_path / "one.ckpt")
    callback = qat()
    with pytest.raises(RuntimeError, match="no optimizers"):
        trainer([callback], max_epochs=2).fit(Fails(), Data(), ckpt_path=tmp_path / "one.ckpt")
    expected = state(qat())
    assert all(torch.equal(value, expected[key]) for key, value in state(callback).items())


def test_a_scale_without_a_gradient_in_a_step_stays_where_it_is():
    class Alternates(ConvModule):
        def __init__(self):
            super().__init__()
            self.second = nn.Linear(8, 3)
            self.scales = []

        def training_step(self, batch, batch_idx):
            x = F.relu(self.bn2(self.depthwise(F.relu(self.bn1(self.stem(batch[0]))))))
            x = F.relu(self.point(x)).mean((2, 3))
            return F.cross_entropy((self.second if batch_idx % 2 else self.head)(x), batch[1])

        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.scales.append((self.second.weight_quantizer.scale.item(), self.head.weight_quantizer.scale.item()))

    module = Alternates()
    trainer([qat(scale_learning_rate=0.01)], max_epochs=1).fit(module, Data())
    for i, (before, after) in enumerate(zip(module.scales, module.scales[1:]), start=1):
        moved, still = (0, 1) if i % 2 else (1, 0)
        assert before[moved] != after[moved]
        assert before[still] == after[still]


@pytest.mark.parametrize("base", [ConvModule, Manual])
def test_a_frozen_backbone_holds_the_first_layer(base):
    class Transfer(base):
        def __init__(self):
            super().__init__()
            for layer in (self.stem, self.bn1, self.depthwise, self.bn2):
                layer.requires_grad_(False)

    module = Transfer()
    trainer([qat(calibration_batches=1)], max_steps=1).fit(module, Data())
    bits = {n: (x.weight_quantizer.bits, x.input_quantizer.bits) for n, x in quantized_layers(module).items()}
    assert bits == {"stem": (8, None), "depthwise": (3, 3), "point": (3, 3), "head": (8, 8)}


def test_ranges_come_from_training_where_validation_comes_first():
    class Large(Data):
        def val_dataloader(self):
            images, labels = dataset(32).tensors
            return DataLoader(TensorDataset(images * 1000.0, labels), batch_size=16)

    module = Manual()
    t = trainer([qat(calibration_batches=20)], max_epochs=2, limit_train_batches=3, num_sanity_val_steps=0)
    t.fit(module, Large())
    q = module.depthwise.input_quantizer
    assert q.scale.item() * q.quant_max < 100.0


def test_a_weight_tied_in_setup_is_refused():
    class Late(ConvModule):
        def __init__(self):
            super().__init__()
            self.twin = nn.Conv2d(4, 8, 1)

        def setup(self, stage):
            self.twin.weight = self.point.weight

    with pytest.raises(MisconfigurationException, match="point and twin share a weight, and have a quantizer each"):
        trainer([qat()]).fit(Late(), Data())


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have notes from Python 3.11 on")
def test_an_error_of_a_pass_comes_with_advice():
    class PerEpoch(ConvModule):
        def on_train_epoch_start(self):
            self.losses = []

        def training_step(self, batch, batch_idx):
            self.losses.append(loss := super().training_step(batch, batch_idx))
            return loss

    with pytest.raises(AttributeError, match="losses") as raised:
        trainer([qat()]).fit(PerEpoch(), Data())
    assert "give forward_fn, a function of the LightningModule and a batch" in raised.value.__notes__[0]


@pytest.mark.parametrize("scheduled", [False, True])
def test_scales_follow_the_group_of_their_layer(scheduled):
    class Groups(ConvModule):
        def configure_optimizers(self):
            head = [p for layer in (self.point, self.head) for p in layer.parameters()]
            rest = [p for layer in (self.stem, self.depthwise) for p in (layer.weight,)]
            if not scheduled:
                return torch.optim.SGD([{"params": rest, "lr": 0.0}, {"params": head}], lr=0.01)
            optimizer = torch.optim.SGD([{"params": rest}, {"params": head}], lr=0.01)
            held = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: 0.0, lambda step: 1.0])
            return [optimizer], [{"scheduler": held, "interval": "step"}]

    module, before = Groups(), {}

    class Look(L.Callback):
        def on_train_start(self, trainer, pl_module):
            before.update({q: q.scale.detach().clone() for q in quantizers(pl_module)})

    trainer([qat(), Look()]).fit(module, Data())
    for name, layer in quantized_layers(module).items():
        for q in layer.quantizers():
            if q.active:
                assert torch.equal(q.scale, before[q]) == (name in ("stem", "depthwise")), name


def test_scales_of_a_group_that_comes_later_follow_its_rise_and_fall():
    module = quantize_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), QuantConfig(3, None))
    backbone, head = module
    backbone.requires_grad_(False)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.01)
    updates = ScaleUpdates([optimizer], module, 1e-3)
    rates = []
    for i, rate in enumerate([None, 0.001, 0.005, 0.01, 0.002]):
        if i == 1:
            backbone.requires_grad_(True)
            optimizer.add_param_group({"params": list(backbone.parameters()), "lr": rate})
        elif i > 1:
            optimizer.param_groups[1]["lr"] = rate
        before = backbone.weight_quantizer.scale.item()
        for layer in module if i > 0 else [head]:
            layer.weight_quantizer.scale.grad = torch.ones(1)
        updates.before_step(optimizer)
        updates.after_step(optimizer)
        rates.append(-math.log(backbone.weight_quantizer.scale.item() / before))
    assert rates[1:] == pytest.approx([1e-4, 5e-4, 1e-3, 2e-4], rel=0.02)


class Growing(ConvModule):
    """Appends a layer to its head in the given hook."""

    def __init__(self, hook):
        super().__init__()
        setattr(self, hook, self.grow)

    def grow(self):
        if type(self.head) is not nn.Sequential:
            self.head = nn.Sequential(self.head, nn.Linear(3, 3))
            self.trainer.optimizers[0].add_param_group({"params": list(self.head[1].parameters())})


def test_layers_made_by_the_modules_own_on_fit_start_are_refused():
    with pytest.raises(MisconfigurationException, match=r"layers head\.1 have no quantizers"):
        trainer([qat()]).fit(Growing("on_fit_start"), Data())


@pytest.mark.filterwarnings("ignore:.*loss_network.*not trained")
def test_a_loss_network_made_by_the_modules_own_on_fit_start_is_told():
    class WithLoss(ConvModule):
        def on_fit_start(self):
            self.loss_network = nn.Linear(3, 3).requires_grad_(False)

    with pytest.warns(UserWarning, match="loss_network were created after training began"):
        trainer([qat()]).fit(WithLoss(), Data())


@pytest.mark.parametrize("hook", ["on_train_start", "on_train_epoch_start", "on_train_epoch_end"])
def test_layers_made_while_training_are_told_once_and_quantized_by_the_next_fit(hook):
    module = Growing(hook)
    with pytest.warns(UserWarning, match=r"head\.1 were created after training began") as told:
        trainer([qat()], max_epochs=3).fit(module, Data())
    assert len([w for w in told if "after training began" in str(w.message)]) == 1
    trainer([qat()]).fit(module, Data())
    assert all(q.calibrated for q in module.head[1].quantizers())


def test_a_lazy_layer_that_is_left_out_does_not_move_by_itself():
    class Lazy(ConvModule):
        def __init__(self):
            super().__init__()
            self.point = nn.LazyConv2d(8, 1)

    rules = [LayerRule("point", weight_bits=None, activation_bits=None)]
    trainer([qat(rules=rules)], num_sanity_val_steps=0).fit(Lazy(), Data())
