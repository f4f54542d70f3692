"""Files in which a weight of b bits takes b bits: safetensors with a manifest.

A tensor of integers is stored as a tensor of bytes: value i takes bits ``b i`` to ``b i + b - 1`` of the tensor's bit
sequence, least significant first, in two's complement. Its scales are stored under the parameter's key plus
``.scale``. All other entries of the state_dict are stored unchanged, and those with several names only once. The
metadata contain the manifest, in JSON, and a SHA-256 checksum of the manifest and all tensors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from os import PathLike, fspath
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_qat_osc.checks import check_file, check_module
from lightning_qat_osc.export.convert import (
    QuantizeInputs,
    integer_model,
    prepare_layers,
    quantize_inputs,
    set_weights,
    without_quantizers,
)
from lightning_qat_osc.export.extras import require_extra
from lightning_qat_osc.export.folding import CannotFoldError, remove_batch_norm
from lightning_qat_osc.export.integers import InputGrid, IntegerWeight
from lightning_qat_osc.files import atomic_write

__all__ = ["load_packed", "pack", "save_packed", "unpack"]

_FORMAT, _VERSION = "lightning-qat-osc packed", 1

Module = TypeVar("Module", bound=nn.Module)


def pack(values: Tensor, bits: int) -> Tensor:
    """Pack integers of b bits into bytes, with b bits for each.

    Args:
        values: Integers from ``-2^(bits-1)`` to ``2^(bits-1) - 1``, int8, of any shape.
        bits: Width of the integers, 2 to 8.

    Returns:
        Bytes, uint8, ``[ceil(bits * n / 8)]``.
    """
    flat = values.flatten()
    rows = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8).to(torch.int64) & 2**bits - 1
    words = torch.zeros(len(rows), dtype=torch.int64)  # 8 values of b bits are b bytes
    for i in range(8):
        words |= rows[:, i] << bits * i
    octets = torch.stack([words >> 8 * i & 255 for i in range(bits)], dim=1)
    return octets.to(torch.uint8).flatten()[: -(-len(flat) * bits // 8)].clone()


def unpack(octets: Tensor, bits: int, shape: list[int]) -> Tensor:
    """Return the integers that :func:`pack` packed.

    Args:
        octets: Bytes, uint8, ``[ceil(bits * n / 8)]``.
        bits: Width of the integers, 2 to 8.
        shape: Shape of the integers.

    Returns:
        Integers, int8, of shape ``shape``.
    """
    n = torch.Size(shape).numel()
    rows = torch.nn.functional.pad(octets, (0, -len(octets) % bits)).view(-1, bits).to(torch.int64)
    words = torch.zeros(len(rows), dtype=torch.int64)
    for i in range(bits):
        words |= rows[:, i] << 8 * i
    sign = 2 ** (bits - 1)
    values = torch.stack([((words >> bits * i & 2**bits - 1) ^ sign) - sign for i in range(8)], dim=1)
    return values.to(torch.int8).flatten()[:n].view(shape).clone()


def save_packed(module: nn.Module, path: str | PathLike[str], *, fold_batch_norm: bool = False) -> None:
    """Write a quantized model to a safetensors file with a manifest, in which weights of b bits take b bits.

    Args:
        module: A model with quantizers, trained or loaded from a checkpoint. It is not changed.
        path: The file, usually ``*.safetensors``. It is written under a temporary name in the same folder, and then
            renamed.
        fold_batch_norm: Fold batch norms into the layers before them, as in
            :func:`~lightning_qat_osc.export.convert`.

    Raises:
        ImportError: If safetensors is not installed.
        TypeError: If ``path`` is not a path, or ``module`` is not a module.
        ValueError: If nothing in the module is quantized, or a layer or a tensor of the state cannot be exported.
    """
    check_file("path", path)
    require_extra("packed", "save_packed")
    import safetensors.torch

    model = integer_model(module, fold_batch_norm=fold_batch_norm)
    first: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    manifest: dict[str, Any] = {"version": _VERSION, "weights": {}, "aliases": {}}
    for key, value in model.module.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise ValueError(f"state_dict entry '{key}' must be a tensor to be packed, got {type(value).__name__}")
        name = first.setdefault(id(value), key)
        if name != key:
            manifest["aliases"][key] = name
        elif key in model.weights:
            weight = model.weights[key]
            manifest["weights"][key] = _described(key, weight)
            tensors[key] = pack(weight.values.cpu(), weight.bits)
            tensors[f"{key}.scale"] = weight.scale.cpu().contiguous()
        else:
            tensors[key] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    manifest["inputs"] = {
        name: {
            argument: grid and {**asdict(grid), "dtype": _dtype_name(grid.dtype)} for argument, grid in grids.items()
        }
        for name, grids in _hooks(model.module).items()
    }
    manifest["layers"] = model.layers
    manifest["folded"] = model.folding.into
    text = json.dumps(manifest)
    metadata = {"format": _FORMAT, "manifest": text, "sha256": _checksum(text, tensors)}
    try:
        content = safetensors.torch.save(tensors, metadata)
    except KeyError as error:  # a dtype that safetensors does not know
        odd = next(name for name, tensor in tensors.items() if tensor.dtype in error.args)
        raise ValueError(
            f"state_dict entry '{odd}' has dtype {tensors[odd].dtype}, which safetensors does not support"
        ) from error
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)  # safetensors' save_file makes the file unreadable for other users


def load_packed(path: str | PathLike[str], module: Module) -> Module:
    """Load a model from a file of :func:`save_packed`, as :func:`~lightning_qat_osc.export.convert` returns it.

    Args:
        path: The file.
        module: A model of the same architecture, as its class creates it. It is not changed.

    Returns:
        A copy of the module in evaluation mode, with the weights of the file in the module's dtypes and on its devices.

    Raises:
        ImportError: If safetensors is not installed.
        FileNotFoundError: If the file does not exist.
        TypeError: If ``path`` is not a path, or ``module`` is not a module.
        ValueError: If the file is not a packed model, is damaged, has another version of the format, or does not fit
            the module, or if the module is already converted.
    """
    check_file("path", path)
    check_module("module", module)
    if _hooks(module):
        raise ValueError(
            f"module must be newly created, but this {type(module).__name__} is already converted: its inputs would "
            "be quantized twice"
        )
    manifest, tensors = _read(path)
    plain = without_quantizers(module)
    weights = {
        key: IntegerWeight(
            values=unpack(tensors.pop(key), entry["bits"], entry["shape"]),
            scale=tensors.pop(f"{key}.scale"),
            bits=entry["bits"],
            quant_min=entry["quant_min"],
            quant_max=entry["quant_max"],
            channel_axis=entry["channel_axis"],
            dtype=_dtype(entry["dtype"]),
        )
        for key, entry in manifest["weights"].items()
    }
    state = {**tensors, **{key: weight.dequantize() for key, weight in weights.items()}}
    for alias, key in manifest["aliases"].items():
        state[alias] = state[key]
        if key in weights:
            weights[alias] = weights[key]
    inputs = {
        name: {
            argument: grid and InputGrid(**{**grid, "dtype": _dtype(grid["dtype"])})
            for argument, grid in arguments.items()
        }
        for name, arguments in manifest["inputs"].items()
    }
    try:
        prepare_layers(plain, manifest["layers"])
        set_weights(plain, weights)
        for norm, layer in manifest["folded"].items():
            remove_batch_norm(plain, norm, layer)
        plain.load_state_dict(state, strict=getattr(plain, "strict_loading", True))  # a LightningModule's
        quantize_inputs(plain, inputs)
    except (AttributeError, RuntimeError, TypeError, CannotFoldError) as error:
        raise ValueError(f"{fspath(path)} does not fit {type(module).__name__}: {error}") from error
    return plain


def _hooks(module: nn.Module) -> dict[str, dict[str, InputGrid | None]]:
    """Return the grids of the arguments of converted layers, by layer name and in argument order."""
    return {
        name: hook.grids
        for name, layer in module.named_modules()
        for hook in layer._forward_pre_hooks.values()
        if isinstance(hook, QuantizeInputs)
    }


def _described(key: str, weight: IntegerWeight) -> dict[str, Any]:
    layer, _, parameter = key.rpartition(".")
    return {
        "layer": layer,
        "parameter": parameter,
        "shape": list(weight.values.shape),
        "bits": weight.bits,
        "quant_min": weight.quant_min,
        "quant_max": weight.quant_max,
        "zero_point": 0,
        "channel_axis": weight.channel_axis,
        "dtype": _dtype_name(weight.dtype),
    }


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _checksum(manifest: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(manifest.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {_dtype_name(tensor.dtype)} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(path: str | PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the manifest and the tensors of a file, after verifying the checksum.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is not a packed model, is damaged, or has another version of the format.
    """
    require_extra("packed", "load_packed")
    import safetensors

    try:
        with safetensors.safe_open(fspath(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{fspath(path)} is not a packed model, or is damaged: {error}") from error
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"{fspath(path)} is not a packed model: its metadata lacks format='{_FORMAT}'")
    text = metadata.get("manifest", "")
    if _checksum(text, tensors) != metadata.get("sha256"):
        raise ValueError(f"{fspath(path)} is damaged: its contents do not match the stored checksum")
    manifest: dict[str, Any] = json.loads(text)
    if manifest["version"] != _VERSION:
        raise ValueError(
            f"{fspath(path)} has version {manifest['version']} of the format, but this package reads version {_VERSION}"
        )
    return manifest, tensors
