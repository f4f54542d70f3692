"""Compiled networks under all callbacks: no graph breaks, no recompilation, and the same states as the eager run."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from marks import needs_compiler
from models import Data, loader, trainer
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from lightning_qat_osc import (
    BatchNormReestimation,
    IterativeFreezing,
    OscillationDampening,
    OscillationTracking,
    QuantConfig,
    QuantizationAwareTraining,
    oscillation_states,
    quantize_model,
)
from lightning_qat_osc.lookup import quantizers

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*below twice the momentum.*"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided.*"),
]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False)
        self.bn2 = nn.BatchNorm2d(4)
        self.point = nn.Conv2d(4, 8, 1)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = F.relu(self.bn1(self.stem(x)))
        x = F.relu(self.bn2(self.depthwise(x)))
        return self.head(F.relu(self.point(x)).mean((2, 3)))


class Module(L.LightningModule):
    """A network, optionally compiled in place or wrapped by torch.compile, with steps that can log."""

    def __init__(self, network=None, compiler=None, wrapped=False, log=True):
        super().__init__()
        self.network, self.logs = Net() if network is None else network, log
        if compiler is not None and wrapped:
            self.network = torch.compile(self.network, backend=compiler, fullgraph=True)
        elif compiler is not None:
            self.network.compile(backend=compiler, fullgraph=True)  # an error where the graph breaks

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.network(batch[0]), batch[1])
        if self.logs:
            self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.network(batch[0]), batch[1])
        if self.logs:
            self.log("val_loss", loss)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.3, momentum=0.9)


class ManualModule(Module):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self.network(batch[0]), batch[1]))
        optimizer.step()


def forward_fn(module, batch):
    module.network(batch[0])


def callbacks(reestimate=None, **kwargs):
    return [
        QuantizationAwareTraining(
            2, **{"activation_bits": 3, "first_last_bits": None, "scale_learning_rate": 0.01, **kwargs}
        ),
        OscillationTracking(momentum=0.1),
        OscillationDampening(final_weight=1e-2),
        IterativeFreezing(threshold=0.12, final_threshold=0.05),
        BatchNormReestimation(num_batches=3, forward_fn=reestimate),
    ]


@pytest.fixture(autouse=True)
def counter():
    """Yield a backend that counts the graphs that it compiles."""
    torch._dynamo.reset()
    yield CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


class Graphs(L.Callback):
    """Records the number of graphs after each batch."""

    def __init__(self, counter):
        self.counter, self.after = counter, []

    def on_train_batch_end(self, *args):
        self.after.append(self.counter.frame_count)

    def on_validation_batch_end(self, *args):
        self.after.append(self.counter.frame_count)


def fit(module_class=Module, own=None, extra=(), seed=11, n=64, ckpt_path=None, module_kwargs=None, **kwargs):
    torch.manual_seed(seed)
    module = module_class(**(module_kwargs or {}))
    own = callbacks() if own is None else own
    checkpointing = any(isinstance(c, ModelCheckpoint) for c in extra)
    t = trainer([*own, *extra], enable_checkpointing=checkpointing, **{"max_epochs": 4, **kwargs})
    t.fit(module, loader(n), loader(16), ckpt_path=ckpt_path)
    return module, t


def frozen(module):
    return sum(int(state.frozen.sum()) for state in oscillation_states(module).values())


def plain_names(state_dict):
    return {name.replace("._orig_mod", ""): value for name, value in state_dict.items()}


def assert_same(a, b):
    one, other = plain_names(a.state_dict()), plain_names(b.state_dict())
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


KINDS = {
    "all": {},
    "first and last at 8 bits": {"first_last_bits": 8},
    "per channel": {"weight_granularity": "per_channel"},
    "weights alone": {"activation_bits": None},
}


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_in_place_it_is_the_eager_run_in_three_graphs(counter, kind):
    eager, _ = fit(own=callbacks(**KINDS[kind]))
    assert frozen(eager) > 0
    graphs = Graphs(counter)
    compiled, _ = fit(own=callbacks(**KINDS[kind]), extra=[graphs], module_kwargs={"compiler": counter})
    assert_same(eager, compiled)
    # one graph each for sanity check (before calibration), training, evaluation; freezing and re-estimation add none
    warm_up = 2 + 8 + 1
    assert graphs.after[:warm_up] == [1, 1, *[2] * 8, 3]
    assert set(graphs.after[warm_up:]) == {3}
    assert len(graphs.after) == 2 + 4 * (8 + 2)


def test_without_a_sanity_check_there_are_as_many_graphs_as_in_plain_lightning(counter):
    fit(own=[], module_kwargs={"compiler": counter}, num_sanity_val_steps=0)
    plain = counter.frame_count
    torch._dynamo.reset()
    fit(module_kwargs={"compiler": counter}, num_sanity_val_steps=0)
    assert counter.frame_count - plain == plain == 2


def test_a_last_batch_of_another_size_costs_what_it_does_in_plain_lightning(counter):
    fit(own=[], n=60, module_kwargs={"compiler": counter}, num_sanity_val_steps=0)
    plain = counter.frame_count
    torch._dynamo.reset()
    compiled, _ = fit(n=60, module_kwargs={"compiler": counter}, num_sanity_val_steps=0)
    assert counter.frame_count - plain == plain > 2
    assert_same(fit(n=60)[0], compiled)


def test_a_network_in_torch_compiles_wrapper(counter):
    compiled, _ = fit(module_kwargs={"compiler": counter, "wrapped": True})
    assert counter.frame_count == 3
    assert next(iter(oscillation_states(compiled))) == "network._orig_mod.stem"
    assert_same(fit()[0], compiled)


@pytest.mark.parametrize("function", [None, forward_fn], ids=["watching the first steps", "forward_fn"])
def test_manual_optimization(counter, function):
    own = [callbacks(forward_fn, forward_fn=function) for _ in range(2)]
    compiled, _ = fit(ManualModule, own[0], module_kwargs={"compiler": counter})
    assert counter.frame_count == 3
    assert frozen(compiled) > 0
    assert_same(fit(ManualModule, own[1])[0], compiled)


class OtherTrainingData(Data):
    def val_dataloader(self):
        return loader(16)


def test_evaluation_after_fit_costs_what_it_does_in_plain_lightning(counter):
    graphs = []
    for own in ([], callbacks()):
        torch._dynamo.reset()
        module, _ = fit(own=own, module_kwargs={"compiler": counter})
        after_fit, mean = counter.frame_count, module.network.bn1.running_mean.clone()
        for _ in range(2):
            trainer(own).validate(module, OtherTrainingData(batch_size=4), verbose=False)
        assert torch.equal(module.network.bn1.running_mean, mean) == (not own)
        graphs.append(counter.frame_count - after_fit)
    assert graphs == [1, 1]  # outside fit, Lightning evaluates in inference mode, which needs its own graph


def test_a_compiled_run_resumes_and_ends_like_the_eager_one(counter, tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    eager, _ = fit(extra=[checkpoint])
    compiled, t = fit(seed=99, ckpt_path=tmp_path / "epoch=1.ckpt", module_kwargs={"compiler": counter})
    assert t.global_step == 32
    assert_same(eager, compiled)


def test_there_is_no_graph_break_to_explain():
    net = Net()
    quantize_model(net, QuantConfig(2, 3, first_last_bits=None))
    x = torch.randn(4, 1, 6, 6)
    for ranges in (False, True):
        if ranges:
            for layer in (net.stem, net.depthwise, net.point, net.head):
                layer.weight_quantizer.calibrate(layer.weight)
                layer.input_quantizer.calibrate(x.flatten(), -2.0, 2.0)
        torch._dynamo.reset()
        report = torch._dynamo.explain(net)(x)
        assert (report.graph_count, report.graph_break_count) == (1, 0)
    assert all(q.active for q in quantizers(net))


def test_an_error_in_a_pass_does_not_leave_everything_eager(counter):
    class Fails(Module):
        def training_step(self, batch, batch_idx):
            if not torch.is_grad_enabled():
                raise RuntimeError("user's error")
            return super().training_step(batch, batch_idx)

    with pytest.raises(RuntimeError, match="user's error"):
        fit(Fails, module_kwargs={"compiler": counter}, num_sanity_val_steps=0)
    assert counter.frame_count == 0
    torch.compile(Net(), backend=counter)(torch.randn(2, 1, 6, 6))
    assert counter.frame_count == 1


def whole(own, log, counter):
    """Fit ``torch.compile(module)``; return the type and words of the error that ended it, or None, and the module."""
    torch._dynamo.reset()
    torch.manual_seed(11)
    module = Module(log=log)
    t = trainer(own, max_epochs=4)
    try:
        t.fit(torch.compile(module, backend=counter), loader(), loader(16))
    except Exception as error:
        return (type(error), str(error).partition("\n")[0]), module
    return None, module


def test_a_compiled_module_whose_steps_do_not_log(counter):
    error, module = whole(callbacks(), False, counter)
    assert error is None
    assert counter.frame_count == 3
    assert frozen(module) > 0
    assert_same(fit(module_kwargs={"log": False})[0], module)


def test_a_compiled_module_whose_steps_log_fails_or_runs_as_in_plain_lightning(counter):
    # with Lightning 2.6.6 and torch 2.13 Dynamo fails in self.log of a compiled training_step, whatever the callbacks
    plain, _ = whole([], True, counter)
    ours, _ = whole(callbacks(), True, counter)
    assert ours == plain


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@needs_compiler
def test_inductor_ends_with_the_integers_of_the_eager_run():
    eager, _ = fit()
    compiled, _ = fit(module_kwargs={"compiler": "inductor"})
    others = oscillation_states(compiled)
    for name, state in oscillation_states(eager).items():
        for what in ("weight_int", "direction", "frozen"):
            assert torch.equal(getattr(state, what), getattr(others[name], what)), (name, what)
        assert torch.allclose(state.frequency, others[name].frequency, atol=1e-6)
    assert frozen(eager) > 0
    for (name, p), q in zip(eager.named_parameters(), compiled.parameters()):
        assert torch.allclose(p, q, rtol=1e-3, atol=1e-4), name
