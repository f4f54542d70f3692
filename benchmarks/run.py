"""Run all benchmarks of training, and write their output into docs/performance.md.

``python benchmarks/run.py`` takes 30 to 60 minutes on two cores; the peers need ``pip install torchao brevitas``.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "performance.md"
HEADING = "## Measured\n"
SCRIPTS = {
    "step_time": "A training step",
    "top_operations": "Top operators of a step",
    "weights_sweep": "Many weights",
    "memory": "Memory",
    "launches": "Operators a step",
    "reestimation": "Batch-norm re-estimation",
    "range_initialization": "Insertion and range initialization of 25 million weights",
}


def output(script: str) -> str:
    """Return the output of a script."""
    run = subprocess.run([sys.executable, HERE / f"{script}.py"], stdout=subprocess.PIPE, text=True, check=True)
    return "\n".join(line for line in run.stdout.splitlines() if not line.startswith("USDT"))


def main() -> None:
    """Run all benchmarks, and update the page after each of them."""
    sections: list[str] = []
    for script, title in SCRIPTS.items():
        print(title, flush=True)
        text = output(script).strip()
        block = text if "|---" in text else f"```\n{text}\n```"
        sections.append(f"### {title}\n\n`python benchmarks/{script}.py`\n\n{block}\n")
        before = PAGE.read_text(encoding="utf-8").partition(HEADING)[0]
        PAGE.write_text(f"{before}{HEADING}\n" + "\n".join(sections), encoding="utf-8")


if __name__ == "__main__":
    main()
