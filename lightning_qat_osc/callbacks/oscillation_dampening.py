"""OscillationDampening: pulls latent weights toward the centers of their bins."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch.optim import Optimizer

from lightning_qat_osc.callbacks._optimizer_steps import OptimizerStepHooks
from lightning_qat_osc.callbacks._optimizer_weights import OptimizerWeights, trained_weights
from lightning_qat_osc.callbacks._progress import is_log_step, run_length, run_step
from lightning_qat_osc.callbacks._requirements import require_one, require_quantization, warn_if_nothing_oscillates
from lightning_qat_osc.checks import check_bits, check_choice, check_number
from lightning_qat_osc.regularizers import Aggregation, dampening_loss
from lightning_qat_osc.schedules import Schedule, constant, cosine_anneal
from lightning_qat_osc.sharding import full_tensor
from lightning_qat_osc.sweep import add_dampening

__all__ = ["OscillationDampening"]


class OscillationDampening(pl.Callback):
    r"""Adds the gradient of the dampening loss to the weights' gradients (Nagel et al., arXiv 2203.11086, Sec. 4.2).

    :math:`L = L_{task} + \lambda \| w_q - \mathrm{clip}(w, s n, s p) \|_F^2`. The gradient is added in closed form
    before each optimizer step: once per step under gradient accumulation, before gradient clipping, and the same on
    every rank. The module's own loss and its logging do not change.

    Logs ``oscillation/dampening_weight``, which is lambda, and ``oscillation/dampening_loss``, without that factor.

    Args:
        final_weight: Lambda at the end of the run, at least 0. The paper's Table 4 uses 1e-4 to 1e-2 with "sum".
        initial_weight: Lambda at the start of the run, at least 0; it is annealed from there along half a cosine.
        anneal_start: Share of the run at which annealing begins, in [0, 1).
        aggregation: How the squared distances of a layer's weights are reduced: "sum", the paper's Frobenius norm;
            "mean"; or "kernel_mean", the ``sum(0).mean()`` in the authors' code, for which their lambda of 0.1 is
            meant. The losses of the layers are added up.
        max_bits: Only weights of at most this many bits are dampened.

    Attributes:
        weight: Lambda of the current or the last optimizer step.

    Raises:
        TypeError: If an argument is not a number.
        ValueError: If an argument is out of range, or ``aggregation`` is unknown.
    """

    def __init__(
        self,
        final_weight: float = 1e-2,
        *,
        initial_weight: float = 0.0,
        anneal_start: float = 0.25,
        aggregation: Aggregation = "sum",
        max_bits: int = 4,
    ) -> None:
        super().__init__()
        check_number("final_weight", final_weight, low=0.0)
        check_number("initial_weight", initial_weight, low=0.0)
        check_number("anneal_start", anneal_start, low=0.0, high=1.0, high_open=True)
        check_choice("aggregation", aggregation, Aggregation)
        check_bits("max_bits", max_bits)
        self.final_weight = final_weight
        self.initial_weight = initial_weight
        self.anneal_start = anneal_start
        self.aggregation = aggregation
        self.max_bits = max_bits
        self._schedule: Schedule = constant(final_weight)
        self.weight = 0.0  # lambda in use
        self._delegate: pl.Callback | None = None
        self._step_hooks: OptimizerStepHooks
        self._weights: OptimizerWeights

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check that QuantizationAwareTraining comes before, and that there is only one OscillationDampening."""
        self._step_hooks = require_quantization(trainer, self).step_hooks
        require_one(trainer, self)
        if stage == "fit":
            self._delegate = None

    def delegate_to(self, other: pl.Callback) -> bool:
        """Let a later callback add the gradient, in the pass over the gradients that it makes anyway.

        Args:
            other: The callback.

        Returns:
            Whether ``other`` is to add the gradient: False if another callback has asked before.
        """
        self._delegate = self._delegate or other
        return self._delegate is other

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Register step hooks, and set up the schedule for the length of the run."""
        warn_if_nothing_oscillates(pl_module, self.max_bits, "dampen")
        self._weights = OptimizerWeights(pl_module, self.max_bits)
        self._step_hooks.add(self, partial(self.on_before_optimizer_step, trainer, pl_module))
        if self.initial_weight != self.final_weight:
            steps = run_length(trainer, "The dampening weight")
            self._schedule = cosine_anneal(self.initial_weight, self.final_weight, steps, self.anneal_start)
        self.weight = self._schedule(run_step(trainer))

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Add lambda times the dampening gradient to the gradients of the weights that this optimizer will move."""
        self._step_hooks.begin(self, optimizer)
        self.weight = self._schedule(run_step(trainer))
        if self.weight > 0.0 and self._delegate is None:
            add_dampening(self._weights.about_to_move(optimizer), self.weight, self.aggregation)

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log lambda of the last step, and the dampening loss after that step."""
        if not is_log_step(trainer):
            return
        losses = [
            dampening_loss(weight, q.scale, q.quant_min, q.quant_max, self.aggregation)
            for _, weight, q in trained_weights(trainer, pl_module, self.max_bits)
        ]
        pl_module.log("oscillation/dampening_weight", self.weight)
        if losses:
            pl_module.log("oscillation/dampening_loss", full_tensor(torch.stack(losses).sum()))
