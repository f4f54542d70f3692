"""Two models side by side: the outputs of each layer on the same data, and how far they are apart."""

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
"""What the output of the model itself is called among those of its layers."""


@dataclass(frozen=True)
class Difference:
    """How far two outputs are apart.

    Attributes:
        largest: Largest absolute difference.
        sqnr: Signal-to-noise ratio of the second with respect to the first, in dB; infinite where they are equal.
    """

    largest: float
    sqnr: float


def float_model(module: nn.Module) -> nn.Module:
    """The latent weights of a quantized model in full precision: a copy, in evaluation mode, of the same layers."""
    plain = without_quantizers(module)
    prepare_layers(plain, list(quantized_layers(module)))
    return plain


@torch.no_grad()
def layer_outputs(
    module: nn.Module, layers: Iterable[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, list[Tensor]]:
    """The outputs of some layers of a model in one call, in the order in which it calls them, and then its own.

    Args:
        module: The model, in evaluation mode.
        layers: Names of layers. Those that are not called are left out.
        args: Positional arguments of its forward.
        kwargs: Keyword arguments of its forward.

    Returns:
        Layer name -> its floating-point outputs, of all its calls; :data:`OUTPUT` -> those of the model.
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
    """How far the outputs of a layer are apart.

    Args:
        one: Its outputs in one model.
        other: Its outputs in another.

    Raises:
        ValueError: If their numbers or shapes differ.
    """
    shapes = [[list(x.shape) for x in outputs] for outputs in (one, other)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"outputs must have the same shapes to be compared, got {shapes[0]} and {shapes[1]}")
    noise, distances = SQNR(), [0.0]
    for a, b in zip(one, other):
        equal = a.isinf() & (a == b)  # as in masked scores: whose difference is no number
        a, b = a.masked_fill(equal, 0.0), b.masked_fill(equal, 0.0)
        noise.update(a, b)
        if a.numel():
            distances.append((a - b).abs().max().item())
    largest = torch.tensor(distances, dtype=torch.float64).max().item()  # NaN if one is, unlike Python's
    return Difference(largest, noise.compute().item())
