"""Forward passes over training batches that do not affect training: for calibration and batch-norm re-estimation."""

from __future__ import annotations

import inspect
import re
import sys
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import count
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import DummyLogger, Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.nn.parameter import is_lazy
from torchmetrics import Metric

from lightning_qat_osc.callbacks._random_numbers import fixed_random_numbers, generators_in, seeded
from lightning_qat_osc.modes import evaluation_mode
from lightning_qat_osc.sharding import local_part, reshard

__all__ = [
    "ForwardFn",
    "can_run_training_step",
    "force_eager",
    "training_pass",
    "without_side_effects",
]

ForwardFn = Callable[[pl.LightningModule, Any], object]
"""Takes the LightningModule and a batch on its device, and runs the network on the batch."""


class _QuietLogger(DummyLogger):
    """Stands in for a logger: it logs nothing, but has that logger's name, version and directories."""

    def __init__(self, logger: Logger) -> None:
        super().__init__()
        self._logger = logger

    @property
    def name(self) -> Any:
        return self._logger.name

    @property
    def version(self) -> Any:
        return self._logger.version

    @property
    def save_dir(self) -> Any:
        return self._logger.save_dir

    @property
    def log_dir(self) -> Any:
        return self._logger.log_dir


class _QuietTrainer:
    """Stands in for the Trainer of a module and datamodule in a pass: it is training, and nothing is logged."""

    barebones = True  # LightningModule.log returns early
    training = True
    validating = testing = predicting = sanity_checking = False

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        self.loggers: list[DummyLogger] = [_QuietLogger(logger) for logger in trainer.loggers] or [DummyLogger()]
        self.logger = self.loggers[0]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trainer, name)


@contextmanager
def _working_copy(metric: Metric) -> Iterator[None]:
    """Let a metric work on copies of its states, and restore the states and its other attributes on exit."""
    attributes = dict(vars(metric))
    for name, value in attributes.items():
        if isinstance(value, Tensor):
            vars(metric)[name] = value.detach().clone()
        elif isinstance(value, list):
            vars(metric)[name] = list(value)
    try:
        yield
    finally:
        vars(metric).update(attributes)


def _fingerprints(module: torch.nn.Module) -> dict[str, tuple[int, float]]:
    """Return a value for each parameter that changes when the parameter is changed.

    For parameters with ``requires_grad=False`` it also changes after a change through ``.data``. All values are read
    from the device at once.
    """
    parameters = {name: p for name, p in module.named_parameters() if not is_lazy(p)}  # the first pass makes lazy ones
    sums = {
        name: local_part(p.detach()).float().nan_to_num().sum()
        for name, p in parameters.items()
        if p.is_floating_point() and not p.requires_grad
    }
    device = next((s.device for s in sums.values()), None)
    values = dict(zip(sums, torch.stack([s.to(device) for s in sums.values()]).tolist() if sums else ()))
    return {name: (p._version, values.get(name, 0.0)) for name, p in parameters.items()}


@contextmanager
def _restored_state(module: torch.nn.Module, but: Collection[torch.nn.Module]) -> Iterator[None]:
    """Restore metrics and buffers on exit, except buffers of the layers ``but``; warn if a parameter was changed."""
    buffers = [
        (m, name, b, None if b is None else b.clone())
        for m in module.modules()
        if m not in but
        for name, b in m._buffers.items()
    ]
    before = _fingerprints(module)
    try:
        with ExitStack() as metrics:
            for m in module.modules():
                if isinstance(m, Metric):
                    metrics.enter_context(_working_copy(m))
            yield
    finally:
        for m, name, buffer, value in buffers:
            m._buffers[name] = buffer  # a pass may have assigned another tensor
            if buffer is not None and value is not None:
                buffer.copy_(value)
        now = _fingerprints(module)
        moved = [name for name, was in before.items() if now.get(name) != was]
        if moved:
            rank_zero_warn(
                f"training_step itself changes {moved[0]}, also in the passes for calibration and batch-norm "
                "re-estimation: give forward_fn, a function of the LightningModule and a batch that only runs the "
                "network."
            )


