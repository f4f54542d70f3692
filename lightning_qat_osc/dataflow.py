"""Tracking of weights and layer outputs through the functions that a forward pass calls."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_qat_osc.sharding import is_sharded

__all__ = ["FollowsOutputs", "WatchesWeights"]

# functions that keep a quantized weight on its grid: the layers' own, products, and those that return the same values
_LAYER_FUNCTION = re.compile("conv|linear|embedding|lstm|gru|rnn|attention")
_PRODUCTS = "matmul __matmul__ __rmatmul__ mm bmm mv addmm addmv baddbmm einsum tensordot"
_CASTS = "to type type_as float half double bfloat16 cpu cuda clone detach contiguous __get__"
_VIEWS = (
    "t view view_as reshape reshape_as flatten unflatten permute transpose swapaxes movedim squeeze unsqueeze expand "
    "expand_as broadcast_to narrow select as_strided split chunk unbind cat stack pad flip roll repeat __getitem__"
)
_MULTIPLIES = frozenset(_PRODUCTS.split())
_KEEPS_THE_GRID = frozenset(f"{_PRODUCTS} {_CASTS} {_VIEWS}".split())

_IN_PLACE = re.compile(
    r"__i(add|sub|mul|matmul|truediv|floordiv|mod|pow|and|or|xor|lshift|rshift)__|(?!requires_grad_|detach_)\w*[^_]_"
)
_SAME_VALUES = frozenset(f"{_CASTS} {_VIEWS}".split())

_READ_ONE = frozenset(["type_as", "view_as", "reshape_as", "expand_as", "to"])
"""Functions that read only the values of their first argument."""


def _keeps_the_grid(function: str) -> bool:
    return function in _KEEPS_THE_GRID or _LAYER_FUNCTION.search(function) is not None


def _is_in_place(function: str) -> bool:
    return function in ("__setitem__", "__set__") or _IN_PLACE.fullmatch(function) is not None


def _hands_over(func: Any, function: str) -> bool:
    """Whether a function only copies, detaches or refers to a weight, and computes nothing with it."""
    attribute = getattr(getattr(func, "__self__", None), "__name__", "") if function == "__get__" else ""
    return function in ("detach", "copy_", "grad", "backward") or attribute in ("data", "grad")


def _address(x: Tensor) -> int:
    """Return a tensor's address in memory; 0 if it has none, or several: sparse, nested, sharded, in torch.func."""
    try:
        return 0 if is_sharded(x) else x.data_ptr()
    except RuntimeError:
        return 0


def _share_memory(x: object, other: Tensor) -> bool:
    if not isinstance(x, Tensor) or is_sharded(x) or is_sharded(other):
        return x is other
    return x.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _values_read(function: str, args: Any, kwargs: Any) -> list[Tensor]:
    """Return the tensors whose values a function reads, without those that only provide a shape or a type."""
    if function.startswith("new_") or function.endswith("_like"):
        return []
    read = args[:1] if function in _READ_ONE else (args, kwargs)
    return [x for x in tree_leaves(read) if isinstance(x, Tensor)]


def _written_by_a_hook(layer: nn.Module, parameter: str) -> bool:
    return parameter not in layer._parameters and not isinstance(getattr(type(layer), parameter, None), property)


