"""LightningCLI on the digits. Everything about quantization is in digits.yaml.

``python examples/digits_cli.py fit --config examples/digits.yaml``
"""

from __future__ import annotations

import lightning as L
import torch
from digits import SeparableNet, digits
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional import accuracy


class DigitsModule(L.LightningModule):
    """A plain LightningModule. Its optimizer and schedule come from the YAML file.

    Args:
        label_smoothing: Label smoothing of the cross entropy.
        float_checkpoint: Checkpoint of a full-precision run to start from.
    """

    def __init__(self, label_smoothing: float = 0.0, float_checkpoint: str | None = None) -> None:
        super().__init__()
        self.network: nn.Module = SeparableNet()
        if float_checkpoint is not None:
            self.load_state_dict(torch.load(float_checkpoint, weights_only=True)["state_dict"])
        self.label_smoothing = label_smoothing

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return and log the cross entropy of a batch."""
        images, labels = batch
        loss = F.cross_entropy(self.network(images), labels, label_smoothing=self.label_smoothing)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the accuracy of a batch."""
        images, labels = batch
        self.log(
            "val_accuracy", accuracy(self.network(images), labels, task="multiclass", num_classes=10), prog_bar=True
        )


if __name__ == "__main__":
    LightningCLI(DigitsModule, digits)
