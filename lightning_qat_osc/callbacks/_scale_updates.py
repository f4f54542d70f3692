"""Updates of the learned scales: an Adam of their own inside the user's optimizer step."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import LBFGS, Adam, Optimizer

from lightning_qat_osc.surgery import quantized_layers

__all__ = ["ScaleUpdates"]


class _LogSteps:
    """Adam's steps for the logarithms of some scales: ``s <- s exp(step)``.

    A scale is a positive factor of any magnitude, so its steps are relative: Adam sees ds/d(log s) = s times the
    gradient, and no step can turn a grid around. Source of learning the logarithm: TQT, arXiv 1903.08066.
    """

    def __init__(self, scales: list[nn.Parameter], learning_rate: float) -> None:
        self.scales = scales
        self.learning_rate = learning_rate
        self._steps = [nn.Parameter(torch.zeros_like(scale)) for scale in scales]
        self.adam = Adam(self._steps, lr=learning_rate)

    def step(self, before: list[Tensor], schedule: float) -> None:
        """Move the scales from ``before`` by their gradients, with ``schedule`` times the learning rate."""
        self.adam.param_groups[0]["lr"] = schedule * self.learning_rate
        for scale, start, step in zip(self.scales, before, self._steps):
            step.zero_()
            step.grad = None if scale.grad is None else scale.grad * start
        self.adam.step()
        for scale, start, step in zip(self.scales, before, self._steps):
            scale.copy_(start * step.exp())


def _schedule(optimizer: Optimizer) -> float:
    """Share of its peak learning rate at which a scheduler holds an optimizer now; 1 without a scheduler."""
    group = optimizer.param_groups[0]
    peak = group.get("max_lr", group.get("initial_lr", group["lr"]))
    return float(group["lr"] / peak) if peak else 1.0


class ScaleUpdates:
    """Moves the scales with an Adam of their own, whatever optimizer the user has.

    The scales are parameters of the user's optimizer, so ``zero_grad``, gradient unscaling and clipping reach them;
    they are added to its first group if it was built without them, which no learning-rate scheduler notices. What that
    optimizer does to them, weight decay included, is undone after its step, and Adam's step is made instead.

    Args:
        optimizers: The user's optimizers.
        module: The quantized model. A layer's scales go with the optimizer of its weight, or else with the first.
        learning_rate: Adam's, for the logarithm of a scale. It follows the schedule of the optimizer's first group.

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
        self._updates: dict[Optimizer, _LogSteps] = {}
        self._before: dict[Optimizer, list[Tensor]] = {}
        for optimizer, ids, own in zip(optimizers, owned, scales):
            if own:
                optimizer.param_groups[0]["params"] += [s for s in own if id(s) not in ids]
                self._updates[optimizer] = _LogSteps(own, learning_rate)

    def before_step(self, optimizer: Optimizer) -> None:
        """Remember the scales that a step of the user's optimizer is about to move."""
        if optimizer in self._updates:
            self._before[optimizer] = [scale.detach().clone() for scale in self._updates[optimizer].scales]

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer) -> None:
        """Undo what the user's optimizer did to its scales, and make Adam's step with the same gradients."""
        if optimizer in self._updates:
            self._updates[optimizer].step(self._before.pop(optimizer), _schedule(optimizer))

    def state_dict(self) -> list[dict[str, Any]]:
        """States of the Adams, in the order of the user's optimizers."""
        return [update.adam.state_dict() for update in self._updates.values()]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Restore the Adams."""
        for update, state in zip(self._updates.values(), states):
            update.adam.load_state_dict(state)
