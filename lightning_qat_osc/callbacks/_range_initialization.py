"""Initial ranges from training batches: in passes before the first step, or in the first steps themselves."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, closing
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_qat_osc.batch_norm import batch_norm_layers, batch_statistics
from lightning_qat_osc.calibration import Calibrator
from lightning_qat_osc.callbacks._optimizer_weights import optimized_parameters
from lightning_qat_osc.callbacks._training_batches import training_batches
from lightning_qat_osc.callbacks._training_passes import ForwardFn, force_eager, training_pass, without_side_effects
from lightning_qat_osc.config import QuantConfig

__all__ = ["WatchedSteps", "initialize_ranges", "report_missing_ranges"]

_NO_BATCHES = "the training data must have at least 1 batch to initialize ranges from, got 0"


def initialize_ranges(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    config: QuantConfig,
    num_batches: int,
    forward_fn: ForwardFn | None,
) -> None:
    """Set the ranges of a module's quantizers in passes over training batches that have no other effect.

    Args:
        trainer: The Trainer.
        pl_module: The quantized module.
        config: The quantization configuration.
        num_batches: Training batches to run.
        forward_fn: Runs the network on a batch. None: use the module's ``training_step``.

    Raises:
        MisconfigurationException: If there is no training batch, or the loss is NaN for each of them.
    """
    calibrator = Calibrator(pl_module, config, optimized_parameters(trainer))
    forward = training_pass(trainer, pl_module, forward_fn)
    count, losses = 0, []
    # the running statistics of layers that were never trained are meaningless
    new = [b for b in batch_norm_layers(pl_module).values() if b.training and b.num_batches_tracked == 0]
    batches = training_batches(trainer, pl_module, num_batches)
    with without_side_effects(trainer, pl_module), batch_statistics(new), calibrator.observe(), closing(batches):
        for batch in batches:
            output = forward(batch)
            count += 1
            if forward_fn is None:
                losses += _loss_is_nan(output)
    if count == 0:
        raise MisconfigurationException(_NO_BATCHES)
    if losses and bool(torch.stack(losses).all()):
        raise MisconfigurationException(
            f"the loss of `training_step` must be a number, got nan for each of {len(losses)} calibration batches, "
            "which run in full precision: there is NaN or inf in the data or in the weights."
        )
    _set_ranges(calibrator)


class WatchedSteps:
    """Sets ranges from the first training steps, in full precision, if no passes can be run before training.

    Args:
        trainer: The Trainer.
        pl_module: The quantized module. Watching begins on construction.
        config: The quantization configuration.
    """

    def __init__(self, trainer: pl.Trainer, pl_module: pl.LightningModule, config: QuantConfig) -> None:
        self._calibrator = Calibrator(pl_module, config, optimized_parameters(trainer))
        self._watching = ExitStack()
        self._watching.enter_context(force_eager())
        self._watching.enter_context(self._calibrator.observe(weights=False))

    def finish(self) -> None:
        """Stop watching, and set the ranges from the inputs seen so far."""
        self.close()
        _set_ranges(self._calibrator)

    def close(self) -> None:
        """Stop watching."""
        self._watching.close()


def report_missing_ranges(trainer: pl.Trainer) -> None:
    """Raise if a run had no training batches, and warn if it had already ended: Lightning does neither.

    Raises:
        MisconfigurationException: If there were no training batches.
    """
    if trainer.limit_train_batches == 0 or trainer.num_training_batches == 0:
        limit = trainer.limit_train_batches
        raise MisconfigurationException(f"{_NO_BATCHES}, with limit_train_batches={limit}")
    if trainer.global_step > 0:
        rank_zero_warn(
            f"Nothing was trained, so the quantizers have no ranges: the run had already ended, at epoch "
            f"{trainer.current_epoch} of max_epochs={trainer.max_epochs} and step {trainer.global_step} of "
            f"max_steps={trainer.max_steps}. Epochs and steps in full precision count, too: raise the limit, or load "
            "only the weights, with load_from_checkpoint, and leave ckpt_path out."
        )


def _set_ranges(calibrator: Calibrator) -> None:
    for warning in calibrator.finish():
        rank_zero_warn(warning)


def _loss_is_nan(output: Any) -> list[Tensor]:
    """Return whether the loss that ``training_step`` returned is NaN, as a list of one tensor; empty without a loss."""
    loss = output.get("loss") if isinstance(output, Mapping) else output
    return [loss.isnan().any()] if isinstance(loss, Tensor) else []
