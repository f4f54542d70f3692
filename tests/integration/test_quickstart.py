"""The quickstart program that the README links to."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("safetensors")

SCRIPT = Path(__file__).parents[2] / "examples" / "quickstart.py"


def test_it_ends_with_integers_in_a_file(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, SCRIPT], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "same outputs: True" in done.stdout
    assert 3 * 2048 / 8 < (tmp_path / "digits.safetensors").stat().st_size < 12_000
