"""Hooks before and after the steps that optimizers actually take."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

__all__ = ["OptimizerStepHooks"]

StepFunction = Callable[[Optimizer], None]


class OptimizerStepHooks:
    """Calls functions before and after each step that an optimizer of the Trainer actually takes.

    The functions are not called for micro-batches that only accumulate gradients. After a step they are not called if
    a gradient scaler skipped the step, or if it moved nothing, for example because a guard against NaN dropped the
    gradients. Manual optimization and several optimizers are supported.

    Before a step, Lightning calls ``on_before_optimizer_step``, before it clips gradients, and the callback reports
    this with :meth:`begin`. Lightning does not call it for an optimizer that a module uses without Lightning's wrapper:
    then torch's own step hook calls the function. Steps of an optimizer that is not one of the Trainer's would go
    unnoticed, so they are refused if that optimizer has scales.
    """

    def __init__(self) -> None:
        self._trainer: pl.Trainer | None = None
        self._scales: set[int] = set()  # by id
        self._before: dict[pl.Callback, StepFunction] = {}
        self._after: list[StepFunction] = []
        self._handles: list[RemovableHandle] = []
        self._hooked: set[Optimizer] = set()
        self._begun: set[tuple[pl.Callback, Optimizer]] = set()
        self._about_to_move: dict[Optimizer, list[tuple[Parameter, int]]] = {}  # parameters with their versions
        self._running: dict[Optimizer, tuple[int, int]] = {}  # nesting depth of steps, and the batch

    def attach(self, trainer: pl.Trainer, scales: Iterable[Parameter]) -> None:
        """Register hooks on all optimizers of the Trainer.

        Args:
            trainer: The Trainer.
            scales: The scales, which no other optimizer may move.

        Raises:
            MisconfigurationException: If torch calls no hooks around an optimizer's steps. The hooks raise it during a
                step, if a gradient scaler leaves unscaling to the optimizer, or if an optimizer that has scales is not
                one of the Trainer's.
        """
        self.detach()
        self._trainer = trainer
        self._scales.update(map(id, scales))
        self._hook()

    def add(self, callback: pl.Callback, before: StepFunction, after: StepFunction | None = None) -> None:
        """Register the functions of a callback, to be called after those that are registered already.

        Args:
            callback: The callback.
            before: Called before a step that the callback has not begun, when the gradients are in place.
            after: Called after each step.
        """
        self._before[callback] = before
        if after is not None:
            self._after.append(after)

    def begin(self, callback: pl.Callback, optimizer: Optimizer) -> bool:
        """Note that a callback has begun its preparation for the optimizer's next step.

        Returns:
            Whether the optimizer was created in the middle of the run; True only in the first call for it.
        """
        new = optimizer not in self._hooked
        if new:
            self._hook()
        if (callback, optimizer) in self._begun:  # left over from a step that a gradient scaler skipped
            self._end(optimizer)
        if not any(begun is optimizer for _, begun in self._begun):
            parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            self._about_to_move[optimizer] = [(p, p._version) for p in parameters]
        self._begun.add((callback, optimizer))
        return new

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._trainer = None
        for held in (self._scales, self._before, self._after, self._handles, self._hooked, self._begun):
            held.clear()
        self._about_to_move.clear()
        self._running.clear()

    def _hook(self) -> None:
        assert self._trainer is not None
        for handle in self._handles:
            handle.remove()
        self._handles = [register_optimizer_step_post_hook(self._after_another_step)]
        self._hooked = set(self._trainer.optimizers)
        for optimizer in self._trainer.optimizers:
            if not getattr(type(optimizer).step, "hooked", False):
                name = type(optimizer).__name__
                raise MisconfigurationException(
                    f"{name}.step calls no optimizer hooks, because {name} does not call Optimizer.__init__, so scales "
                    "and oscillations cannot follow its steps: call super().__init__(params, defaults) in it, or "
                    "return the optimizer that it wraps from configure_optimizers."
                )
            self._handles += [
                optimizer.register_step_pre_hook(self._before_step),
                optimizer.register_step_post_hook(self._after_step),
            ]

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._change_depth(optimizer, by=1) > 1:
            return None
        # set by a gradient scaler that leaves unscaling and skipping to the optimizer
        if getattr(optimizer, "found_inf", None) is not None:
            raise MisconfigurationException(
                f"{type(optimizer).__name__}(fused=True) unscales gradients, and skips steps with inf gradients, "
                "inside the optimizer, where no hook sees it, so scales and oscillations cannot follow: remove "
                "fused=True, or train without a gradient scaler (bf16-mixed, 32-true)."
            )
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)  # args[0] is the optimizer
        if closure is None:
            self._ensure_begun(optimizer)
            return None

        def closure_then_begin() -> Any:  # the closure computes gradients inside the step, maybe more than once
            self._end(optimizer)
            loss = closure()
            self._ensure_begun(optimizer)
            return loss

        return args[:1] + args[2:], {**kwargs, "closure": closure_then_begin}

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._depth(optimizer) <= 1:
            self._end(optimizer)
            moved = self._has_moved(optimizer)
            for after in self._after if moved else ():  # inside the step, so that their own steps are nested
                after(optimizer)
        self._change_depth(optimizer, by=-1)

    def _has_moved(self, optimizer: Optimizer) -> bool:
        """Whether a step has moved a parameter: one that still has its gradient, or that has changed.

        Scales are ignored, because their gradients are set aside. If only scales had gradients, the step counts.
        """
        noted = self._about_to_move.pop(optimizer, [])
        telling = [(p, version) for p, version in noted if id(p) not in self._scales]
        if not telling:
            return bool(noted)
        return any(p.grad is not None or p._version != version for p, version in telling)

    def _after_another_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if optimizer in self._hooked or any(self._depth(other) > 0 for other in self._hooked):
            return  # an optimizer that wraps others takes their steps inside its own
        if any(id(p) in self._scales for group in optimizer.param_groups for p in group["params"]):
            raise MisconfigurationException(
                f"{type(optimizer).__name__} has taken a step on quantized layers, but is not one of the Trainer's "
                "optimizers, so scales and oscillations cannot follow: return from configure_optimizers the optimizer "
                "that training_step uses, and call its step()."
            )

    def _ensure_begun(self, optimizer: Optimizer) -> None:
        for callback, before in self._before.items():
            if (callback, optimizer) not in self._begun:
                before(optimizer)

    def _end(self, optimizer: Optimizer) -> None:
        self._begun -= {(callback, optimizer) for callback in self._before}

    def _change_depth(self, optimizer: Optimizer, by: int) -> int:
        """Count nested steps: torch calls the hooks twice for a subclass that calls ``super().step()``."""
        assert self._trainer is not None
        self._running[optimizer] = self._depth(optimizer) + by, self._trainer.fit_loop.total_batch_idx
        return self._depth(optimizer)

    def _depth(self, optimizer: Optimizer) -> int:
        assert self._trainer is not None
        depth, batch = self._running.get(optimizer, (0, 0))
        # ignore a step of an earlier batch, which raised and never ended
        return depth if batch == self._trainer.fit_loop.total_batch_idx else 0
