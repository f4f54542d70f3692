"""Calibration: watch a few forward passes, then set the bits of the first and last layer and every range."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_qat_osc.config import QuantConfig
from lightning_qat_osc.copies import untrained_copies
from lightning_qat_osc.lookup import own_parameters, quantized_layers, weight_name
from lightning_qat_osc.quantizers import InputQuantizer, QuantizedLayer, latent_weight
from lightning_qat_osc.surgery import quantizable_layers

__all__ = ["Calibrator"]

_SAMPLE_PER_BATCH = 2**16  # elements of each layer's input that are kept of a forward pass


@dataclass
class _Observed:
    """What was seen of one layer's input: a sample, and the extremes and finiteness of all of it."""

    samples: list[Tensor] = field(default_factory=list)
    lows: list[Tensor] = field(default_factory=list)
    highs: list[Tensor] = field(default_factory=list)
    finite: list[Tensor] = field(default_factory=list)

    def add(self, x: Tensor) -> None:
        flat = x.detach().flatten()
        is_finite = flat.isfinite().all()
        flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
        # an odd stride does not fall in step with channels or pixels, of which there is mostly an even number
        stride = -(-flat.numel() // _SAMPLE_PER_BATCH) | 1
        self.samples.append(flat[::stride].clone())
        flat = flat.nan_to_num(0.0, 0.0, 0.0)
        self.lows.append(flat.amin())
        self.highs.append(flat.amax())
        self.finite.append(is_finite)

    def extend(self, other: _Observed) -> None:
        self.samples += other.samples
        self.lows += other.lows
        self.highs += other.highs
        self.finite += other.finite

    def to(self, device: torch.device | str) -> _Observed:
        return _Observed(*([t.to(device) for t in ts] for ts in (self.samples, self.lows, self.highs, self.finite)))


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


class _WatchesWeights(TorchFunctionMode):
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


class _Flow(TorchFunctionMode):
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


def _child(name: str) -> str:
    return name.partition(".")[0]


class Calibrator:
    """Initialises the ranges of a quantized model from the inputs that its layers see.

    Args:
        module: A model with quantizers.
        config: What was asked of :func:`~lightning_qat_osc.quantize_model`.
    """

    def __init__(self, module: nn.Module, config: QuantConfig) -> None:
        self._config = config
        self._layers = quantizable_layers(module)
        # the first and last layer are the model's, not those of a frozen teacher or loss network beside it
        trainable = {n for n, layer in self._layers.items() if any(p.requires_grad for p in own_parameters(layer))}
        self._trainable = trainable or set(self._layers)
        self._observed: dict[tuple[str, str], _Observed] = {}  # by layer and argument
        self._called: dict[str, None] = {}  # in the order of first calls
        self._flow = _Flow()
        self._first: str | None = None
        self._last: str | None = None
        self._running: list[tuple[str, nn.Module]] = []
        weights = {
            id(weight): weight_name(name, parameter)
            for name, layer in quantized_layers(module).items()
            for parameter in layer.parameter_quantizers
            if (weight := layer._parameters.get(parameter)) is not None
        }
        self._watch = _WatchesWeights(weights, self._running)

    @contextmanager
    def observe(self, *, weights: bool = True) -> Iterator[None]:
        """Watch every forward pass inside the context.

        Args:
            weights: Watch what is done to weights, too: not for a context in which optimizers move them.
        """
        with ExitStack() as watching:
            for name, layer in self._layers.items():
                before = layer.register_forward_pre_hook(partial(self._enter, name), with_kwargs=True)
                after = layer.register_forward_hook(partial(self._leave, name), always_call=True)
                watching.callback(before.remove)
                watching.callback(after.remove)
            watching.callback(self._running.clear)
            if weights:
                watching.enter_context(self._watch)
                watching.enter_context(self._flow)
            yield

    def _enter(self, name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._running.append((name, layer))
        self._called[name] = None
        if name in self._trainable:
            self._flow.arrive((args, kwargs))
            self._last = name
        if not isinstance(layer, QuantizedLayer):
            return
        seen: list[Any] = []
        for i, argument in enumerate(layer.argument_quantizers):
            x = args[i] if i < len(args) else kwargs.get(argument)
            x = x.data if isinstance(x, PackedSequence) else x
            if not isinstance(x, Tensor) or any(x is other for other in seen):
                continue  # one tensor is quantized once
            seen.append(x)
            observed = self._observed.setdefault((name, argument), _Observed())
            if x.is_floating_point() and x.numel() > 0:
                observed.add(x)

    def _leave(self, name: str, layer: nn.Module, args: Any, output: Any) -> None:
        if self._running:
            self._running.pop()
        if name not in self._trainable:
            self._flow.leave(_child(name), output)

    def finish(self) -> list[str]:
        """Set the bits of the first and the last layer and the range of every quantizer that has none yet.

        Every rank of a distributed run ends with the same ranges, those of all the batches together.

        Returns:
            A sentence for each layer of which there is something to tell.
        """
        flow = self._flow
        within = frozenset() if flow.bypassed else flow.arrived  # a backbone that is frozen, but no teacher
        self._first = next((n for n in self._called if n in self._trainable or _child(n) in within), None)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self._gather()
        copies = untrained_copies(self._layers, self._trainable)
        words: list[str] = []
        if self._config.first_last_bits is not None:
            words += self._set_first_last_bits(self._config.first_last_bits)
        words += [
            f"The weight of layer '{name}' is also read outside of the layer, by {reader}, in full precision there."
            for name, reader in self._watch.read_outside.items()
        ]
        words += [
            f"Layer '{name}' computes another weight from its quantized one, by {function}, which is not on the grid."
            for name, function in self._watch.changed_inside.items()
        ]
        pairs = [(name, self._layers[name], self._layers[original]) for name, original in copies.items()]
        waiting: list[tuple[InputQuantizer, InputQuantizer]] = []
        for name, layer, original in pairs:
            if isinstance(layer, QuantizedLayer) and isinstance(original, QuantizedLayer) and name != self._first:
                waiting += self._follow(layer, original, called=name in self._called)
        for name, layer in self._layers.items():
            if isinstance(layer, QuantizedLayer):
                words += [f"Layer '{name}': {word}." for word in self._calibrate(name, layer, waiting)]
        for x, other in waiting:
            x.take_over(other)
        return words

    def _follow(
        self, layer: QuantizedLayer, original: QuantizedLayer, *, called: bool
    ) -> list[tuple[InputQuantizer, InputQuantizer]]:
        """Give a copy its original's bits, with which averages of scales fit both.

        Returns:
            The inputs that nobody saw, each with the original's.
        """
        for w, other in zip(layer.weight_quantizers().values(), original.weight_quantizers().values()):
            if not w.calibrated and not w.pinned:
                w.set_bits(other.bits)
        inputs = zip(layer.input_quantizers().values(), original.input_quantizers().values())
        followers = [(x, other) for x, other in inputs if not x.calibrated and not x.pinned]
        for x, other_input in followers:
            x.set_bits(other_input.bits)
        return [] if called else followers

    def _set_first_last_bits(self, bits: int) -> Iterator[str]:
        ends = {self._first, self._last} - {None}
        replaced = set()
        for name in ends:
            layer = self._layers[name]  # type: ignore[index]
            if not isinstance(layer, QuantizedLayer):
                continue
            for w in layer.weight_quantizers().values():
                if not w.calibrated and not w.pinned:
                    replaced.add(w.bits)
                    w.set_bits(bits)
            for x in layer.input_quantizers().values():
                if not x.calibrated and not x.pinned:
                    x.set_bits(None if name == self._first else bits)
        others = any(isinstance(layer, QuantizedLayer) for name, layer in self._layers.items() if name not in ends)
        for asked in () if others else replaced - {bits, None}:
            yield (
                f"Every quantized layer is the first or the last and has first_last_bits={bits}, none has {asked}: "
                "first_last_bits=None gives them the bits that are asked for."
            )

    def _calibrate(
        self, name: str, layer: QuantizedLayer, waiting: Sequence[tuple[InputQuantizer, InputQuantizer]]
    ) -> Iterator[str]:
        for parameter, w in layer.weight_quantizers().items():
            if w.calibrated or w.bits is None:
                continue
            weight = latent_weight(layer, parameter)
            if weight.numel() == 0:
                w.set_bits(None)  # no values, no range
            elif word := w.calibrate(weight):
                yield f"{parameter}: {word}"
        later = [x for x, _ in waiting]  # compared as objects
        inputs = {key: q for key, q in layer.input_quantizers().items() if not q.calibrated and q not in later}
        if name not in self._called and any(q.bits is not None for q in inputs.values()):
            yield "it was not called during calibration, so its input stays in full precision"
        for argument, q in inputs.items():
            observed = self._observed.get((name, argument))
            word = None if observed is None or q.bits is None else self._calibrate_input(q, observed)
            if word is not None:
                yield word
            if not q.calibrated:
                q.set_bits(None)  # for good, also after a resume; or it is the same tensor as an argument before it

    def _calibrate_input(self, quantizer: InputQuantizer, observed: _Observed) -> str | None:
        seen = observed.to(quantizer.scale.device)
        if not seen.samples:
            return "its input was empty or held no floating-point numbers; it stays in full precision"
        low, high = torch.stack(seen.lows).amin().item(), torch.stack(seen.highs).amax().item()
        if low == high == 0.0:
            return "its input was 0 throughout calibration and stays in full precision"
        sample = torch.cat(seen.samples)
        sample = sample[sample.isfinite()]
        if not bool(sample.any()):  # a few values in many zeros, which it has missed
            sample = sample.new_tensor([low, high])
        quantizer.calibrate(sample, low, high)
        if not bool(torch.stack(seen.finite).all()):
            return "its input held NaN or inf during calibration; its range comes from the finite values"
        return None

    def _gather(self) -> None:
        """Give every rank what all ranks observed, in the order of the ranks."""
        observed = {key: seen.to("cpu") for key, seen in self._observed.items()}
        mine = (self._first, self._last, self._called, observed)
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, mine)
        self._first, self._last = ranks[0][:2]
        self._observed = {}
        for _, _, called, theirs in ranks:
            self._called |= called
            for key, seen in theirs.items():
                self._observed.setdefault(key, _Observed()).extend(seen)
