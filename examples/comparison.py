"""Shared code of the examples: pre-train a network, train it with quantization in four ways, compare the results."""

from __future__ import annotations

import csv
import logging
import time
import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional import accuracy

from lightning_qat_osc import (
    BatchNormReestimation,
    IterativeFreezing,
    OscillationDampening,
    OscillationTracking,
    QuantizationAwareTraining,
)
from lightning_qat_osc.lookup import oscillation_states
from lightning_qat_osc.metrics import FrozenShare, OscillatingShare

METHODS = ("LSQ", "dampening", "freezing", "both")


class Classifier(L.LightningModule):
    """A plain LightningModule for a network that returns logits. Nothing in it is specific to quantization.

    Args:
        network: Maps images to logits.
        learning_rate: Learning rate of SGD with momentum 0.9.
        anneal: Whether a cosine schedule takes the learning rate to 0; otherwise it is constant.
        weight_decay: Weight decay of all parameters.
    """

    def __init__(
        self, network: nn.Module, learning_rate: float, *, anneal: bool = True, weight_decay: float = 1e-4
    ) -> None:
        super().__init__()
        self.anneal = anneal
        self.network = network
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of a batch of images."""
        logits: Tensor = self.network(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross entropy of a batch."""
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log accuracy and loss of a batch."""
        images, labels = batch
        logits = self(images)
        self.log("val_loss", F.cross_entropy(logits, labels))
        self.log("val_accuracy", accuracy(logits, labels, task="multiclass", num_classes=logits.shape[1]))

    def configure_optimizers(self) -> Any:
        """Return SGD, with a cosine schedule if ``anneal`` is set."""
        optimizer = torch.optim.SGD(
            self.parameters(), lr=self.learning_rate, momentum=0.9, weight_decay=self.weight_decay
        )
        if not self.anneal:
            return optimizer
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Images(L.LightningDataModule):
    """A data module for images and labels that fit into memory.

    Args:
        train: Training images [N, 1, H, W] and labels [N].
        val: Validation images and labels.
        batch_size: Images per training step.
    """

    def __init__(self, train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor], batch_size: int) -> None:
        super().__init__()
        self.train = torch.utils.data.TensorDataset(*train)
        self.val = torch.utils.data.TensorDataset(*val)
        self.batch_size = batch_size

    def train_dataloader(self) -> Any:
        """Return shuffled batches of the training images."""
        return torch.utils.data.DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> Any:
        """Return the validation images in batches, in order."""
        return torch.utils.data.DataLoader(self.val, 500)


@dataclass
class Setting:
    """One way to quantize, and the hyperparameters of the methods that control oscillations.

    Attributes:
        name: Name of the setting, such as W3A3.
        weight_bits: Bits of the weights.
        activation_bits: Bits of the activations, or None for full precision.
        epochs: Epochs of quantization-aware training.
        learning_rate: Initial learning rate.
        scale_learning_rate: Initial learning rate of the scales.
        momentum: Momentum of oscillation tracking.
        dampening: Keyword arguments of OscillationDampening.
        freezing: Keyword arguments of IterativeFreezing.
        anneal: Whether the learning rate is annealed to 0.
    """

    name: str
    weight_bits: int
    activation_bits: int | None
    epochs: int
    learning_rate: float
    scale_learning_rate: float
    momentum: float
    dampening: dict[str, Any]
    freezing: dict[str, Any]
    anneal: bool = True


@dataclass
class Result:
    """The results of one run: accuracies and shares in percent, time in seconds."""

    setting: str
    method: str
    seed: int
    before: float
    after: float
    oscillating: float
    frozen: float
    train_loss: float
    seconds: float
    curves: dict[str, tuple[list[float], list[float]]] = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        """Return a summary in one line."""
        return (
            f"{self.setting} {self.method}, seed {self.seed}: {self.before:.2f} % with running BN, "
            f"{self.after:.2f} % re-estimated; {self.oscillating:.2f} % oscillating, {self.frozen:.2f} % frozen; "
            f"{self.seconds:.0f} s"
        )


def quiet() -> None:
    """Silence log messages and known warnings, so that the terminal shows only results."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    ignored = (
        ".*is not empty.*",
        ".*does not have many workers.*",
        ".*logging interval.*",
        ".*below twice the momentum.*",
        ".*LeafSpec.*",
    )
    for message in ignored:
        warnings.filterwarnings("ignore", message=message)


def _trainer(**arguments: Any) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        devices=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )


def pretrain(
    make_network: Callable[[], nn.Module], data: Images, *, epochs: int, learning_rate: float, seed: int = 0
) -> tuple[nn.Module, float]:
    """Create a network and train it in full precision.

    Returns:
        The network, and its validation accuracy in percent.
    """
    L.seed_everything(seed, verbose=False)
    network = make_network()
    module = Classifier(network, learning_rate)
    trainer = _trainer(max_epochs=epochs, logger=False, limit_val_batches=0)
    trainer.fit(module, data)
    trainer = _trainer(logger=False)
    return network, 100 * trainer.validate(module, data, verbose=False)[0]["val_accuracy"]


