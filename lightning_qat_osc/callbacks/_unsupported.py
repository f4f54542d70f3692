"""Checks, before training, for what quantization-aware training does not support, or not as users may expect."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_qat_osc.config import QuantConfig
from lightning_qat_osc.lookup import own_parameters, quantized_layers
from lightning_qat_osc.surgery import (
    hidden_weights,
    no_layer_to_quantize,
    quantizable_layers,
    unquantized_layers,
    weights_of_other_sizes,
    weights_tied_late,
)

__all__ = [
    "check_callbacks",
    "check_layers",
    "check_strategy",
    "refuse_late_layers",
    "warn_about_copied_process",
    "warn_about_late_layers",
    "warn_about_teachers",
]

# they copy the model in `setup`, and pair its parameters with the copy's by position
_COPY_THE_MODEL = (pl.callbacks.WeightAveraging, pl.callbacks.StochasticWeightAveraging)


def check_strategy(trainer: pl.Trainer) -> None:
    """Refuse strategies, or combinations of strategy and precision, that cannot store scales next to the weights.

    Raises:
        MisconfigurationException: If the Trainer has one.
    """
    if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy)):
        raise MisconfigurationException(
            f"{type(trainer.strategy).__name__} flattens weights into shards, so that a weight cannot have a scale: "
            "use ModelParallelStrategy, and call lightning_qat_osc.quantize_model before fully_shard in "
            "configure_model."
        )
    if isinstance(trainer.strategy, ModelParallelStrategy) and trainer.precision in ("16-true", "bf16-true"):
        raise MisconfigurationException(
            f"precision='{trainer.precision}' with ModelParallelStrategy mixes 16-bit weights with 32-bit scales in "
            "one group, which FSDP2 does not support: use bf16-mixed, or fully_shard's mp_policy."
        )


def check_callbacks(trainer: pl.Trainer, callback: pl.Callback) -> None:
    """Refuse callbacks that do not work on the model that ``callback`` quantizes, or come in the wrong order.

    Raises:
        MisconfigurationException: If the Trainer has one.
    """
    name, callbacks = type(callback).__name__, list(trainer.callbacks)  # type: ignore[attr-defined]
    if any(isinstance(other, type(callback)) and other is not callback for other in callbacks):
        raise MisconfigurationException(
            f"only one {name} can quantize a module: keep one, and add LayerRule(...) to its rules for layers that "
            "should differ."
        )
    for other in callbacks:
        if isinstance(other, pl.callbacks.ModelPruning):
            raise MisconfigurationException(
                f"{name} and ModelPruning cannot be used together: both replace the weight that a layer computes "
                "with. Prune in an earlier run, with make_pruning_permanent=True."
            )
    for other in callbacks[: callbacks.index(callback)]:
        if isinstance(other, _COPY_THE_MODEL):
            raise MisconfigurationException(
                f"{name} must come before {type(other).__name__} in the Trainer's callbacks: {type(other).__name__} "
                "copies the model, and the copy needs the quantizers."
            )


def check_layers(pl_module: pl.LightningModule, config: QuantConfig) -> None:
    """Refuse a module that has no quantized layers, or that was changed after its quantizers were inserted.

    Raises:
        MisconfigurationException: If the module is of either kind.
    """
    refuse_late_layers(unquantized_layers(pl_module, config))
    if not quantized_layers(pl_module):
        left_out = bool(quantizable_layers(pl_module))
        raise MisconfigurationException(
            "the arguments of QuantizationAwareTraining leave every layer in full precision: nothing to quantize"
            if left_out
            else no_layer_to_quantize(pl_module)
        )
    hidden = hidden_weights(pl_module)
    if hidden:
        raise MisconfigurationException(
            f"the quantizers of {', '.join(hidden[:5])} have no effect, because a parametrization that was "
            "registered after Callback.setup computes the weight: register it in __init__ or configure_model."
        )
    resized = weights_of_other_sizes(pl_module)
    if resized:
        raise MisconfigurationException(
            f"{', '.join(resized[:5])} were replaced by weights of other shapes, which do not match the per-channel "
            "scales: create a module with the new shapes, in full precision, and copy the weights into it."
        )
    tied = weights_tied_late(pl_module)
    if tied:
        raise MisconfigurationException(
            f"{' and '.join(tied)} share a weight, and have a quantizer each, because it was tied after "
            "Callback.setup: tie weights in __init__ or configure_model."
        )


def warn_about_copied_process(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Warn if training runs in copies of the process, and leaves the user's module without quantizers."""
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher) and not quantized_layers(pl_module):
        rank_zero_warn(
            "Training runs in copies of the process, and only latent weights are copied back, to a module without "
            "quantizers. To get a quantized module, call lightning_qat_osc.quantize_model(module, config) with "
            "this callback's config before fit, or load a checkpoint with lightning_qat_osc.load_quantized."
        )


def refuse_late_layers(names: list[str]) -> None:
    """Refuse layers that exist when training begins, but were created too late to be quantized.

    Raises:
        MisconfigurationException: If there are any.
    """
    if names:
        raise MisconfigurationException(
            f"layers {', '.join(names[:5])} have no quantizers, because they were created after Callback.setup: "
            "call lightning_qat_osc.quantize_model(self, QuantConfig(...)) at the end of configure_model."
        )


def warn_about_late_layers(names: list[str]) -> None:
    """Warn about layers, such as those of a growing network, that were created late and train in full precision."""
    if names:
        rank_zero_warn(
            f"Layers {', '.join(names[:5])} were created after training began. They have no quantizers and stay in "
            "full precision until the next fit, which inserts them."
        )


def warn_about_teachers(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Warn if DDP would wait for the gradients of scales that may get none."""
    if not isinstance(trainer.strategy, DDPStrategy):
        return
    fixed = [
        name
        for name, layer in quantized_layers(pl_module).items()
        if not any(p.requires_grad for p in own_parameters(layer))
        and any(q.scale.requires_grad for q in layer.quantizers())  # False in a copy of the network
    ]
    if fixed:
        rank_zero_warn(
            f"Layers {', '.join(fixed[:5])} have no trainable parameters except their scales, for whose gradients DDP "
            "waits. If they run in torch.no_grad(), as a teacher does, leave them in full precision with "
            f"LayerRule(pattern='{fixed[0]}', weight_bits=None, activation_bits=None), or all of the teacher with a "
            "pattern such as 'teacher.*'; strategy='ddp_find_unused_parameters_true' trains with them quantized."
        )
