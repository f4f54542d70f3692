"""Copies of a network that a model keeps beside it and does not train, such as an exponential moving average."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import nn

from lightning_qat_osc.sharding import own_part

__all__ = ["untrained_copies"]

Network = dict[str, nn.Module]
"""Layers by their name inside of the network."""


def untrained_copies(
    layers: Mapping[str, nn.Module], trained: Collection[str], called: Collection[str]
) -> dict[str, str]:
    """The layers of copies of a trained network, and what each is a copy of.

    A copy holds layers of the same names, classes and shapes, and trains none of them. One whose layers are called is
    only one if its parameters are those of the original: it may as well be a teacher.

    Args:
        layers: The layers of a model, by name.
        trained: Names of those with parameters that are trained.
        called: Names of those that a forward pass has called.

    Returns:
        Name of a layer of a copy -> name of the layer in the original.
    """
    networks: dict[str, Network] = {}
    for name, layer in layers.items():
        parts = name.split(".")
        for i in range(1, len(parts)):
            networks.setdefault(".".join(parts[:i]), {})[".".join(parts[i:])] = layer
    names = {prefix: [f"{prefix}.{name}" for name in network] for prefix, network in networks.items()}
    originals: dict[object, list[str]] = {}
    for prefix, network in networks.items():
        if len(network) > 1 and not set(names[prefix]).isdisjoint(trained):
            originals.setdefault(_structure(network), []).append(prefix)
    copies: dict[str, str] = {}
    for prefix, network in networks.items():
        candidates = originals.get(_structure(network), [])
        if not candidates or not set(names[prefix]).isdisjoint(trained):
            continue
        equal = [other for other in candidates if _are_equal(network, networks[other])]
        if not equal and len(candidates) == 1 and set(names[prefix]).isdisjoint(called):
            equal = candidates  # an average of it that has gone on
        if equal:
            copies |= {f"{prefix}.{name}": f"{equal[0]}.{name}" for name in network}
    return copies


def _structure(network: Network) -> object:
    return frozenset((name, type(layer), *(p.shape for p in layer.parameters())) for name, layer in network.items())


def _are_equal(one: Network, other: Network) -> bool:
    return all(
        torch.equal(own_part(p), own_part(q))
        for name, layer in one.items()
        for p, q in zip(layer.parameters(), other[name].parameters())
    )
