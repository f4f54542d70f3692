"""Schedules: factories that return a pure function of the optimizer step, which has no state to save.

The returned functions can be pickled, because strategies that spawn processes pickle callbacks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

__all__ = ["Schedule", "constant", "cosine_anneal"]

Schedule = Callable[[float], float]
"""A value for each optimizer step, counted from 0."""


def constant(value: float) -> Schedule:
    """Return a schedule that stays at ``value``."""
    return partial(_constant, value)


def _constant(value: float, step: float) -> float:
    return value


def cosine_anneal(initial_value: float, final_value: float, total_steps: int, start: float = 0.0) -> Schedule:
    r"""Return a schedule from one value up or down to another along half a cosine.

    .. math:: a(t) = e + \tfrac{1}{2} (i - e) (1 + \cos(\pi (t - t_0) / (T - t_0))), \qquad t_0 \le t \le T

    with i before :math:`t_0` and e after T. Source: Nagel et al., arXiv 2203.11086, Secs. 4.2-4.3; the constant
    value before :math:`t_0` is from the authors' code.

    Args:
        initial_value: The value up to the start, i.
        final_value: The value at ``total_steps`` and after, e.
        total_steps: Optimizer steps of the whole run, T, at least 1.
        start: Share of the run at which annealing begins, :math:`t_0 / T`, in [0, 1).

    Returns:
        A function of the optimizer step.

    Raises:
        ValueError: If ``total_steps`` is below 1 or ``start`` outside [0, 1).
    """
    if total_steps < 1:
        raise ValueError(f"total_steps must be at least 1, got {total_steps=}")
    if not 0.0 <= start < 1.0:
        raise ValueError(f"start must be in [0, 1), got {start=}")
    return partial(_cosine, initial_value, final_value, total_steps, start * total_steps)


def _cosine(initial_value: float, final_value: float, total_steps: int, start_step: float, step: float) -> float:
    if step <= start_step:
        return initial_value
    if step >= total_steps:
        return final_value
    progress = (step - start_step) / (total_steps - start_step)
    return final_value + 0.5 * (initial_value - final_value) * (1.0 + math.cos(math.pi * progress))
