"""Time to insert quantizers into 25 million weights and to initialise their ranges, for each method and granularity.

``python benchmarks/range_initialisation.py`` prints medians of interleaved runs, and ratios to one read of the weights.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import get_args

import torch
from torch import nn

from lightning_qat_osc.config import Granularity, QuantConfig
from lightning_qat_osc.quantizers import WeightQuantizer
from lightning_qat_osc.ranges import RangeMethod
from lightning_qat_osc.surgery import quantize_model


def stack(millions: int) -> nn.Sequential:
    """Linear layers of 1024 x 1024 weights, about a million each."""
    return nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(millions)))


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--millions", type=int, default=25, help="weights, in millions")
    parser.add_argument("--repeats", type=int, default=5, help="interleaved runs")
    arguments = parser.parse_args()
    model = stack(arguments.millions)
    weights = [layer.weight for layer in model]

    def calibrate(method: RangeMethod, granularity: Granularity) -> None:
        for weight in weights:
            WeightQuantizer(4, weight, granularity=granularity, method=method).calibrate(weight)

    contenders: dict[str, Callable[[], object]] = {
        "read once": lambda: [weight.sum() for weight in weights],
        "insertion": lambda: quantize_model(stack(arguments.millions), QuantConfig()),
        "making the network alone": lambda: stack(arguments.millions),
    }
    for method in get_args(RangeMethod):
        for granularity in get_args(Granularity):
            contenders[f"{method}, {granularity}"] = lambda m=method, g=granularity: calibrate(m, g)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(arguments.repeats):
        for name, function in contenders.items():
            times[name].append(_seconds(function))
    floor = statistics.median(times["read once"])
    print(f"{arguments.millions} million weights, torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name, runs in times.items():
        median = statistics.median(runs)
        print(f"{name:28s} {median * 1e3:9.1f} ms  (x {median / floor:6.1f}, {min(runs):.3f} to {max(runs):.3f} s)")


if __name__ == "__main__":
    main()
