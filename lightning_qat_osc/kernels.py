"""Compiled forms of small functions of tensors, and views of tensors in which one compiled form serves many shapes."""

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
    "blocks",
    "compiled",
    "in_channels_last",
    "in_one_order",
    "in_rows",
    "joined_copy",
    "memory",
    "number",
    "parted",
    "rows",
    "why_nothing_compiles",
]

BLOCK = 2**18
"""Elements that stay in a CPU's cache from one operation to the next."""

SMALL = 2**15
"""Elements up to which a compiled kernel is not worth its call.

It would also be made for one thread, if tensors so small were the first that it sees."""

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}

Limit = TypeVar("Limit", int, Tensor)
"""A limit of an integer grid: a number, or, for compiled kernels, a tensor without dimensions."""

Function = TypeVar("Function", bound=Callable[..., Any])


@cache
def compiled(function: Function, variant: str = "") -> Function:
    """A function through ``torch.compile``, with sizes left open, so that layers of other sizes share one kernel.

    Not for functions in ``torch.no_grad()`` as a decorator: torch counts recompilations of all these as one function's,
    a user's compiled layers included.

    Args:
        function: A plain function.
        variant: What is compiled is shared within a variant alone. A loop is made for one thread if the first tensors
            that it sees are small, and torch has a limit for the forms of one function.
    """
    if variant:
        code = function.__code__.replace(co_name=f"{function.__name__}_{variant}")
        function = cast(Function, FunctionType(code, function.__globals__))
    return cast(Function, torch.compile(function, dynamic=True))


@lru_cache(maxsize=256)
def number(value: float, device: torch.device) -> Tensor:
    """A number as compiled kernels take it, without dimensions.

    They are made anew for each Python float, and convert an integer in every iteration. A fill waits for no GPU.
    """
    with torch.inference_mode(False):
        return torch.full((), value, dtype=torch.float32, device=device)


def why_nothing_compiles(device: torch.device) -> str | None:
    """Compile something small: what went wrong on this machine, such as that it has no compiler, or None."""
    try:
        torch.compile(torch.neg, dynamic=True)(torch.ones(2, device=device))
    except Exception as error:  # from whatever a backend is made of
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None


def in_one_order(tensors: Sequence[Tensor]) -> bool:
    """Whether tensors of one shape fill their memory in one order: all are contiguous, or all in channels_last."""
    first = tensors[0]
    if not (first.is_contiguous() or in_channels_last(first)):
        return False
    return all(t.stride() == first.stride() and t.shape == first.shape for t in tensors[1:])


def in_channels_last(x: Tensor) -> bool:
    """Whether a tensor fills its memory with channels side by side."""
    memory_format = _CHANNELS_LAST.get(x.dim())
    return memory_format is not None and x.is_contiguous(memory_format=memory_format)


def memory(x: Tensor, *shape: int) -> Tensor:
    """The memory of a tensor that fills it, in one or two dimensions.

    Detached: a kernel compiled for a view is compiled again for each shape of what it is a view of.
    """
    return x.as_strided(shape, (*shape[1:], 1)).detach()


def in_rows(scale: Tensor, x: Tensor) -> bool:
    """Whether the memory of a tensor is one row with one scale, or a row for each, as :func:`rows` needs it."""
    if scale.numel() == 1:
        return in_one_order([x])
    return scale.dim() == x.dim() and scale.shape[0] == scale.numel() and x.is_contiguous()


def rows(scales: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor] | None:
    """Scales and tensors that they apply to, in few dimensions and the same memory: [1] and [n], or [G, 1] and [G, n].

    None where the tensors' memory runs in different orders, or output channels are not the first dimension.
    """
    groups, n = scales[0].numel(), tensors[0].numel()
    if groups == 1 and in_one_order(tensors):
        return [*(memory(s, 1) for s in scales), *(memory(t, n) for t in tensors)]
    if groups > 1 and all(in_rows(scales[0], t) for t in tensors):
        return [*(memory(s, groups, 1) for s in scales), *(memory(t, groups, n // groups) for t in tensors)]
    return None


def blocks(views: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """Tensors in pieces that fit the cache. What has one element for all the elements of the last is whole in each."""
    last = views[-1]
    size = max(1, BLOCK * len(last) // max(1, last.numel()))
    return zip(*(torch.split(t, size) if len(t) == len(last) else repeat(t) for t in views))


def joined_copy(tensors: Sequence[Tensor]) -> Tensor:
    """The elements of several tensors of one dtype, one tensor behind the other."""
    return cast(Tensor, _flatten_dense_tensors(tensors))  # type: ignore[no-untyped-call]


def parted(joined: Tensor, like: Sequence[Tensor]) -> Sequence[Tensor]:
    """Views of joined elements, in the shapes of the tensors that they come from."""
    return cast(Sequence[Tensor], _unflatten_dense_tensors(joined, like))  # type: ignore[no-untyped-call]