def _callbacks(setting: Setting, method: str) -> list[L.Callback]:
    callbacks: list[L.Callback] = [
        QuantizationAwareTraining(
            weight_bits=setting.weight_bits,
            activation_bits=setting.activation_bits,
            scale_learning_rate=setting.scale_learning_rate,
        ),
        OscillationTracking(momentum=setting.momentum),
    ]
    if method in ("dampening", "both"):
        callbacks.append(OscillationDampening(**setting.dampening))
    if method in ("freezing", "both"):
        callbacks.append(IterativeFreezing(**setting.freezing))
    return callbacks


def _read_curves(path: Path) -> dict[str, tuple[list[float], list[float]]]:
    """Read every logged metric from the CSV log: name -> steps, values."""
    curves: dict[str, tuple[list[float], list[float]]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value and name not in ("step", "epoch"):
                    steps, values = curves.setdefault(name, ([], []))
                    steps.append(float(row["step"]))
                    values.append(float(value))
    return curves


def train_quantized(
    network: nn.Module, data: Images, setting: Setting, method: str, *, seed: int, output: Path, compiled: bool = False
) -> Result:
    """Train a copy of a network with quantization, and evaluate it before and after batch-norm re-estimation."""
    L.seed_everything(seed, verbose=False)
    module = Classifier(deepcopy(network), setting.learning_rate, anneal=setting.anneal)
    if compiled:
        module.network.compile()
    name = f"{setting.name}-{method}-{seed}"
    csv_logger = CSVLogger(output, name="csv", version=name)
    trainer = _trainer(
        max_epochs=setting.epochs,
        callbacks=_callbacks(setting, method),
        logger=[csv_logger, TensorBoardLogger(str(output), name="tensorboard", version=name)],
        log_every_n_steps=10,
    )
    start = time.perf_counter()
    trainer.fit(module, data)
    seconds = time.perf_counter() - start
    before = trainer.validate(module, data, verbose=False)[0]["val_accuracy"]
    evaluation = _trainer(
        callbacks=[_callbacks(setting, "LSQ")[0], BatchNormReestimation(num_batches=50)], logger=False
    )
    after = evaluation.validate(module, data, verbose=False)[0]["val_accuracy"]
    states = oscillation_states(module)
    oscillating, frozen = OscillatingShare(list(states)), FrozenShare(list(states))
    oscillating.update(states)
    frozen.update(states)
    curves = _read_curves(Path(csv_logger.log_dir) / "metrics.csv")
    losses = curves["train_loss"][1]
    last = losses[-max(1, len(losses) // 10) :]
    return Result(
        setting=setting.name,
        method=method,
        seed=seed,
        before=100 * before,
        after=100 * after,
        oscillating=100 * oscillating.compute()[""].item(),
        frozen=100 * frozen.compute()[""].item(),
        train_loss=sum(last) / len(last),
        seconds=seconds,
        curves=curves,
    )


def compare(
    network: nn.Module,
    data: Images,
    settings: Sequence[Setting],
    *,
    seeds: Sequence[int],
    output: Path,
    report: Callable[[Result], None],
    methods: Sequence[str] = METHODS,
    compiled: bool = False,
) -> list[Result]:
    """Run all combinations of settings, methods and seeds, and call ``report`` with each result when it is ready."""
    results = []
    for setting in settings:
        for method in methods:
            for seed in seeds:
                result = train_quantized(network, data, setting, method, seed=seed, output=output, compiled=compiled)
                report(result)
                results.append(result)
    return results


def _mean_spread(values: Sequence[float], digits: int = 2) -> str:
    t = torch.tensor(values)
    spread = f" ± {t.std().item():.{digits}f}" if len(values) > 1 else ""
    return f"{t.mean().item():.{digits}f}{spread}"


def table(results: Sequence[Result]) -> str:
    """Return a Markdown table of means over the seeds, with standard deviations if there are several seeds."""
    lines = [
        "| setting | method | accuracy %, running BN | re-estimated BN | Osc. % | frozen % | training loss | time s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for key in dict.fromkeys((r.setting, r.method) for r in results):
        runs = [r for r in results if (r.setting, r.method) == key]
        columns = [
            _mean_spread([getattr(r, name) for r in runs]) for name in ("before", "after", "oscillating", "frozen")
        ]
        loss = _mean_spread([r.train_loss for r in runs], 4)
        seconds = f"{sum(r.seconds for r in runs) / len(runs):.0f}"
        lines.append(f"| {' | '.join([*key, *columns, loss, seconds])} |")
    return "\n".join(lines)


def plot(results: Sequence[Result], path: Path) -> None:
    """Plot oscillating share, frozen share and validation accuracy over the steps, for each method's first seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    settings = list(dict.fromkeys(r.setting for r in results))
    figures = [
        ("oscillation/oscillating", "oscillating weights, %"),
        ("oscillation/frozen", "frozen weights, %"),
        ("val_accuracy", "accuracy before re-estimation, %"),
    ]
    figure, axes = plt.subplots(len(settings), 3, figsize=(13, 3.6 * len(settings)), squeeze=False)
    for row, setting in zip(axes, settings):
        for axis, (name, label) in zip(row, figures):
            for method in dict.fromkeys(r.method for r in results):
                run = next((r for r in results if (r.setting, r.method) == (setting, method)), None)
                if run is not None and name in run.curves:
                    steps, values = run.curves[name]
                    axis.plot(steps, [100 * v for v in values], label=method, linewidth=1.4)
            axis.set(xlabel="optimizer step", ylabel=label, title=setting)
            axis.grid(alpha=0.3)
        row[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
