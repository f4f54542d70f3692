"""Two processes with gloo on the CPU, under each strategy."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from marks import needs_compiler
from models import ConvModule, Data, trainer
from torch import nn

from lightning_qat_osc import LayerRule, QuantizationAwareTraining, load_quantized, oscillation_states
from lightning_qat_osc.lookup import quantized_layers

SCRIPT = Path(__file__).parent / "distributed_script.py"
ROOT = Path(__file__).parent.parent.parent


def run(folder, *arguments):
    """Return the reports of all ranks, and what was printed to stderr."""
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(folder), *map(str, arguments)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rank*.json"))], result.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run the script once for each set of arguments, when a test first asks for it."""
    folder, made = tmp_path_factory.mktemp("runs"), {}

    def get(*arguments):
        if arguments not in made:
            made[arguments] = run(folder / str(len(made)), *arguments)
        return made[arguments]

    return get


@pytest.mark.parametrize(
    ("strategy", "granularity", "compiled"),
    [
        ("ddp", "per_tensor", ()),
        ("ddp", "per_channel", ()),
        ("ddp", "per_tensor", ("--compile",)),
        ("fsdp2", "per_tensor", ()),
        ("fsdp2", "per_channel", ()),
        ("fsdp2", "per_tensor", ("--compile",)),
    ],
)
def test_both_ranks_have_the_same_of_everything(runs, strategy, compiled, granularity):
    (first, second), _ = runs("--strategy", strategy, "--granularity", granularity, *compiled)
    here = first.pop("here"), second.pop("here")
    assert first == second
    assert first["frozen"] > 0
    assert first["logged"]["oscillation/frozen"] == pytest.approx(first["frozen"] / first["all"])
    assert first["logged"]["oscillation/frequency"] == pytest.approx(sum(first["frequency"].values()) / first["all"])
    # each rank stores the histories of the weights that it stores
    assert sum(here) == (first["all"] if strategy == "fsdp2" else 2 * first["all"])
    assert strategy == "ddp" or max(here) < 0.8 * first["all"]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_quantizing_again_in_the_backward_pass_changes_nothing(runs, strategy):
    kept, _ = runs("--strategy", strategy, "--granularity", "per_tensor")
    again, _ = runs("--strategy", strategy, "--granularity", "per_tensor", "--recompute")
    assert [{k: v for k, v in r.items() if k != "here"} for r in again] == [
        {k: v for k, v in r.items() if k != "here"} for r in kept
    ]


def test_sharded_is_as_replicated(runs):
    (ddp, _), _ = runs("--strategy", "ddp", "--granularity", "per_channel")
    (fsdp2, _), _ = runs("--strategy", "fsdp2", "--granularity", "per_channel")
    assert ddp["integers"] == fsdp2["integers"]
    assert ddp["frozen"] == fsdp2["frozen"]
    assert ddp["weights"] == pytest.approx(fsdp2["weights"], rel=1e-4)
    for key in ("scales", "bn"):
        for ours, theirs in zip(ddp[key], fsdp2[key]):
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    # a DDP rank computes these figures from all weights, an FSDP2 rank starts from its part
    figures = [{k: v for k, v in run["logged"].items() if k.startswith("oscillation/")} for run in (ddp, fsdp2)]
    assert "oscillation/dampening_loss" in figures[0]
    assert figures[1] == pytest.approx(figures[0], rel=1e-3)


@pytest.mark.parametrize("how", ["--compile", pytest.param("--fused", marks=needs_compiler)])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_compiled_is_as_eager(runs, strategy, how):
    options = ("--strategy", strategy, "--granularity", "per_tensor")
    (eager, _), _ = runs(*options)
    (compiled, _), _ = runs(*options, how)
    # at least one kernel each for forward and backward and, under DDP, for the two halves of the sweep
    assert eager["kernels"] == 0
    assert compiled["kernels"] >= (0 if how == "--compile" else 4 if strategy == "ddp" else 2)
    for key in ("scales", "bn"):
        for ours, theirs in zip(compiled[key], eager[key]):
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    assert compiled["weights"] == pytest.approx(eager["weights"], rel=1e-4)
    for key in ("integers", "frozen", "sent"):
        assert compiled[key] == eager[key], key


def test_reestimated_statistics_are_those_of_one_process_on_all_the_batches(runs):
    # nothing is trained, so both runs estimate statistics of the same network
    options = ("--lr", "0", "--scale-lr", "0", "--epochs", "1")
    (one,), _ = runs("--strategy", "one", *options)
    (first, _), _ = runs("--strategy", "ddp", *options)
    mean, variance, *deeper = first["bn"]
    assert mean == pytest.approx(one["bn"][0], rel=1e-5)
    assert variance == pytest.approx(one["bn"][1], rel=1e-5)
    for ours, theirs in zip(deeper, one["bn"][2:]):  # after activations whose ranges agree only to 1e-3
        assert ours == pytest.approx(theirs, abs=5e-3)


def test_ranges_are_those_of_one_process_on_all_the_batches(runs):
    # both calibrated on the same 64 images: all on one rank, or half on each of two
    (one,), _ = runs("--strategy", "one")
    for strategy in ("ddp", "fsdp2"):
        (first, _), _ = runs("--strategy", strategy, "--granularity", "per_tensor")
        assert first["initial"] == pytest.approx(one["initial"], rel=1e-3)


