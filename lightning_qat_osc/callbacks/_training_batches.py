"""Training batches for passes that do not affect the iterators, workers and random generators of training."""

from __future__ import annotations

import copy
import sys
from collections.abc import Generator, Sequence, Sized
from itertools import islice
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_qat_osc.callbacks._loader_copies import independent_copy
from lightning_qat_osc.callbacks._random_numbers import generators_in, seeded

__all__ = ["training_batches"]


def _train_dataloaders(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Any:
    """Return the training loaders as the Trainer prepared them, or else as ``train_dataloader`` returns them, or None.

    Outside fit, the ``setup`` and ``train_dataloader`` hooks may fail: then there is a warning instead of an error.
    """
    if trainer.train_dataloader is not None:
        return trainer.train_dataloader
    for source in (trainer.datamodule, pl_module):  # type: ignore[attr-defined]
        if source is None or not is_overridden("train_dataloader", source):
            continue
        try:
            if source is not pl_module:
                # this run's stage may not have created the training data; a copy keeps what the stage has created
                source = copy.copy(source)
                source.setup("fit")
            return source.train_dataloader()
        except Exception as error:
            name = type(source).__name__
            rank_zero_warn(f"{name} failed to set up training data outside fit: {type(error).__name__}: {error}")
    return None


def _share_of_rank(trainer: pl.Trainer, loaders: Sequence[Any], num_batches: int) -> slice:
    """Return which batches this rank takes from loaders that the Trainer has not prepared.

    Ranks take different batches, and the same number of them, if there are enough for all. Otherwise, or if a loader
    has no length, each rank takes the first batches of its own loaders.
    """
    sizes = [len(loader) if isinstance(loader, Sized) else sys.maxsize for loader in loaders]
    size = max(sizes, default=0)
    replicas = trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}  # some ranks may share a replica
    rank, world = replicas["rank"], replicas["num_replicas"]
    if size < world or size == sys.maxsize:
        rank, world = 0, 1
    limit = trainer.limit_train_batches  # a number of batches, or a share of them
    most = limit if isinstance(limit, int) else int(size // world * limit)
    return slice(rank, world * min(num_batches, size // world, most), world)


def training_batches(
    trainer: pl.Trainer, pl_module: pl.LightningModule, num_batches: int
) -> Generator[Any, None, None]:
    """Yield the first training batches, on the module's device, without affecting the iterator that training uses.

    Use it inside ``without_side_effects``, which fixes the random numbers for shuffling and augmentation. Close it
    explicitly, because an error in a pass may keep it alive: closing restores the random generators of loaders,
    samplers and datasets.

    Args:
        trainer: The Trainer.
        pl_module: Its module.
        num_batches: Maximum number of batches; the Trainer's ``limit_train_batches`` holds as well.

    Yields:
        Batches; none if there is no training data.
    """
    loaders = _train_dataloaders(trainer, pl_module)
    if loaders is None:
        return
    if isinstance(loaders, CombinedLoader):  # a hook may return one; the Trainer unwraps its own
        loaders = loaders.iterables
    combined = CombinedLoader(loaders, "max_size_cycle")
    generators = generators_in(combined.flattened)
    combined.flattened = [independent_copy(loader) for loader in combined.flattened]
    if trainer.train_dataloader is not None:
        mine = slice(int(min(num_batches, trainer.num_training_batches)))
    else:
        mine = _share_of_rank(trainer, combined.flattened, num_batches)
    before_transfer = pl_module.on_before_batch_transfer
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    if datamodule is not None and is_overridden("on_before_batch_transfer", datamodule):
        before_transfer = datamodule.on_before_batch_transfer
    with seeded(generators):
        for batch, _, _ in islice(combined, mine.start, mine.stop, mine.step):
            batch = before_transfer(trainer.precision_plugin.convert_input(batch), 0)
            yield trainer.strategy.batch_to_device(batch, trainer.strategy.root_device)
