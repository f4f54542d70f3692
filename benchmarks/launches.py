"""Operators that callbacks add to a step per layer, and waits for the device: counted on 50 and 500 layers.

``python benchmarks/launches.py`` prints how many operators the profiler counts in a training step without logging, and
how many of them are ``.item()`` or another read of a number.
"""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from networks import Workload, stack
from torch.profiler import ProfilerActivity, profile
from training import Steps, everything

READS = ("aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero")


class Count(L.Callback):
    """Counts the top-level operators of the fourth step, and the reads among all operators."""

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the profiler."""
        if batch_idx == 3:
            self.profiler = profile(activities=[ProfilerActivity.CPU])
            self.profiler.__enter__()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Stop the profiler and count."""
        if args[-1] == 3:
            self.profiler.__exit__(None, None, None)
            events = [e for e in self.profiler.events() if e.name.startswith("aten::")]  # type: ignore[union-attr]
            self.operators = sum(e.cpu_parent is None or not e.cpu_parent.name.startswith("aten::") for e in events)
            self.reads = sum(e.name in READS for e in events)


def count(workload: Workload, callbacks: list[L.Callback]) -> tuple[int, int, float]:
    """Return the numbers of operators and reads in a step, and the seconds of a step."""
    counter = Count()
    Steps(workload, callbacks=callbacks).run(8, counter)
    return counter.operators, counter.reads, Steps(workload, callbacks=callbacks).seconds()


def main() -> None:
    """Run the benchmark."""
    print("| layers | callbacks | operators a step | added for each layer | reads of a number | ms a step |")
    print("|---|---|---|---|---|---|")
    for layers in (50, 500):
        workload = Workload("", lambda n=layers: stack(n, 32), lambda: torch.randn(16, 32))  # type: ignore[misc]
        base = 0
        for name, callbacks in {
            "none": [],
            "quantizers": everything(3, 3)[:1],
            "everything on": everything(3, 3),
        }.items():
            operators, reads, seconds = count(workload, callbacks)
            base = base or operators
            added = (operators - base) / layers
            print(f"| {layers} | {name} | {operators} | {added:.1f} | {reads} | {seconds * 1e3:.1f} |", flush=True)


if __name__ == "__main__":
    main()
