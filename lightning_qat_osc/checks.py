"""Checks of arguments, whose errors name the argument, the rule and the value."""

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
    """Refuse a bit width that is none.

    Args:
        name: The argument's name.
        value: Its value.
        none: What None stands for; None if it is refused.
        default_allowed: Whether "default" is taken.

    Raises:
        TypeError: If it is not an integer.
        ValueError: If it is outside 2 to 8.
    """
    if (none is not None and value is None) or (default_allowed and value == "default"):
        return
    or_none = "" if none is None else f", or None for {none}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer from 2 to 8{or_none}, got {value!r}")
    if not 2 <= value <= 8:
        raise ValueError(f"{name} must be from 2 to 8{or_none}, got {value}")


def check_count(name: str, value: object) -> None:
    """Refuse what does not count something.

    Raises:
        TypeError: If it is not an integer.
        ValueError: If it is below 1.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer of at least 1, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def check_number(
    name: str, value: object, *, low: float, high: float = math.inf, low_open: bool = False, high_open: bool = False
) -> None:
    """Refuse a number outside ``[low, high]`` (or one open at an end), infinity and NaN.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is outside.
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
    """Refuse a value that is not one of a Literal's.

    Raises:
        ValueError: If it is not.
    """
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, get_args(choices)))}, got {value!r}")


def check_flag(name: str, value: object) -> None:
    """Refuse what is neither True nor False.

    Raises:
        TypeError: If it is not.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_file(name: str, value: object) -> None:
    """Refuse what is no path of a file.

    Raises:
        TypeError: If it is no path.
        ValueError: If it is a folder.
    """
    if not isinstance(value, (str, PathLike)):
        raise TypeError(f"{name} must be the path of a file, got {value!r}")
    if Path(value).is_dir():
        raise ValueError(f"{name} must be the path of a file, and {value} is a folder")


def check_module(name: str, value: object) -> None:
    """Refuse what is no module, the class of one included.

    Raises:
        TypeError: If it is not.
    """
    if isinstance(value, type) and issubclass(value, nn.Module):
        raise TypeError(f"{name} must be a module, got the class {value.__name__}: make one, {value.__name__}(...)")
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name} must be a torch.nn.Module, got {value!r}")


def check_function(name: str, value: object) -> None:
    """Refuse what cannot be called, but for None, which stands for no function.

    Raises:
        TypeError: If it cannot.
    """
    if value is not None and not callable(value):
        raise TypeError(f"{name} must be a function, got {value!r}")
