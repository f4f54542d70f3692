"""Tracking, dampening and freezing of many weights without a network, against optimizers and the paper's tracker.

``python benchmarks/weights_sweep.py`` prints tables of one step for 25 million weights in layers of about one million,
in layers of four million and in a single layer, and the cost per weight for 1 to 100 million weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from from_paper import PlainTracker
from racing import machine, race, table, timed
from torch import nn

from lightning_qat_osc import QuantConfig, quantize_model
from lightning_qat_osc.calibration import Calibrator
from lightning_qat_osc.lookup import QuantizedWeight, quantized_weights
from lightning_qat_osc.sweep import advance_states, dampen_and_pass_on, make_batches


def tracked(layers: int, width: int) -> list[QuantizedWeight]:
    """Return tracked weights of linear layers with gradients. 5 percent of the weights are frozen."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    config = QuantConfig(4, None, first_last_bits=None, weight_range="lsq")
    Calibrator(quantize_model(model, config), config).finish()
    weights = quantized_weights(model)
    for w in weights:
        w.weight.grad = 1e-3 * torch.randn_like(w.weight)
        w.quantizer.scale_grad = torch.zeros_like(w.quantizer.scale)
        state = w.quantizer.start_tracking(w.weight)
        state.frozen = torch.rand_like(w.weight) < 0.05
        state.hold_frozen(w.weight.detach(), w.quantizer.scale.detach())
    return weights


def sweep(weights: list[QuantizedWeight], fused: bool) -> Callable[[], None]:
    """Return a function that does all work of the oscillation callbacks in a step."""
    for w in weights:
        w.quantizer.fused = fused
    batches = make_batches(weights)

    def step() -> None:
        dampen_and_pass_on(batches, 1e-6, "sum")
        advance_states(batches, 0.01, 0.5)

    return step


def compare(layers: int, width: int, rounds: int) -> str:
    """Return a table for one shape of the weights."""
    weights = tracked(layers, width)
    parameters = [w.weight for w in weights]
    adamw = torch.optim.AdamW(parameters, lr=1e-9)
    adamw_fused = torch.optim.AdamW(parameters, lr=1e-9, fused=True)
    sgd = torch.optim.SGD(parameters, lr=1e-9, momentum=0.9)
    trackers = [PlainTracker() for _ in weights]
    copies = [torch.empty_like(p) for p in parameters]

    @torch.no_grad()
    def plain() -> None:
        for tracker, w in zip(trackers, weights):
            tracker((w.weight / w.quantizer.scale).round().clamp(-8, 7))

    def copy() -> None:
        torch._foreach_copy_(copies, [p.detach() for p in parameters])

    results = race(
        {
            "AdamW": timed(adamw.step),
            "AdamW, fused=True": timed(adamw_fused.step),
            "SGD with momentum": timed(sgd.step),
            "one copy of the weights": timed(copy),
            "tracking, dampening and freezing": timed(sweep(weights, False)),
            "the same, fused=True": timed(sweep(weights, True)),
            "the paper's tracker with freezing, plain": timed(plain),
        },
        rounds,
        warmup=2,
    )
    return table(f"{layers} layer{'s' if layers > 1 else ''} of {width} x {width}", results)


def per_weight(millions: tuple[int, ...], rounds: int) -> str:
    """Return a table of nanoseconds per weight, fused, by number of weights.

    The sizes take turns, so that small ones do not find their weights in the cache. In a training step they would not.
    """
    contenders = {str(count): timed(sweep(tracked(count, 1024), True)) for count in millions}
    lines = ["| million weights | ns a weight, fused=True | fastest to slowest |", "|---|---|---|"]
    for result in race(contenders, rounds, warmup=2):
        times = result.median, min(result.times), max(result.times)
        median, low, high = (t / (int(result.name) * 1024**2) * 1e9 for t in times)
        lines.append(f"| {result.name} | {median:.2f} | {low:.2f} to {high:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    print(machine())
    shapes = (24, 1024), (6, 2048), (1, 5120)
    tables = [compare(layers, width, rounds) for layers, width in shapes]
    print("", *tables, per_weight((1, 10, 25, 100), 3 * rounds), sep="\n\n")


if __name__ == "__main__":
    main()
