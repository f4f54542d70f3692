"""Copies of data loaders: iterating one changes nothing that the loader itself, or its live iterator, goes by."""

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

__all__ = ["independent"]

_SHARED = (type, nn.Module, pl.Trainer, pl.LightningDataModule, *GENERATORS)
_DEPTH = 5  # attributes of attributes, and so on
_LONGEST_ORDER = 2**24  # numbers of samples, and no stream of tokens


def independent(loader: Any) -> Any:
    """A loader to iterate without a trace in this one, whose iterator training is drawing from.

    It has samplers, inner loaders and datasets without indices of its own, with the lists in their attributes, which
    they may shuffle in place. Datasets with indices are shared, and random generators.

    Raises:
        MisconfigurationException: If it can be iterated only once.
    """
    for source in (loader, None if _in_workers(loader) else getattr(loader, "dataset", None)):
        if isinstance(source, Iterator):
            raise MisconfigurationException(
                f"the training data is a {type(source).__name__}, which can be iterated only once: batches taken from "
                "it would be lost to training. Give an iterable that makes an iterator of its own each time."
            )
    return _copied(loader, {}, _DEPTH)


def _in_workers(loader: Any) -> bool:
    """Whether worker processes iterate, each over a copy of the dataset."""
    return getattr(loader, "num_workers", 0) > 0


def _copied(thing: Any, copies: dict[int, Any], depth: int) -> Any:
    """A copy of what iterating may change, with copies of what is in it; anything else as it is.

    Args:
        thing: A loader, or what it holds.
        copies: By the id of what they are copies of, so that what is held twice is copied once.
        depth: How deep to go.
    """
    if id(thing) in copies or depth == 0 or isinstance(thing, _SHARED):
        return copies.get(id(thing), thing)
    if isinstance(thing, (Tensor, np.ndarray)):
        is_order = thing.ndim == 1 and len(thing) <= _LONGEST_ORDER and not isinstance(thing, np.memmap)
        return copy.deepcopy(thing) if is_order else thing  # which may be shuffled in place; else it is data
    if type(thing) is tuple and len(thing) <= FEW:
        return tuple(_copied(value, copies, depth - 1) for value in thing)
    # transforms and tokenizers are only called; what hands on attributes cannot be copied before it has its own
    iterates = hasattr(thing, "__iter__") or hasattr(thing, "__getitem__")
    attributes = getattr(thing, "__dict__", None)
    container = isinstance(thing, (MutableSequence, MutableMapping, MutableSet))
    if not container and (attributes is None or not iterates or hasattr(type(thing), "__getattr__")):
        return thing
    if hasattr(type(thing), "__del__"):
        return thing  # the end of a copy would close what it shares: files, databases, workers
    try:
        found = copies[id(thing)] = copy.copy(thing)
    except Exception:  # of whatever a loader may be made of
        return thing
    if found is thing:
        return thing
    if isinstance(thing, DataLoader):
        _own(found, thing, copies, depth)
    elif isinstance(thing, (list, deque)) and len(thing) <= FEW:
        for i, value in enumerate(thing):
            found[i] = _copied(value, copies, depth - 1)
    elif isinstance(thing, dict) and len(thing) <= FEW:
        found.update({key: _copied(value, copies, depth - 1) for key, value in thing.items()})
    if attributes is not None and not isinstance(thing, DataLoader):
        vars(found).update({name: _copied(value, copies, depth - 1) for name, value in attributes.items()})
    return found


def _own(found: DataLoader[Any], loader: DataLoader[Any], copies: dict[int, Any], depth: int) -> None:
    """Give the copy of a DataLoader what its iteration changes."""
    if not isinstance(loader.dataset, IterableDataset) or _in_workers(loader):
        copies[id(loader.dataset)] = loader.dataset  # samplers may hold it, too
    own = {name: _copied(getattr(loader, name), copies, depth - 1) for name in ("dataset", "sampler", "batch_sampler")}
    samplers: list[Any] = [own["sampler"], own["batch_sampler"], getattr(own["batch_sampler"], "sampler", None)]
    for sampler in samplers:
        if hasattr(sampler, "set_epoch") and any(sampler is each for each in copies.values()):
            sampler.set_epoch(0)  # the same batches in each
    # persistent workers are those of the live iterator
    vars(found).update(own, _iterator=None, persistent_workers=False)
    if any(isinstance(value, Iterator) for value in vars(found).values()):
        found.__class__ = DataLoader  # a subclass that goes on with one iterator for good, which is training's
