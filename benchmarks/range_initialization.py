"""Time to insert quantizers for 25 million weights and to initialize their ranges, by method and granularity.

``python benchmarks/range_initialization.py`` prints medians of interleaved runs, and ratios to one read of the weights.
"""

from __future__ import annotations

import argparse
from typing import get_args

from racing import machine, race, table, timed
from torch import nn

from lightning_qat_osc.config import Granularity, QuantConfig
from lightning_qat_osc.quantizers import WeightQuantizer
from lightning_qat_osc.ranges import RangeMethod
from lightning_qat_osc.surgery import quantize_model


def stack(millions: int) -> nn.Sequential:
    """Return linear layers of 1024 x 1024 weights, about a million each."""
    return nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(millions)))


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

    contenders = {
        "read once": timed(lambda: [weight.sum() for weight in weights]),
        "insertion": timed(lambda: quantize_model(stack(arguments.millions), QuantConfig())),
        "creating the network alone": timed(lambda: stack(arguments.millions)),
    }
    for method in get_args(RangeMethod):
        for granularity in get_args(Granularity):
            contenders[f"{method}, {granularity}"] = timed(lambda m=method, g=granularity: calibrate(m, g))
    results = race(contenders, arguments.repeats, warmup=0)
    print(machine(), table(f"{arguments.millions} million weights", results), sep="\n\n")


if __name__ == "__main__":
    main()
