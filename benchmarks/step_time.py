"""A training step with every callback of it, against the full-precision step and peers' bare fake-quantized ones.

``python benchmarks/step_time.py`` prints a table for each network and memory format. Steps run under a real Trainer;
the peers' and the baseline's networks run in the same LightningModule, without callbacks.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable

import authors
import peers
import torch
from networks import WORKLOADS, Workload
from racing import Result, machine, race, table
from torch import nn
from training import Steps, everything


def contenders(workload: Workload, memory_format: torch.memory_format) -> dict[str, Callable[[], float]]:
    """Name -> seconds of a step; the full-precision one first."""

    def network() -> nn.Module:
        torch.manual_seed(0)
        return workload.network().to(memory_format=memory_format)

    batch = workload.batch()
    batch = batch.to(memory_format=memory_format) if batch.dim() == 4 else batch
    compiled, compiled_ours = network(), network()
    for model in (compiled, compiled_ours):
        model.compile()
    made: dict[str, Steps | None] = {
        "full precision": Steps(workload, memory_format=memory_format),
        "quantizers alone": Steps(workload, callbacks=everything()[:1], memory_format=memory_format),
        "everything on": Steps(workload, callbacks=everything(), memory_format=memory_format),
        "everything on, fused=True": Steps(workload, callbacks=everything(fused=True), memory_format=memory_format),
        "everything on, fused=True, recompute=True": Steps(
            workload, callbacks=everything(fused=True, recompute=True), memory_format=memory_format
        ),
    }
    others: dict[str, Callable[[], nn.Module]] = {
        "torchao PT2E": lambda: peers.torchao(network(), batch),
        "Brevitas": lambda: peers.brevitas(network(), batch),
        "authors' LSQ": lambda: authors.prepare(network(), batch, tracked=False),
        "authors' LSQ, tracking and freezing": lambda: authors.prepare(network(), batch, tracked=True),
    }
    for name, make in others.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                made[name] = Steps(workload, make(), memory_format=memory_format)
        except ImportError as error:
            print(f"{name} is left out: {error}")
    made["full precision, compiled"] = Steps(workload, compiled, memory_format=memory_format)
    made["everything on, compiled"] = Steps(
        workload, compiled_ours, everything(fused=True), memory_format=memory_format
    )
    return {name: steps.seconds for name, steps in made.items() if steps is not None}


def compiled_ratio(results: list[Result]) -> str:
    """The one ratio that is not to the eager full-precision step."""
    by_name = {r.name: r for r in results}
    ratio = by_name["everything on, compiled"].ratio(by_name["full precision, compiled"])
    return f"Everything on, compiled, to full precision, compiled: {ratio:.2f}."


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="rounds of 6 steps for each contender")
    parser.add_argument("--networks", nargs="+", default=list(WORKLOADS), choices=list(WORKLOADS))
    arguments = parser.parse_args()
    print(machine())
    for name in arguments.networks:
        images = WORKLOADS[name].batch().dim() == 4 and name == "conv net"
        for memory_format in (torch.contiguous_format, torch.channels_last)[: 1 + images]:
            results = race(contenders(WORKLOADS[name], memory_format), arguments.rounds, warmup=1)
            layout = ", channels_last" if memory_format == torch.channels_last else ""
            print(f"\n{table(f'{name}{layout}', results)}\n\n{compiled_ratio(results)}", flush=True)


if __name__ == "__main__":
    main()
