"""Weights that are sharded over processes (DTensor, as FSDP2 makes them): whole, or each process's own part."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["copy_whole_", "is_sharded", "own_part", "reshard", "shard_whole", "sharded_like", "whole"]


def is_sharded(x: Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    if not dist.is_available():
        return False
    from torch.distributed.tensor import DTensor  # not there where distributed is not

    return isinstance(x, DTensor)


def whole(x: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded: a collective, if it is."""
    return x.full_tensor() if is_sharded(x) else x  # type: ignore[attr-defined]


def own_part(x: Tensor) -> Tensor:
    """This process's part of a tensor that may be sharded."""
    return x.to_local() if is_sharded(x) else x  # type: ignore[attr-defined]


def sharded_like(x: Tensor, other: Tensor) -> Tensor:
    """A tensor that may be sharded, in the parts of another of its shape: a collective, if it is in other parts."""
    if not is_sharded(x):
        return x
    return x.redistribute(placements=other.placements)  # type: ignore[attr-defined, no-any-return]


def reshard(module: nn.Module) -> None:
    """Let FSDP2 shard again what it keeps whole after a forward pass without a backward pass."""
    if dist.is_available():
        from torch.distributed.fsdp import FSDPModule

        for child in module.modules():
            if isinstance(child, FSDPModule):
                child.reshard()


def shard_whole(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, the same on every process, in the parts of another that may be sharded."""
    if not is_sharded(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return distribute_tensor(value.to(like.dtype), mesh, placements, src_data_rank=None)


@torch.no_grad()
def copy_whole_(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor, the same on every process, into one that may be sharded."""
    target.copy_(shard_whole(value, target))
