"""Two processes with gloo on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "ddp_script.py"
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for devices in ("1", "2"):
        command = [sys.executable, str(SCRIPT), str(folder), devices]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
        assert run.returncode == 0, run.stderr[-3000:]
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def test_both_ranks_have_the_same_of_everything(results):
    assert results["2-0"] == results["2-1"]
    assert sum(frozen for _, frozen in results["2-0"]["states"].values()) > 0
    assert results["2-0"]["logged"]["oscillation/frozen"] > 0


def test_ranges_are_those_of_one_process_on_all_the_batches(results):
    # both saw the same 64 images before the first step: in halves on two ranks, or whole
    assert results["2-0"]["initial"] == pytest.approx(results["1-0"]["initial"], rel=1e-3)