def test_half_batches_on_two_ranks_are_whole_ones_on_one(runs):
    # in 64 bits, so that rounding errors do not change the integer of a weight
    options = ("--no-batch-norm", "--precision", "64-true", "--lr", "0.1")
    (one,), _ = runs("--strategy", "one", *options)
    (first, _), _ = runs("--strategy", "ddp", *options)
    for ours, theirs in zip(first["scales"], one["scales"]):
        assert ours == pytest.approx(theirs, rel=1e-9)
    assert first["weights"] == pytest.approx(one["weights"], rel=1e-9)
    assert first["integers"] == one["integers"]
    assert first["frozen"] == one["frozen"] > 0


def test_oscillation_state_is_never_broadcast(runs):
    # before each forward pass, DDP broadcasts batch norm's buffers (2 layers of 4 channels, and counts of 8 bytes) and
    # the grids of 8 quantizers (5 floats each), but not the histories of the 140 weights (11 bytes each)
    (first, _), _ = runs("--strategy", "ddp", "--granularity", "per_tensor")
    assert len(first["sent"]) >= 4 * 8
    assert set(first["sent"]) == {2 * (2 * 4 * 4 + 8) + 8 * 5 * 4}


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_notebook"])
def test_a_training_in_copies_of_the_process_gives_back_what_it_was_given(runs, strategy):
    (plain,), told = runs("--strategy", strategy, "--epochs", "1")
    assert plain["quantized"] == []
    assert "only latent weights are copied back, to a module without quantizers" in " ".join(told.split())
    (quantized,), told = runs("--strategy", strategy, "--epochs", "1", "--quantize-first")
    assert "latent weights are copied back" not in " ".join(told.split())
    (ddp, _), _ = runs("--strategy", "ddp", "--epochs", "1")
    for key in ("quantized", "scales", "integers", "frozen", "frequency"):
        assert quantized[key] == ddp[key], key
    assert plain["weights"] == pytest.approx(weights_alone(ddp))


def weights_alone(report):
    scales = {round(sum(map(abs, s)), 9) for s in report["scales"]}
    return [w for w in report["weights"] if round(w, 9) not in scales]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "fsdp2, one file"])
def test_resume(runs, tmp_path, strategy):
    checkpoint = tmp_path / "stop.ckpt"
    options = ("--strategy", strategy, "--optimizer", "AdamW", "--lr", "0.01")
    (unbroken, _), _ = runs(*options, "--epochs", "3", "--save", tmp_path / "end.ckpt")
    run(tmp_path / "first", *options, "--epochs", "3", "--stop", "2", "--save", checkpoint)
    (resumed, _), _ = run(tmp_path / "second", *options, "--epochs", "3", "--resume", checkpoint)
    assert sum(unbroken["frequency"].values()) > 0
    for key in ("scales", "weights", "integers", "frozen", "frequency", "logged"):
        assert resumed[key] == unbroken[key], key


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2, one file"])
def test_a_checkpoint_of_two_processes_in_one(runs, tmp_path, strategy):
    (saved, _), _ = runs("--strategy", strategy, "--epochs", "2", "--save", tmp_path / "two.ckpt")
    module = load_quantized(ConvModule, tmp_path / "two.ckpt")
    assert module.depthwise.weight_quantizer.bits == 2
    assert {n: s.weight_int.flatten().tolist() for n, s in oscillation_states(module).items()} == saved["integers"]


@pytest.fixture
def process_group_of_its_own():
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def test_flat_parameters_are_refused(process_group_of_its_own):
    class OnCPU(FSDPStrategy):
        """Gets past Lightning's check, which refuses FSDPStrategy itself on a CPU."""

    t = trainer([QuantizationAwareTraining()], strategy=OnCPU(process_group_backend="gloo"))
    with pytest.raises(
        MisconfigurationException, match="OnCPU flattens weights into shards.*use ModelParallelStrategy"
    ):
        t.fit(ConvModule(), Data())


@pytest.mark.parametrize("precision", ["16-true", "bf16-true"])
def test_sixteen_bits_beside_scales_of_32_are_refused(precision):
    callback = QuantizationAwareTraining()
    stand_in = SimpleNamespace(strategy=ModelParallelStrategy(), precision=precision, callbacks=[callback])
    with pytest.raises(MisconfigurationException, match=f"precision='{precision}' with ModelParallelStrategy"):
        callback.setup(stand_in, ConvModule(), "fit")


class Distilled(ConvModule):
    """A student, and a teacher that runs only without gradients."""

    def __init__(self):
        super().__init__()
        self.teacher = nn.Sequential(nn.Flatten(), nn.Linear(36, 3)).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            target = self.teacher(batch[0])
        return nn.functional.mse_loss(self(batch[0]), target)


@pytest.mark.filterwarnings("ignore:.*sync_dist=True.*")
def test_a_teacher_is_told_of(process_group_of_its_own):
    def fit(*rules):
        strategy = DDPStrategy(process_group_backend="gloo")
        t = trainer([QuantizationAwareTraining(rules=rules)], strategy=strategy, max_steps=3, limit_val_batches=0)
        t.fit(Distilled(), Data())

    with (
        pytest.warns(UserWarning, match=r"Layers teacher\.1 have no trainable .*LayerRule\(pattern='teacher\.1'"),
        pytest.raises(RuntimeError, match="not used in producing the loss"),
    ):
        fit()
    fit(LayerRule("teacher.1", weight_bits=None, activation_bits=None))


def test_deepspeed_is_refused():
    class Deep(DeepSpeedStrategy):
        def __init__(self):
            """Skip the parent's ``__init__``, which needs deepspeed to be installed."""

    module = ConvModule()
    with pytest.raises(MisconfigurationException, match="Deep flattens weights into shards.*use ModelParallelStrategy"):
        QuantizationAwareTraining().setup(SimpleNamespace(strategy=Deep()), module, "fit")
    assert not quantized_layers(module)
