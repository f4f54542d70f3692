"""Quantization-aware training from a full-precision network to a file of 3-bit integers, on handwritten digits."""

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_qat_osc import (
    BatchNormReestimation,
    IterativeFreezing,
    OscillationDampening,
    OscillationTracking,
    QuantizationAwareTraining,
    load_quantized,
)
from lightning_qat_osc.export import convert, save_packed


class Digits(L.LightningModule):
    """A plain LightningModule. Nothing in it is specific to quantization."""

    def __init__(self, learning_rate: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.learning_rate = learning_rate
        self.network = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Conv2d(32, 32, 3, padding=1, groups=32, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Conv2d(32, 64, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, 10)),
        )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross entropy."""
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the accuracy."""
        self.log("accuracy", (self.network(batch[0]).argmax(1) == batch[1]).float().mean(), prog_bar=True)

    def configure_optimizers(self):  # type: ignore[no-untyped-def]
        """Return SGD with a learning rate annealed to 0."""
        optimizer = torch.optim.SGD(self.parameters(), self.learning_rate, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_epochs or 1)]


def main() -> None:
    """Train in full precision, then quantized, and export."""
    L.seed_everything(0)
    digits = load_digits()
    x, y = torch.tensor(digits.images / 16.0, dtype=torch.float32).unsqueeze(1), torch.tensor(digits.target)
    train = DataLoader(TensorDataset(x[:1400], y[:1400]), batch_size=64, shuffle=True)
    val = DataLoader(TensorDataset(x[1400:], y[1400:]), batch_size=64)

    trainer = L.Trainer(max_epochs=10)
    trainer.fit(Digits(), train, val)
    trainer.save_checkpoint("float.ckpt")

    module = Digits.load_from_checkpoint("float.ckpt", learning_rate=0.01)  # a tenth of the rate in full precision
    trainer = L.Trainer(
        max_epochs=10,
        callbacks=[
            QuantizationAwareTraining(weight_bits=3, activation_bits=3, print_plan=True),  # first in the list
            OscillationTracking(momentum=0.01),
            OscillationDampening(final_weight=1e-2),
            IterativeFreezing(threshold=0.04, final_threshold=0.01),
            BatchNormReestimation(num_batches=20),
        ],
    )
    trainer.fit(module, train, val)
    trainer.save_checkpoint("quantized.ckpt")

    module = load_quantized(Digits, "quantized.ckpt").eval()  # possible in another process, too
    save_packed(module, "digits.safetensors")  # 3 bits per weight, 8 in the first and last layer
    plain = convert(module)  # a Digits again, with weights at scale times integer
    print(f"same outputs: {torch.equal(plain.network(x), module.network(x))}")


if __name__ == "__main__":
    main()
