"""Stock LightningCLI with every callback in YAML and on the command line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("jsonargparse")
pytest.importorskip("sklearn")

ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "examples" / "digits_cli.py"
CONFIG = ROOT / "examples" / "digits.yaml"


def run(*arguments, cwd):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{cwd}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *arguments]
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_the_complete_example(tmp_path):
    run(
        "fit",
        "--config",
        str(CONFIG),
        "--trainer.max_epochs",
        "2",
        "--trainer.enable_progress_bar",
        "false",
        cwd=tmp_path,
    )
    plan = {line["layer"]: line for line in yaml.safe_load((tmp_path / "runs/digits_cli/plan.yaml").read_text())}
    assert plan["network.0"]["weight_bits"] == 8
    assert plan["network.0"]["activation_bits"] is None
    assert plan["network.3.0"]["weight_bits"] == 4
    assert plan["network.4.0"]["weight_bits"] == plan["network.4.0"]["activation_bits"] == 3
    assert plan["network.9"]["activation_bits"] is None
    checkpoint = torch.load(next(tmp_path.rglob("*.ckpt")), weights_only=True)
    state = checkpoint["state_dict"]
    assert state["network.4.0.weight_quantizer.oscillation.frequency"].shape == state["network.4.0.weight"].shape
    # the scales have moved, although the optimizer was built before the quantizers
    later = state["network.4.0.weight_quantizer.scale"]
    assert later.item() != pytest.approx(plan["network.4.0"]["weight_scale"], rel=1e-4)
    assert later.item() == pytest.approx(plan["network.4.0"]["weight_scale"], rel=0.2)
    saved = yaml.safe_load(next(tmp_path.rglob("config.yaml")).read_text())
    arguments = saved["trainer"]["callbacks"][0]["init_args"]
    assert arguments["rules"][0]["pattern"] == "network.3.*"
    # the configuration that the CLI saved can be read back
    config = next(tmp_path.rglob("config.yaml"))
    run("fit", "--config", str(config), "--trainer.fast_dev_run", "true", cwd=tmp_path)


def test_callbacks_on_the_command_line(tmp_path):
    (tmp_path / "functions.py").write_text("def run(module, batch):\n    print('RAN')\n    module.network(batch[0])\n")
    out = run(
        "fit", "--trainer.fast_dev_run=2", "--trainer.accelerator=cpu",
        "--trainer.callbacks+=lightning_qat_osc.QuantizationAwareTraining",
        "--trainer.callbacks.weight_bits=2",
        "--trainer.callbacks.activation_bits=null",
        "--trainer.callbacks+=lightning_qat_osc.IterativeFreezing",
        "--trainer.callbacks.threshold=0.05",
        "--trainer.callbacks+=lightning_qat_osc.BatchNormReestimation",
        "--trainer.callbacks.forward_fn=functions.run",
        "--optimizer=SGD",
        "--optimizer.lr=0.01",
        cwd=tmp_path,
    )  # fmt: skip
    assert "RAN" in out


@pytest.mark.parametrize(
    ("callback", "arguments"),
    [
        ("QuantizationAwareTraining", {"weight_bits": "Bits of the weights", "rules": "Exceptions by layer name"}),
        ("OscillationTracking", {"momentum": "Weight of the new value", "max_bits": "at most this many bits"}),
        (
            "OscillationDampening",
            {"final_weight": "Lambda at the end", "aggregation": "of a layer's weights are reduced"},
        ),
        ("IterativeFreezing", {"threshold": "Frequency above which", "final_threshold": "Threshold at the end"}),
        ("BatchNormReestimation", {"num_batches": "Number of training batches", "forward_fn": "runs the network"}),
        ("ModelExport", {"formats": "safetensors with b bits", "network": "Name of the submodule to export"}),
    ],
)
def test_help_shows_every_argument_with_its_documentation(callback, arguments, tmp_path):
    import inspect

    import lightning_qat_osc

    out = run("fit", f"--trainer.callbacks.help=lightning_qat_osc.{callback}", cwd=tmp_path)
    text = " ".join(out.split())
    for name in inspect.signature(getattr(lightning_qat_osc, callback)).parameters:
        assert f"--trainer.callbacks.{name}" in text or f"--trainer.callbacks.init_args.{name}" in text, name
    for name, words in arguments.items():
        assert words in text, name
