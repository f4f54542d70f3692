"""Recomputation of quantized tensors in the backward pass, instead of keeping them in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import disable_saved_tensors_hooks, saved_tensors_hooks

__all__ = ["Recipe", "recomputed"]

_inside: ContextVar[bool] = ContextVar("_inside", default=False)


@dataclass(frozen=True)
class Recipe:
    """How to compute a quantized tensor.

    Attributes:
        quantize: Function that computes the tensor from ``sources``, always with the same result.
        sources: The tensors from which it is computed.
    """

    quantize: Callable[..., Tensor]
    sources: tuple[Tensor, ...]

    @torch.no_grad()
    def make(self) -> Tensor:
        """Compute the quantized tensor."""
        return self.quantize(*self.sources)


@dataclass(frozen=True)
class _Kept:
    """What replaces a saved tensor: the recipe for its memory, its view of that memory, and the sources' versions."""

    recipe: Recipe
    versions: tuple[int, ...]
    size: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt

    def make(self) -> Tensor:
        if _versions(self.recipe) != self.versions:
            raise RuntimeError(
                "a tensor that was quantized, or its scale, was modified in place before the backward pass that needs "
                "it: clone it before modifying it, or set recompute=False"
            )
        return self.recipe.make().as_strided(self.size, self.stride, self.offset)


def _what(tensor: Tensor) -> tuple[int, torch.dtype, int]:
    """Return a key that only a tensor and its views share, and that an in-place operation changes."""
    return tensor.untyped_storage().data_ptr(), tensor.dtype, tensor._version


def _versions(recipe: Recipe) -> tuple[int, ...]:
    return tuple(source._version for source in recipe.sources)


@contextmanager
def recomputed(quantized: Sequence[tuple[Tensor, Recipe]]) -> Iterator[None]:
    """Save recipes in place of the quantized tensors that autograd saves in this context, and recompute them on demand.

    If other hooks on saved tensors are active, as in activation checkpointing, this context does nothing.

    Args:
        quantized: Quantized tensors and their recipes.
    """
    if not _inside.get() and _others_decide():
        yield
        return
    # the hooks outlive this context, so they must not hold references to the tensors
    recipes = {_what(tensor): recipe for tensor, recipe in quantized}

    def pack(saved: Tensor) -> Tensor | _Kept:
        recipe = recipes.get(_what(saved))
        if recipe is None:
            return saved
        return _Kept(recipe, _versions(recipe), saved.size(), saved.stride(), saved.storage_offset())

    token = _inside.set(True)
    try:
        with saved_tensors_hooks(pack, lambda kept: kept.make() if isinstance(kept, _Kept) else kept):
            yield
    finally:
        _inside.reset(token)


def _others_decide() -> bool:
    try:
        with disable_saved_tensors_hooks("in use"):
            return False
    except RuntimeError:
        return True
