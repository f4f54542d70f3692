"""The parameters of the optimizers, and the low-bit weights of each optimizer."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_qat_osc.lookup import (
    QuantizedWeight,
    is_quantized,
    quantized_layers,
    quantized_weights,
    weights_with_quantizers,
)
from lightning_qat_osc.sweep import WeightBatch, make_batches

__all__ = ["OptimizerWeights", "optimized_parameters", "trained_weights"]


def optimized_parameters(trainer: pl.Trainer) -> list[Tensor]:
    """Return the parameters of the Trainer's optimizers."""
    return [p for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]]


def trained_weights(trainer: pl.Trainer, pl_module: pl.LightningModule, max_bits: int) -> list[QuantizedWeight]:
    """Return the low-bit weights that the Trainer's optimizers move, so none of an averaged copy or frozen backbone."""
    ids = set(map(id, optimized_parameters(trainer)))
    return [w for w in quantized_weights(pl_module, max_bits) if w.weight.requires_grad and id(w.weight) in ids]


class OptimizerWeights:
    """The low-bit weights of each optimizer. The model is searched once, and again after a weight was replaced.

    Args:
        pl_module: The quantized module, after all its layers were created.
        max_bits: Weights of more bits than this are left out.
    """

    def __init__(self, pl_module: pl.LightningModule, max_bits: int) -> None:
        self._module = pl_module
        self._max_bits = max_bits
        self._search()

    def _search(self) -> None:
        self._weights = weights_with_quantizers(self._module)
        self._owners = [
            (layer, parameter, layer._parameters.get(parameter))
            for layer in quantized_layers(self._module).values()
            for parameter in layer.parameter_quantizers
        ]
        self._batches: dict[Optimizer, tuple[list[tuple[str, torch.Size]], list[WeightBatch]]] = {}

    def of(self, optimizer: Optimizer) -> list[WeightBatch]:
        """Return the weights that an optimizer updates, in batches, without those with ``requires_grad=False``."""
        if any(layer._parameters.get(parameter) is not weight for layer, parameter, weight in self._owners):
            self._search()
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        weights = [
            w
            for w in self._weights
            if w.weight.requires_grad and id(w.weight) in owned and is_quantized(w.quantizer, self._max_bits)
        ]
        shapes = [(w.name, w.weight.shape) for w in weights]
        if optimizer not in self._batches or self._batches[optimizer][0] != shapes:
            self._batches[optimizer] = shapes, make_batches(weights)
        return self._batches[optimizer][1]

    def about_to_move(self, optimizer: Optimizer) -> list[WeightBatch]:
        """Return the batches of :meth:`of` in which a weight has a gradient."""
        return [batch for batch in self.of(optimizer) if batch.has_gradients()]
