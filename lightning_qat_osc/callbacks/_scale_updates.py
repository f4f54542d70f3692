"""Updates of the learned scales, by an Adam optimizer of their own next to the user's optimizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import compress
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import LBFGS, Adam, Optimizer

from lightning_qat_osc.lookup import own_parameters, quantized_layers
from lightning_qat_osc.quantizers import Quantizer
from lightning_qat_osc.sharding import full_tensor, shard_full

__all__ = ["ScaleUpdates", "add_scales_to_state"]


class _LogSteps:
    """Adam's steps on the logarithms of scales: ``s <- s exp(step)``.

    A scale is a positive factor of any magnitude, so its steps are relative: Adam sees the gradient times
    ds/d(log s) = s, and no step can make a scale negative. Source of learning the logarithm: TQT, arXiv 1903.08066.

    Args:
        quantizers: The quantizers whose scales to move.
        optimizer: The user's optimizer, whose schedule the learning rate follows.
        learning_rate: Adam's learning rate while the learning rate of the scale's parameter group is at its peak.
    """

    def __init__(self, quantizers: list[Quantizer], optimizer: Optimizer, learning_rate: float) -> None:
        self.quantizers = quantizers
        self._optimizer = optimizer
        self._learning_rate = learning_rate
        self.peaks: list[float] = []  # largest learning rate of each group
        self._note_peaks()
        self._steps = [nn.Parameter(torch.zeros_like(q.scale)) for q in quantizers]
        self.adam = Adam(self._steps, lr=learning_rate, fused=True)  # one kernel for all

    def step(self) -> None:
        """Move the scales by their gradients, which :meth:`ScaleUpdates.before_step` has set aside."""
        moved = [(q, step) for q, step in zip(self.quantizers, self._steps) if q.scale_grad is not None]
        if not moved:
            return
        self._note_peaks()
        of_parameter = self._shares()
        shares = [of_parameter.get(id(q.scale), 1.0) for q, _ in moved]
        largest = max(shares)
        self.adam.param_groups[0]["lr"] = largest * self._learning_rate
        scales: list[Tensor] = [q.scale for q, _ in moved]
        steps: list[Tensor] = [step for _, step in moved]
        gradients = torch._foreach_mul([q.scale_grad for q, _ in moved if q.scale_grad is not None], scales)
        for (q, step), gradient in zip(moved, gradients):
            step.grad, q.scale_grad = gradient, None
        torch._foreach_zero_(steps)
        self.adam.step()
        if min(shares) < largest:  # Adam's steps are proportional to its learning rate
            torch._foreach_mul_(steps, [share / largest for share in shares])
        torch._foreach_mul_(scales, list(torch._foreach_exp(steps)))
        self.adam.zero_grad()

    def _note_peaks(self) -> None:
        """Note the largest learning rate that each group has had, or is known to reach."""
        groups = self._optimizer.param_groups
        # a group that a callback adds may start with a low rate, and rise to that of the others
        self.peaks += [max(self.peaks, default=0.0)] * (len(groups) - len(self.peaks))
        for i, group in enumerate(groups):
            self.peaks[i] = max(self.peaks[i], *(_rate(group, key) for key in ("lr", "initial_lr", "max_lr")))

    def _shares(self) -> dict[int, float]:
        """Return, by parameter id, the current learning rate of the parameter's group as a share of its peak."""
        shares: dict[int, float] = {}
        for group, peak in zip(self._optimizer.param_groups, self.peaks):
            finds_it_by_itself = group.get("lr") is None
            share = 1.0 if finds_it_by_itself else min(1.0, _rate(group, "lr") / (peak or 1.0))
            shares.update(dict.fromkeys(map(id, group["params"]), share))
        return shares


def _rate(group: dict[str, Any], key: str) -> float:
    """Return a learning rate of a group; 0 if the group has none, or None because the optimizer chooses it."""
    return float(group.get(key) or 0.0)


