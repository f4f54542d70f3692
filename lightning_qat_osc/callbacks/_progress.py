"""How far a run is, how long it is, and which of its steps are logged."""

from __future__ import annotations

import math

import lightning.pytorch as pl
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities.exceptions import MisconfigurationException

__all__ = ["is_log_step", "run_length", "run_step"]


def run_length(trainer: pl.Trainer, what: str) -> int:
    """Return the length of the whole run, in the unit of :func:`run_step`.

    Call this only after training has begun. It reads ``trainer.estimated_stepping_batches``, which sets up the training
    data; before a checkpoint's loops are restored, that would lose the state of a stateful loader.

    Raises:
        MisconfigurationException: If the number of steps is unknown. The message names what is annealed, ``what``.
    """
    steps = trainer.estimated_stepping_batches
    if not 0 <= steps < math.inf:  # -1 for a loader without a length
        raise MisconfigurationException(
            f"{what} is annealed over the run, but the run's number of optimizer steps is unknown: set "
            "Trainer(max_steps=...), or Trainer(max_epochs=..., limit_train_batches=...) for a loader without a length."
        )
    schedulers = [c for c in trainer.callbacks if isinstance(c, GradientAccumulationScheduler)]  # type: ignore[attr-defined]
    if schedulers and trainer.max_epochs != -1 and math.isfinite(trainer.num_training_batches):
        # the Trainer counts without accumulation: the scheduler sets it only when an epoch begins
        counts = [schedulers[0].get_accumulate_grad_batches(epoch) for epoch in range(trainer.max_epochs or 1)]
        steps = sum(math.ceil(trainer.num_training_batches / count) for count in counts)
        steps = steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)
    return max(1, int(steps))


def run_step(trainer: pl.Trainer) -> float:
    """Return the progress of the run: 0 before its first optimizer step, :func:`run_length` after its last.

    Under manual optimization a batch may have any number of steps, of several optimizers, and Lightning does not count
    steps taken without its wrapper. With ``max_epochs`` set, the progress is then the share of batches that are done,
    or the share of ``max_steps`` if that is larger.
    """
    if trainer.lightning_module.automatic_optimization or trainer.max_epochs in (None, -1):
        return trainer.global_step
    batch = trainer.fit_loop.total_batch_idx
    if trainer.max_steps == -1:
        return batch
    share = batch / (trainer.num_training_batches * max(1, trainer.max_epochs))
    return max(share, trainer.global_step / trainer.max_steps) * run_length(trainer, "A schedule")


def is_log_step(trainer: pl.Trainer) -> bool:
    """Whether values that are logged for the batch just trained on are used.

    Loggers use them every ``log_every_n_steps``; callbacks that monitor at the end of an epoch, after its last batch.
    """
    if trainer.barebones:
        return False
    if trainer.is_last_batch:
        return True
    every = trainer.log_every_n_steps  # type: ignore[attr-defined]
    automatic = trainer.lightning_module.automatic_optimization
    # under manual optimization the loggers count batches, while global_step counts the steps of all optimizers
    step = trainer.global_step if automatic else trainer.fit_loop.total_batch_idx + 1
    stepped = not automatic or (trainer.fit_loop.batch_idx + 1) % trainer.accumulate_grad_batches == 0
    return bool(every) and stepped and step % every == 0
