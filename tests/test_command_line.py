"""The command-line tool: inspect, export and compare, with checkpoints of every kind."""

import math
import re
import subprocess
import sys
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from marks import needs_onnx_export
from models import ConvModule, Data, trainer
from torch import nn
from torch.nn import functional as F

from lightning_qat_osc import (
    IterativeFreezing,
    OscillationTracking,
    QuantConfig,
    QuantizationAwareTraining,
    load_quantized,
    oscillation_states,
    quantize_model,
)
from lightning_qat_osc.calibration import Calibrator
from lightning_qat_osc.checkpoints import config_of_state, inspect_checkpoint
from lightning_qat_osc.cli import main
from lightning_qat_osc.deepcopies import deep_copy
from lightning_qat_osc.export import convert, load_packed, save_packed
from lightning_qat_osc.export.comparison import OUTPUT, Difference, difference
from lightning_qat_osc.lookup import quantized_layers, quantizers

pytest.importorskip("safetensors")
pytestmark = pytest.mark.filterwarnings("ignore:.*below twice the momentum.*")

X = torch.randn(5, 1, 6, 6, generator=torch.Generator().manual_seed(1))


class OfOne(nn.Module):
    """Self-attention with one input."""

    def __init__(self, width):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0]


class Wrapping(L.LightningModule):
    """Has no forward, an argument that checkpoints do not store, a layer with two names, and a shared weight."""

    def __init__(self, width):
        super().__init__()
        self.network = nn.Sequential(nn.Embedding(10, width), OfOne(width), nn.Linear(width, 10))
        self.network[2].weight = self.network[0].weight
        self.head = self.network[2]

    def training_step(self, batch, batch_idx):
        tokens = batch[1][:, None].expand(-1, 4)
        return F.cross_entropy(self.network(tokens)[:, 0], batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Small(nn.Sequential):
    """A network for :class:`AroundNetwork`."""

    def __init__(self, width: int = 4):
        super().__init__(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))


class AroundNetwork(L.LightningModule):
    """A module that takes its network as an argument and does not save it with its hyperparameters."""

    def __init__(self, network: nn.Module, lr: float = 0.1):
        super().__init__()
        self.save_hyperparameters(ignore=["network"])
        self.network = network

    def forward(self, x):
        return self.network(x)


class MakingNetwork(AroundNetwork):
    """The same module, but it creates the network itself."""

    def __init__(self, **hyperparameters):
        super().__init__(network=Small(8), **hyperparameters)


class Save(L.Callback):
    """Saves checkpoints in the middle of an epoch and keeps a copy of the module from that step."""

    def __init__(self, folder):
        self.folder, self.module = folder, None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 44:
            trainer.save_checkpoint(self.folder / "middle.ckpt")
            trainer.save_checkpoint(self.folder / "weights.ckpt", weights_only=True)
            torch.save(pl_module.state_dict(), self.folder / "state.pt")
            self.module = deep_copy(pl_module)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a folder of checkpoints from the middle of a run, and a copy of the module from the same step."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    save = Save(folder)
    callbacks = [
        QuantizationAwareTraining(2, 3, scale_learning_rate=0.01, weight_granularity="per_channel"),
        OscillationTracking(momentum=0.1),
        IterativeFreezing(threshold=0.11, final_threshold=0.02),
        save,
    ]
    trainer(callbacks, max_epochs=6).fit(ConvModule(lr=0.3), Data())
    torch.save(X, folder / "x.pt")
    return folder, save.module.eval()


