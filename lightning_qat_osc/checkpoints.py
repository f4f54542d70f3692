"""Inspection of the quantized weights in a checkpoint, without the class of the module."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os import PathLike, fspath
from typing import Any

from torch import Tensor

from lightning_qat_osc.config import LayerRule, QuantConfig
from lightning_qat_osc.files import read_tensors
from lightning_qat_osc.functional import fake_quantize
from lightning_qat_osc.lookup import qualified_name, weight_name
from lightning_qat_osc.metrics import SQNR, FrozenShare, OscillatingShare
from lightning_qat_osc.oscillation import OscillationState
from lightning_qat_osc.tables import table

__all__ = ["CheckpointWeight", "config_of_state", "format_weights", "inspect_checkpoint", "read_checkpoint"]

_GRID = re.compile(r"(?:(?P<layer>.*)\.)?(?P<name>\w+)_quantizer\.grid$")


@dataclass(frozen=True)
class CheckpointWeight:
    """One weight of a checkpoint.

    Attributes:
        name: Name of its layer; ``layer.parameter`` if the parameter is not called ``weight``.
        shape: Its shape; empty if the checkpoint does not contain it, because its layer computes it from others.
        bits: Its bit width, None for full precision.
        scale: Its scale, or the mean of its scales per channel; None for full precision.
        activation_bits: Bit width of each of the layer's inputs, None for full precision.
        oscillating: Share of the elements with a frequency above 0.005, None if they were not tracked.
        frozen: Share of the elements that are frozen, None if they were not tracked.
        sqnr: Signal-to-quantization-noise ratio in dB, None if there is nothing to compare.
        float_bytes: Size in floating point, in bytes.
        packed_bytes: Size at its bit width, in bytes, including its scales.
    """

    name: str
    shape: list[int]
    bits: int | None
    scale: float | None
    activation_bits: list[int | None]
    oscillating: float | None
    frozen: float | None
    sqnr: float | None
    float_bytes: int
    packed_bytes: int


@dataclass(frozen=True)
class _Grid:
    """A quantizer in a state_dict: its key without ``.grid``, what it quantizes, and its grid."""

    key: str
    layer: str
    name: str
    bits: int | None
    quant_min: int
    quant_max: int
    calibrated: bool
    is_weight: bool


def read_checkpoint(
    path: str | PathLike[str], *, weights_only: bool = True
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a checkpoint of a quantized module, and return it and the state_dict in it, on the CPU.

    Args:
        path: A Lightning checkpoint, or a saved state_dict.
        weights_only: Read only tensors and plain values.

    Raises:
        OSError: If the file does not exist or cannot be opened.
        ValueError: If the file is not a readable checkpoint, or has no quantizers.
    """
    checkpoint = read_tensors(path, map_location="cpu", weights_only=weights_only)
    state = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise ValueError(
            f"{fspath(path)} is not a checkpoint or a state_dict: it contains an object of type "
            f"{type(checkpoint).__name__}"
        )
    if not any(_GRID.match(key) for key in state):
        raise ValueError(f"{fspath(path)} is not a checkpoint of a quantized module: it has no quantizers")
    return checkpoint, state


def _grids(state: Mapping[str, Tensor]) -> Iterator[_Grid]:
    for key, grid in state.items():
        if match := _GRID.match(key):
            layer, name = match["layer"] or "", match["name"]
            if f"{key.removesuffix('.grid')}.scale" not in state:
                raise ValueError(f"the state_dict is damaged: it contains {key}, but no scale for it")
            bits, quant_min, quant_max, _, calibrated = (round(value) for value in grid.tolist())
            yield _Grid(
                key=key.removesuffix(".grid"),
                layer=layer,
                name=name,
                bits=bits or None,
                quant_min=quant_min,
                quant_max=quant_max,
                calibrated=bool(calibrated),
                is_weight="weight" in name,
            )


def inspect_checkpoint(path: str | PathLike[str], *, weights_only: bool = True) -> list[CheckpointWeight]:
    """Return the weights of the quantized layers of a checkpoint, in the order of its layers; shared weights once.

    Args:
        path: A Lightning checkpoint, from the end or the middle of training, or a saved state_dict.
        weights_only: Read only tensors and plain values. Use False for a trusted checkpoint with other objects.

    Returns:
        One entry for each weight, and one for each layer in which only inputs are quantized.

    Raises:
        OSError: If the file does not exist or cannot be opened.
        ValueError: If the file is not a readable checkpoint, or has no quantizers.
    """
    return inspect_state(read_checkpoint(path, weights_only=weights_only)[1])


def inspect_state(state: Mapping[str, Tensor]) -> list[CheckpointWeight]:
    """Do the same as :func:`inspect_checkpoint`, for a state_dict that is already loaded."""
    layers: dict[str, list[_Grid]] = {}
    for grid in _grids(state):
        layers.setdefault(grid.layer, []).append(grid)
    lines, seen = [], set()
    for layer, grids in layers.items():
        activation_bits = [grid.bits if grid.calibrated else None for grid in grids if not grid.is_weight]
        of_weights: list[_Grid | None] = [grid for grid in grids if grid.is_weight]
        for of_weight in of_weights or [None]:
            parameter = "weight" if of_weight is None else of_weight.name
            weight = state.get(qualified_name(layer, parameter))
            if weight is None or weight.data_ptr() not in seen:
                lines.append(_line(weight_name(layer, parameter), weight, of_weight, activation_bits, state))
            if weight is not None:
                seen.add(weight.data_ptr())
    return lines


