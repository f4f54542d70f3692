"""Observation of forward passes: which layers run, on which inputs, and how weights and outputs are used."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.rnn import PackedSequence

from lightning_qat_osc.arguments import given_arguments
from lightning_qat_osc.dataflow import FollowsOutputs, WatchesWeights
from lightning_qat_osc.lookup import weight_name
from lightning_qat_osc.quantized_layer import QuantizedLayer
from lightning_qat_osc.quantizers import InputQuantizer

__all__ = ["Observation", "ObservedInput"]

_SAMPLE_PER_CALL = 2**16  # elements of each layer's input that are kept from one call
_SAMPLE = 2**18  # and from all calls of all ranks together
# a sampling step of a whole number plus this, the root of x^2 + x = 1, never falls into step with the features
_GOLDEN = (5**0.5 - 1) / 2
# offsets of successive calls, multiples of this, the root of x^3 + x^2 = 1, fall into step with neither
_PLASTIC = 0.7548776662466927
_UNIT = 2**20  # fixed-point positions: float32, all that some devices have, skips odd integers above 2^24


def _parts_around(name: str) -> list[str]:
    """Return the names of the modules that contain a layer, the outermost first, and last the layer's own."""
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _sample(x: Tensor, *, convolved: bool) -> Tensor:
    """Return some elements of a layer's input, flattened, from all of its features and positions."""
    flat = x.detach().flatten()
    every = -(-flat.numel() // _SAMPLE_PER_CALL)
    if convolved:  # a channel's pixels are adjacent and mostly even in number, so the step must be odd
        return flat[:: every | 1]
    return flat if every == 1 else _spread(flat, every + _GOLDEN)


def _spread(flat: Tensor, every: float, phase: float = 0.0) -> Tensor:
    """Return about one in ``every`` elements, at least one; the first is ``phase * every`` elements from the start."""
    step, start = int(every * _UNIT), int(phase * min(every, flat.numel()) * _UNIT)
    count = -(-(flat.numel() * _UNIT - start) // step)
    return flat[(torch.arange(count, device=flat.device) * step + start) // _UNIT]


@dataclass
class ObservedInput:
    """What was seen of one layer's input: a sample, and of all elements the extremes and whether they are finite."""

    samples: list[Tensor] = field(default_factory=list)
    lows: list[Tensor] = field(default_factory=list)
    highs: list[Tensor] = field(default_factory=list)
    finite: list[Tensor] = field(default_factory=list)
    convolved: bool = field(default=False, kw_only=True)  # the input is that of a convolution, [N, C, ...]
    every: float = field(default=1.0, kw_only=True)  # keep one of `every` elements of a call; grows with calls
    kept: int = field(default=0, kw_only=True)  # total elements in all samples: calls may be thousands

    def add(self, x: Tensor) -> None:
        """Add the input of one call: a floating-point tensor with at least one element."""
        sample = _sample(x, convolved=self.convolved).to(torch.promote_types(x.dtype, torch.float32))
        phase = self._phase(len(self.samples))
        self.samples.append(sample.clone() if self.every == 1.0 else _spread(sample, self.every, phase))
        self.kept += self.samples[-1].numel()
        self.thin_out(_SAMPLE)
        flat = x.detach().flatten()
        self.finite.append(flat.isfinite().all())
        flat = flat.to(sample.dtype).nan_to_num(0.0, 0.0, 0.0)
        self.lows.append(flat.amin())
        self.highs.append(flat.amax())

    def thin_out(self, most: int) -> None:
        """Keep at most ``most`` elements (or one per call), the same share of each call's sample."""
        while self.kept > max(most, len(self.samples)):
            self.every *= 2.0 + _GOLDEN
            self.samples = [_spread(sample, 2.0 + _GOLDEN, self._phase(i)) for i, sample in enumerate(self.samples)]
            self.kept = sum(sample.numel() for sample in self.samples)

    def _phase(self, call: int) -> float:
        """Return a call's sampling offset, which differs between calls and, through ``every``, between thinnings."""
        return call * _PLASTIC * self.every % 1.0

    def extend(self, other: ObservedInput) -> None:
        """Add what ``other`` has seen."""
        self.samples += other.samples
        self.kept += other.kept
        self.lows += other.lows
        self.highs += other.highs
        self.finite += other.finite

    def to(self, device: torch.device | str) -> ObservedInput:
        """Return the same observations on a device."""
        seen = ([t.to(device) for t in ts] for ts in (self.samples, self.lows, self.highs, self.finite))
        return ObservedInput(*seen, every=self.every, kept=self.kept)

    def calibrate(self, quantizer: InputQuantizer) -> str | None:
        """Set the range of an input's quantizer, if there is anything to set it from.

        Returns:
            What was wrong with the input and what that means, or None.
        """
        seen = self.to(quantizer.scale.device)
        if not seen.samples:
            return "its input was empty or contained no floating-point numbers; it stays in full precision"
        low, high = torch.stack(seen.lows).amin().item(), torch.stack(seen.highs).amax().item()
        if low == high == 0.0:
            return "its input was 0 throughout calibration and stays in full precision"
        sample = torch.cat(seen.samples)
        sample = sample[sample.isfinite()]
        if not bool(sample.any()):  # the sample missed the few values that are not 0
            sample = sample.new_tensor([low, high])
        quantizer.calibrate(sample, low, high)
        if not bool(torch.stack(seen.finite).all()):
            return "its input contained NaN or inf during calibration; its range is set from the finite values"
        return None


class Observation:
    """Watches forward passes.

    Args:
        layers: The layers of the model that can be quantized, by name.
        trained: Names of the layers that are trained.

    Attributes:
        inputs: What was seen of each argument, by layer and argument.
        repeated: Arguments that were, in some call, the same tensor as an earlier argument.
        called: Names of the layers that ran, in the order of their first calls.
        first: The first layer to run that is trained or belongs to a backbone; set by :meth:`finish`.
        last: The trained layer that was the last to begin a forward pass.
        weights: What is done to quantized weights.
        flow: Where the outputs of untrained layers go, by the parts of the model that contain these layers.
        part_of: Name of a layer -> outermost module around it without trained layers; its own name if it is trained.
    """

    def __init__(self, layers: Mapping[str, nn.Module], trained: Collection[str]) -> None:
        self._layers = layers
        self._trained = trained
        self.inputs: dict[tuple[str, str], ObservedInput] = {}
        self.repeated: set[tuple[str, str]] = set()
        self.called: dict[str, None] = {}
        self.first: str | None = None
        self.last: str | None = None
        self._running: list[tuple[str, nn.Module]] = []
        self.flow = FollowsOutputs()
        around = {part for name in trained for part in _parts_around(name)}
        self.part_of = {name: next((p for p in _parts_around(name) if p not in around), name) for name in layers}
        names = {
            weight: weight_name(name, parameter)
            for name, layer in layers.items()
            if isinstance(layer, QuantizedLayer)
            for parameter in layer.parameter_quantizers
            if (weight := layer._parameters.get(parameter)) is not None
        }
        self.weights = WatchesWeights(names, self._running)

    @contextmanager
    def observe(self, *, weights: bool = True) -> Iterator[None]:
        """Watch every forward pass inside the context.

        Args:
            weights: Also watch what is done to weights; False for a context in which optimizers update them.
        """
        with ExitStack() as watching:
            for name, layer in self._layers.items():
                before = layer.register_forward_pre_hook(partial(self._enter, name), with_kwargs=True)
                after = layer.register_forward_hook(partial(self._leave, name), always_call=True)
                watching.callback(before.remove)
                watching.callback(after.remove)
            watching.callback(self._running.clear)
            if weights:
                watching.enter_context(self.weights)
            watching.enter_context(self.flow)
            yield

    def _enter(self, name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._running.append((name, layer))
        self.called[name] = None
        in_backward = torch._C._current_graph_task_id() != -1  # activation checkpointing runs layers again there
        if name in self._trained and not in_backward:
            self.flow.arrive((args, kwargs))
            self.last = name
        if not isinstance(layer, QuantizedLayer):
            return
        for argument, given, same_as in given_arguments(layer.argument_quantizers, args, kwargs):
            x = given.data if isinstance(given, PackedSequence) else given
            if same_as is not None:
                self.repeated.add((name, argument))  # a tensor given twice is quantized once
            elif isinstance(x, Tensor):
                observed = self.inputs.setdefault((name, argument), ObservedInput(convolved=isinstance(layer, _ConvNd)))
                if x.is_floating_point() and x.numel() > 0:
                    observed.add(x)

    def _leave(self, name: str, layer: nn.Module, args: Any, output: Any) -> None:
        if self._running:
            self._running.pop()
        if name not in self._trained:
            self.flow.leave(self.part_of[name], output)

    @property
    def backbones(self) -> frozenset[str]:
        """Untrained parts whose outputs trained layers read; none if some trained layer reads only other values."""
        return frozenset() if self.flow.bypassed else self.flow.arrived

    def finish(self) -> None:
        """Find the first layer, and give every rank the calls and inputs of all ranks, in the order of the ranks."""
        self.first = next((n for n in self.called if n in self._trained or self.part_of[n] in self.backbones), None)
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return
        for seen in self.inputs.values():
            seen.thin_out(_SAMPLE // dist.get_world_size())
        inputs = {key: seen.to("cpu") for key, seen in self.inputs.items()}
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, (self.first, self.last, self.called, self.repeated, inputs))
        self.first, self.last = ranks[0][:2]
        self.inputs = {}
        for _, _, called, repeated, theirs in ranks:
            self.called |= called
            self.repeated |= repeated
            for key, seen in theirs.items():
                self.inputs.setdefault(key, ObservedInput()).extend(seen)
