"""IterativeFreezing: freezes the integers of weights that oscillate too often."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer

from lightning_qat_osc.callbacks._frozen_weights import HoldsFrozenWeights
from lightning_qat_osc.callbacks._optimizer_weights import trained_weights
from lightning_qat_osc.callbacks._progress import is_log_step, run_length, run_step
from lightning_qat_osc.callbacks._requirements import require_averaging_before
from lightning_qat_osc.callbacks._tracks_oscillation import TracksOscillation
from lightning_qat_osc.callbacks.oscillation_dampening import OscillationDampening
from lightning_qat_osc.checks import check_number
from lightning_qat_osc.schedules import Schedule, constant, cosine_anneal
from lightning_qat_osc.sharding import reshard
from lightning_qat_osc.sweep import dampen_and_pass_on, pass_on_frozen_gradients

__all__ = ["IterativeFreezing"]


class IterativeFreezing(TracksOscillation, HoldsFrozenWeights):
    """Freezes weights that oscillate too often (Nagel et al., arXiv 2203.11086, Sec. 4.3, Algorithm 1).

    A weight whose frequency exceeds the threshold is frozen for the rest of training at the integer that its moving
    average rounds to. The scale is still learned, with dw_q/ds = z for a frozen integer z. Frozen latent weights are
    kept at s z, so they are correct in evaluation, in every checkpoint and for code that is unaware of freezing;
    changes to them by momentum or weight decay are undone.

    Start freezing late enough: a weight that freezes while its moving average still reflects the start of training is
    held at the wrong integer. With an annealed threshold, freezing starts only after ``anneal_start`` of the run.

    It works without OscillationTracking; with it, both share one state. Logs ``oscillation/freeze_threshold``.

    Args:
        threshold: Frequency above which a weight is frozen, in (0, 1], in oscillations per optimizer step.
        final_threshold: Threshold at the end of the run, reached along half a cosine. None: the threshold is constant.
        anneal_start: Share of the run at which annealing begins, in [0, 1); no weight is frozen before. A constant
            threshold applies from the first step.
        momentum: Weight of the new value in the moving averages, in (0, 1]. None: that of OscillationTracking if the
            Trainer has it and it sets a momentum, else 0.01. One oscillation raises a frequency from 0 to the momentum,
            so a threshold below twice the momentum freezes weights that have oscillated once or twice, and there is a
            warning. Only ``final_threshold`` may go down to the momentum without a warning, as in the paper. A
            ``threshold`` below the momentum would freeze every weight at its first oscillation, and is an error.
        max_bits: Only weights of at most this many bits are frozen.

    Raises:
        TypeError: If an argument is not a number.
        ValueError: If an argument is out of range.
    """

    _verb = "freeze"

    def __init__(
        self,
        threshold: float = 0.04,
        final_threshold: float | None = None,
        *,
        anneal_start: float = 0.25,
        momentum: float | None = None,
        max_bits: int = 4,
    ) -> None:
        super().__init__(momentum, max_bits)
        check_number("threshold", threshold, low=0.0, high=1.0, low_open=True)
        if final_threshold is not None:
            check_number("final_threshold", final_threshold, low=0.0, high=1.0, low_open=True)
        check_number("anneal_start", anneal_start, low=0.0, high=1.0, high_open=True)
        self.threshold = threshold
        self.final_threshold = threshold if final_threshold is None else final_threshold
        self.anneal_start = anneal_start
        self._schedule: Schedule = constant(threshold)
        self._first_step = 0.0
        self._in_force = threshold
        self._dampening: OscillationDampening | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Agree on the momentum, check the threshold against it, and take over dampening, to do both in one pass."""
        super().setup(trainer, pl_module, stage)
        require_averaging_before(trainer, self)
        if stage != "fit":
            return  # an evaluation by another Trainer inside a fit must not separate the two callbacks
        earlier = trainer.callbacks[: trainer.callbacks.index(self)]  # type: ignore[attr-defined]
        dampening = [c for c in earlier if isinstance(c, OscillationDampening) and c.max_bits == self.max_bits]
        self._dampening = next((c for c in dampening if c.delegate_to(self)), None)
        if self.threshold < self._momentum:
            raise MisconfigurationException(
                f"threshold must be at least the momentum, {self._momentum}, got {self.threshold}: one oscillation "
                "raises a frequency of 0 to the momentum, so every weight would freeze at its first oscillation. "
                "Raise the threshold, or lower the momentum to average over more steps."
            )
        lowest = min(self.threshold, self.final_threshold)
        if self.threshold < 2.0 * self._momentum or lowest < self._momentum:
            rank_zero_warn(
                f"IterativeFreezing's lowest threshold {lowest} is below twice the momentum {self._momentum}: one "
                "oscillation raises a frequency of 0 to the momentum, so a weight freezes after one or two "
                "oscillations, even if it would then have settled. Raise the threshold, or lower the momentum to "
                "average over more steps."
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the histories of the weights, and set up the schedule for the length of the run."""
        super().on_train_start(trainer, pl_module)
        if self.threshold != self.final_threshold:
            steps = run_length(trainer, "The freezing threshold")
            self._schedule = cosine_anneal(self.threshold, self.final_threshold, steps, self.anneal_start)
            self._first_step = self.anneal_start * steps
        self._in_force = self._schedule(run_step(trainer))

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Pass the gradients of frozen weights on to their scales, after adding the gradient of dampening, if any."""
        self._step_hooks.begin(self, optimizer)
        weights = self._weights.about_to_move(optimizer)
        if self._dampening is None or self._dampening.weight == 0.0:
            pass_on_frozen_gradients(weights)
        else:
            dampen_and_pass_on(weights, self._dampening.weight, self._dampening.aggregation)

    def _threshold_now(self, trainer: pl.Trainer) -> float:
        step = run_step(trainer)
        self._in_force = self._schedule(step)
        return self._in_force if step >= self._first_step else math.inf

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the threshold of the last step."""
        if is_log_step(trainer):
            pl_module.log("oscillation/freeze_threshold", self._in_force)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put frozen weights back in place, because another callback may have swapped in averaged weights."""
        if not trainer.sanity_checking:  # it runs before stale frozen masks are released
            self._hold(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put frozen weights back in place, because another callback may have swapped in averaged weights."""
        self._hold(trainer, pl_module)

    def _hold(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        reshard(pl_module)
        for _, weight, q in trained_weights(trainer, pl_module, self.max_bits):  # not of an averaged copy
            if q.oscillation is not None:
                q.oscillation.hold_frozen(weight, q.scale)
