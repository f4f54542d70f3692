"""Imports run one way: from the callbacks down to functions of tensors."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = "lightning_qat_osc"
ROOT = Path(__file__).parent.parent / PACKAGE

# lowest first: a module may import only modules from earlier sets
FLOORS = [
    {"kernels", "sharding", "schedules", "layers", "arguments", "checks", "files", "tables", "modes", "deepcopies"},
    {"lsq_gradients", "ranges", "recomputation", "copies", "dataflow"},
    {"functional"},
    {"oscillation", "regularizers", "batch_norm", "config"},
    {"quantizers", "metrics"},
    {"quantized_layer"},
    {"lookup"},
    {"sweep", "rules", "scales"},
    {"surgery", "observation"},
    {"calibration", "plan", "loading", "checkpoints"},
    {"export.integers", "export.extras"},
    {"export.folding"},
    {"export.convert"},
    {"export.packed", "export.pt2e", "export.torchao"},
    {"export.onnx_graph"},
    {"export.onnx"},
    {"export.formats"},
    {"export", "export.comparison"},
    {
        "callbacks._random_numbers",
        "callbacks._optimizer_steps",
        "callbacks._scale_updates",
        "callbacks._frozen_weights",
        "callbacks._progress",
        "callbacks._unsupported",
        "callbacks._optimizer_weights",
    },
    {"callbacks._loader_copies", "callbacks._training_passes", "callbacks._sharded_restore"},
    {"callbacks._training_batches"},
    {"callbacks._range_initialization"},
    {"callbacks.quantization_aware_training"},
    {"callbacks._requirements"},
    {"callbacks._tracks_oscillation"},
    {
        "callbacks.oscillation_tracking",
        "callbacks.oscillation_dampening",
        "callbacks.batch_norm_reestimation",
        "callbacks.model_export",
    },
    {"callbacks.iterative_freezing"},
    {"callbacks"},
    {"cli"},
    {""},
]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
TORCH_ONLY = {
    "kernels",
    "lsq_gradients",
    "functional",
    "arguments",
    "recomputation",
    "schedules",
    "ranges",
    "oscillation",
    "regularizers",
    "batch_norm",
    "modes",
}


def imported(source: str) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # `from package import name` may import a module
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            modules |= {name if name[len(PACKAGE) + 1 :] in FLOOR else node.module for name in names}
    return modules


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def faults(name: str, source: str) -> list[str]:
    found = []
    for module in imported(source):
        if module == PACKAGE or module.startswith(f"{PACKAGE}."):
            target = module[len(PACKAGE) + 1 :]
            if FLOOR[target] >= FLOOR[name]:
                found.append(f"{name} imports {target}")
            continue
        library = module.split(".")[0]
        if library == "lightning" and name not in ("", "cli") and not name.startswith("callbacks"):
            found.append(f"{name} imports {module}")
        if library in ("torchmetrics", "yaml", "numpy") and name in TORCH_ONLY:
            found.append(f"{name} imports {module}")
    return found


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=name_of)
def test_imports_run_one_way(path):
    assert faults(name_of(path), path.read_text()) == []


def test_private_modules_of_torch_are_left_to_exports():
    without = "import sys; sys.modules['torch.ao.quantization.fx._decomposed'] = None; import lightning_qat_osc.export"
    subprocess.run([sys.executable, "-c", without], check=True)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("functional", "from lightning_qat_osc.quantizers import WeightQuantizer"),
        ("oscillation", "import torchmetrics"),
        ("surgery", "from lightning.pytorch import Callback"),
        ("config", "import lightning_qat_osc.callbacks"),
        ("callbacks.oscillation_tracking", "from lightning_qat_osc.callbacks.iterative_freezing import X"),
        ("metrics", "from lightning_qat_osc import oscillation_states"),
        ("metrics", "from lightning_qat_osc import surgery"),
    ],
)
def test_an_arrow_the_wrong_way_is_found(name, source):
    assert len(faults(name, source)) == 1
