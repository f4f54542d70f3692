"""Random numbers for passes that must not affect training: every generator is seeded, and restored afterwards."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["FEW", "GENERATORS", "fixed_random_numbers", "generators_in", "seeded"]

_SEED = 0
"""One seed gives the same batches at each evaluation, so that epochs differ by their weights alone."""

GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)
"""Types of random generators other than the global ones."""

FEW = 64
"""Largest size of a container that is searched: larger ones hold samples, files or indices."""

_LEVELS = 8  # levels of nested attributes to search


def generators_in(things: Iterable[Any]) -> list[Any]:
    """Return the random generators among objects, in their attributes and in what these hold, each once.

    Modules are not searched: pass their attributes, ``vars(module)``, instead.
    """
    found: dict[int, Any] = {}
    seen: dict[int, Any] = {}
    level = list(things)
    for _ in range(_LEVELS):
        found |= {id(x): x for x in level if isinstance(x, GENERATORS)}
        level = list({id(x): x for x in level if id(x) not in seen and not _is_opaque(x)}.values())
        seen |= {id(x): x for x in level}
        level = [held for x in level for held in _held(x)]
    return list(found.values())


def _is_opaque(thing: Any) -> bool:
    return isinstance(thing, (type, nn.Module, pl.Trainer, Tensor, np.ndarray, *GENERATORS))


def _held(thing: Any) -> list[Any]:
    if isinstance(thing, (list, tuple, deque, dict)):
        values = thing.values() if isinstance(thing, dict) else thing
        return list(values) if len(thing) <= FEW else []
    return list(getattr(thing, "__dict__", {}).values())


@contextmanager
def fixed_random_numbers() -> Iterator[None]:
    """Seed the global generators that a data pipeline may use, including those of devices, and restore them on exit."""
    python, numpy = random.getstate(), np.random.get_state()
    # torch.manual_seed seeds every device, so all of them have to be restored
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device_type = "cuda" if accelerator is None else accelerator.type
    with torch.random.fork_rng(range(torch.accelerator.device_count()), device_type=device_type):
        try:
            torch.manual_seed(_SEED)
            random.seed(_SEED)
            np.random.seed(_SEED)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def seeded(generators: Iterable[Any]) -> Iterator[None]:
    """Seed generators, and restore their states on exit."""
    with ExitStack() as puts_back:
        for generator in generators:
            puts_back.callback(_seed(generator))
        yield


def _seed(generator: Any) -> Callable[[], object]:
    """Seed a generator.

    Returns:
        A function that restores the generator's state.
    """
    put_back: Callable[[], object]
    if isinstance(generator, torch.Generator):
        put_back = partial(generator.set_state, generator.get_state())
        generator.manual_seed(_SEED)
    elif isinstance(generator, random.Random):
        put_back = partial(generator.setstate, generator.getstate())
        generator.seed(_SEED)
    elif isinstance(generator, np.random.RandomState):
        put_back = partial(generator.set_state, generator.get_state())
        generator.seed(_SEED)
    else:
        bits = generator.bit_generator
        put_back = partial(setattr, bits, "state", bits.state)
        bits.state = type(bits)(_SEED).state
    return put_back
