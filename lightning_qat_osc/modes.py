"""Training and evaluation mode of modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["evaluation_mode"]


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Set evaluation mode inside the context, and restore the mode of each submodule on exit.

    This calls the module's own ``train``, which may do more than set a mode: unmerge a low-rank adapter, drop a cache.

    Args:
        module: The module.
    """
    modes = [(m, m.training) for m in module.modules()]
    try:
        module.eval()
        yield
    finally:
        module.train(modes[0][1])  # the first entry is the module itself
        for m, training in modes:
            m.training = training
