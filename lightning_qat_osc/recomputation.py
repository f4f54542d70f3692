"""Quantized tensors that are made again in the backward pass, instead of being kept for it."""

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
    """How a quantized tensor is made.

    Attributes:
        quantize: Makes it from ``sources``, always in the same way.
        sources: What it is made from.
    """

    quantize: Callable[..., Tensor]
    sources: tuple[Tensor, ...]

    @torch.no_grad()
    def make(self) -> Tensor:
        """The quantized tensor."""
        return self.quantize(*self.sources)


@dataclass(frozen=True)
class _Kept:
    """What is kept of a saved tensor: how its memory is made, the view of it, and the versions of what goes into it."""

    recipe: Recipe
    versions: tuple[int, ...]
    size: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt

    def make(self) -> Tensor:
        if _versions(self.recipe) != self.versions:
            raise RuntimeError(
                "a tensor that was quantized, or its scale, was changed by an in-place operation before the backward "
                "pass that needs it: make a copy before the change, or leave recompute=True out"
            )
        return self.recipe.make().as_strided(self.size, self.stride, self.offset)


def _what(tensor: Tensor) -> tuple[int, torch.dtype, int]:
    """What tells a quantized tensor and its views from all others, also from itself after an in-place operation."""
    return tensor.untyped_storage().data_ptr(), tensor.dtype, tensor._version


def _versions(recipe: Recipe) -> tuple[int, ...]:
    return tuple(source._version for source in recipe.sources)


@contextmanager
def recomputed(quantized: Sequence[tuple[Tensor, Recipe]]) -> Iterator[None]:
    """Keep recipes in place of quantized tensors that autograd saves meanwhile, and make these again when it asks.

    Where somebody else decides what is kept of saved tensors, as activation checkpointing does, that is left to them.

    Args:
        quantized: Tensors and how they were made.
    """
    if not _inside.get() and _others_decide():
        yield
        return
    # the hooks outlive this, so they must not hold the tensors
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
