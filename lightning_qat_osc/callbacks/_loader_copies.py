"""Copies of data loaders that can be iterated without changing the state of the loader or of its live iterator."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, MutableMapping, MutableSequence, MutableSet
from typing import Any

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_qat_osc.callbacks._random_numbers import FEW, GENERATORS

__all__ = ["independent_copy"]

_SHARED = (type, nn.Module, pl.Trainer, pl.LightningDataModule, *GENERATORS)
_DEPTH = 5  # levels of nested attributes to copy
_LONGEST_ORDER = 2**24  # a longer one-dimensional array is data, such as a stream of tokens, not sample indices


def independent_copy(loader: Any) -> Any:
    """Return a copy of a loader that can be iterated without affecting the original, from which training draws.

    The copy has its own samplers, inner loaders and iterable-style datasets, including the lists in their attributes,
    which may be shuffled in place. Map-style datasets, datasets that worker processes copy, and random generators are
    shared.

    Raises:
        MisconfigurationException: If the loader is an iterator, which can be iterated only once, or its dataset is one
            and no worker processes copy it.
    """
    for source in (loader, None if _in_workers(loader) else getattr(loader, "dataset", None)):
        if isinstance(source, Iterator):
            raise MisconfigurationException(
                f"the training data is a {type(source).__name__}, which can be iterated only once: batches taken from "
                "it would be lost to training. Pass an iterable whose __iter__ returns a new iterator each time."
            )
    return _copied(loader, {}, _DEPTH)


def _in_workers(loader: Any) -> bool:
    """Whether worker processes iterate over the dataset, each over its own copy."""
    return getattr(loader, "num_workers", 0) > 0


def _copied(thing: Any, copies: dict[int, Any], depth: int) -> Any:
    """Copy an object that iteration may change, and recursively what it holds; return any other object unchanged.

    Args:
        thing: A loader, or an object that a loader holds.
        copies: The copies made so far, by the id of the original, so that an object that is held twice is copied once.
        depth: How many levels of attributes and members to copy.
    """
    if id(thing) in copies or depth == 0 or isinstance(thing, _SHARED):
        return copies.get(id(thing), thing)
    if isinstance(thing, (Tensor, np.ndarray)):
        is_order = thing.ndim == 1 and len(thing) <= _LONGEST_ORDER and not isinstance(thing, np.memmap)
        return copy.deepcopy(thing) if is_order else thing  # indices may be shuffled in place; the rest is data
    if type(thing) is tuple and len(thing) <= FEW:
        return tuple(_copied(value, copies, depth - 1) for value in thing)
    # transforms and tokenizers are only called; __getattr__ may fail on a copy that has no attributes yet
    iterates = hasattr(thing, "__iter__") or hasattr(thing, "__getitem__")
    attributes = getattr(thing, "__dict__", None)
    container = isinstance(thing, (MutableSequence, MutableMapping, MutableSet))
    if not container and (attributes is None or not iterates or hasattr(type(thing), "__getattr__")):
        return thing
    if hasattr(type(thing), "__del__"):
        return thing  # deleting a copy would close what it shares with the original: files, databases, workers
    try:
        found = copies[id(thing)] = copy.copy(thing)
    except Exception:  # a loader may hold objects of any kind
        return thing
    if found is thing:
        return thing
    if isinstance(thing, DataLoader):
        _copy_iteration_state(found, thing, copies, depth)
    elif isinstance(thing, (list, deque)) and len(thing) <= FEW:
        for i, value in enumerate(thing):
            found[i] = _copied(value, copies, depth - 1)
    elif isinstance(thing, dict) and len(thing) <= FEW:
        found.update({key: _copied(value, copies, depth - 1) for key, value in thing.items()})
    if attributes is not None and not isinstance(thing, DataLoader):
        vars(found).update({name: _copied(value, copies, depth - 1) for name, value in attributes.items()})
    return found


def _copy_iteration_state(found: DataLoader[Any], loader: DataLoader[Any], copies: dict[int, Any], depth: int) -> None:
    """Give the copy of a DataLoader its own version of everything that iteration changes."""
    if not isinstance(loader.dataset, IterableDataset) or _in_workers(loader):
        copies[id(loader.dataset)] = loader.dataset  # samplers may hold it, too, and must not copy it
    own = {name: _copied(getattr(loader, name), copies, depth - 1) for name in ("dataset", "sampler", "batch_sampler")}
    samplers: list[Any] = [own["sampler"], own["batch_sampler"], getattr(own["batch_sampler"], "sampler", None)]
    for sampler in samplers:
        if hasattr(sampler, "set_epoch") and any(sampler is each for each in copies.values()):
            sampler.set_epoch(0)  # the same batches at each evaluation
    # persistent workers belong to the live iterator
    vars(found).update(own, _iterator=None, persistent_workers=False)
    if any(isinstance(value, Iterator) for value in vars(found).values()):
        found.__class__ = DataLoader  # such a subclass keeps one iterator, from which training draws
