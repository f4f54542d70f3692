"""Peak memory of a training step, from the allocator's events, and bytes of oscillation state.

``python benchmarks/memory.py`` prints a table for each network, in MiB: the peak of what a step allocates, the same
plus what is kept between steps (parameters, momentum, oscillation state), and the ratio of this to full precision.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from typing import Any

import from_paper
import lightning as L
import peers
import torch
from networks import WORKLOADS, Workload
from torch import nn
from torch.profiler import ProfilerActivity, profile
from training import Steps, everything

from lightning_qat_osc import oscillation_states


class Peak(L.Callback):
    """Measures the peak of what one step allocates."""

    def __init__(self) -> None:
        self.bytes = 0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the profiler at the fourth step."""
        if batch_idx == 3:
            self.profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self.profiler.__enter__()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Read the memory events of the fourth step."""
        if args[-1] == 3:
            self.profiler.__exit__(None, None, None)
            now = 0
            for event in self.profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
                if event.name() == "[memory]":
                    now += event.nbytes()
                    self.bytes = max(self.bytes, now)


def measure(workload: Workload) -> str:
    """Return the table of one network."""
    batch = workload.batch()

    def compiled() -> nn.Module:
        network = workload.network()
        network.compile()
        return network

    cases: dict[str, Callable[[], Steps]] = {
        "full precision": lambda: Steps(workload),
        "everything on": lambda: Steps(workload, callbacks=everything()),
        "everything on, fused=True": lambda: Steps(workload, callbacks=everything(fused=True)),
        "everything on, recompute=True": lambda: Steps(workload, callbacks=everything(recompute=True)),
        "full precision, compiled": lambda: Steps(workload, compiled()),
        "everything on, compiled": lambda: Steps(workload, compiled(), everything()),
        "torchao PT2E": lambda: Steps(workload, peers.torchao(workload.network(), batch)),
        "Brevitas": lambda: Steps(workload, peers.brevitas(workload.network(), batch)),
        "the paper's LSQ, tracking and freezing, plain": lambda: Steps(
            workload, from_paper.prepare(workload.network(), batch, tracked=True)
        ),
    }
    held = 2 * sum(p.numel() for p in workload.network().parameters()) * 4  # parameters and momentum
    peak: dict[str, int] = {}
    lines = [f"| {workload.name} | allocated in a step, MiB | with what is kept | ratio |", "|---|---|---|---|"]
    for name, make in cases.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            steps, watch = make(), Peak()
            steps.run(5, watch)
        states = oscillation_states(steps.module).values()
        kept = sum(t.nbytes for state in states for t in state.state_dict().values())
        peak[name] = watch.bytes + held + kept
        base = "full precision, compiled" if "compiled" in name else "full precision"
        ratio = peak[name] / peak[base]
        lines.append(f"| {name} | {watch.bytes / 2**20:.0f} | {peak[name] / 2**20:.0f} | {ratio:.2f} |")
        if kept:
            weights = sum(state.frequency.numel() for state in states)
            note = f"Oscillation state: {kept / weights:.0f} bytes a tracked weight."
    return "\n".join([*lines, "", note])


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", default=["conv net", "ViT-Tiny"], choices=list(WORKLOADS))
    print(f"torch {torch.__version__}")
    for name in parser.parse_args().networks:
        print(f"\n{measure(WORKLOADS[name])}", flush=True)


if __name__ == "__main__":
    main()
