"""A training step with all callbacks, against a full-precision step and the fake-quantized steps of peers.

``python benchmarks/step_time.py`` prints a table for each network and memory format. Steps run under a real Trainer;
the networks of the peers and the baseline run in the same LightningModule, without callbacks. The process returns no
memory to the operating system, so that the cost of a contender does not depend on the others.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from functools import partial

import from_paper
import lightning as L
import peers
import torch
from networks import WORKLOADS, Workload
from racing import Result, keep_memory, machine, race, table
from torch import Tensor, nn
from training import Steps, everything

Make = Callable[[Workload, torch.memory_format], Steps]


BASELINE, BASELINE_COMPILED, COMPILED = (
    "full precision",
    "full precision, compiled",
    "everything on, fused=True, compiled",
)


def _network(workload: Workload, memory_format: torch.memory_format, *, compiled: bool = False) -> nn.Module:
    torch.manual_seed(0)
    network = workload.network()
    if workload.batch().dim() == 4:
        network = network.to(memory_format=memory_format)
    if compiled:
        network.compile()
    return network


def _ours(callbacks: Callable[[], list[L.Callback]] = list, *, compiled: bool = False) -> Make:
    def make(workload: Workload, memory_format: torch.memory_format) -> Steps:
        network = _network(workload, memory_format, compiled=compiled)
        return Steps(workload, network, callbacks(), memory_format=memory_format)

    return make


def _peer(prepare: Callable[[nn.Module, Tensor], nn.Module]) -> Make:
    def make(workload: Workload, memory_format: torch.memory_format) -> Steps:
        batch = workload.batch()
        batch = batch.to(memory_format=memory_format) if batch.dim() == 4 else batch
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            network = prepare(_network(workload, memory_format), batch)
            return Steps(workload, network, memory_format=memory_format)

    return make


CONTENDERS: dict[str, Make] = {
    BASELINE: _ours(),
    "quantizers alone": _ours(lambda: everything()[:1]),
    "everything on": _ours(everything),
    "everything on, fused=True": _ours(partial(everything, fused=True)),
    "everything on, fused=True, recompute=True": _ours(partial(everything, fused=True, recompute=True)),
    "torchao PT2E": _peer(peers.torchao),
    "Brevitas": _peer(peers.brevitas),
    "the paper's LSQ, plain": _peer(partial(from_paper.prepare, tracked=False)),
    "the paper's LSQ, tracking and freezing, plain": _peer(partial(from_paper.prepare, tracked=True)),
    BASELINE_COMPILED: _ours(compiled=True),
    COMPILED: _ours(partial(everything, fused=True), compiled=True),
}


def measure(network: str, memory_format: torch.memory_format, rounds: int) -> list[Result]:
    """Let all contenders whose packages are installed take turns, each with a short run of steps."""
    racers: dict[str, Callable[[], float]] = {}
    for name, make in CONTENDERS.items():
        try:
            racers[name] = make(WORKLOADS[network], memory_format).seconds
        except ImportError as error:
            print(f"skipped {name}: {error}")
    return race(racers, rounds, warmup=1)


def compiled_ratio(results: list[Result]) -> str:
    """Return the only ratio that is not relative to the eager full-precision step."""
    by_name = {r.name: r for r in results}
    ratio = by_name[COMPILED].ratio(by_name[BASELINE_COMPILED])
    return f"Everything on, compiled, to full precision, compiled: {ratio:.2f}."


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="rounds of 6 steps for each contender")
    parser.add_argument("--networks", nargs="+", default=list(WORKLOADS), choices=list(WORKLOADS))
    arguments = parser.parse_args()
    keep_memory()
    print(machine())
    for name in arguments.networks:
        images = WORKLOADS[name].batch().dim() == 4 and name == "conv net"
        for memory_format in (torch.contiguous_format, torch.channels_last)[: 1 + images]:
            results = measure(name, memory_format, arguments.rounds)
            layout = ", channels_last" if memory_format == torch.channels_last else ""
            print(f"\n{table(f'{name}{layout}', results)}\n\n{compiled_ratio(results)}", flush=True)


if __name__ == "__main__":
    main()