def test_inspection_says_what_the_module_holds(run):
    folder, module = run
    for file in ("middle.ckpt", "weights.ckpt", "state.pt"):
        lines = {line.name: line for line in inspect_checkpoint(folder / file)}
        assert list(lines) == ["stem", "depthwise", "point", "head"]
        assert sum(line.frozen or 0.0 for line in lines.values()) > 0
        for name, layer in quantized_layers(module).items():
            q, line = layer.weight_quantizer, lines[name]
            assert line.shape == list(layer.weight.shape)
            assert line.bits == q.bits
            assert line.scale == pytest.approx(q.scale.mean().item())
            assert line.activation_bits == [None if name == "stem" else layer.input_quantizer.bits]
            w, w_q = layer.weight.double(), q(layer.weight).double()
            assert line.sqnr == pytest.approx(
                10 * np.log10((w**2).sum().item() / ((w - w_q) ** 2).sum().item()), abs=1e-3
            )
            assert line.float_bytes == 4 * w.numel()
            assert line.packed_bytes == -(-w.numel() * q.bits // 8) + 4 * q.scale.numel()
            if q.bits == 8:
                assert line.oscillating is line.frozen is None
            else:
                state = oscillation_states(module)[name]
                assert line.frozen == pytest.approx(state.frozen.double().mean().item())
                assert line.oscillating == pytest.approx((state.frequency > 0.005).double().mean().item())


def test_inspection_of_a_checkpoint_with_other_objects(run, tmp_path):
    folder, _ = run
    checkpoint = torch.load(folder / "middle.ckpt", weights_only=True)
    torch.save({**checkpoint, "path": Path("data")}, tmp_path / "objects.ckpt")
    with pytest.raises(ValueError, match="weights_only=False"):
        inspect_checkpoint(tmp_path / "objects.ckpt")
    assert inspect_checkpoint(tmp_path / "objects.ckpt", weights_only=False) == inspect_checkpoint(
        folder / "middle.ckpt"
    )


def test_inspect_prints_a_table(run, capsys):
    folder, _ = run
    assert main(["inspect", str(folder / "middle.ckpt")]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "epoch 5, optimizer step 44"
    assert out[1].split()[:2] == ["layer", "weight"]
    assert out[3].split()[:3] == ["depthwise", "4x1x3x3", "2"]
    # 128 float weights; packed, 77 bytes of integers and 19 scales
    assert out[6].split() == ["total", "512", "B", "153", "B"]


def test_inspect_needs_nothing_but_the_file(run, tmp_path):
    """Run in a separate process, which cannot import the module's class and creates no callbacks."""
    folder, _ = run
    command = [sys.executable, "-m", "lightning_qat_osc.cli", "inspect", str(folder / "middle.ckpt")]
    root = Path(__file__).parent.parent
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert "depthwise" in result.stdout


@pytest.mark.parametrize("checkpoint", ["middle.ckpt", "weights.ckpt"])
def test_export_to_packed(checkpoint, run, tmp_path, capsys):
    folder, module = run
    output = tmp_path / "model.safetensors"
    arguments = ["export", str(folder / checkpoint), "--module", "models.ConvModule", "--to", "packed"]
    assert main([*arguments, "--output", str(output)]) == 0
    assert torch.equal(load_packed(output, ConvModule())(X), module(X))
    assert capsys.readouterr().out == f"{output}: {output.stat().st_size} bytes\n"


def test_export_beside_the_checkpoint(run):
    folder, module = run
    arguments = ["export", str(folder / "middle.ckpt"), "--module", "models:ConvModule", "--to", "torch"]
    assert main([*arguments, "--input", str(folder / "x.pt")]) == 0
    out = torch.export.load(folder / "middle.pt2").module()(X)
    assert (out - module(X)).abs().mean() < 1e-2


@pytest.mark.parametrize("suffix", [None, ".safetensors", ".pt2", pytest.param(".onnx", marks=needs_onnx_export)])
def test_compare(suffix, run, tmp_path, capsys):
    folder, _ = run
    module = ["--module", "models.ConvModule"]
    exported = []
    if suffix is not None:
        to = {".safetensors": "packed", ".pt2": "torch", ".onnx": "onnx"}[suffix]
        if to == "onnx":
            pytest.importorskip("onnxruntime")
        exported = ["--exported", str(tmp_path / f"model{suffix}")]
        main(
            [
                "export",
                str(folder / "middle.ckpt"),
                *module,
                "--to",
                to,
                "--input",
                str(folder / "x.pt"),
                "--output",
                exported[1],
            ]
        )
        capsys.readouterr()
    assert main(["compare", str(folder / "middle.ckpt"), *module, "--data", str(folder / "x.pt"), *exported]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split("  ")[0]: line.split() for line in lines[1:6]}
    assert list(rows) == ["stem", "depthwise", "point", "head", "(output)"]
    assert 0 < float(rows["head"][1]) < 40
    if suffix in (None, ".safetensors"):
        assert all(row[2:] == ["inf", "0"] for row in rows.values())
    else:
        assert all(len(row) == 2 for name, row in rows.items() if name != "(output)")
        assert float(rows["(output)"][2]) > 20
    values = {line.split()[0]: line.split()[1:] for line in lines[-3:]}
    assert list(values) == ["float", "quantized", "exported"]
    assert len(values["float"]) == 8


def test_compare_says_where_outputs_part(run, tmp_path, capsys):
    folder, _ = run
    other = load_quantized(ConvModule, folder / "middle.ckpt")
    with torch.no_grad():
        other.point.bias[0] += 0.5
    save_packed(other, tmp_path / "other.safetensors")
    data = ["--data", str(folder / "x.pt"), "--exported", str(tmp_path / "other.safetensors")]
    assert main(["compare", str(folder / "middle.ckpt"), "--module", "models.ConvModule", *data]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.endswith("first difference")] == ["point"]
    assert next(line for line in lines if line.startswith("point")).split()[3] == "0.5"


class Routed(ConvModule):
    """Sends samples to two heads by position, but all to the first in full precision, as value-based routing might."""

    def __init__(self, lr=0.3):
        super().__init__(lr)
        self.other = nn.Linear(8, 3)

    def forward(self, x):
        x = F.relu(self.bn2(self.depthwise(F.relu(self.bn1(self.stem(x))))))
        hidden = F.relu(self.point(x)).mean((2, 3))
        n = 3 if hasattr(self.head, "weight_quantizer") else len(x)
        return torch.cat(
            [head(part) for head, part in ((self.head, hidden[:n]), (self.other, hidden[n:])) if len(part)]
        )


def test_compare_where_a_layer_runs_on_other_samples_or_not_at_all(tmp_path, capsys):
    t = trainer([QuantizationAwareTraining(2, 3)], max_epochs=1)
    t.fit(Routed(), Data())
    t.save_checkpoint(tmp_path / "routed.ckpt")
    torch.save(X, tmp_path / "x.pt")
    command = ["compare", str(tmp_path / "routed.ckpt"), "--module", "test_command_line.Routed"]
    assert main([*command, "--data", str(tmp_path / "x.pt")]) == 0
    rows = {line.split("  ")[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert rows["head"] == ["head"]
    assert rows["other"] == ["other"]
    assert len(rows["point"]) > 3


def test_numbers_that_are_none_are_no_equal_outputs():
    good, bad = torch.ones(3), torch.tensor([1.0, float("nan"), 1.0])
    assert difference([good], [good.clone()]) == Difference(0.0, math.inf)
    assert math.isnan(difference([good, good], [bad, good]).largest)


def test_equal_infinities_are_equal_outputs():
    masked, others = torch.tensor([1.0, -math.inf]), torch.tensor([1.5, -math.inf])
    assert difference([masked], [masked.clone()]) == Difference(0.0, math.inf)
    assert difference([masked], [others]).largest == 0.5
    assert difference([masked], [-masked]).largest == math.inf


class OfTwo(L.LightningModule):
    """Takes two inputs that must not be swapped."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, plus, minus):
        return self.layer(plus) - minus


def test_a_trusted_checkpoint_may_hold_anything(run, tmp_path, capsys):
    checkpoint = torch.load(run[0] / "middle.ckpt", weights_only=True)
    torch.save({**checkpoint, "anything": Path("x")}, tmp_path / "any.ckpt")
    export = ["export", str(tmp_path / "any.ckpt"), "--module", "models.ConvModule", "--to", "packed"]
    for command in (["inspect", str(tmp_path / "any.ckpt")], export):
        assert main(command) == 1
        assert "weights_only" in capsys.readouterr().err
        assert main([*command, "--trusted"]) == 0
    assert (tmp_path / "any.safetensors").exists()


@needs_onnx_export
def test_onnx_inputs_go_by_their_names(tmp_path, capsys):
    module, one, other = OfTwo(), torch.randn(6, 4), torch.randn(6, 4)
    config = QuantConfig(4, None, first_last_bits=None)
    quantize_model(module, config)
    Calibrator(module, config).finish()
    torch.save({"state_dict": module.state_dict(), "pytorch-lightning_version": L.__version__}, tmp_path / "m.ckpt")
    np.savez(tmp_path / "example.npz", plus=one.numpy(), minus=other.numpy())
    np.savez(tmp_path / "data.npz", minus=other.numpy(), plus=one.numpy())
    common = [str(tmp_path / "m.ckpt"), "--module", "test_command_line.OfTwo"]
    assert main(["export", *common, "--to", "onnx", "--input", str(tmp_path / "example.npz")]) == 0
    common += ["--exported", str(tmp_path / "m.onnx")]
    capsys.readouterr()
    assert main(["compare", *common, "--data", str(tmp_path / "data.npz")]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith(OUTPUT)]
    assert float(line.split()[3]) < 1e-5
    (tmp_path / "m.onnx").write_bytes(b"no graph")
    assert main(["compare", *common, "--data", str(tmp_path / "data.npz")]) == 1
    assert "m.onnx cannot be read" in capsys.readouterr().err


def test_a_part_of_a_module_with_arguments_and_shared_weights(tmp_path, capsys):
    module = Wrapping(8)
    callbacks = [QuantizationAwareTraining(4, 8, first_last_bits=None)]
    t = trainer(callbacks, max_epochs=1, limit_val_batches=0)
    with pytest.warns(UserWarning, match="validation"):
        t.fit(module, Data())
    tokens = torch.randint(0, 10, (3, 4))
    np.savez(tmp_path / "tokens.npz", input=tokens.numpy())
    for name, weights_only in (("full.ckpt", False), ("weights.ckpt", True)):
        t.save_checkpoint(tmp_path / name, weights_only=weights_only)
        common = [str(tmp_path / name), "--module", "test_command_line.Wrapping", "--module-args", '{"width": 8}']
        common += ["--network", "network"]
        assert main(["export", *common, "--to", "packed", "--output", str(tmp_path / "out.safetensors")]) == 0
        loaded = load_packed(tmp_path / "out.safetensors", Wrapping(8).network)
        assert torch.equal(loaded(tokens), module.eval().network(tokens))
        capsys.readouterr()
        assert main(["compare", *common, "--data", str(tmp_path / "tokens.npz")]) == 0
        assert "1.attention.out_proj" in capsys.readouterr().out
    names = [line.name for line in inspect_checkpoint(tmp_path / "full.ckpt")]
    assert names == ["network.0", "network.1.attention.out_proj", "network.1.attention.in_proj_weight"]


def test_a_module_that_is_given_its_network(tmp_path, capsys, monkeypatch):
    pytest.importorskip("jsonargparse")
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # from functions that Lightning calls
    config = QuantConfig(4, 4)
    module = quantize_model(AroundNetwork(Small(8), lr=0.2), config).eval()
    x = torch.randn(6, 4)
    calibrator = Calibrator(module, config)
    module(x)
    calibrator.finish()
    made_by_cli = {"_instantiator": "lightning.pytorch.cli.instantiate_module"}
    for name, others in (("own.ckpt", {}), ("cli.ckpt", made_by_cli)):
        hyperparameters = {"hyper_parameters": {"lr": 0.2, **others}, "hparams_name": "kwargs"}
        version = {"pytorch-lightning_version": L.__version__}
        torch.save({"state_dict": module.state_dict(), **version, **hyperparameters}, tmp_path / name)
    network = '{"network": {"class_path": "test_command_line.Small", "init_args": {"width": %s}}}'
    given = ["--module", "test_command_line.AroundNetwork", "--module-args", network]
    for checkpoint, module_of in (
        ("own.ckpt", ["--module", "test_command_line.MakingNetwork"]),
        ("cli.ckpt", [*given[:-1], network % 8]),
    ):
        packed = tmp_path / f"{checkpoint}.safetensors"
        assert main(["export", str(tmp_path / checkpoint), *module_of, "--to", "packed", "--output", str(packed)]) == 0
        assert torch.equal(load_packed(packed, AroundNetwork(Small(8)))(x), module(x))
    for wrong in (given[:2], [*given[:-1], network % '"wide"']):
        assert main(["export", str(tmp_path / "cli.ckpt"), *wrong, "--to", "packed"]) == 1
        assert re.match("lightning-qat-osc export: .*network", capsys.readouterr().err, re.DOTALL)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["inspect", "none.ckpt"], "inspect: .*No such file"),
        (["inspect", "float.pt"], "float.pt is not a checkpoint of a quantized module: it has no quantizers"),
        (
            ["inspect", "unsafe.pt"],
            "unsafe.pt is damaged, or contains objects other than .* weights_only=False .--trusted",
        ),
        (["inspect", "text.ckpt", "--trusted"], "text.ckpt is damaged, or is not a file that torch.load can read$"),
        (["inspect", "empty.ckpt"], "empty.ckpt is damaged"),
        (["inspect", "half.ckpt"], "half.ckpt is damaged"),
        (["inspect", "short.ckpt"], "short.ckpt is damaged"),
        (
            ["inspect", "numbered.pt"],
            "numbered.pt is not a checkpoint or a state_dict: it contains an object of type dict",
        ),
        (["inspect", "."], "the checkpoint must be a file, but . is a folder of shards"),
        *(
            (["compare", "state.ckpt", "--module", "models.ConvModule", "--data", name], f"{name} is damaged")
            for name in ("cut.npz", "empty.npy", "empty.npz")
        ),
        (
            ["compare", "state.ckpt", "--module", "models.ConvModule", "--data", "x.pt", "--exported", "cut.pt2"],
            "cut.pt2 cannot be read",
        ),
        (["inspect", "list.pt"], "list.pt is not a checkpoint or a state_dict: it contains an object of type list"),
        (["inspect", "noscale.pt"], "the state_dict is damaged: it contains .*_quantizer.grid, but no scale"),
        (
            ["export", "state.ckpt", "--module", "models.ConvModule", "--to", "onnx", "--input", "text.ckpt"],
            "text.ckpt is damaged, or is not a .npy, .npz or .pt file of tensors$",
        ),
        (
            ["export", "state.ckpt", "--module", "models.ConvModule", "--to", "packed", "--module-args", "[1]"],
            r"--module-args must be a JSON object, got \[1\]",
        ),
        (
            [
                "export",
                "state.ckpt",
                "--module",
                "models.ConvModule",
                "--to",
                "packed",
                "--module-args",
                '{"widht": 1}',
            ],
            "--module-args must be arguments of models.ConvModule, got widht",
        ),
        (
            ["export", "state.ckpt", "--module", "models.ConvModule", "--to", "onnx", "--network", "head"],
            "--input must be given for 'onnx': example_input_array belongs to the whole module",
        ),
        (["export", "state.ckpt", "--module", "models.ConvModule", "--to", "onnx"], "--input must be given for 'onnx'"),
        (["export", "state.ckpt", "--module", "models.Data", "--to", "packed"], "--module must be .* got models.Data"),
        (["export", "state.pt", "--module", "models.ConvModule", "--to", "packed"], "state.pt has no 'state_dict'"),
        (["export", "state.ckpt", "--module", "nowhere.Module", "--to", "packed"], "No module named 'nowhere'"),
        (
            ["export", "state.ckpt", "--module", "models.ConvModule", "--to", "packed", "--network", "x"],
            "no attribute `x`",
        ),
    ],
)
def test_errors_are_one_line(arguments, words, run, tmp_path, monkeypatch, capsys):
    folder, _ = run
    monkeypatch.chdir(tmp_path)
    (tmp_path / "state.ckpt").write_bytes((folder / "middle.ckpt").read_bytes())
    torch.save({"weight": torch.ones(2)}, tmp_path / "float.pt")
    torch.save(torch.load(folder / "middle.ckpt", weights_only=True)["state_dict"], tmp_path / "state.pt")
    torch.save(ConvModule(), tmp_path / "unsafe.pt")
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    (tmp_path / "empty.ckpt").touch()
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({1: torch.ones(2)}, tmp_path / "numbered.pt")
    torch.save(X, tmp_path / "x.pt")
    content = (tmp_path / "state.ckpt").read_bytes()
    (tmp_path / "half.ckpt").write_bytes(content[: len(content) // 2])
    (tmp_path / "short.ckpt").write_bytes(content[:-10])
    np.savez(tmp_path / "whole.npz", x=X.numpy())
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:100])
    (tmp_path / "cut.pt2").write_bytes((tmp_path / "whole.npz").read_bytes()[:100])
    for name in ("empty.npy", "empty.npz"):
        (tmp_path / name).touch()
    state = torch.load(folder / "middle.ckpt", weights_only=True)["state_dict"]
    torch.save({k: v for k, v in state.items() if not k.endswith("scale")}, tmp_path / "noscale.pt")
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.search(words, captured.err)
    assert captured.err.startswith(f"lightning-qat-osc {arguments[0]}: ")
    assert captured.err.count("\n") == 1


def test_the_configuration_of_a_state_gives_the_quantizers_back(run):
    folder, module = run
    config = config_of_state(module.state_dict())
    assert config.weight_granularity == "per_channel"
    again = load_quantized(ConvModule, folder / "weights.ckpt", config).eval()
    assert torch.equal(again(X), module(X))
    assert torch.equal(convert(again)(X), module(X))


def test_arguments_that_are_no_json_are_named(capsys):
    with pytest.raises(SystemExit):
        main(["export", "a.ckpt", "--module", "models.ConvModule", "--to", "packed", "--module-args", "{width: 8"])
    assert "argument --module-args: must be JSON, got {width: 8" in capsys.readouterr().err


class Attends(L.LightningModule):
    """Passes the same tensor as all three arguments of its attention."""

    def __init__(self):
        super().__init__()
        self.attention, self.head = torch.nn.MultiheadAttention(8, 2, batch_first=True), torch.nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.attention(x, x, x)[0])


def test_the_configuration_of_a_state_with_several_arguments(tmp_path):
    x = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(3))
    module = quantize_model(Attends().eval(), wanted := QuantConfig(4, 4, first_last_bits=None))
    calibrator = Calibrator(module, wanted)
    with torch.no_grad(), calibrator.observe():
        module(x)
    calibrator.finish()
    bits = [q.bits for q in quantizers(module)]
    config = config_of_state(module.state_dict())
    torch.save({"state_dict": module.state_dict(), "pytorch-lightning_version": "2.6.0"}, tmp_path / "weights.ckpt")
    again = load_quantized(Attends, tmp_path / "weights.ckpt", config).eval()
    assert [q.bits for q in quantizers(again)] == bits
    assert torch.equal(again(x), module(x))
