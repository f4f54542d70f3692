"""Training and evaluation mode of modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["evaluating"]


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, and then each submodule's own mode again.

    It goes through the module's ``train``, which may do more than set a mode: unmerge a low-rank adapter, drop a cache.

    Args:
        module: The module.
    """
    modes = [(m, m.training) for m in module.modules()]
    try:
        module.eval()
        yield
    finally:
        module.train(modes[0][1])  # its own: it is the first of its modules
        for m, training in modes:
            m.training = training
