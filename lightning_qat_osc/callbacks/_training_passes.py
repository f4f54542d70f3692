"""Forward passes over training batches that leave training as it was: for calibration and batch-norm re-estimation."""

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
from lightning_qat_osc.modes import evaluating
from lightning_qat_osc.sharding import own_part, reshard

__all__ = [
    "ForwardFn",
    "can_run_training_step",
    "eagerly",
    "training_pass",
    "without_side_effects",
]

ForwardFn = Callable[[pl.LightningModule, Any], object]
"""Takes the LightningModule and a batch on its device, and runs the network on it."""


class _QuietLogger(DummyLogger):
    """Stands in for a logger: it logs nothing, and says where that one does."""

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
    """Stands in for a module's and its data's Trainer during a pass: it trains, ``log`` and the loggers do nothing."""

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
    """Let a metric work on copies of its states, and put these and its other attributes back."""
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
    """What tells of each parameter whether it has been changed; of those that want no gradient also through ``.data``.

    It reads from the device once, for all of them.
    """
    parameters = {name: p for name, p in module.named_parameters() if not is_lazy(p)}  # the first pass makes those
    sums = {
        name: own_part(p.detach()).float().nan_to_num().sum()
        for name, p in parameters.items()
        if p.is_floating_point() and not p.requires_grad
    }
    device = next((s.device for s in sums.values()), None)
    values = dict(zip(sums, torch.stack([s.to(device) for s in sums.values()]).tolist() if sums else ()))
    return {name: (p._version, values.get(name, 0.0)) for name, p in parameters.items()}


@contextmanager
def _restored_state(module: torch.nn.Module, but: Collection[torch.nn.Module]) -> Iterator[None]:
    """Put back metrics and all buffers but those of some layers."""
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
            m._buffers[name] = buffer  # it may have been assigned to
            if buffer is not None and value is not None:
                buffer.copy_(value)
        now = _fingerprints(module)
        moved = [name for name, was in before.items() if now.get(name) != was]
        if moved:
            rank_zero_warn(
                f"training_step moves {moved[0]} by itself, also when it is run on training batches to look at them: "
                "give forward_fn, a function of the LightningModule and a batch that only runs the network."
            )


@contextmanager
def _ignored(*messages: str) -> Iterator[None]:
    """Ignore warnings. After ``warnings.catch_warnings`` Python repeats all that it has told: here in each epoch."""
    filters = cast(list[Any], warnings.filters)
    entries = [("ignore", re.compile(message), Warning, None, 0) for message in messages]
    filters[:0] = entries
    try:
        yield
    finally:
        for entry in entries:
            if entry in filters:
                filters.remove(entry)


def eagerly() -> AbstractContextManager[Any]:
    """Compiled modules run eagerly, so that hooks on their layers fire, and are not traced into graphs."""
    return cast(AbstractContextManager[Any], torch.compiler.set_stance("force_eager"))


@contextmanager
def without_side_effects(
    trainer: pl.Trainer, pl_module: pl.LightningModule, estimated: Collection[torch.nn.Module] = ()
) -> Iterator[None]:
    """Run forward passes in evaluation mode and eagerly; no log, random number, buffer or metric notices.

    Args:
        trainer: The Trainer.
        pl_module: Its module.
        estimated: Batch-norm layers whose statistics the passes are for, which keep what they are set to.
    """
    # validation may run in inference mode, whose tensors training could not use again
    modes = torch.inference_mode(False), torch.no_grad()
    silent = _ignored(r".*You are trying to `self.log\(\)`.*", ".*does not have many workers.*")
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    owners = [pl_module] if datamodule is None else [pl_module, datamodule]
    own_generators = seeded(generators_in([vars(owner) for owner in (*pl_module.modules(), *owners[1:])]))
    state = _restored_state(pl_module, set(estimated))
    with modes[0], modes[1], fixed_random_numbers(), own_generators, state, eagerly(), silent:
        quiet: Any = _QuietTrainer(trainer)
        for owner in owners:
            owner.trainer = quiet
        try:
            with evaluating(pl_module):
                yield
        finally:
            for owner in owners:
                owner.trainer = trainer
            reshard(pl_module)


def can_run_training_step(pl_module: pl.LightningModule) -> bool:
    """Whether ``training_step`` is a pure function of a batch: no optimizer of its own, no iterator to draw from."""
    parameters = inspect.signature(pl_module.training_step).parameters
    return pl_module.automatic_optimization and "dataloader_iter" not in parameters


def training_pass(
    trainer: pl.Trainer, pl_module: pl.LightningModule, forward_fn: ForwardFn | None
) -> Callable[[Any], object]:
    """What to do with a batch: the user's function, or the module's ``training_step`` under the Trainer's precision.

    Raises:
        MisconfigurationException: If there is no function and ``training_step`` cannot serve.
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
                    "gradients, maybe before the module's own hooks of an epoch or a batch. If that is why it fails, "
                    "give forward_fn, a function of the LightningModule and a batch that only runs the network."
                )
            raise

    return run_step
