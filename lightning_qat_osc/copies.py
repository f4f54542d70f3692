"""Untrained copies of a network inside the same model, such as an exponential moving average."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_qat_osc.sharding import is_sharded

__all__ = ["untrained_copies"]

Network = dict[str, nn.Module]
"""Layers by their names inside the network."""

_NEAR = 0.5  # largest relative distance of two near weights; independent weights are about 1.4 apart


def untrained_copies(layers: Mapping[str, nn.Module], trained: Collection[str], *, near: bool = True) -> dict[str, str]:
    """Find the layers of untrained copies of a trained network, and the layer that each is a copy of.

    A copy contains several layers, none of them trained, with the same names, classes and shapes as the original's and
    with weights near the original's. Two entries of one container, such as the blocks of a transformer, are not copies.
    Lazy layers and those with sharded weights, of which each process sees only a part, are left out.

    Args:
        layers: The layers of a model, by name.
        trained: Names of the layers with parameters that are trained.
        near: Compare weights, too; those on the meta device are never near. False: compare only the structure, and only
            of whole networks, not of parts of them.

    Returns:
        Name of a layer of a copy -> name of the layer in the original.
    """
    networks: dict[str, Network] = {}  # outer networks before those inside them
    for name, layer in layers.items():
        if any(is_lazy(p) or is_sharded(p) for p in layer.parameters()):
            continue
        parts = name.split(".")
        for i in range(1, len(parts)):
            networks.setdefault(".".join(parts[:i]), {})[".".join(parts[i:])] = layer
    is_trained = {
        prefix: any(f"{prefix}.{name}" in trained for name in network) for prefix, network in networks.items()
    }
    originals: dict[object, list[str]] = {}
    for prefix, network in networks.items():
        if len(network) > 1 and is_trained[prefix]:
            originals.setdefault(_structure(network), []).append(prefix)
    copies: dict[str, str] = {}
    for prefix, network in networks.items():
        if is_trained[prefix]:
            continue
        parts = prefix.split(".")
        around = (networks[".".join(parts[:i])] for i in range(1, len(parts)) if not is_trained[".".join(parts[:i])])
        if not near and any(len(other) > len(network) for other in around):
            continue  # part of a larger network that is not trained, as the attention in a frozen encoder
        structure = _structure(network)
        candidates = [
            (f"{original}.", networks[original])
            for original in originals.get(structure, [])
            if not _in_one_container(prefix, original)
        ]
        beside = {name: layers[name] for name in network if name in layers}  # layers of the model itself
        if len(beside) > 1 and _structure(beside) == structure and not beside.keys().isdisjoint(trained):
            candidates.append(("", beside))
        for original, its in candidates:
            if not near or _are_near(network, its):
                for name in network:
                    copies.setdefault(f"{prefix}.{name}", f"{original}{name}")
                break
    return copies


def _structure(network: Network) -> object:
    return frozenset((name, type(layer), *(p.shape for p in layer.parameters())) for name, layer in network.items())


def _in_one_container(one: str, other: str) -> bool:
    """Whether two names first differ only in numbers, as blocks.0 and blocks.1 do, or block1 and block2."""
    parting = next(((a, b) for a, b in zip(one.split("."), other.split(".")) if a != b), ("", ""))
    return len({re.sub(r"\d+", "0", name) for name in parting}) == 1


def _are_near(one: Network, other: Network) -> bool:
    return all(
        not p.is_meta and bool(torch.dist(p.detach(), q.detach()) <= _NEAR * q.detach().norm())
        for name, layer in one.items()
        for p, q in zip(layer.parameters(), other[name].parameters())
        if p.dim() > 1
    )
