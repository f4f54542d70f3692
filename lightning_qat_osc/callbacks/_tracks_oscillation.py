"""The base class of the callbacks that track oscillations and freeze weights."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer

from lightning_qat_osc.callbacks._frozen_weights import HoldsFrozenWeights
from lightning_qat_osc.callbacks._optimizer_steps import OptimizerStepHooks
from lightning_qat_osc.callbacks._optimizer_weights import OptimizerWeights, trained_weights
from lightning_qat_osc.callbacks._requirements import require_one, require_quantization, warn_if_nothing_oscillates
from lightning_qat_osc.checks import check_bits, check_number
from lightning_qat_osc.lookup import quantized_weights
from lightning_qat_osc.sweep import advance_states

__all__ = ["TracksOscillation"]


class TracksOscillation(pl.Callback):
    """Base class for tracking and freezing: advances the oscillation states of weights once per optimizer step.

    All such callbacks of a Trainer share the states. Only one of them advances the states, in one pass over the
    weights: IterativeFreezing if there is one, or else the first.

    Args:
        momentum: Weight of the new value in the moving averages. None: that of the other such callbacks, else 0.01.
        max_bits: Weights of more bits than this are left alone.
    """

    _verb = "track"  # what the callback does to weights, for messages

    def __init__(self, momentum: float | None, max_bits: int) -> None:
        super().__init__()
        if momentum is not None:
            check_number("momentum", momentum, low=0.0, high=1.0, low_open=True)
        check_bits("max_bits", max_bits)
        self.momentum = momentum
        self.max_bits = max_bits
        self._momentum = 0.0  # the momentum in use
        self._leads = False
        self._restored = False  # whether weights and histories come from the same checkpoint
        self._step_hooks: OptimizerStepHooks
        self._weights: OptimizerWeights

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Agree with the other callbacks on the momentum, and on which of them advances the states."""
        self._step_hooks = require_quantization(trainer, self).step_hooks
        self._restored &= stage != "fit"
        require_one(trainer, self)
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
        self._leads = next((c for c in sharing if isinstance(c, HoldsFrozenWeights)), sharing[0]) is self

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Note that a run is resumed: its histories continue, even if weights were moved after its optimizer steps."""
        self._restored = trainer.state.fn == "fit"

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Register step hooks, and start the history of each weight that has none or has moved since it ended."""
        self._weights = OptimizerWeights(pl_module, self.max_bits)

        def after_step(optimizer: Optimizer) -> None:
            if self._leads:
                advance_states(self._weights.of(optimizer), self._momentum, self._threshold_now(trainer))

        self._step_hooks.add(self, partial(self.on_before_optimizer_step, trainer, pl_module), after_step)
        for _, weight, quantizer in quantized_weights(pl_module, self.max_bits):
            quantizer.start_tracking(weight)
        for _, weight, quantizer in () if self._restored else trained_weights(trainer, pl_module, self.max_bits):
            quantizer.start_tracking(weight).restart_where_moved(quantizer.to_int(weight.detach()))
        if self._leads:
            warn_if_nothing_oscillates(pl_module, self.max_bits, self._verb)

    def _threshold_now(self, trainer: pl.Trainer) -> float | None:
        """Return the frequency above which weights freeze after this step; None if this callback never freezes."""
        return None
