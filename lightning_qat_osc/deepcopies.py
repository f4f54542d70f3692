"""Deep copies of modules, even if training or compilers have left tensors and functions on them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils import _pytree as pytree

__all__ = ["deep_copy"]

Module = TypeVar("Module", bound=nn.Module)


def deep_copy(module: Module) -> Module:
    """Return a deep copy, even of a module on which a forward pass has left tensors.

    Raises:
        TypeError: If an attribute cannot be copied; the message names it.
    """
    # such tensors (a loss, a list of losses, the weight of a norm) belong to a graph, and deepcopy refuses them
    kept = [x for m in module.modules() for x in pytree.tree_leaves(list(vars(m).values())) if isinstance(x, Tensor)]
    copies = {id(t): t.detach().clone() for t in kept if not t.is_leaf}
    try:
        copy_of_it = copy.deepcopy(module, dict(copies))
    except Exception as error:
        raise TypeError(f"{type(module).__name__} cannot be copied{_because_of(module, copies)}: {error}") from error
    for m in copy_of_it.modules():
        _forget_compiled_calls(vars(m))
    return copy_of_it


def _forget_compiled_calls(attributes: dict[str, Any]) -> None:
    """Drop compiled methods from a copy: deepcopy does not copy functions, so they would still call the original's."""
    attributes.pop("_compiled_call_impl", None)
    lightnings = attributes.get("_compiler_ctx")  # set by trainer.fit(torch.compile(module))
    if lightnings is not None:
        for key in lightnings:
            if key.startswith("original_"):
                attributes.pop(key.removeprefix("original_"), None)
        attributes["_compiler_ctx"] = None


def _because_of(module: nn.Module, copies: Mapping[int, Tensor]) -> str:
    """Name the attribute that keeps a module from being copied; empty if none is found."""
    of_any_module = vars(nn.Module())
    for name, m in module.named_modules():
        for key, value in vars(m).items():
            if key not in of_any_module:
                try:
                    copy.deepcopy(value, dict(copies))
                except Exception:
                    return f", because of its attribute '{name}.{key}'".replace("'.", "'")
    return ""
