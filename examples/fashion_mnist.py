"""Quantization-aware training of a MobileNetV2-style network on Fashion-MNIST, in four ways, over several seeds.

The data comes from Debian's package ``dataset-fashion-mnist``, or from a folder with the four files of the original
distribution. ``python examples/fashion_mnist.py`` reproduces the table of docs/results.md.
"""

from __future__ import annotations

import argparse
import gzip
import time
from pathlib import Path

import numpy as np
import torch
from comparison import METHODS, Images, Result, Setting, compare, plot, pretrain, quiet, table
from torch import Tensor, nn

DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def _read(folder: Path, name: str) -> Tensor:
    """Read an IDX file: a header with 4 bytes each for magic number and dimensions, then one byte per value."""
    path = next((p for p in (folder / f"{name}.gz", folder / name) if p.exists()), None)
    if path is None:
        raise FileNotFoundError(
            f"{folder} does not contain {name}(.gz): install Debian's dataset-fashion-mnist, or pass a folder with "
            "--data"
        )
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    dimensions = raw[3]
    shape = np.frombuffer(raw, ">i4", dimensions, offset=4)
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions).reshape(shape).copy())


def fashion_mnist(folder: Path, batch_size: int, train_images: int = 60_000) -> Images:
    """Return the first ``train_images`` of 60000 training images, and 10000 test images: 28x28 pixels, normalized."""
    pixels = [_read(folder, f"{part}-images-idx3-ubyte") for part in ("train", "t10k")]
    labels = [_read(folder, f"{part}-labels-idx1-ubyte").long() for part in ("train", "t10k")]
    images = [(p.unsqueeze(1).float() / 255.0 - 0.286) / 0.353 for p in pixels]
    return Images((images[0][:train_images], labels[0][:train_images]), (images[1], labels[1]), batch_size)


class InvertedResidual(nn.Module):
    """MobileNetV2's block: expansion, depthwise convolution, projection; a residual if the shapes allow it."""

    def __init__(self, channels_in: int, channels_out: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = channels_in * expansion
        self.residual = stride == 1 and channels_in == channels_out
        self.expand = nn.Sequential(nn.Conv2d(channels_in, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6())
        self.depthwise = nn.Sequential(
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6()
        )
        self.project = nn.Sequential(nn.Conv2d(hidden, channels_out, 1, bias=False), nn.BatchNorm2d(channels_out))

    def forward(self, x: Tensor) -> Tensor:
        """Features in, features out."""
        y: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class MobileNet(nn.Sequential):
    """A MobileNetV2 for images of 28x28 pixels.

    Args:
        width: Factor on the number of channels.
    """

    def __init__(self, width: float = 1.0) -> None:
        c = [round(width * channels) for channels in (16, 16, 24, 32, 128)]
        super().__init__(
            nn.Sequential(nn.Conv2d(1, c[0], 3, 2, 1, bias=False), nn.BatchNorm2d(c[0]), nn.ReLU6()),
            InvertedResidual(c[0], c[1], 1, 3),
            InvertedResidual(c[1], c[2], 2, 3),
            InvertedResidual(c[2], c[2], 1, 3),
            InvertedResidual(c[2], c[3], 2, 3),
            InvertedResidual(c[3], c[3], 1, 3),
            nn.Sequential(nn.Conv2d(c[3], c[4], 1, bias=False), nn.BatchNorm2d(c[4]), nn.ReLU6()),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(c[4], 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of images, as in the base class, but so that torch.compile sees a single graph."""
        for layer in self:
            x = layer(x)
        return x


def settings(epochs: int) -> list[Setting]:
    """Return W3A3 and weight-only W3, as in the paper's tables, and W2, also at a constant, higher learning rate.

    If the learning rate ends at 0, the weights settle, even if they oscillated before. If it does not, as in any run
    that is evaluated before its end, oscillations leave batch norm with statistics that no longer match the weights.
    """
    common = {
        "epochs": epochs,
        "learning_rate": 0.01,
        "scale_learning_rate": 1e-3,
        "momentum": 0.01,
        "dampening": {"final_weight": 2e-2},
    }
    # weights only: as in the paper's Table 5; with activations: annealed later, because weights settle later
    weights_only = {"threshold": 0.04, "final_threshold": 0.01}
    with_activations = {"threshold": 0.04, "final_threshold": 0.005, "anneal_start": 0.5}
    constant = {**common, "learning_rate": 0.02, "anneal": False}
    return [
        Setting("W3A3", weight_bits=3, activation_bits=3, freezing=with_activations, **common),
        Setting("W3", weight_bits=3, activation_bits=None, freezing=weights_only, **common),
        Setting("W2", weight_bits=2, activation_bits=None, freezing=weights_only, **common),
        Setting("W2-constant", weight_bits=2, activation_bits=None, freezing=weights_only, **constant),
    ]


def main() -> None:
    """Run the comparison."""
    names = [setting.name for setting in settings(epochs=1)]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=DEBIAN, help="folder with the four files")
    parser.add_argument("--train-images", type=int, default=20_000, help="number of training images to use")
    parser.add_argument("--epochs", type=int, default=6, help="epochs of quantization-aware training")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method")
    parser.add_argument("--width", type=float, default=0.5, help="multiplier for the network's channels")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="which methods to run")
    parser.add_argument("--settings", nargs="+", choices=names, default=names, help="which settings to run")
    parser.add_argument("--no-compile", action="store_true", help="run without torch.compile")
    parser.add_argument("--output", type=Path, default=Path("runs/fashion_mnist"), help="folder for logs and plot")
    arguments = parser.parse_args()
    quiet()
    arguments.output.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    data = fashion_mnist(arguments.data, 128, arguments.train_images)
    network, accuracy = pretrain(lambda: MobileNet(arguments.width), data, epochs=15, learning_rate=0.2)
    print(f"full precision: {accuracy:.2f} %", flush=True)

    def report(result: Result) -> None:
        print(result, flush=True)

    results = compare(
        network,
        data,
        [s for s in settings(arguments.epochs) if s.name in arguments.settings],
        seeds=range(arguments.seeds),
        output=arguments.output,
        report=report,
        methods=arguments.methods,
        compiled=not arguments.no_compile,
    )
    plot(results, arguments.output / "oscillations.png")
    print(f"\n{table(results)}\n")
    print(f"Total time: {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    main()
