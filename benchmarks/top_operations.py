"""The operators in which a training step of the conv net spends the most time, with and without quantization.

``python benchmarks/top_operations.py`` prints a table of the profiler's milliseconds per step, without the time of
nested operators: medians over rounds in which the three configurations take turns.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import lightning as L
from networks import WORKLOADS
from torch.profiler import ProfilerActivity, profile
from training import Steps, everything

FIRST, STEPS, ROUNDS, SHOWN = 5, 10, 5, 14
OWN_KERNELS = "compiled kernels of fused=True"


class Profiled(L.Callback):
    """Measures milliseconds per step of each operator, after some warm-up steps."""

    def __init__(self) -> None:
        self.milliseconds: dict[str, float] = {}

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the profiler."""
        if batch_idx == FIRST:
            self.profiler = profile(activities=[ProfilerActivity.CPU])
            self.profiler.__enter__()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Stop the profiler and add up the times."""
        if args[-1] == FIRST + STEPS - 1:
            self.profiler.__exit__(None, None, None)
            for event in self.profiler.key_averages():
                name = OWN_KERNELS if "CompiledFxGraph" in event.key else event.key
                if name.startswith("aten::") or name == OWN_KERNELS:
                    spent = event.self_cpu_time_total / 1e3 / STEPS
                    self.milliseconds[name] = self.milliseconds.get(name, 0.0) + spent


def main() -> None:
    """Run the benchmark."""
    cases: dict[str, Callable[[], list[L.Callback]]] = {
        "full precision": list,
        "everything on": everything,
        "fused=True": lambda: everything(fused=True),
    }
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
    for _ in range(ROUNDS):
        for name, callbacks in cases.items():
            profiled = Profiled()
            Steps(WORKLOADS["conv net"], callbacks=callbacks()).run(FIRST + STEPS + 1, profiled)
            rounds[name].append(profiled.milliseconds)
    operators = {operator for runs in rounds.values() for times in runs for operator in times}
    columns = {
        name: {o: statistics.median(times.get(o, 0.0) for times in runs) for o in operators}
        for name, runs in rounds.items()
    }
    ranked = sorted(operators, key=lambda o: -max(times.get(o, 0.0) for times in columns.values()))
    print(f"| operator, ms a step | {' | '.join(columns)} |")
    print(f"|---|{'---|' * len(columns)}")
    for operator in ranked[:SHOWN]:
        print(f"| {operator} | {' | '.join(f'{times.get(operator, 0.0):.1f}' for times in columns.values())} |")
    rest = [sum(t for o, t in times.items() if o not in ranked[:SHOWN]) for times in columns.values()]
    print(f"| all others | {' | '.join(f'{t:.1f}' for t in rest)} |")


if __name__ == "__main__":
    main()
