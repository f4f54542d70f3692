"""Access to weights sharded over ranks (DTensor, as in FSDP2): the whole tensor, or the part of this rank."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["copy_full_", "full_tensor", "is_sharded", "local_part", "reshard", "shard_full", "sharded_like"]


def is_sharded(x: Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    if not dist.is_available():
        return False
    from torch.distributed.tensor import DTensor  # missing if distributed is not available

    return isinstance(x, DTensor)


def full_tensor(x: Tensor) -> Tensor:
    """Return the whole tensor. This is a collective operation if the tensor is sharded."""
    return x.full_tensor() if is_sharded(x) else x  # type: ignore[attr-defined]


def local_part(x: Tensor) -> Tensor:
    """Return the part of a tensor that is on this rank; the tensor itself if it is not sharded."""
    return x.to_local() if is_sharded(x) else x  # type: ignore[attr-defined]


def sharded_like(x: Tensor, other: Tensor) -> Tensor:
    """Redistribute a sharded tensor to the placements of another one of its shape; return other tensors as they are.

    This is a collective operation if the placements differ.
    """
    if not is_sharded(x):
        return x
    return x.redistribute(placements=other.placements)  # type: ignore[attr-defined, no-any-return]


def reshard(module: nn.Module) -> None:
    """Reshard FSDP2 parameters that are still whole after a forward pass without a backward pass."""
    if dist.is_available():
        from torch.distributed.fsdp import FSDPModule

        for child in module.modules():
            if isinstance(child, FSDPModule):
                child.reshard()


def shard_full(value: Tensor, like: Tensor) -> Tensor:
    """Shard a whole tensor, identical on every rank, like ``like``. Return it as is if ``like`` is not sharded."""
    if not is_sharded(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return distribute_tensor(value.to(like.dtype), mesh, placements, src_data_rank=None)


@torch.no_grad()
def copy_full_(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor, identical on every rank, into a tensor that may be sharded."""
    target.copy_(shard_full(value, target))
