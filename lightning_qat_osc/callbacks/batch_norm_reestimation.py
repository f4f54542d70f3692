"""BatchNormReestimation: fresh batch-norm statistics before every evaluation."""

from __future__ import annotations

from contextlib import closing
from itertools import chain
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_qat_osc.batch_norm import batch_norm_layers, reestimate_batch_norm
from lightning_qat_osc.callbacks._requirements import (
    require_averaging_before,
    require_freezing_before,
    require_quantization,
)
from lightning_qat_osc.callbacks._training_batches import training_batches
from lightning_qat_osc.callbacks._training_passes import (
    ForwardFn,
    can_run_training_step,
    training_pass,
    without_side_effects,
)
from lightning_qat_osc.checks import check_count, check_flag, check_function

__all__ = ["BatchNormReestimation"]


class BatchNormReestimation(pl.Callback):
    """Re-estimates batch-norm statistics before every validation and test, and at the end of fit.

    Oscillating weights make running statistics stale (Nagel et al., arXiv 2203.11086, Sec. 2.3.1). Each layer gets
    exactly the mean and variance over some training batches: the same batches each time, so that epochs differ by their
    weights alone. The passes do not change weights, other buffers, metrics, random numbers or training's own iterator,
    and they log nothing. Layers that training itself keeps in evaluation mode are not re-estimated.

    Put it after callbacks that swap weights before an evaluation, such as WeightAveraging. Attributes that
    ``training_step`` itself sets, such as a list of outputs, cannot be restored: give ``forward_fn`` in that case.

    Args:
        num_batches: Number of training batches to estimate from on each process, at least 1. The paper's authors use
            50.
        log_divergence: Whether to log ``batch_norm/divergence/<layer>``, the KL divergence of the new statistics from
            the old ones in nats, averaged over the channels, and ``batch_norm/divergence``, the largest of these.
        forward_fn: Function of the LightningModule and a batch that runs the network on the batch. It is needed if
            ``training_step`` cannot be run on its own. In YAML: the import path of the function.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If ``num_batches`` is below 1.
    """

    def __init__(
        self, num_batches: int = 50, *, log_divergence: bool = False, forward_fn: ForwardFn | None = None
    ) -> None:
        super().__init__()
        check_count("num_batches", num_batches)
        check_flag("log_divergence", log_divergence)
        check_function("forward_fn", forward_fn)
        self.num_batches = num_batches
        self.log_divergence = log_divergence
        self.forward_fn = forward_fn
        self._layers: dict[str, _BatchNorm] = {}
        self._trained: dict[str, _BatchNorm] = {}  # layers to re-estimate: in fit those in training mode
        self._left_alone: list[str] | None = None  # layers that training keeps in evaluation mode, None: unknown
        self._evaluating: list[str] = []  # layers that are in evaluation mode in setup

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the order of callbacks and that ``training_step`` can be run, and find the layers to re-estimate."""
        require_quantization(trainer, self)
        require_averaging_before(trainer, self)
        require_freezing_before(trainer, self)
        # the modes are still those that the user set: the Trainer changes all of them before an evaluation
        self._evaluating = [name for name, bn in batch_norm_layers(pl_module).items() if not bn.training]
        self._find(pl_module, stage)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the layers again: ``configure_model`` may have created some, and ``sync_batchnorm`` replaced them."""
        self._find(pl_module, "fit")

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the layers again, after ``configure_model`` and after the checkpoint was loaded."""
        if trainer.state.fn != "fit":
            self._find(pl_module, "validate")

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the layers again, after ``configure_model`` and after the checkpoint was loaded."""
        self._find(pl_module, "test")

    def state_dict(self) -> dict[str, Any]:
        """Return the layers that training keeps in evaluation mode, which outside of training the modes do not show."""
        return {"left_alone": self._left_alone}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the layers that the run of the checkpoint kept in evaluation mode."""
        self._left_alone = state_dict["left_alone"]

    def _find(self, pl_module: pl.LightningModule, stage: str) -> None:
        self._layers = batch_norm_layers(pl_module)
        self._trained = {name: bn for name, bn in self._layers.items() if bn.training}
        if stage != "fit":
            left_alone = self._evaluating if self._left_alone is None else self._left_alone
            self._trained = {name: bn for name, bn in self._layers.items() if name not in left_alone}
        if stage != "fit" and self._left_alone is None and not self._trained:
            self._trained = self._layers  # the whole module is in evaluation mode, so no layer is frozen
        if self._trained and self.forward_fn is None and not can_run_training_step(pl_module):
            raise MisconfigurationException(
                "BatchNormReestimation cannot run this module's `training_step` on its own (manual optimization, or a "
                "`dataloader_iter`): give `forward_fn`, a function of the LightningModule and a batch."
            )

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note which layers are in training mode: it may change in a new epoch, or when a callback unfreezes layers."""
        if batch_idx == 0:
            self._layers = batch_norm_layers(pl_module)
        self._trained = {name: bn for name, bn in self._layers.items() if bn.training}
        self._left_alone = [name for name in self._layers if name not in self._trained]

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Re-estimate the statistics, and log how far the old ones were off."""
        if not trainer.sanity_checking:
            self._log(trainer, pl_module, self._reestimate(trainer, pl_module))

    def on_test_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Re-estimate the statistics, and log how far the old ones were off."""
        self._log(trainer, pl_module, self._reestimate(trainer, pl_module))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Re-estimate the statistics for use of the module after fit."""
        self._reestimate(trainer, pl_module)

    def _reestimate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Tensor]:
        if not self._trained:
            return {}
        forward = training_pass(trainer, pl_module, self.forward_fn)
        batches = training_batches(trainer, pl_module, self.num_batches)
        with without_side_effects(trainer, pl_module, self._trained.values()), closing(batches):
            first = next(batches, None)
            if first is None:
                rank_zero_warn(
                    "There is no training data to re-estimate batch norm from: its statistics stay as they are."
                )
                return {}
            return reestimate_batch_norm(pl_module, chain([first], batches), forward, layers=self._trained)

    def _log(self, trainer: pl.Trainer, pl_module: pl.LightningModule, divergence: dict[str, Tensor]) -> None:
        if not self.log_divergence or not divergence or trainer.barebones:
            return
        means = {name: value.mean() for name, value in divergence.items()}
        for name, value in means.items():
            pl_module.log(f"batch_norm/divergence/{name}", value, batch_size=1, sync_dist=True)
        pl_module.log("batch_norm/divergence", torch.stack(list(means.values())).amax(), batch_size=1, sync_dist=True)
