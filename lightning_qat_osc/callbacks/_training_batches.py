"""Training batches for passes that leave training as it was: its iterators, workers and random generators go on."""

from __future__ import annotations

import copy
from collections.abc import Generator, Sequence, Sized
from itertools import islice
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_qat_osc.callbacks._loader_copies import independent
from lightning_qat_osc.callbacks._random_numbers import generators_in, seeded

__all__ = ["training_batches"]


def _train_dataloaders(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Any:
    """The loaders that training uses, as the Trainer prepared them, or else as their author returns them; or None.

    Outside fit the author's hooks may fail: that is then told, and there are none.
    """
    if trainer.train_dataloader is not None:
        return trainer.train_dataloader
    for source in (trainer.datamodule, pl_module):  # type: ignore[attr-defined]
        if source is None or not is_overridden("train_dataloader", source):
            continue
        try:
            if source is not pl_module:
                # this run's own stage may not have made the training data; what it has made is to stay
                source = copy.copy(source)
                source.setup("fit")
            return source.train_dataloader()
        except Exception as error:
            name = type(source).__name__
            rank_zero_warn(f"{name}.train_dataloader failed outside fit: {type(error).__name__}: {error}")
    return None


def _share_of_rank(trainer: pl.Trainer, loaders: Sequence[Any], num_batches: int) -> slice:
    """Which batches of loaders that the Trainer has not prepared a rank takes: others than the other ranks.

    Each takes as many, where there are enough for all. A loader without a length is left to its author.
    """
    sizes = [len(loader) for loader in loaders if isinstance(loader, Sized)]
    replicas = trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}  # fewer than ranks if these share
    world = replicas["num_replicas"]
    if len(sizes) < len(loaders) or max(sizes, default=0) < world:
        return slice(num_batches)
    return slice(replicas["rank"], world * min(num_batches, max(sizes) // world), world)


def training_batches(
    trainer: pl.Trainer, pl_module: pl.LightningModule, num_batches: int
) -> Generator[Any, None, None]:
    """The first training batches, on the module's device, without disturbing the iterator that training draws from.

    Use it inside ``without_side_effects``, which fixes the random numbers that shuffle and augment them, and close
    it: the generators of loaders, samplers and datasets are put back then, and an error in a pass may keep it alive.

    Args:
        trainer: The Trainer.
        pl_module: Its module.
        num_batches: How many, at most; ``limit_train_batches`` holds as well.

    Yields:
        Batches, or nothing where the Trainer has no training data.
    """
    loaders = _train_dataloaders(trainer, pl_module)
    if loaders is None:
        return
    if isinstance(loaders, CombinedLoader):  # as a hook returns it; the Trainer hands out what is in it
        loaders = loaders.iterables
    combined = CombinedLoader(loaders, "max_size_cycle")
    generators = generators_in(combined.flattened)
    combined.flattened = [independent(loader) for loader in combined.flattened]
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
