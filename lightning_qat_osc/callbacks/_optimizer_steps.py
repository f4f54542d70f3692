"""A hook after the steps that optimizers really take, and which of them are logged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

__all__ = ["OptimizerStepHooks", "is_log_step"]


class OptimizerStepHooks:
    """Calls a function after each step that an optimizer of the Trainer really takes, whoever asked for it.

    The function is not called for micro-batches that only accumulate gradients, nor where a gradient scaler skips the
    step; it is under manual optimization, and for each of several optimizers.
    """

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []

    def attach(self, trainer: pl.Trainer, function: Callable[[Optimizer], None]) -> None:
        """Hook all optimizers of the Trainer."""
        self.detach()

        def after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            function(optimizer)

        self._handles = [optimizer.register_step_post_hook(after_step) for optimizer in trainer.optimizers]

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def is_log_step(trainer: pl.Trainer) -> bool:
    """Whether the loggers take the figures of the optimizer step that has just been made."""
    every = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return bool(every) and (trainer.global_step % every == 0 or trainer.is_last_batch)
