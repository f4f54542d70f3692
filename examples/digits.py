"""Quantization-aware training on scikit-learn's handwritten digits, with oscillations measured, dampened and frozen.

Run it with ``make demo``. It pre-trains a small depthwise-separable network in full precision, trains it with 3-bit
weights and activations and with 2-bit weights, each in four ways, and prints the results.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from comparison import Images, Result, Setting, compare, plot, pretrain, quiet, table
from sklearn.datasets import load_digits
from torch import nn


def digits(batch_size: int = 64) -> Images:
    """Return the 1797 digits of 8x8 pixels, with every fourth held out for validation."""
    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16.0
    labels = torch.tensor(bunch.target)
    held_out = torch.arange(len(labels)) % 4 == 0
    return Images((images[~held_out], labels[~held_out]), (images[held_out], labels[held_out]), batch_size)


def _separable(channels_in: int, channels_out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_in, 3, stride, 1, groups=channels_in, bias=False),
        nn.BatchNorm2d(channels_in),
        nn.ReLU(),
        nn.Conv2d(channels_in, channels_out, 1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
    )


class SeparableNet(nn.Sequential):
    """A convolution, four depthwise-separable blocks, and a linear layer."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            _separable(16, 24),
            _separable(24, 32, stride=2),
            _separable(32, 48),
            _separable(48, 64, stride=2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(64, 10),
        )


def settings(epochs: int) -> list[Setting]:
    """Return the settings W3A3 and weight-only W2."""
    common = {
        "epochs": epochs,
        "learning_rate": 0.02,
        "scale_learning_rate": 1e-3,
        "momentum": 0.01,
        "dampening": {"final_weight": 1e-2},
        "freezing": {"threshold": 0.04, "final_threshold": 0.01},
    }
    return [
        Setting("W3A3", weight_bits=3, activation_bits=3, **common),
        Setting("W2", weight_bits=2, activation_bits=None, **common),
    ]


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=30, help="epochs of quantization-aware training")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each method")
    parser.add_argument("--output", type=Path, default=Path("runs/digits"), help="folder for the logs and the plot")
    arguments = parser.parse_args()
    quiet()
    torch.set_num_threads(1)  # the tensors are tiny
    arguments.output.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    data = digits()
    network, accuracy = pretrain(SeparableNet, data, epochs=20, learning_rate=0.1)
    print(f"full precision: {accuracy:.2f} %", flush=True)

    def report(result: Result) -> None:
        print(result, flush=True)

    results = compare(
        network, data, settings(arguments.epochs), seeds=range(arguments.seeds), output=arguments.output, report=report
    )
    plot(results, arguments.output / "oscillations.png")
    print(f"\n{table(results)}\n")
    print(f"Curves: {arguments.output}/oscillations.png. Logs: {arguments.output}/tensorboard, {arguments.output}/csv.")
    print(f"Total time: {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    main()
