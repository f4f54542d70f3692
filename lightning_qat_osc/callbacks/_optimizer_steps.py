"""Hooks before and after the steps that optimizers really take, and which of them are logged."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

__all__ = ["OptimizerStepHooks", "is_log_step"]


class OptimizerStepHooks:
    """Calls functions around each step that an optimizer of the Trainer really takes, whoever asked for it.

    They are not called for micro-batches that only accumulate gradients, nor, after the step, where a gradient scaler
    skips it; they are under manual optimization, and for each of several optimizers. Before a step Lightning's
    ``on_before_optimizer_step`` comes first, ahead of clipping, and says so with :meth:`begin`. Optimizers that a
    module takes without Lightning's wrapper know no such hook: their own then makes up for it.
    """

    def __init__(self) -> None:
        self._attach_again: Callable[[], None] | None = None
        self._handles: list[RemovableHandle] = []
        self._hooked: set[Optimizer] = set()
        self._begun: set[Optimizer] = set()
        self._running: dict[Optimizer, tuple[int, int]] = {}  # how deep in steps, and in which batch

    def attach(
        self, trainer: pl.Trainer, before: Callable[[Optimizer], None], after: Callable[[Optimizer], None] | None = None
    ) -> None:
        """Hook all optimizers of the Trainer.

        Args:
            trainer: The Trainer.
            before: Called where a step that nobody has begun is about to be made, with its gradients in place.
            after: Called after each step.

        Raises:
            MisconfigurationException: If torch calls no hooks around an optimizer's steps; from within a step, if a
                gradient scaler has left unscaling to the optimizer.
        """
        self.detach()
        self._attach_again = partial(self.attach, trainer, before, after)

        def ensure_begun(optimizer: Optimizer) -> None:
            if optimizer not in self._begun:
                before(optimizer)

        def deeper(optimizer: Optimizer, by: int) -> int:
            """Count steps within steps: for a subclass that calls ``super().step()`` torch calls the hooks twice."""
            batch = trainer.fit_loop.total_batch_idx
            depth, counted_in = self._running.get(optimizer, (0, batch))
            depth = by if counted_in != batch else depth + by  # a step that raised, batches ago, has not ended
            self._running[optimizer] = depth, batch
            return depth

        def before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if deeper(optimizer, by=1) > 1:
                return None
            # set by a gradient scaler that leaves its work to the optimizer
            if getattr(optimizer, "found_inf", None) is not None:
                raise MisconfigurationException(
                    f"{type(optimizer).__name__}(fused=True) unscales gradients and skips steps with inf in them where "
                    "nobody can see it, so scales and oscillations cannot follow: leave fused=True out, or train "
                    "without a gradient scaler (bf16-mixed, 32-true)."
                )
            closure = kwargs.get("closure", args[1] if len(args) > 1 else None)  # the first is the optimizer
            if closure is None:
                ensure_begun(optimizer)
                return None

            def closure_then_begin() -> Any:  # the gradients are made inside the step, and maybe more than once
                self._begun.discard(optimizer)
                loss = closure()
                ensure_begun(optimizer)
                return loss

            return args[:1] + args[2:], {**kwargs, "closure": closure_then_begin}

        def after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            if deeper(optimizer, by=-1) > 0:
                return
            self._begun.discard(optimizer)
            if after is not None:
                after(optimizer)

        for optimizer in trainer.optimizers:
            if not getattr(type(optimizer).step, "hooked", False):
                name = type(optimizer).__name__
                raise MisconfigurationException(
                    f"{name}.step calls no hooks, so scales and oscillations cannot follow it, because {name} does not "
                    "call Optimizer.__init__: call super().__init__(params, defaults) in it, or return the optimizer "
                    "that it wraps from configure_optimizers."
                )
            self._hooked.add(optimizer)
            self._handles += [
                optimizer.register_step_pre_hook(before_step),
                optimizer.register_step_post_hook(after_step),
            ]

    def begin(self, optimizer: Optimizer) -> None:
        """Note that what comes before the optimizer's next step is being done; hook it, if it is new."""
        if optimizer not in self._hooked and self._attach_again is not None:
            self._attach_again()
        self._begun.add(optimizer)

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._attach_again = None
        self._handles = []
        self._hooked = set()
        self._begun = set()
        self._running = {}


def is_log_step(trainer: pl.Trainer) -> bool:
    """Whether the loggers take the figures of the optimizer step that has just been made."""
    every = trainer.log_every_n_steps  # type: ignore[attr-defined]
    automatic = trainer.lightning_module.automatic_optimization
    # under manual optimization the loggers go by batches, while global_step counts the steps of all optimizers
    step = trainer.global_step if automatic else trainer.fit_loop.total_batch_idx + 1
    stepped = not automatic or (trainer.fit_loop.batch_idx + 1) % trainer.accumulate_grad_batches == 0
    return bool(every) and ((stepped and step % every == 0) or trainer.is_last_batch)
