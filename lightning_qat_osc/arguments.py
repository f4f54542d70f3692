"""Arguments of a forward pass: unpack them from one object, and replace them with their quantized values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

__all__ = ["call_arguments", "given_arguments", "with_quantized_arguments"]


def call_arguments(example_input: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and keyword arguments of a call, from a tuple, a dictionary or a single argument."""
    if isinstance(example_input, tuple):
        return example_input, {}
    if isinstance(example_input, Mapping):
        return (), dict(example_input)
    return (example_input,), {}


def given_arguments(
    names: Iterable[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[tuple[str, Any, str | None]]:
    """Return the first arguments of a layer's forward, as far as they are given.

    Args:
        names: Names of the arguments, in their order.
        args: Positional arguments.
        kwargs: Keyword arguments.

    Returns:
        For each argument its name, its value, and the name of an earlier argument that is the same object, or None.
    """
    given: list[tuple[str, Any, str | None]] = []
    for i, name in enumerate(names):
        if i >= len(args) and name not in kwargs:
            break  # the layer's own forward raises for missing arguments
        x = args[i] if i < len(args) else kwargs[name]
        same = [other for other, y, _ in given if y is x]
        given.append((name, x, same[0] if same else None))
    return given


def with_quantized_arguments(
    names: Iterable[str], quantize: Callable[[str, Tensor], Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Replace the first arguments of a layer's forward with their quantized values.

    In self-attention, one tensor is all three inputs: a tensor that is given as several arguments is quantized once, as
    the first of them. For a packed sequence, ``data`` is quantized.

    Args:
        names: Names of the arguments, in their order.
        quantize: Called with the name of an argument and its values; returns the quantized values.
        args: Positional arguments.
        kwargs: Keyword arguments.

    Returns:
        The positional and the keyword arguments, with quantized values in place.
    """
    quantized: dict[str, Any] = {}
    for name, x, same_as in given_arguments(names, args, kwargs):
        if same_as is not None:
            quantized[name] = quantized[same_as]
        elif isinstance(x, PackedSequence):
            quantized[name] = x._replace(data=quantize(name, x.data))
        else:
            quantized[name] = quantize(name, x)
    values = list(quantized.values())
    by_name = dict(list(quantized.items())[len(args) :])
    return (*values[: len(args)], *args[len(values) :]), {**kwargs, **by_name}
