"""QuantizationAwareTraining: inserts quantizers before optimizers are created, and sets ranges before training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn
from torch.optim import Optimizer

from lightning_qat_osc.callbacks._frozen_weights import release_frozen_weights
from lightning_qat_osc.callbacks._optimizer_steps import OptimizerStepHooks
from lightning_qat_osc.callbacks._progress import is_log_step
from lightning_qat_osc.callbacks._range_initialization import (
    WatchedSteps,
    initialize_ranges,
    report_missing_ranges,
)
from lightning_qat_osc.callbacks._scale_updates import ScaleUpdates, add_scales_to_state
from lightning_qat_osc.callbacks._sharded_restore import load_histories
from lightning_qat_osc.callbacks._training_passes import ForwardFn, can_run_training_step
from lightning_qat_osc.callbacks._unsupported import (
    check_callbacks,
    check_layers,
    check_strategy,
    refuse_late_layers,
    warn_about_copied_process,
    warn_about_late_layers,
    warn_about_teachers,
)
from lightning_qat_osc.checks import check_count, check_file, check_flag, check_function, check_number
from lightning_qat_osc.config import Granularity, LayerRule, QuantConfig, config_differences
from lightning_qat_osc.files import atomic_write
from lightning_qat_osc.kernels import why_nothing_compiles
from lightning_qat_osc.lookup import quantizers, scale_parameters
from lightning_qat_osc.plan import LayerPlan, format_plan, quantization_plan
from lightning_qat_osc.ranges import RangeMethod
from lightning_qat_osc.rules import bits_differences
from lightning_qat_osc.scales import hold_scales, release_scales
from lightning_qat_osc.sharding import full_tensor
from lightning_qat_osc.surgery import quantizable_layers, quantize_model, unquantized_layers

__all__ = ["QuantizationAwareTraining"]

_FOR_OTHER_BITS = (
    "To train with other bits, load only the weights, with load_from_checkpoint(path, strict=False), and leave "
    "ckpt_path out."
)


class QuantizationAwareTraining(pl.Callback):
    """Trains any LightningModule with simulated quantization of its weights and activations (LSQ, arXiv 1902.08153).

    In ``setup``, before optimizers are created, each layer of a kind that :func:`~lightning_qat_osc.quantize_model`
    supports gets a quantizer for each weight and, except for embeddings, for each input. Weights are quantized
    symmetrically; inputs are unsigned if calibration saw no negative values, else asymmetric. Before the first step,
    the ranges are set from a few training batches, run in evaluation mode. The order in which these batches execute
    the layers determines which are the first and the last layer. The scales are then learned by an Adam optimizer of
    their own, without weight decay, inside the step of the optimizer that the module configures.

    If ``training_step`` itself sets attributes, such as a list of outputs, it also sets them for calibration batches,
    unless ``forward_fn`` is given. Under manual optimization, or if ``training_step`` takes a ``dataloader_iter``, and
    without ``forward_fn``, the ranges come from the first ``calibration_batches`` training steps themselves, which run
    in full precision.

    Put it first among the callbacks of this package, and before callbacks that copy the model in ``setup``, such as
    WeightAveraging.

    Args:
        weight_bits: Bits of the weights, 2 to 8. None leaves them in full precision.
        activation_bits: Bits of the layers' inputs, 2 to 8. None leaves them in full precision.
        first_last_bits: Bits of the first and last layer; the first layer's input stays in full precision, as in
            the paper. None treats both layers like all others, inputs included.
        weight_granularity: "per_tensor", or "per_channel" for one weight scale per output channel.
        weight_range: How weight ranges are initialized: "mse" (least squared error), "minmax", "percentile" (0.1th to
            99.9th) or "lsq" (2 mean|w| / sqrt(quant_max)).
        activation_range: How activation ranges are initialized; the same choices as for ``weight_range``.
        rules: Exceptions by layer name or type; they apply to the first and last layer as well.
        calibration_batches: Number of training batches on each process from which activation ranges are initialized.
        scale_learning_rate: Learning rate of the Adam optimizer for the scales. It acts on the logarithm of a scale, so
            a step changes a scale by about this share of its value. It follows the learning-rate schedule of the
            module's optimizer.
        fused: Whether to compile the quantizers and the updates of the oscillation callbacks with ``torch.compile``; in
            a compiled module the quantizers are part of its graph anyway. The first steps then take longer. If there is
            no compiler, a warning says so, and everything runs eagerly.
        recompute: Whether to quantize weights and inputs again in the backward pass instead of saving the results for
            it: a training step then needs the memory of one in full precision, and the time of one more forward pass of
            the quantizers. The result is the same to the bit. A compiled module decides for itself what to save, and so
            does activation checkpointing.
        print_plan: Whether to print the plan (layer, type, shape, bits, ranges) before the first step.
        plan_path: File to write the plan to, as YAML, before the first step.
        forward_fn: Function of the LightningModule and a batch that runs the network on the batch. It is used instead
            of ``training_step``, for modules in which that cannot be run on its own. In YAML: the import path of the
            function.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range, or ``plan_path`` is a folder.
    """

    def __init__(
        self,
        weight_bits: int | None = 4,
        activation_bits: int | None = 4,
        *,
        first_last_bits: int | None = 8,
        weight_granularity: Granularity = "per_tensor",
        weight_range: RangeMethod = "mse",
        activation_range: RangeMethod = "mse",
        rules: Sequence[LayerRule] = (),
        calibration_batches: int = 4,
        scale_learning_rate: float = 1e-3,
        fused: bool = False,
        recompute: bool = False,
        print_plan: bool = False,
        plan_path: str | None = None,
        forward_fn: ForwardFn | None = None,
    ) -> None:
        super().__init__()
        self.config = QuantConfig(
            weight_bits=weight_bits,
            activation_bits=activation_bits,
            first_last_bits=first_last_bits,
            weight_granularity=weight_granularity,
            weight_range=weight_range,
            activation_range=activation_range,
            rules=rules,
        )
        check_count("calibration_batches", calibration_batches)
        check_number("scale_learning_rate", scale_learning_rate, low=0.0)
        for name, value in (("fused", fused), ("recompute", recompute), ("print_plan", print_plan)):
            check_flag(name, value)
        if plan_path is not None:
            check_file("plan_path", plan_path)
        check_function("forward_fn", forward_fn)
        self.calibration_batches = calibration_batches
        self.scale_learning_rate = scale_learning_rate
        self.fused = fused
        self.recompute = recompute
        self.print_plan = print_plan
        self.plan_path = plan_path
        self.forward_fn = forward_fn
        self.step_hooks = OptimizerStepHooks()  # shared with the other callbacks
        self._scale_updates: ScaleUpdates | None = None
        self._saved_scale_updates: list[dict[str, Any]] | None = None
        self._watched: WatchedSteps | None = None
        self._float_checkpoint: dict[str, Any] | None = None
        self._checked = False  # whether scales were checked after the first step
        self._late: set[str] = set()  # layers created after the quantizers, and warned about

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Insert the quantizers, unless the module already has them."""
        check_strategy(trainer)
        check_callbacks(trainer, self)
        if stage == "fit":
            # a fit that failed after reading its checkpoint may have left these
            self._scale_updates = self._saved_scale_updates = self._float_checkpoint = None
            warn_about_copied_process(trainer, pl_module)
            self._late.clear()
        if quantizable_layers(pl_module):
            quantize_model(pl_module, self.config)
        if stage == "fit":
            release_scales(pl_module)
            warn_about_teachers(trainer, pl_module)
        elif trainer.strategy.restore_checkpoint_after_setup:
            hold_scales(pl_module)  # the Trainer may still have a fit's optimizers, and restores them, too

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set up the updates of the scales."""
        check_layers(pl_module, self.config)
        self._choose_kernels(pl_module)
        self._scale_updates = ScaleUpdates(list(trainer.optimizers), pl_module, self.scale_learning_rate)
        if self._saved_scale_updates is not None:
            self._scale_updates.load_state_dict(self._saved_scale_updates)
            self._saved_scale_updates = None
        self._add_scales_to_checkpoint(trainer, pl_module)
        if trainer.strategy.restore_checkpoint_after_setup:
            hold_scales(pl_module)  # no optimizer must be asked for the scales' state during a restore

    def _choose_kernels(self, pl_module: pl.LightningModule) -> None:
        problem = why_nothing_compiles(pl_module.device) if self.fused else None
        if problem is not None:
            rank_zero_warn(f"fused=True needs torch.compile, which fails here, so kernels run eagerly: {problem}")
        for quantizer in quantizers(pl_module):
            quantizer.fused = self.fused and problem is None
            quantizer.recompute = self.recompute

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Check the scales for NaN if a fit is running."""
        if trainer.state.fn == "fit" and trainer.state.status == TrainerStatus.RUNNING:
            self._check_scales(trainer, pl_module)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Note a checkpoint in full precision, whose optimizers have no scales; load sharded oscillation histories."""
        if trainer.state.fn == "fit" and self.state_key not in checkpoint["callbacks"]:
            rank_zero_info(
                "The checkpoint is in full precision: quantization-aware training continues its run from step "
                f"{checkpoint['global_step']}. Epochs, schedules and annealing count from the beginning of that run. "
                "To start a new run, load only the weights, with load_from_checkpoint, and leave ckpt_path out."
            )
            self._float_checkpoint = checkpoint
            if self._scale_updates is not None:  # sharded strategies restore after on_fit_start
                self._add_scales_to_checkpoint(trainer, pl_module)
        elif trainer.strategy.restore_checkpoint_after_setup and trainer.ckpt_path is not None:
            load_histories(pl_module, trainer.ckpt_path)

    def _add_scales_to_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        checkpoint, self._float_checkpoint = self._float_checkpoint, None
        if checkpoint is not None and "optimizer_states" in checkpoint:
            scales = {id(scale) for scale in scale_parameters(pl_module)}
            checkpoint["optimizer_states"] = [
                add_scales_to_state(state, optimizer, scales)
                for state, optimizer in zip(checkpoint["optimizer_states"], trainer.optimizers)
            ]

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reset ranges that were set before weights in full precision were loaded."""
        _reset_stale_quantizers(pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Register hooks on the optimizers, and initialize the ranges, unless a checkpoint contained them."""
        assert self._scale_updates is not None
        self._checked = False
        self.step_hooks.attach(trainer, scale_parameters(pl_module))
        self.step_hooks.add(self, partial(self.on_before_optimizer_step, trainer, pl_module), self._after_step)
        release_scales(pl_module)
        # layers from the module's own on_fit_start, which runs after ours; a frozen loss network there is allowed
        late = unquantized_layers(pl_module, self.config)
        refuse_late_layers([n for n in late if any(p.requires_grad for p in pl_module.get_submodule(n).parameters())])
        _reset_stale_quantizers(pl_module)
        self._check_bits(pl_module)
        release_frozen_weights(trainer, pl_module)
        if all(q.calibrated for q in quantizers(pl_module) if q.bits is not None):
            return
        if self.forward_fn is None and not can_run_training_step(pl_module):
            self._watched = WatchedSteps(trainer, pl_module, self.config)
            return
        initialize_ranges(trainer, pl_module, self.config, self.calibration_batches, self.forward_fn)
        self._show_plan(pl_module)

    def _show_plan(self, pl_module: pl.LightningModule) -> None:
        plan = quantization_plan(pl_module)
        if self.print_plan:
            rank_zero_info(format_plan(plan))
        if self.plan_path is not None:
            _write_plan(self.plan_path, plan)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Warn about layers that were created after training began."""
        if batch_idx == 0:
            late = set(unquantized_layers(pl_module, self.config)) - self._late
            self._late |= late
            warn_about_late_layers(sorted(late))

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Set the scales' gradients aside, so that the user's optimizer does not move scales or clip by their norm."""
        new = self.step_hooks.begin(self, optimizer)
        assert self._scale_updates is not None
        if new:
            self._scale_updates = ScaleUpdates(list(trainer.optimizers), pl_module, self.scale_learning_rate)
        self._scale_updates.before_step(optimizer)

    def _after_step(self, optimizer: Optimizer) -> None:
        assert self._scale_updates is not None
        self._scale_updates.after_step(optimizer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Check scales for NaN at the first step and at logging steps; set ranges that come from training steps."""
        first_step = trainer.global_step > 0 and not self._checked
        if first_step or is_log_step(trainer):
            self._check_scales(trainer, pl_module)
            self._checked |= first_step
        if batch_idx + 1 >= self.calibration_batches:
            self._finish_watching(pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check scales for NaN; set ranges that come from training steps, also after a short epoch."""
        self._check_scales(trainer, pl_module)
        self._finish_watching(pl_module)

    def _check_scales(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raise before NaN is evaluated, saved or counted: its integers would look like weights that have settled.

        Raises:
            MisconfigurationException: If a scale is not finite. After a NaN loss, no scale is finite.
        """
        scales = [full_tensor(s).detach().isfinite().all() for s in scale_parameters(pl_module)]
        if scales and not bool(torch.stack(scales).all()):
            raise MisconfigurationException(
                f"scales of the quantizers are not finite after optimizer step {trainer.global_step}: a loss or "
                "gradient was NaN or inf in this step or shortly before, and the weights cannot recover. Lower the "
                "learning rate, return None from training_step for such batches, or find the operation with "
                "Trainer(detect_anomaly=True)."
            )

    def _finish_watching(self, pl_module: pl.LightningModule) -> None:
        watched, self._watched = self._watched, None
        if watched is not None:
            watched.finish()
            self._show_plan(pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warn if the evaluation runs in full precision; in fit, check bits, and check scales for NaN.

        Ranges that come from training steps are set now, even if there were fewer than ``calibration_batches`` batches
        before the first validation.
        """
        if trainer.state.fn != "fit":
            self._before_evaluation(pl_module)
        elif not trainer.sanity_checking:
            self._finish_watching(pl_module)
            self._check_bits(pl_module)
            self._check_scales(trainer, pl_module)
            self._warn_if_uncalibrated(pl_module)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the state that was loaded, and warn if the evaluation runs in full precision."""
        self._before_evaluation(pl_module)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the state that was loaded, and warn if the predictions are made in full precision."""
        self._before_evaluation(pl_module)

    def _before_evaluation(self, pl_module: pl.LightningModule) -> None:
        """Reset stale ranges, refuse weights of another quantization, and warn if there are no ranges."""
        _reset_stale_quantizers(pl_module)
        self._check_bits(pl_module)
        self._warn_if_uncalibrated(pl_module)

    def _check_bits(self, pl_module: pl.LightningModule) -> None:
        # a weights-only checkpoint has bits, but no state of this callback, so load_state_dict compares nothing
        differences = bits_differences(pl_module, self.config)
        if differences:
            raise MisconfigurationException(
                f"the weights were quantized with a different configuration: {'; '.join(differences[:5])}. "
                f"{_FOR_OTHER_BITS}"
            )

    def _warn_if_uncalibrated(self, pl_module: pl.LightningModule) -> None:
        if not any(q.calibrated for q in quantizers(pl_module)):
            rank_zero_warn(
                "The quantizers have no ranges yet, so this runs in full precision: fit, or load a checkpoint."
            )

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raise or warn if no quantizer has a range after fit."""
        if not any(q.calibrated for q in quantizers(pl_module)):
            report_missing_ranges(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Remove the hooks, and clear the ``stale`` flags: weights exchanged within a run keep their ranges."""
        if stage == "fit":  # not an evaluation by another Trainer inside a fit
            self._end_fit(pl_module)
        _clear_stale_flags(pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Remove the hooks on optimizers and layers, and clear the ``stale`` flags."""
        if trainer.state.fn == "fit":
            self._end_fit(pl_module)
        _clear_stale_flags(pl_module)

    def _end_fit(self, pl_module: pl.LightningModule) -> None:
        hold_scales(pl_module)  # a fit without this callback would move scales like any parameter
        self.step_hooks.detach()
        if self._watched is not None:
            self._watched.close()
            self._watched = None

    def state_dict(self) -> dict[str, Any]:
        """Return the configuration and the states of the scales' Adam optimizers. The module's state has the ranges."""
        updates = self._scale_updates
        return {
            "config": self.config.to_dict(),
            "scale_updates": self._saved_scale_updates if updates is None else updates.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the scales' Adam optimizers, if the checkpoint has the same configuration.

        Raises:
            ValueError: If the configuration differs; the message says how.
        """
        differences = config_differences(state_dict["config"], self.config.to_dict())
        if differences:
            raise ValueError(
                f"the checkpoint was quantized with a different configuration: {differences}. {_FOR_OTHER_BITS}"
            )
        if self._scale_updates is None:
            self._saved_scale_updates = state_dict["scale_updates"]
        elif state_dict["scale_updates"] is not None:
            self._scale_updates.load_state_dict(state_dict["scale_updates"])


def _reset_stale_quantizers(module: pl.LightningModule) -> None:
    """Reset ranges that are stale, because their layer's weights have since been loaded in full precision or reset."""
    for quantizer in quantizers(module):
        if quantizer.stale:
            quantizer.reset()


def _clear_stale_flags(module: pl.LightningModule) -> None:
    """Clear the ``stale`` flags at the end of a run: weights that were exchanged within it keep their ranges."""
    for quantizer in quantizers(module):
        quantizer.stale = False


@rank_zero_only
def _write_plan(path: str, plan: list[LayerPlan]) -> None:
    with atomic_write(path) as file:
        file.write_text(yaml.safe_dump([asdict(line) for line in plan], sort_keys=False), encoding="utf-8")
