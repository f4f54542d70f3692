"""Updates of the learned scales: an Adam of their own inside the user's optimizer step."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import LBFGS, Adam, Optimizer

from lightning_qat_osc.surgery import quantized_layers

__all__ = ["ScaleUpdates"]

_SMALLEST_SCALE = 1e-8  # a step that crossed 0 would turn the grid around


class ScaleUpdates:
    """Moves the scales with an Adam of their own, whatever optimizer and schedule the user has.

    The scales are parameters of the user's optimizer, so ``zero_grad``, gradient unscaling and clipping reach them;
    they are added to its first group if it was built without them, which no learning-rate scheduler notices. What that
    optimizer does to them, weight decay included, is undone after its step, and Adam's step is made instead.

    Args:
        optimizers: The user's optimizers.
        module: The quantized model. A layer's scales go with the optimizer of its weight, or else with the first.
        learning_rate: Adam's, constant.

    Raises:
        MisconfigurationException: If an optimizer is L-BFGS, whose line search moves all parameters as one.
    """

    def __init__(self, optimizers: list[Optimizer], module: nn.Module, learning_rate: float) -> None:
        for optimizer in optimizers:
            if isinstance(optimizer, LBFGS):
                raise MisconfigurationException(
                    "LBFGS searches along one direction for all parameters, so learned scales cannot have steps of "
                    "their own: use a first-order optimizer such as SGD or AdamW."
                )
        owned = [{id(p) for group in optimizer.param_groups for p in group["params"]} for optimizer in optimizers]
        scales: list[list[nn.Parameter]] = [[] for _ in optimizers]
        for layer in quantized_layers(module).values():
            owner = next((i for i, ids in enumerate(owned) if id(layer.weight) in ids), 0)
            for quantizer in (layer.weight_quantizer, layer.input_quantizer):
                if quantizer is not None:
                    scales[owner].append(quantizer.scale)
        self._scales: dict[Optimizer, list[nn.Parameter]] = {}
        self._adams: dict[Optimizer, Adam] = {}
        self._before: dict[Optimizer, list[Tensor]] = {}
        for optimizer, ids, own in zip(optimizers, owned, scales):
            if own:
                optimizer.param_groups[0]["params"] += [s for s in own if id(s) not in ids]
                self._scales[optimizer] = own
                self._adams[optimizer] = Adam(own, lr=learning_rate)

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer) -> None:
        """Remember the scales that a step of the user's optimizer is about to move."""
        self._before[optimizer] = [scale.clone() for scale in self._scales.get(optimizer, [])]

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer) -> None:
        """Undo what the user's optimizer did to its scales, and make Adam's step with the same gradients."""
        if optimizer not in self._adams:
            return
        scales = self._scales[optimizer]
        for scale, before in zip(scales, self._before.pop(optimizer)):
            scale.copy_(before)
        self._adams[optimizer].step()
        for scale in scales:
            scale.clamp_(min=_SMALLEST_SCALE)

    def state_dict(self) -> list[dict[str, Any]]:
        """States of the Adams, in the order of the user's optimizers."""
        return [adam.state_dict() for adam in self._adams.values()]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Restore the Adams."""
        for adam, state in zip(self._adams.values(), states):
            adam.load_state_dict(state)
