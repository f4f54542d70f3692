"""Training batches for passes that leave training as it was: its iterators, workers and random generators go on."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader

__all__ = ["SEED", "training_batches"]

SEED = 0
"""For the same batches at each evaluation, so that epochs differ by their weights alone."""

_GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)


def _independent(loader: Any) -> Any:
    """A loader to iterate without a trace in this one, whose iterator training is drawing from.

    Raises:
        MisconfigurationException: If it can be iterated only once.
    """
    in_workers = getattr(loader, "num_workers", 0) > 0  # each has a copy of the dataset
    for source in (loader, None if in_workers else getattr(loader, "dataset", None)):
        if isinstance(source, Iterator):
            raise MisconfigurationException(
                f"the training data is a {type(source).__name__}, which can be iterated only once: batches taken from "
                "it would be lost to training. Give an iterable that makes an iterator of its own each time."
            )
    if not isinstance(loader, DataLoader):
        return copy.copy(loader)  # what it remembers of its iterator, it remembers in attributes
    independent = copy.copy(loader)
    # samplers may count their epochs, and persistent workers are those of the live iterator
    vars(independent).update(_own_samplers(loader), persistent_workers=False)
    return independent


def _own_samplers(loader: DataLoader[Any]) -> dict[str, Any]:
    """Copies of a loader's samplers, by attribute."""
    sampler, batch_sampler = _copied(loader.sampler), _copied(loader.batch_sampler)
    inner = getattr(loader.batch_sampler, "sampler", None)
    if inner is not None and batch_sampler is not loader.batch_sampler:
        batch_sampler.sampler = sampler if inner is loader.sampler else _copied(inner)
    theirs = loader.sampler, loader.batch_sampler, inner
    copies: list[Any] = [sampler, batch_sampler, getattr(batch_sampler, "sampler", None)]
    for each in copies:
        if hasattr(each, "set_epoch") and not any(each is other for other in theirs):
            each.set_epoch(0)  # the same batches in each
    return {"sampler": sampler, "batch_sampler": batch_sampler}


def _copied(sampler: Any) -> Any:
    # one that hands on what it does not know itself cannot be copied before it has attributes
    return sampler if hasattr(type(sampler), "__getattr__") else copy.copy(sampler)


def _generators(loader: Any) -> list[Any]:
    """The random generators that iterating a loader advances: its own, its samplers' and its dataset's."""
    holders = [loader]
    for holder in holders:
        for name in ("sampler", "batch_sampler", "dataset", "collate_fn"):
            held = getattr(holder, name, None)
            if held is not None and not any(held is other for other in holders):
                holders.append(held)
    found = [value for holder in holders for value in getattr(holder, "__dict__", {}).values()]
    return [value for value in found if isinstance(value, _GENERATORS)]


@contextmanager
def _seeded(generator: Any) -> Iterator[None]:
    """A random generator that starts at :data:`SEED`, and is put back."""
    put_back: Callable[[], object]
    if isinstance(generator, torch.Generator):
        put_back = partial(generator.set_state, generator.get_state())
        generator.manual_seed(SEED)
    elif isinstance(generator, random.Random):
        put_back = partial(generator.setstate, generator.getstate())
        generator.seed(SEED)
    elif isinstance(generator, np.random.RandomState):
        put_back = partial(generator.set_state, generator.get_state())
        generator.seed(SEED)
    else:
        bits = generator.bit_generator
        put_back = partial(setattr, bits, "state", bits.state)
        bits.state = type(bits)(SEED).state
    try:
        yield
    finally:
        put_back()


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
                source.setup("fit")  # this run's own stage may not have made the training data
            return source.train_dataloader()
        except Exception as error:
            name = type(source).__name__
            rank_zero_warn(f"{name}.train_dataloader failed outside fit: {type(error).__name__}: {error}")
    return None


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
    generators = [g for loader in combined.flattened for g in _generators(loader)]
    combined.flattened = [_independent(loader) for loader in combined.flattened]
    limit = min(num_batches, trainer.num_training_batches) if trainer.train_dataloader is not None else num_batches
    before_transfer = pl_module.on_before_batch_transfer
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    if datamodule is not None and is_overridden("on_before_batch_transfer", datamodule):
        before_transfer = datamodule.on_before_batch_transfer
    with ExitStack() as seeded:
        for generator in {id(g): g for g in generators}.values():
            seeded.enter_context(_seeded(generator))
        for batch, _, _ in islice(combined, int(limit)):
            batch = before_transfer(trainer.precision_plugin.convert_input(batch), 0)
            yield trainer.strategy.batch_to_device(batch, trainer.strategy.root_device)
