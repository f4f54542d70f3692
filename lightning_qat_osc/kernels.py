"""Compiled forms of small tensor functions, and views of tensors that let many shapes share one compiled form."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, lru_cache
from itertools import repeat
from types import FunctionType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

__all__ = [
    "BLOCK",
    "SMALL",
    "Limit",
    "as_rows",
    "blocks",
    "cached_scalar",
    "compiled",
    "in_channels_last",
    "in_one_order",
    "in_rows",
    "joined_copy",
    "memory_view",
    "split_like",
    "why_nothing_compiles",
]

BLOCK = 2**18
"""Number of elements that stay in a CPU's cache from one operation to the next."""

SMALL = 2**15
"""Number of elements up to which calling a compiled kernel does not pay off.

If the first tensors that a kernel sees are this small, it would also be compiled for a single thread."""

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}

Limit = TypeVar("Limit", int, Tensor)
"""A limit of an integer grid: a number, or, for compiled kernels, a tensor without dimensions."""

Function = TypeVar("Function", bound=Callable[..., Any])


@cache
def compiled(function: Function, variant: str = "") -> Function:
    """Compile a function with ``torch.compile`` and dynamic sizes, so that layers of different sizes share one kernel.

    Do not pass functions decorated with ``torch.no_grad()``: torch counts the recompilations of all such functions
    together, including those in a user's compiled layers.

    Args:
        function: A plain function.
        variant: Each variant is compiled separately. This matters because a loop is compiled for a single thread if the
            first tensors that it sees are small, and because torch limits the number of compiled forms of a function.
    """
    if variant:
        code = function.__code__.replace(co_name=f"{function.__name__}_{variant}")
        function = cast(Function, FunctionType(code, function.__globals__))
    return cast(Function, torch.compile(function, dynamic=True))


@lru_cache(maxsize=256)
def cached_scalar(value: float, device: torch.device) -> Tensor:
    """Return a number as a tensor without dimensions, for compiled kernels.

    Kernels are recompiled for each Python float, and convert an integer argument in every iteration. Filling a
    tensor does not synchronize with a GPU.
    """
    with torch.inference_mode(False):
        return torch.full((), value, dtype=torch.float32, device=device)


def why_nothing_compiles(device: torch.device) -> str | None:
    """Compile a small function and return what went wrong, such as a missing compiler, or None on success."""
    try:
        torch.compile(torch.neg, dynamic=True)(torch.ones(2, device=device))
    except Exception as error:  # a backend may raise any exception
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None


def in_one_order(tensors: Sequence[Tensor]) -> bool:
    """Whether tensors have one shape and one dense memory layout: all are contiguous, or all in channels_last."""
    first = tensors[0]
    if not (first.is_contiguous() or in_channels_last(first)):
        return False
    return all(t.stride() == first.stride() and t.shape == first.shape for t in tensors[1:])


def in_channels_last(x: Tensor) -> bool:
    """Whether a tensor is contiguous in channels_last or channels_last_3d."""
    memory_format = _CHANNELS_LAST.get(x.dim())
    return memory_format is not None and x.is_contiguous(memory_format=memory_format)


def memory_view(x: Tensor, *shape: int) -> Tensor:
    """Return the memory of a dense tensor as a detached tensor of one or two dimensions.

    It is detached because a kernel compiled for a view is compiled again for each shape of the tensor it views.
    """
    return x.as_strided(shape, (*shape[1:], 1)).detach()


def in_rows(scale: Tensor, x: Tensor) -> bool:
    """Whether the memory of a tensor is one row with one scale, or one row per scale, as :func:`as_rows` needs it."""
    if scale.numel() == 1:
        return in_one_order([x])
    return scale.dim() == x.dim() and scale.shape[0] == scale.numel() and x.is_contiguous()


def as_rows(scales: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor] | None:
    """Return views of scales and of the tensors they apply to: [1] and [n] for one scale, [G, 1] and [G, n] for G.

    Return None if the tensors have different or non-dense memory layouts. Several scales also require contiguous
    tensors whose first dimension is that of the scales.
    """
    groups, n = scales[0].numel(), tensors[0].numel()
    if groups == 1 and in_one_order(tensors):
        return [*(memory_view(s, 1) for s in scales), *(memory_view(t, n) for t in tensors)]
    if groups > 1 and all(in_rows(scales[0], t) for t in tensors):
        return [*(memory_view(s, groups, 1) for s in scales), *(memory_view(t, groups, n // groups) for t in tensors)]
    return None


def blocks(views: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """Split tensors along the first dimension into blocks that fit the cache.

    A tensor that is not as long as the last one, such as a single scale, is passed whole with each block.
    """
    last = views[-1]
    size = max(1, BLOCK * len(last) // max(1, last.numel()))
    return zip(*(torch.split(t, size) if len(t) == len(last) else repeat(t) for t in views))


def joined_copy(tensors: Sequence[Tensor]) -> Tensor:
    """Copy several tensors of one dtype into one 1-dimensional tensor, one after the other."""
    return cast(Tensor, _flatten_dense_tensors(tensors))  # type: ignore[no-untyped-call]


def split_like(joined: Tensor, like: Sequence[Tensor]) -> Sequence[Tensor]:
    """Split joined elements into views that have the shapes of the original tensors."""
    return cast(Sequence[Tensor], _unflatten_dense_tensors(joined, like))  # type: ignore[no-untyped-call]
