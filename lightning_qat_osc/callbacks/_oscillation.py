"""What the oscillation callbacks share: checks, their schedule, and the weights of an optimizer."""

from __future__ import annotations

import math

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer

from lightning_qat_osc.callbacks._optimizer_steps import OptimizerStepHooks
from lightning_qat_osc.callbacks.quantization_aware_training import QuantizationAwareTraining
from lightning_qat_osc.lookup import is_quantized, quantized_layers, weights_with_quantizers
from lightning_qat_osc.sweep import WeightBatch, in_batches

__all__ = [
    "OptimizerWeights",
    "require_averaging_before",
    "require_one",
    "require_quantization",
    "run_length",
    "run_step",
    "step_hooks",
    "warn_if_nothing_oscillates",
]


def require_quantization(trainer: pl.Trainer, callback: pl.Callback) -> None:
    """Insist that a QuantizationAwareTraining comes before a callback.

    Raises:
        MisconfigurationException: If none is in the list, or it comes later.
    """
    name = type(callback).__name__
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    first = next((i for i, c in enumerate(callbacks) if isinstance(c, QuantizationAwareTraining)), None)
    if first is None:
        raise MisconfigurationException(
            f"{name} needs quantized weights: add QuantizationAwareTraining(...) to the Trainer's callbacks, before it."
        )
    if first > callbacks.index(callback):
        raise MisconfigurationException(
            f"QuantizationAwareTraining must come before {name} in the Trainer's callbacks: it inserts the quantizers "
            "and moves their scales, which the others then read."
        )


def step_hooks(trainer: pl.Trainer) -> OptimizerStepHooks:
    """The hooks around optimizer steps, which all callbacks share."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next(c.step_hooks for c in callbacks if isinstance(c, QuantizationAwareTraining))


def require_one(trainer: pl.Trainer, callback: pl.Callback) -> None:
    """Insist that a callback is the only one of its kind, whose arguments are then in force.

    Raises:
        MisconfigurationException: If there are more.
    """
    same = [c for c in trainer.callbacks if type(c) is type(callback)]  # type: ignore[attr-defined]
    if len(same) > 1:
        name = type(callback).__name__
        raise MisconfigurationException(f"the Trainer's callbacks must have one {name} at most, got {len(same)}")


def warn_if_nothing_oscillates(pl_module: pl.LightningModule, max_bits: int, verb: str) -> None:
    """Say so if no weight has few enough bits for a callback.

    Args:
        pl_module: The quantized module.
        max_bits: The callback's.
        verb: What the callback does to weights.
    """
    bits = [w.quantizer.bits for w in weights_with_quantizers(pl_module) if w.quantizer.bits is not None]
    if any(b <= max_bits for b in bits):
        return
    least = f"the least is {min(bits)}; the first and last layer have first_last_bits" if bits else "none is quantized"
    rank_zero_warn(
        f"No weight is quantized to max_bits={max_bits} or fewer ({least}): there is nothing to {verb}. Lower the bits "
        "(first_last_bits=None gives the first and last layer those of the others) or raise max_bits."
    )


def require_averaging_before(trainer: pl.Trainer, callback: pl.Callback) -> None:
    """Insist that averaged weights are in place when a callback prepares the model for an evaluation.

    Raises:
        MisconfigurationException: If a WeightAveraging, which swaps them in, comes after it.
    """
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for other in callbacks[callbacks.index(callback) :]:
        if isinstance(other, pl.callbacks.WeightAveraging):
            raise MisconfigurationException(
                f"{type(other).__name__} must come before {type(callback).__name__} in the Trainer's callbacks, and "
                "after QuantizationAwareTraining: what it swaps in before an evaluation is yet to be prepared for it."
            )


class OptimizerWeights:
    """The low-bit weights of each optimizer. The model is searched once, and again where a layer has another weight.

    Args:
        pl_module: The quantized module, once it is whole.
        max_bits: Weights of more bits than this are left out.
    """

    def __init__(self, pl_module: pl.LightningModule, max_bits: int) -> None:
        self._module = pl_module
        self._max_bits = max_bits
        self._search()

    def _search(self) -> None:
        self._weights = weights_with_quantizers(self._module)
        self._owners = [
            (layer, parameter, layer._parameters.get(parameter))
            for layer in quantized_layers(self._module).values()
            for parameter in layer.parameter_quantizers
        ]
        self._batches: dict[Optimizer, tuple[list[tuple[str, torch.Size]], list[WeightBatch]]] = {}

    def of(self, optimizer: Optimizer) -> list[WeightBatch]:
        """Those that an optimizer updates; not those that their owner holds fixed."""
        if any(layer._parameters.get(parameter) is not weight for layer, parameter, weight in self._owners):
            self._search()
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        weights = [
            w
            for w in self._weights
            if w.weight.requires_grad and id(w.weight) in owned and is_quantized(w.quantizer, self._max_bits)
        ]
        shapes = [(w.name, w.weight.shape) for w in weights]
        if optimizer not in self._batches or self._batches[optimizer][0] != shapes:
            self._batches[optimizer] = shapes, in_batches(weights)
        return self._batches[optimizer][1]

    def about_to_move(self, optimizer: Optimizer) -> list[WeightBatch]:
        """Those of them that have gradients."""
        return [batch for batch in self.of(optimizer) if batch.has_gradients()]


def run_length(trainer: pl.Trainer, what: str) -> int:
    """Length of the whole run, in the unit of :func:`run_step`.

    To be called once training has begun: asking a Trainer for its number of steps sets up the training data, and before
    a checkpoint's loops are restored that loses the state of a stateful loader.

    Raises:
        MisconfigurationException: If the run has no known end; ``what`` says what is annealed over it.
    """
    steps = trainer.estimated_stepping_batches
    if not 0 <= steps < math.inf:  # -1 for a loader without a length
        raise MisconfigurationException(
            f"{what} is annealed over the run, whose number of optimizer steps is not known: set "
            "Trainer(max_steps=...), or Trainer(max_epochs=..., limit_train_batches=...) for a loader without a length."
        )
    schedulers = [c for c in trainer.callbacks if isinstance(c, GradientAccumulationScheduler)]  # type: ignore[attr-defined]
    if schedulers and trainer.max_epochs != -1 and math.isfinite(trainer.num_training_batches):
        # the Trainer counts as if nothing were accumulated: its scheduler only speaks up as an epoch begins
        counts = [schedulers[0].get_accumulate_grad_batches(epoch) for epoch in range(trainer.max_epochs or 1)]
        steps = sum(math.ceil(trainer.num_training_batches / count) for count in counts)
        steps = steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)
    return max(1, int(steps))


def run_step(trainer: pl.Trainer) -> float:
    """How far the run is: 0 before its first optimizer step, :func:`run_length` after its last.

    Under manual optimization a batch may have any number of steps, of several optimizers, and those taken without
    Lightning's wrapper are not counted. There the run is as far as its batches are, or as ``max_steps`` if that is
    nearer.
    """
    if trainer.lightning_module.automatic_optimization or trainer.max_epochs in (None, -1):
        return trainer.global_step
    batch = trainer.fit_loop.total_batch_idx
    if trainer.max_steps == -1:
        return batch
    share = batch / (trainer.num_training_batches * max(1, trainer.max_epochs))
    return max(share, trainer.global_step / trainer.max_steps) * run_length(trainer, "")
