"""Argument checks. Their errors name the argument, the rule and the value."""

from __future__ import annotations

import math
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import Any, get_args

from torch import nn

__all__ = [
    "check_bits",
    "check_choice",
    "check_count",
    "check_file",
    "check_flag",
    "check_function",
    "check_module",
    "check_number",
]


def check_bits(name: str, value: object, *, none: str | None = None, default_allowed: bool = False) -> None:
    """Raise if a value is not a valid bit width.

    Args:
        name: The argument's name.
        value: Its value.
        none: What the value None stands for, for the message; None if that value is not allowed.
        default_allowed: Whether "default" is allowed.

    Raises:
        TypeError: If the value is not an integer.
        ValueError: If the value is outside 2 to 8.
    """
    if (none is not None and value is None) or (default_allowed and value == "default"):
        return
    or_none = "" if none is None else f", or None for {none}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer from 2 to 8{or_none}, got {value!r}")
    if not 2 <= value <= 8:
        raise ValueError(f"{name} must be from 2 to 8{or_none}, got {value}")


def check_count(name: str, value: object) -> None:
    """Raise if a value is not a positive integer.

    Raises:
        TypeError: If the value is not an integer.
        ValueError: If the value is below 1.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer of at least 1, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def check_number(
    name: str, value: object, *, low: float, high: float = math.inf, low_open: bool = False, high_open: bool = False
) -> None:
    """Raise if a value is not a finite number in ``[low, high]``, where either end may be open.

    Raises:
        TypeError: If the value is not a number.
        ValueError: If the value is outside the interval, infinite or NaN.
    """
    interval = f"{'(' if low_open else '['}{low:g}, {high:g}{')' if high_open or math.isinf(high) else ']'}"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number in {interval}, got {value!r}")
    number = float(value)
    above = low < number if low_open else low <= number
    below = number < high if high_open else number <= high
    if not above or not below or math.isinf(number):
        raise ValueError(f"{name} must be in {interval}, got {value}")


def check_choice(name: str, value: object, choices: Any) -> None:
    """Raise if a value is not one of the choices of a Literal.

    Raises:
        ValueError: If the value is not a choice.
    """
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, get_args(choices)))}, got {value!r}")


def check_flag(name: str, value: object) -> None:
    """Raise if a value is neither True nor False.

    Raises:
        TypeError: If the value is not a bool.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_file(name: str, value: object) -> None:
    """Raise if a value cannot be the path of a file.

    Raises:
        TypeError: If the value is not a path.
        ValueError: If the path is a folder.
    """
    if not isinstance(value, (str, PathLike)):
        raise TypeError(f"{name} must be the path of a file, got {value!r}")
    if Path(value).is_dir():
        raise ValueError(f"{name} must be the path of a file, and {value} is a folder")


def check_module(name: str, value: object) -> None:
    """Raise if a value is not a module. A module class instead of an instance is not allowed either.

    Raises:
        TypeError: If the value is not a module.
    """
    if isinstance(value, type) and issubclass(value, nn.Module):
        raise TypeError(
            f"{name} must be a module, got the class {value.__name__}: pass an instance, {value.__name__}(...)"
        )
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name} must be a torch.nn.Module, got {value!r}")


def check_function(name: str, value: object) -> None:
    """Raise if a value cannot be called. None is allowed and stands for no function.

    Raises:
        TypeError: If the value is neither callable nor None.
    """
    if value is not None and not callable(value):
        raise TypeError(f"{name} must be a function, got {value!r}")
