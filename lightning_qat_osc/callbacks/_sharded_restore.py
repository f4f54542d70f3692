"""Oscillation histories from the checkpoint of a sharded strategy, which loads only into tensors that exist already."""

from __future__ import annotations

from collections.abc import Container, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_qat_osc.lookup import quantized_layers
from lightning_qat_osc.quantized_layer import latent_weight
from lightning_qat_osc.sharding import copy_full_

__all__ = ["load_histories"]


def load_histories(module: nn.Module, path: str | Path) -> None:
    """Create the histories that a checkpoint contains, and load them. This is a collective operation.

    Args:
        module: The quantized module, after its parameters and buffers were loaded.
        path: The checkpoint, a folder of shards or a single file.
    """
    if Path(path).is_dir():
        # missing where torch has no distributed package
        from torch.distributed.checkpoint.filesystem import FileSystemReader
        from torch.distributed.checkpoint.state_dict_loader import load

        saved = FileSystemReader(path).read_metadata().state_dict_metadata
        tensors = {f"state_dict.{key}": tensor for key, tensor in _histories(module, saved, "state_dict.")}
        load(tensors, checkpoint_id=path)  # in place
    else:
        whole = torch.load(path, map_location="cpu", mmap=True, weights_only=True)["state_dict"]
        for key, tensor in _histories(module, whole):
            copy_full_(tensor, whole[key].to(tensor.device))


def _histories(module: nn.Module, saved: Container[str], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Create the histories whose keys, with ``prefix`` in front, were saved, and yield their keys and tensors."""
    for name, layer in quantized_layers(module).items():
        for parameter, quantizer in layer.weight_quantizers().items():
            key = ".".join(filter(None, (name, layer.parameter_quantizers[parameter], "oscillation")))
            if f"{prefix}{key}.weight_int" in saved:
                state = quantizer.start_tracking(latent_weight(layer, parameter))
                yield from ((f"{key}.{tensor_name}", tensor) for tensor_name, tensor in state.state_dict().items())