@contextmanager
def _ignore_warnings(*messages: str) -> Iterator[None]:
    """Ignore warnings. ``warnings.catch_warnings`` would make Python repeat earlier warnings, here in each epoch."""
    filters = cast(list[Any], warnings.filters)
    entries = [("ignore", re.compile(message), Warning, None, 0) for message in messages]
    filters[:0] = entries
    try:
        yield
    finally:
        for entry in entries:
            if entry in filters:
                filters.remove(entry)


def force_eager() -> AbstractContextManager[Any]:
    """Run compiled modules eagerly, so that hooks on their layers fire, and are not traced into graphs."""
    return cast(AbstractContextManager[Any], torch.compiler.set_stance("force_eager"))


@contextmanager
def without_side_effects(
    trainer: pl.Trainer, pl_module: pl.LightningModule, estimated: Collection[torch.nn.Module] = ()
) -> Iterator[None]:
    """Run forward passes eagerly, in evaluation mode, without effects on logs, random numbers, buffers or metrics.

    Args:
        trainer: The Trainer.
        pl_module: Its module.
        estimated: Batch-norm layers that the passes re-estimate; their buffers are not restored.
    """
    # validation may run in inference mode, and training could not use tensors that were created in it
    modes = torch.inference_mode(False), torch.no_grad()
    silent = _ignore_warnings(r".*You are trying to `self.log\(\)`.*", ".*does not have many workers.*")
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    owners = [pl_module] if datamodule is None else [pl_module, datamodule]
    own_generators = seeded(generators_in([vars(owner) for owner in (*pl_module.modules(), *owners[1:])]))
    state = _restored_state(pl_module, set(estimated))
    with modes[0], modes[1], fixed_random_numbers(), own_generators, state, force_eager(), silent:
        quiet: Any = _QuietTrainer(trainer)
        for owner in owners:
            owner.trainer = quiet
        try:
            with evaluation_mode(pl_module):
                yield
        finally:
            for owner in owners:
                owner.trainer = trainer
            reshard(pl_module)


def can_run_training_step(pl_module: pl.LightningModule) -> bool:
    """Whether ``training_step`` needs only a batch: it steps no optimizer itself, and draws from no iterator."""
    parameters = inspect.signature(pl_module.training_step).parameters
    return pl_module.automatic_optimization and "dataloader_iter" not in parameters


def training_pass(
    trainer: pl.Trainer, pl_module: pl.LightningModule, forward_fn: ForwardFn | None
) -> Callable[[Any], object]:
    """Return what to run on a batch, in the Trainer's precision: ``forward_fn``, or the module's ``training_step``.

    Raises:
        MisconfigurationException: If ``forward_fn`` is None and ``training_step`` cannot be run on its own.
    """
    if forward_fn is not None:
        function = forward_fn

        def run_function(batch: Any) -> object:
            with trainer.precision_plugin.train_step_context():
                return function(pl_module, batch)

        return run_function
    if not can_run_training_step(pl_module):
        raise MisconfigurationException(
            "`training_step` cannot be run on its own under manual optimization or with a `dataloader_iter`: "
            "give `forward_fn`, a function of the LightningModule and a batch that runs the network."
        )
    kinds = [p.kind for p in inspect.signature(pl_module.training_step).parameters.values()]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    takes_index = sum(kind in positional for kind in kinds) > 1 or inspect.Parameter.VAR_POSITIONAL in kinds

    indices = count()

    def run_step(batch: Any) -> object:
        try:
            return trainer.strategy.training_step(*((batch, next(indices)) if takes_index else (batch,)))
        except Exception as error:
            if sys.version_info >= (3, 11):
                error.add_note(
                    "This pass over training batches runs training_step on its own: in evaluation mode, without "
                    "gradients, possibly before the module's own hooks of an epoch or a batch. If that is why it "
                    "fails, give forward_fn, a function of the LightningModule and a batch that only runs the network."
                )
            raise

    return run_step
