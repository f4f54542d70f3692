"""Reading files that torch has written, and writing files atomically."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import fsspec
import torch

__all__ = ["atomic_write", "read_tensors"]


def read_tensors(path: str | PathLike[str], *, map_location: Any, weights_only: bool) -> Any:
    """Call ``torch.load``, with errors that say what to do. Paths with ``://`` are opened by fsspec, as in Lightning.

    Raises:
        OSError: If the file does not exist or cannot be read.
        ValueError: If the path is a folder, as for sharded checkpoints, or the file is damaged, is not a pickle, or
            holds objects of classes that ``weights_only`` forbids.
    """
    if os.path.isdir(path):
        raise ValueError(
            f"the checkpoint must be a file, but {path} is a folder of shards: consolidate it with "
            f"`python -m lightning.fabric.utilities.consolidate_checkpoint {path}`, or train with "
            "ModelParallelStrategy(save_distributed_checkpoint=False)"
        )
    try:
        if "://" in os.fspath(path):
            with fsspec.open(os.fspath(path), "rb") as file:
                return torch.load(file, map_location=map_location, weights_only=weights_only)
        with open(path, "rb") as file:  # errors after this are about its content
            file.read(1)
        return torch.load(path, map_location=map_location, weights_only=weights_only)
    except (UnpicklingError, EOFError, KeyError, IndexError, OSError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise  # such as a missing file or a network that fails; a seek in a truncated file is an invalid argument
        if isinstance(error, RuntimeError) and not any(word in str(error) for word in ("archive", "corrupt")):
            raise  # such as a missing device or too little memory
        if not weights_only:
            raise ValueError(f"{path} is damaged, or is not a file that torch.load can read") from error
        raise ValueError(
            f"{path} is damaged, or contains objects other than tensors and plain values, such as a module's "
            "hyperparameters: if you trust its source, load it with weights_only=False (--trusted on the command line)"
        ) from error


@contextmanager
def atomic_write(path: str | PathLike[str]) -> Iterator[Path]:
    """Yield a temporary file next to the target to write to. It replaces the target on exit.

    A reader of the target finds the old file or the new one, never part of one. If the body raises, the temporary file
    is removed and the target does not change.

    Args:
        path: The target. Missing parent folders are created.

    Yields:
        The path to write to, with the target's suffix.
    """
    target = Path(os.path.realpath(path))  # replace what a link points to, not the link
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{os.getpid()}.{target.name}")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
