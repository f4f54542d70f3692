"""What becomes of weights and of layers' outputs in a forward pass, function by function."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["FollowsOutputs", "WatchesWeights"]

# what leaves a quantized weight on its grid: the layers' own functions, products, and other views of the same values
_LAYER_FUNCTION = re.compile("conv|linear|embedding|lstm|gru|rnn|attention")
_PRODUCTS = "matmul __matmul__ __rmatmul__ mm bmm mv addmm addmv baddbmm einsum tensordot"
_CASTS = "to type type_as float half double bfloat16 cpu cuda clone detach contiguous __get__"
_VIEWS = (
    "t view view_as reshape reshape_as flatten unflatten permute transpose swapaxes movedim squeeze unsqueeze expand "
    "expand_as broadcast_to narrow select as_strided split chunk unbind cat stack pad flip roll repeat __getitem__"
)
_KEEPS_THE_GRID = frozenset(f"{_PRODUCTS} {_CASTS} {_VIEWS}".split())

_READ_ONE = frozenset(["type_as", "view_as", "reshape_as", "expand_as", "to"])
"""Functions that read the values of their first argument alone."""


def _keeps_the_grid(function: str) -> bool:
    return function in _KEEPS_THE_GRID or _LAYER_FUNCTION.search(function) is not None


def _written_by_a_hook(layer: nn.Module, parameter: str) -> bool:
    return parameter not in layer._parameters and not isinstance(getattr(type(layer), parameter, None), property)


class WatchesWeights(TorchFunctionMode):
    """Notes what is done to quantized weights besides their layer's own function.

    Args:
        weights: id of a latent weight -> its name.
        running: The layers whose forward runs, innermost last, with their names.

    Attributes:
        read_outside: Name of a weight -> the function that reads it outside of its layer, in full precision there.
        changed_inside: Name of a layer -> the function that computes another weight from its quantized one.
    """

    def __init__(self, weights: dict[int, str], running: list[tuple[str, nn.Module]]) -> None:
        super().__init__()
        self._weights, self._running = weights, running
        self.read_outside: dict[str, str] = {}
        self.changed_inside: dict[str, str] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at the arguments of a function."""
        out = func(*args, **(kwargs or {}))
        outputs = out if isinstance(out, (tuple, list)) else (out,)
        if any(isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 0 for x in outputs):
            function = getattr(func, "__name__", str(func))
            if self._running:
                name, layer = self._running[-1]
                # not weights that a hook of pruning or a norm writes: their latent value is an attribute, too
                own = getattr(layer, "parameter_quantizers", ())
                substitutes = [parameter for parameter in own if not _written_by_a_hook(layer, parameter)]
                if not _keeps_the_grid(function) and any(
                    x is layer.__dict__.get(parameter) for x in args for parameter in substitutes
                ):
                    self.changed_inside.setdefault(name, function)
                return out
            for x in args:
                for element in x if isinstance(x, (list, tuple)) else (x,):
                    if id(element) in self._weights and isinstance(element, nn.Parameter):
                        self.read_outside.setdefault(self._weights[id(element)], function)
        return out


class FollowsOutputs(TorchFunctionMode):
    """Follows what layers compute that are not trained, to the layers that are.

    Attributes:
        arrived: Children of the model whose untrained layers' outputs, or what was computed from them, a trained layer
            has read.
        bypassed: Whether a trained layer has read nothing of the kind, but the batch: then the others are beside it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.arrived: frozenset[str] = frozenset()
        self.bypassed = False
        self._sources = WeakTensorKeyDictionary()  # tensor -> children of the model

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Mark what was computed from what is followed."""
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if len(self._sources) == 0 or name.startswith("new_") or name.endswith("_like"):
            return out
        sources = self._of(args[:1] if name in _READ_ONE else (args, kwargs))
        if sources:
            in_place = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
            self._add((out, args[0], getattr(args[0], "_base", None)) if in_place and args else out, sources)
        return out

    def leave(self, child: str, output: Any) -> None:
        """Note the output of a layer that is not trained."""
        self._add(output, frozenset({child}))

    def arrive(self, inputs: Any) -> None:
        """Note the inputs of a layer that is."""
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