class ScaleUpdates:
    """Moves the scales with an Adam optimizer of their own, whatever optimizer the user has.

    The scales are parameters of the user's optimizer, so that ``zero_grad`` and the unscaling of gradients include
    them. If the optimizer was built without them, they are added to the group of their layer's largest parameter,
    which does not affect learning-rate schedulers; they are removed from every other optimizer. Scales that a
    finetuning callback has frozen are not added here, because that callback adds them together with the weights.

    Before a step of the user's optimizer, the gradients of the scales are set aside. The optimizer then skips the
    scales, also in weight decay, and gradient clipping uses the norm of the weights' gradients alone. After this step,
    Adam takes its step.

    Args:
        optimizers: The user's optimizers.
        module: The quantized model. The scales of a layer go with the optimizer of the layer's largest parameter that
            is in one, or else with the first optimizer.
        learning_rate: Adam's, for the logarithm of a scale. It follows the schedule of the scale's parameter group.

    Raises:
        MisconfigurationException: If an optimizer is L-BFGS, which evaluates the loss several times per step.
    """

    def __init__(self, optimizers: list[Optimizer], module: nn.Module, learning_rate: float) -> None:
        for optimizer in optimizers:
            if isinstance(optimizer, LBFGS):
                raise MisconfigurationException(
                    "LBFGS evaluates the loss several times per step, but scales and oscillations are updated only "
                    "once per step: use a first-order optimizer such as SGD or AdamW."
                )
        places = {
            id(p): (i, j)
            for i, optimizer in reversed(list(enumerate(optimizers)))  # the first optimizer of a parameter wins
            for j, group in enumerate(optimizer.param_groups)
            for p in group["params"]
        }
        owner: dict[Quantizer, tuple[int, int]] = {}  # indices of optimizer and group
        shared = _in_several(optimizers)
        for name, layer in quantized_layers(module).items():
            if any(id(p) in shared for p in own_parameters(layer)):
                rank_zero_warn(
                    f"More than one optimizer has parameters of layer '{name}', and possibly of other layers: their "
                    "scales are updated only in the steps of the first of these optimizers."
                )
                shared.clear()  # warn once
            parameters = sorted(own_parameters(layer), key=Tensor.numel, reverse=True)
            place = next((places[id(p)] for p in parameters if id(p) in places), (0, 0))
            for q in layer.quantizers():
                owner.setdefault(q, place)
        names = {id(p): name for name, p in module.named_parameters()}
        self._updates: dict[Optimizer, _LogSteps] = {}
        for i, optimizer in enumerate(optimizers):
            ids = {id(p) for group in optimizer.param_groups for p in group["params"]}
            others = {id(q.scale) for q, (index, _) in owner.items() if index != i}
            # an optimizer may have scales of another one's layers, as when the user sorts parameters by p.ndim
            for group in optimizer.param_groups if ids & others else []:
                _filter_group(group, [id(p) not in others for p in group["params"]])
            own = [q for q, (index, _) in owner.items() if index == i]
            if own and optimizer.param_groups:  # Lightning's mock optimizer has no groups
                for q in own:
                    if id(q.scale) not in ids and q.scale.requires_grad:
                        group = optimizer.param_groups[owner[q][1]]
                        group["params"].append(q.scale)
                        if "param_names" in group:
                            group["param_names"].append(names[id(q.scale)])
                self._updates[optimizer] = _LogSteps(own, optimizer, learning_rate)

    def before_step(self, optimizer: Optimizer) -> None:
        """Set the gradients of the scales aside, so that the optimizer skips the scales."""
        if optimizer in self._updates:
            for q in self._updates[optimizer].quantizers:
                q.scale_grad, q.scale.grad = q.scale.grad, None

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer) -> None:
        """Move the scales by a step of Adam."""
        if optimizer in self._updates:
            self._updates[optimizer].step()

    def state_dict(self) -> list[dict[str, Any]]:
        """Return the states of the Adam optimizers, in the order of the user's optimizers, with unsharded tensors."""
        states = [{**update.adam.state_dict(), "peaks": update.peaks} for update in self._updates.values()]
        for state in states:
            state["state"] = {i: {k: full_tensor(v) for k, v in values.items()} for i, values in state["state"].items()}
        return states

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Restore the states of the Adam optimizers."""
        for update, state in zip(self._updates.values(), states):
            update.peaks = list(state["peaks"])
            update.adam.load_state_dict(state)
            for step, values in update.adam.state.items():
                values.update({k: shard_full(v, step) for k, v in values.items() if v.shape == step.shape})


def _in_several(optimizers: list[Optimizer]) -> set[int]:
    """Return the ids of parameters that are in several optimizers."""
    counts = Counter(id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"])
    return {key for key, count in counts.items() if count > 1}


def _filter_group(group: dict[str, Any], which: Sequence[bool]) -> None:
    """Keep only some parameters of an optimizer's group, and their names if it was built with names."""
    for key in {"params", "param_names"} & group.keys():
        group[key][:] = list(compress(group[key], which))


def add_scales_to_state(state: dict[str, Any], optimizer: Optimizer, scales: set[int]) -> dict[str, Any]:
    """Convert the state of an optimizer without scales to one that an optimizer with scales can load.

    Args:
        state: The saved ``optimizer.state_dict()``, without scales.
        optimizer: The current optimizer, with the same parameters in the same order, and scales among them.
        scales: ids of the scales.

    Returns:
        A state that ``optimizer`` can load; ``state`` itself if the groups have other numbers of parameters.
    """
    sizes = [sum(id(p) not in scales for p in group["params"]) for group in optimizer.param_groups]
    if sizes != [len(group["params"]) for group in state["param_groups"]]:
        return state
    indices: dict[int, int] = {}
    groups = []
    position = 0
    for saved, group in zip(state["param_groups"], optimizer.param_groups):
        old = iter(saved["params"])
        indices |= {next(old): position + i for i, p in enumerate(group["params"]) if id(p) not in scales}
        groups.append({**saved, "params": list(range(position, position + len(group["params"])))})
        position += len(group["params"])
    return {"state": {indices[key]: value for key, value in state["state"].items()}, "param_groups": groups}
