"""Arguments of a forward: from one object, and with their quantized form in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

__all__ = ["call_arguments", "with_quantized_arguments"]


def call_arguments(example_input: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a call, from a tuple, a dictionary or a single argument."""
    if isinstance(example_input, tuple):
        return example_input, {}
    if isinstance(example_input, Mapping):
        return (), dict(example_input)
    return (example_input,), {}


def with_quantized_arguments(
    names: Iterable[str], quantize: Callable[[str, Tensor], Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Replace the first arguments of a layer's forward.

    In self-attention one tensor is all three inputs: what is given as several arguments is quantized once, as the first
    of them. Of a packed sequence the data are quantized.

    Args:
        names: Names of the arguments, in their order.
        quantize: Called with the name of an argument and its values.
        args: Positional arguments.
        kwargs: The others.

    Returns:
        Both, with what ``quantize`` returned in place.
    """
    seen: list[tuple[Any, Any]] = []
    positional, keywords = list(args), dict(kwargs)
    for i, name in enumerate(names):
        if i >= len(args) and name not in kwargs:
            break  # the layer's own forward says what is missing
        x = args[i] if i < len(args) else kwargs[name]
        before = [quantized for other, quantized in seen if other is x]
        if before:
            x_q = before[0]
        else:
            packed = isinstance(x, PackedSequence)
            x_q = x._replace(data=quantize(name, x.data)) if packed else quantize(name, x)
            seen.append((x, x_q))
        if i < len(args):
            positional[i] = x_q
        else:
            keywords[name] = x_q
    return tuple(positional), keywords