def _line(
    name: str,
    weight: Tensor | None,
    grid: _Grid | None,
    activation_bits: list[int | None],
    state: Mapping[str, Tensor],
) -> CheckpointWeight:
    bits = scale = sqnr = oscillating = frozen = None
    float_bytes = 0 if weight is None else weight.nbytes
    packed_bytes = float_bytes
    if grid is not None and grid.calibrated and grid.bits is not None:
        bits, scales = grid.bits, state[f"{grid.key}.scale"]
        scale = scales.mean().item()
        if weight is not None:
            noise = SQNR()
            noise.update(weight, fake_quantize(weight, scales, grid.quant_min, grid.quant_max))
            sqnr = noise.compute().item()
            packed_bytes = -(-weight.numel() * bits // 8) + scales.nbytes
        history = _history(grid, state)
        if history is not None:
            oscillating, frozen = (_share(metric, name, history) for metric in (OscillatingShare, FrozenShare))
    shape = [] if weight is None else list(weight.shape)
    return CheckpointWeight(
        name, shape, bits, scale, activation_bits, oscillating, frozen, sqnr, float_bytes, packed_bytes
    )


def _history(grid: _Grid, state: Mapping[str, Tensor]) -> OscillationState | None:
    prefix = f"{grid.key}.oscillation."
    saved = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if not saved:
        return None
    history = OscillationState(saved["weight_int"])
    history.load_state_dict(saved)
    return history


def _share(metric: type[OscillatingShare] | type[FrozenShare], name: str, history: OscillationState) -> float:
    share = metric([name])
    share.update({name: history})
    return share.compute()[""].item()


def format_weights(weights: list[CheckpointWeight]) -> str:
    """Format the weights of a checkpoint as a readable table, with the total sizes in the last line."""

    def text(value: float | None, form: str = "", none: str = "") -> str:
        return none if value is None else format(value, form)

    rows: list[tuple[str, ...]] = []
    rows.append(
        ("layer", "weight", "W bits", "W scale", "A bits", "oscillating", "frozen", "SQNR dB", "float", "packed")
    )
    for w in weights:
        rows.append(
            (
                w.name,
                "x".join(map(str, w.shape)),
                text(w.bits, none="full"),
                text(w.scale, ".3g"),
                "/".join(text(bits, none="full") for bits in w.activation_bits),
                text(w.oscillating, ".2%"),
                text(w.frozen, ".2%"),
                text(w.sqnr, ".1f"),
                _size(w.float_bytes),
                _size(w.packed_bytes),
            )
        )
    total, packed = sum(w.float_bytes for w in weights), sum(w.packed_bytes for w in weights)
    rows.append(("total", *[""] * 7, _size(total), _size(packed)))
    return table(rows)


def _size(octets: int) -> str:
    return f"{octets} B" if octets < 1000 else f"{octets / 1000:.1f} kB" if octets < 10**6 else f"{octets / 1e6:.1f} MB"


def config_of_state(state: Mapping[str, Tensor]) -> QuantConfig:
    """Return a configuration that gives a module the quantizers that a state_dict has.

    For checkpoints that do not contain their configuration, such as those saved with ``save_weights_only=True``. Each
    layer gets a rule of its own.

    Args:
        state: The state_dict of a quantized module.
    """
    layers: dict[str, dict[str, int | None]] = {}
    per_channel, aliases = False, _aliases(state)
    for grid in _grids(state):
        scale = state[f"{grid.key}.scale"]
        per_channel |= grid.is_weight and (scale.dim() > 1 or scale.numel() > 1)
        if grid.layer not in aliases:
            bits = layers.setdefault(grid.layer, {})
            what = "weight_bits" if grid.is_weight else "activation_bits"
            bits[what] = bits.get(what) or grid.bits  # one of several inputs may have no bits, as a repeated tensor
    rules = tuple(
        LayerRule(
            pattern=glob.escape(layer),
            weight_bits=bits["weight_bits"] or 8 if "weight_bits" in bits else None,
            activation_bits=bits["activation_bits"] or 8 if "activation_bits" in bits else None,
        )
        for layer, bits in layers.items()
    )
    return QuantConfig(
        weight_bits=None,
        activation_bits=None,
        first_last_bits=None,
        weight_granularity="per_channel" if per_channel else "per_tensor",
        rules=rules,
    )


def _aliases(state: Mapping[str, Tensor]) -> set[str]:
    """Return second names of layers: all tensors under such a name are also under the first.

    Layers that share only their weight, as two embeddings may, are not included.
    """
    found: dict[frozenset[int], str] = {}
    aliases = set()
    for layer in dict.fromkeys(grid.layer for grid in _grids(state)):
        prefix = f"{layer}." if layer else ""
        own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        first = found.setdefault(frozenset(value.data_ptr() for value in own.values()), layer)
        if first != layer and any(not key.startswith("weight") for key in own):
            aliases.add(layer)
    return aliases
