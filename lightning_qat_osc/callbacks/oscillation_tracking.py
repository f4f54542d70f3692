"""OscillationTracking: how often each weight oscillates, logged layer by layer."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch

from lightning_qat_osc.callbacks._optimizer_weights import trained_weights
from lightning_qat_osc.callbacks._progress import is_log_step
from lightning_qat_osc.callbacks._tracks_oscillation import TracksOscillation
from lightning_qat_osc.metrics import FrozenShare, OscillatingShare, OscillationFrequency

__all__ = ["OscillationTracking"]


class OscillationTracking(TracksOscillation):
    """Tracks how often each quantized weight oscillates, and logs it (Nagel et al., arXiv 2203.11086, Sec. 4.1).

    For each layer and in total it logs ``oscillation/frequency[/<layer>]``, the mean frequency in oscillations per
    optimizer step; ``oscillation/oscillating[/<layer>]``, the share of the weights with a frequency above 0.005; and
    ``oscillation/frozen[/<layer>]``, the share that is frozen. Loggers get these values every ``log_every_n_steps`` of
    the Trainer; callbacks such as EarlyStopping also get them at the end of each epoch and before each validation.
    :func:`~lightning_qat_osc.oscillation_states` returns the states themselves, and every checkpoint contains them.

    Args:
        momentum: Weight of the new value in the moving averages of frequency and integers, in (0, 1]. None: that of
            IterativeFreezing, if the Trainer has it and it sets a momentum, else 0.01.
        max_bits: Only weights of at most this many bits are tracked, as in the authors' code.

    Raises:
        TypeError: If an argument is not a number.
        ValueError: If an argument is out of range.
    """

    def __init__(self, momentum: float | None = None, *, max_bits: int = 4) -> None:
        super().__init__(momentum, max_bits)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the values, if this is a logging step."""
        if is_log_step(trainer):
            self._log(trainer, pl_module, on_step=True)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the values for callbacks that monitor them at the end of validation."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking and not trainer.barebones:
            self._log(trainer, pl_module, on_step=False)

    def _log(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, on_step: bool) -> None:
        weights = trained_weights(trainer, pl_module, self.max_bits)
        states = {w.name: w.quantizer.oscillation for w in weights if w.quantizer.oscillation is not None}
        if not states:
            return
        names = list(states)
        figures = {
            "frequency": OscillationFrequency(names),
            "oscillating": OscillatingShare(names),
            "frozen": FrozenShare(names),
        }
        for figure, metric in figures.items():
            if pl_module.device.type == "mps":  # which has no double precision
                metric.set_dtype(torch.float32)
            metric.to(pl_module.device)
            metric.update(states)
            for layer, value in metric.compute().items():
                key = f"oscillation/{figure}/{layer}" if layer else f"oscillation/{figure}"
                # sync_dist: the values are equal on all ranks, but Lightning warns without it
                pl_module.log(key, value, on_step=on_step, on_epoch=not on_step, batch_size=1, sync_dist=not on_step)