class WatchesWeights(TorchFunctionMode):
    """Records uses of quantized weights other than by their layer's own function.

    Args:
        weights: Latent weight -> its name.
        running: Names and layers whose forward is running, the innermost last; the caller updates this list.

    Attributes:
        read_outside: Name of a weight -> the function that reads it outside of its layer, in full precision there.
        changed_inside: Name of a layer -> the function that computes another weight from its quantized one.
        changed_unseen: Name of a layer -> the function that changes its quantized weight unseen by autograd, as
            through ``.data``.
    """

    def __init__(self, weights: Mapping[nn.Parameter, str], running: list[tuple[str, nn.Module]]) -> None:
        super().__init__()
        self._running = running
        self._weights = {id(w): name for w, name in weights.items()}
        self._addresses = [(start, start + w.nbytes, name) for w, name in weights.items() if (start := _address(w))]
        self.read_outside: dict[str, str] = {}
        self.changed_inside: dict[str, str] = {}
        self.changed_unseen: dict[str, str] = {}
        self._aliases = WeakTensorKeyDictionary()  # tensor with the values of a quantized weight -> the layer's name

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function, and record what it does to weights among its arguments."""
        function = getattr(func, "__name__", str(func))
        in_place = bool(args) and _is_in_place(function)
        read = _values_read(function, args, kwargs)
        weights = self._quantized_weights()
        changed = [name for x in read if (name := self._layer_of(x, weights)) is not None]
        versions = [w._version for w, _ in weights] if in_place else []
        out = func(*args, **(kwargs or {}))
        values = [x for x in tree_leaves(out) if isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 0]
        if function in _SAME_VALUES and changed:
            aliases: Any = self._aliases
            for x in values:
                aliases[x] = changed[0]
        if values and not self._running and not _hands_over(func, function):
            for x in read:
                name = self._weight_read_by(function, x)
                if name is not None:
                    self.read_outside.setdefault(name, function)
        if in_place or (values and not _keeps_the_grid(function)):
            for name in changed:
                self.changed_inside.setdefault(name, function)
        for (w, name), version in zip(weights, versions):
            if w._version == version and _share_memory(args[0], w) and function != "__set__":
                self.changed_unseen[name] = function
        return out

    def _weight_read_by(self, function: str, x: Tensor) -> str | None:
        """Return the name of the weight that ``x`` is, or, in products and layer functions, whose memory it shares."""
        if isinstance(x, nn.Parameter):
            return self._weights.get(id(x))
        if function not in _MULTIPLIES and not _LAYER_FUNCTION.search(function):
            return None
        address = _address(x)
        return next((name for start, end, name in self._addresses if start <= address < end), None)

    def _quantized_weights(self) -> list[tuple[Tensor, str]]:
        """Return the quantized weights of the layer whose forward is running, each with the layer's name."""
        if not self._running:
            return []
        name, layer = self._running[-1]
        # without weights that a pruning or norm hook writes: their latent values are instance attributes as well
        own = [p for p in getattr(layer, "parameter_quantizers", ()) if not _written_by_a_hook(layer, p)]
        return [(layer.__dict__[p], name) for p in own if isinstance(layer.__dict__.get(p), Tensor)]

    def _layer_of(self, x: Tensor, weights: list[tuple[Tensor, str]]) -> str | None:
        """Return the running layer whose quantized weight ``x`` is, or is a view, a cast or a copy of; else None."""
        aliases: Any = self._aliases
        alias = aliases.get(x)  # once its layer has returned, an alias is an ordinary output
        return next((name for w, name in weights if x is w), alias if alias in dict(self._running) else None)


class FollowsOutputs(TorchFunctionMode):
    """Follows the outputs of untrained layers to the trained layers that read them.

    Attributes:
        arrived: Parts of the model whose untrained layers' outputs, or values computed from them, a trained layer has
            read.
        bypassed: Whether some trained layer has read no such values, but only others, such as the batch. The untrained
            layers then run beside it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.arrived: frozenset[str] = frozenset()
        self.bypassed = False
        self._sources = WeakTensorKeyDictionary()  # tensor -> parts of the model

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function, and mark its results if they are computed from marked tensors."""
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        sources = self._of(_values_read(name, args, kwargs)) if len(self._sources) > 0 else frozenset()
        if sources:
            in_place = bool(args) and _is_in_place(name)
            self._add((out, args[0], getattr(args[0], "_base", None)) if in_place else out, sources)
        return out

    def leave(self, child: str, output: Any) -> None:
        """Mark the output of an untrained layer."""
        self._add(output, frozenset({child}))

    def arrive(self, inputs: Any) -> None:
        """Record which parts of the model the inputs of a trained layer come from."""
        sources = self._of(inputs)
        self.arrived |= sources
        self.bypassed |= not sources

    def _of(self, values: Any) -> frozenset[str]:
        known: Any = self._sources
        return frozenset().union(*(known.get(x, ()) for x in tree_leaves(values) if isinstance(x, Tensor)))

    def _add(self, values: Any, sources: frozenset[str]) -> None:
        known: Any = self._sources
        for x in tree_leaves(values):
            if isinstance(x, Tensor):
                known[x] = sources | known.get(x, frozenset())
