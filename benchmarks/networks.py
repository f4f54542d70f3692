"""The measured networks, and the batch that each is trained on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Workload:
    """A network to train.

    Attributes:
        name: Name in tables.
        network: Creates the network, which maps a batch to logits of 10 classes.
        batch: Creates a batch of inputs.
        learning_rate: Learning rate of SGD with momentum 0.9.
    """

    name: str
    network: Callable[[], nn.Module]
    batch: Callable[[], Tensor]
    learning_rate: float = 0.01


def _conv_bn(channels_in: int, channels_out: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(channels_in, channels_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(channels_out)]


class _Layers(nn.Sequential):
    """Layers in sequence. With torch's own Sequential, torch.compile would see one graph per layer."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x)
        return x


class InvertedResidual(nn.Module):
    """MobileNetV2's block: expansion, depthwise convolution, projection; a residual if the shapes allow it."""

    def __init__(self, channels_in: int, channels_out: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = channels_in * expansion
        self.residual = stride == 1 and channels_in == channels_out
        self.layers = _Layers(
            *_conv_bn(channels_in, hidden, 1),
            nn.ReLU6(),
            *_conv_bn(hidden, hidden, 3, stride, groups=hidden),
            nn.ReLU6(),
            *_conv_bn(hidden, channels_out, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Features in, features out."""
        y: Tensor = self.layers(x)
        return x + y if self.residual else y


def conv_net() -> nn.Module:
    """Return a MobileNetV2 for images of 28x28 pixels, with 48 thousand parameters and 18 quantized layers."""
    return _Layers(
        *_conv_bn(1, 16, 3),
        nn.ReLU6(),
        InvertedResidual(16, 16, 1, 3),
        InvertedResidual(16, 24, 2, 3),
        InvertedResidual(24, 32, 2, 4),
        InvertedResidual(32, 32, 1, 4),
        InvertedResidual(32, 48, 1, 4),
        *_conv_bn(48, 192, 1),
        nn.ReLU6(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(192, 10),
    )


class VisionTransformer(nn.Module):
    """A vision transformer of ViT-Tiny's size for images of 32x32 pixels: 12 layers of width 192, 3 heads."""

    def __init__(self, depth: int = 12, width: int = 192, heads: int = 3, patch: int = 4) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, patch, patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, (32 // patch) ** 2, width))
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images in, logits out."""
        tokens = self.embed(x).flatten(2).transpose(1, 2) + self.position  # [N, L, E]
        logits: Tensor = self.head(self.encoder(tokens).mean(1))
        return logits


def stack(millions: int = 25, width: int = 1024) -> nn.Sequential:
    """Return linear layers, by default of about a million weights each, followed by one with 10 outputs."""
    layers = [module for _ in range(millions) for module in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(width, 10))


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("conv net", conv_net, lambda: torch.randn(128, 1, 28, 28)),
        Workload("ViT-Tiny", VisionTransformer, lambda: torch.randn(32, 3, 32, 32)),
        Workload("25 M weights", stack, lambda: torch.randn(16, 1024)),
    )
}
