"""Training steps under a real Lightning Trainer, in short runs that can be interleaved."""

from __future__ import annotations

import logging
import statistics
import time
import warnings
from itertools import pairwise
from typing import Any

import lightning as L
import torch
from networks import Workload
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_qat_osc import (
    IterativeFreezing,
    OscillationDampening,
    OscillationTracking,
    QuantConfig,
    QuantizationAwareTraining,
)

UNTIMED, TIMED = 3, 6  # steps at the start of each short run that are not timed, and steps after them that are


class Classifier(L.LightningModule):
    """A plain LightningModule for a network."""

    def __init__(self, network: nn.Module, learning_rate: float) -> None:
        super().__init__()
        self.network = network
        self.learning_rate = learning_rate

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.network(x)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross entropy."""
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD with momentum."""
        return torch.optim.SGD(self.parameters(), self.learning_rate, momentum=0.9)


class Stopwatch(L.Callback):
    """Times each step from the end of the previous one: data, forward, backward, optimizer and all callbacks."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *args: Any) -> None:
        """Record the time."""
        self.ends.append(time.perf_counter())


def everything(weight_bits: int = 4, activation_bits: int = 4, **qat: Any) -> list[L.Callback]:
    """Return all callbacks that act in a training step, each with work to do from the first step on."""
    return [
        QuantizationAwareTraining(weight_bits, activation_bits, **qat),
        OscillationTracking(momentum=0.01),
        OscillationDampening(final_weight=1e-3, initial_weight=1e-3),
        IterativeFreezing(threshold=0.03),
    ]


class Steps:
    """A network under training, a few steps at a time.

    Args:
        workload: What to train.
        network: The network, if not the workload's own.
        callbacks: Callbacks of the Trainer.
        memory_format: Memory format of the network and its inputs, for image networks.
        precision: Precision of the Trainer.
    """

    def __init__(
        self,
        workload: Workload,
        network: nn.Module | None = None,
        callbacks: list[L.Callback] | None = None,
        *,
        memory_format: torch.memory_format = torch.contiguous_format,
        precision: Any = "32-true",
    ) -> None:
        self.callbacks = callbacks or []
        self.precision = precision
        torch.manual_seed(0)
        own = workload.network() if network is None else network
        x = workload.batch()
        if x.dim() == 4:
            own, x = own.to(memory_format=memory_format), x.to(memory_format=memory_format)
        self.module = Classifier(own, workload.learning_rate)
        self.batch = x, torch.randint(0, 10, (len(x),))

    def run(self, steps: int, *extra: L.Callback) -> None:
        """Run some training steps."""
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        data: DataLoader[Any] = DataLoader([self.batch] * steps, batch_size=None)  # type: ignore[arg-type]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = L.Trainer(
                accelerator="cpu",
                max_epochs=1,
                callbacks=[*self.callbacks, *extra],
                precision=self.precision,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            trainer.fit(self.module, data)

    def seconds(self) -> float:
        """Return the median seconds of a step over a short run, without the last step, which logs."""
        watch = Stopwatch()
        self.run(UNTIMED + TIMED + 1, watch)
        ends = watch.ends[UNTIMED - 1 : -1]
        return statistics.median(b - a for a, b in pairwise(ends))


def quantized(workload: Workload, config: QuantConfig | None = None) -> nn.Module:
    """Return the workload's network with calibrated quantizers, without a Trainer."""
    from lightning_qat_osc import quantize_model
    from lightning_qat_osc.calibration import Calibrator

    config = config or QuantConfig(4, 4)
    torch.manual_seed(0)
    network = quantize_model(workload.network(), config)
    calibrator = Calibrator(network, config)
    with torch.no_grad(), calibrator.observe():
        network(workload.batch())
    calibrator.finish()
    return network
