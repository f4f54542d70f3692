"""What callbacks require of a Trainer's other callbacks, and of the quantized module."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_qat_osc.callbacks._frozen_weights import HoldsFrozenWeights
from lightning_qat_osc.callbacks.quantization_aware_training import QuantizationAwareTraining
from lightning_qat_osc.lookup import computed_weights, weights_with_quantizers

__all__ = [
    "require_averaging_before",
    "require_freezing_before",
    "require_one",
    "require_quantization",
    "warn_if_nothing_oscillates",
]


def require_quantization(trainer: pl.Trainer, callback: pl.Callback) -> QuantizationAwareTraining:
    """Return the Trainer's QuantizationAwareTraining, which must come before ``callback``.

    Raises:
        MisconfigurationException: If the Trainer has none, or if it comes after ``callback``.
    """
    name = type(callback).__name__
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    quantization = next((c for c in callbacks if isinstance(c, QuantizationAwareTraining)), None)
    if quantization is None:
        raise MisconfigurationException(
            f"{name} needs quantized weights: add QuantizationAwareTraining(...) to the Trainer's callbacks, before it."
        )
    if callbacks.index(quantization) > callbacks.index(callback):
        raise MisconfigurationException(
            f"QuantizationAwareTraining must come before {name} in the Trainer's callbacks: it inserts the quantizers "
            f"and updates their scales, which {name} then reads."
        )
    return quantization


def require_one(trainer: pl.Trainer, callback: pl.Callback) -> None:
    """Check that a callback is the only one of its type, so that it is clear whose arguments apply.

    Raises:
        MisconfigurationException: If the Trainer has several.
    """
    same = [c for c in trainer.callbacks if type(c) is type(callback)]  # type: ignore[attr-defined]
    if len(same) > 1:
        name = type(callback).__name__
        raise MisconfigurationException(f"the Trainer's callbacks must contain at most one {name}, got {len(same)}")


def require_averaging_before(trainer: pl.Trainer, callback: pl.Callback) -> None:
    """Check that averaged weights are swapped in before a callback prepares the model for an evaluation.

    Raises:
        MisconfigurationException: If a WeightAveraging, which swaps them in, comes after ``callback``.
    """
    for other in _later(trainer, callback, pl.callbacks.WeightAveraging):
        raise MisconfigurationException(
            f"{type(other).__name__} must come before {type(callback).__name__} in the Trainer's callbacks, and "
            f"after QuantizationAwareTraining: {type(callback).__name__} has to prepare the weights that "
            f"{type(other).__name__} swaps in before an evaluation."
        )


def require_freezing_before(trainer: pl.Trainer, callback: pl.Callback) -> None:
    """Check that frozen weights are put back in place before a callback runs the model with averaged weights.

    Raises:
        MisconfigurationException: If a callback that puts back frozen weights, which averaging may move, comes after
            ``callback``.
    """
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if not any(isinstance(other, pl.callbacks.WeightAveraging) for other in callbacks):
        return
    for other in _later(trainer, callback, HoldsFrozenWeights):
        raise MisconfigurationException(
            f"{type(other).__name__} must come before {type(callback).__name__} in the Trainer's callbacks: it puts "
            "frozen weights back on their integers after WeightAveraging has swapped in averaged weights, and "
            f"{type(callback).__name__} must run the model with the resulting weights."
        )


def _later(trainer: pl.Trainer, callback: pl.Callback, kind: type[pl.Callback]) -> list[pl.Callback]:
    """Return the callbacks of type ``kind`` that come after ``callback``."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [other for other in callbacks[callbacks.index(callback) + 1 :] if isinstance(other, kind)]


def warn_if_nothing_oscillates(pl_module: pl.LightningModule, max_bits: int, verb: str) -> None:
    """Warn if no weight has few enough bits for a callback.

    Args:
        pl_module: The quantized module.
        max_bits: The callback's limit on the bits of a weight.
        verb: What the callback does to weights, for the message.
    """
    bits = [w.quantizer.bits for w in weights_with_quantizers(pl_module) if w.quantizer.bits is not None]
    if any(b <= max_bits for b in bits):
        return
    computed = [name for name, q in computed_weights(pl_module).items() if q.bits is not None and q.bits <= max_bits]
    if computed:
        rank_zero_warn(
            f"{', '.join(computed[:5])} are computed from other parameters (a parametrization, a norm, pruning), and "
            f"no other weight is quantized to max_bits={max_bits} or fewer: there is nothing to {verb}."
        )
        return
    least = f"the least is {min(bits)}; the first and last layer have first_last_bits" if bits else "none is quantized"
    rank_zero_warn(
        f"No weight is quantized to max_bits={max_bits} or fewer ({least}): there is nothing to {verb}. Lower the bits "
        "(first_last_bits=None gives the first and last layer those of the others) or raise max_bits."
    )
