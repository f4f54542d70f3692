"""Comparison of two models: the outputs of each layer on the same data, and how much they differ."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_qat_osc.export.convert import prepare_layers, without_quantizers
from lightning_qat_osc.lookup import quantized_layers
from lightning_qat_osc.metrics import SQNR

__all__ = ["OUTPUT", "Difference", "difference", "float_model", "layer_outputs"]

OUTPUT = "(output)"
"""Key of the output of the model itself, next to the names of its layers."""


@dataclass(frozen=True)
class Difference:
    """How much two outputs differ.

    Attributes:
        largest: Largest absolute difference.
        sqnr: Signal-to-noise ratio of the second with respect to the first, in dB; infinite if they are equal.
    """

    largest: float
    sqnr: float


def float_model(module: nn.Module) -> nn.Module:
    """Return a full-precision copy of a quantized model: the same layers with latent weights, in evaluation mode."""
    plain = without_quantizers(module)
    prepare_layers(plain, list(quantized_layers(module)))
    return plain


@torch.no_grad()
def layer_outputs(
    module: nn.Module, layers: Iterable[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, list[Tensor]]:
    """Call a model and return the outputs of some of its layers, in the order of their calls, and then its own.

    Args:
        module: The model, in evaluation mode.
        layers: Names of layers. Those that are not called are left out.
        args: Positional arguments of the model's forward.
        kwargs: Keyword arguments of the model's forward.

    Returns:
        Layer name -> the floating-point outputs of all its calls; :data:`OUTPUT` -> those of the model.
    """
    found: dict[str, list[Tensor]] = {}
    with ExitStack() as hooks:
        for name in layers:
            hooks.enter_context(_recording(module.get_submodule(name), found, name))
        found[OUTPUT] = _tensors(module(*args, **kwargs))
    return found


@contextmanager
def _recording(layer: nn.Module, found: dict[str, list[Tensor]], name: str) -> Iterator[None]:
    def record(layer: nn.Module, args: Any, output: Any) -> None:
        found.setdefault(name, []).extend(x.clone() for x in _tensors(output))

    handle = layer.register_forward_hook(record)
    try:
        yield
    finally:
        handle.remove()


def _tensors(output: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()]


def difference(one: list[Tensor], other: list[Tensor]) -> Difference:
    """Return how much the outputs of a layer differ between two models.

    Args:
        one: Outputs of the layer in one model.
        other: Outputs of the layer in the other model.

    Raises:
        ValueError: If the number of outputs or their shapes differ.
    """
    shapes = [[list(x.shape) for x in outputs] for outputs in (one, other)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"outputs must have the same shapes to be compared, got {shapes[0]} and {shapes[1]}")
    noise, distances = SQNR(), [0.0]
    for a, b in zip(one, other):
        equal = a.isinf() & (a == b)  # equal infinities, as in masked scores: their difference is NaN
        a, b = a.masked_fill(equal, 0.0), b.masked_fill(equal, 0.0)
        noise.update(a, b)
        if a.numel():
            distances.append((a - b).abs().max().item())
    largest = torch.tensor(distances, dtype=torch.float64).max().item()  # propagates NaN, unlike Python's max
    return Difference(largest, noise.compute().item())
