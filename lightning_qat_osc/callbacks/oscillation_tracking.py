"""OscillationTracking: how often each weight oscillates, logged layer by layer."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer

from lightning_qat_osc.callbacks._optimizer_steps import OptimizerStepHooks, is_log_step
from lightning_qat_osc.callbacks._oscillation import OptimizerWeights, require_quantization
from lightning_qat_osc.config import check_bits, check_number
from lightning_qat_osc.lookup import oscillation_states, quantized_weights
from lightning_qat_osc.metrics import FrozenShare, OscillatingShare, OscillationFrequency
from lightning_qat_osc.sweep import advance_states

__all__ = ["OscillationTracking", "TracksOscillation"]


class TracksOscillation(pl.Callback):
    """What tracking and freezing have in common: after each optimizer step, the states of its weights advance once.

    However many such callbacks a Trainer has, they share the states. One advances these, in one pass over the weights:
    IterativeFreezing where there is one, or else the first.

    Args:
        momentum: Weight of the new value in the moving averages; None: that of the Trainer's other such callbacks.
        max_bits: Weights of more bits than this are left alone.
    """

    _freezes = False

    def __init__(self, momentum: float | None, max_bits: int) -> None:
        super().__init__()
        if momentum is not None:
            check_number("momentum", momentum, low=0.0, high=1.0, low_open=True)
        check_bits("max_bits", max_bits, none_allowed=False)
        self.momentum = momentum
        self.max_bits = max_bits
        self._momentum = 0.0  # the one in force
        self._leads = False
        self._step_hooks = OptimizerStepHooks()
        self._weights: OptimizerWeights

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Agree with the other callbacks on the momentum, and on who advances the states."""
        require_quantization(trainer, self)
        sharing = [c for c in trainer.callbacks if isinstance(c, TracksOscillation)]  # type: ignore[attr-defined]
        for what in ("momentum", "max_bits"):
            values = {type(c).__name__: getattr(c, what) for c in sharing if getattr(c, what) is not None}
            if len(set(values.values())) > 1:
                given = ", ".join(f"{name}({what}={value})" for name, value in values.items())
                raise MisconfigurationException(
                    f"callbacks that share one oscillation state must have the same {what}, got {given}"
                )
        momenta = [c.momentum for c in sharing if c.momentum is not None]
        self._momentum = momenta[0] if momenta else 0.01
        self._leads = next((c for c in sharing if c._freezes), sharing[0]) is self

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Hook the optimizers, and begin the history of every weight that has none with its integers of now."""
        self._weights = OptimizerWeights(pl_module, self.max_bits)

        def after_step(optimizer: Optimizer) -> None:
            # where training_step returned None, Lightning steps without gradients, and nothing moves
            moved = any(p.grad is not None for group in optimizer.param_groups for p in group["params"])
            if self._leads and moved:
                advance_states(self._weights.of(optimizer), self._momentum, self._threshold_now(trainer))

        before = partial(self.on_before_optimizer_step, trainer, pl_module)
        self._step_hooks.attach(trainer, before, after_step)
        calibrated = quantized_weights(pl_module)
        for _, weight, quantizer in quantized_weights(pl_module, self.max_bits):
            quantizer.start_tracking(weight)
        if calibrated and self._leads and not oscillation_states(pl_module):
            least = min(w.quantizer.bits or 8 for w in calibrated)
            rank_zero_warn(
                f"No weight is quantized to max_bits={self.max_bits} or fewer (the least is {least}; the first and "
                "last layer have first_last_bits): there is nothing to track. Lower the bits or raise max_bits."
            )

    def _threshold_now(self, trainer: pl.Trainer) -> float | None:
        """Frequency above which weights freeze after this step; None where nothing ever does."""
        return None

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let go of the optimizers."""
        self._step_hooks.detach()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Let go of the optimizers."""
        self._step_hooks.detach()


class OscillationTracking(TracksOscillation):
    """Tracks how often each quantized weight oscillates, and logs it (Nagel et al., arXiv 2203.11086, Sec. 4.1).

    Logs, every ``log_every_n_steps`` of the Trainer, at the end of each epoch and before each validation, for each
    layer and in total: ``oscillation/frequency[/<layer>]``, the mean frequency in oscillations per optimizer step;
    ``oscillation/oscillating[/<layer>]``, the share of the weights with a frequency above 0.005; and
    ``oscillation/frozen[/<layer>]``, the share that is frozen. Any logger, ModelCheckpoint and EarlyStopping can use
    them. The states themselves are in :func:`~lightning_qat_osc.oscillation_states`, and in every checkpoint.

    Args:
        momentum: Weight of the new value in the moving averages of frequency and integers, in (0, 1]. None: that of
            IterativeFreezing if it is in the list and has one, else 0.01.
        max_bits: Only weights of at most this many bits are tracked, as in the paper, where more bits do not suffer.

    Raises:
        TypeError: If an argument is no number.
        ValueError: If an argument is out of range.
    """

    def __init__(self, momentum: float | None = 0.01, *, max_bits: int = 4) -> None:
        super().__init__(momentum, max_bits)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the figures at the steps that the loggers take."""
        if is_log_step(trainer):
            self._log(pl_module, on_step=True)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the figures for callbacks that look at the end of validation."""
        if trainer.barebones:
            return
        if trainer.training or (trainer.validating and trainer.state.fn == "fit" and not trainer.sanity_checking):
            self._log(pl_module, on_step=False)

    def _log(self, pl_module: pl.LightningModule, *, on_step: bool) -> None:
        states = oscillation_states(pl_module)
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
                # the same on every rank already; a Trainer of several asks for it all the same
                pl_module.log(key, value, on_step=on_step, on_epoch=not on_step, batch_size=1, sync_dist=not on_step)
