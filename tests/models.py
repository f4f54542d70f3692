"""Small LightningModules, written as a user would write them, without any reference to quantization."""

from __future__ import annotations

import lightning as L
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


class ConvModule(L.LightningModule):
    """Two convolutions with batch norm, dropout and a linear layer."""

    def __init__(
        self, lr: float = 0.05, weight_decay: float = 0.0, optimizer: str = "SGD", dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.stem = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False)
        self.bn2 = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(dropout)
        self.point = nn.Conv2d(4, 8, 1)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = F.relu(self.bn1(self.stem(x)))
        x = self.dropout(F.relu(self.bn2(self.depthwise(x))))
        return self.head(F.relu(self.point(x)).mean((2, 3)))

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch, batch_idx):
        self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def predict_step(self, batch, batch_idx):
        return self(batch[0]).argmax(1)

    def configure_optimizers(self):
        kwargs = {"momentum": 0.9} if self.hparams.optimizer == "SGD" else {}
        kind = getattr(torch.optim, self.hparams.optimizer)
        return kind(self.parameters(), lr=self.hparams.lr, weight_decay=self.hparams.weight_decay, **kwargs)


class Manual(ConvModule):
    """The same module with manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()


def dataset(n: int = 64, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (n,), generator=generator)
    images = torch.randn(n, 1, 6, 6, generator=generator) + labels.view(-1, 1, 1, 1)
    return TensorDataset(images, labels)


def loader(n: int = 64, batch_size: int = 8, shuffle: bool = False, **kwargs) -> DataLoader:
    return DataLoader(dataset(n), batch_size=batch_size, shuffle=shuffle, **kwargs)


class Data(L.LightningDataModule):
    def __init__(self, batch_size: int = 8, shuffle: bool = False) -> None:
        super().__init__()
        self.batch_size, self.shuffle = batch_size, shuffle

    def train_dataloader(self):
        return loader(batch_size=self.batch_size, shuffle=self.shuffle)

    def val_dataloader(self):
        return loader(32, 16)

    test_dataloader = predict_dataloader = val_dataloader


def trainer(callbacks, **kwargs) -> L.Trainer:
    """A quiet Trainer on the CPU."""
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(callbacks=callbacks, **{**defaults, **kwargs})
