"""Calibration: watch a few forward passes, then set the bits of the first and last layer and every range."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_qat_osc.config import QuantConfig
from lightning_qat_osc.copies import untrained_copies
from lightning_qat_osc.dataflow import FollowsOutputs, WatchesWeights
from lightning_qat_osc.lookup import own_parameters, quantized_layers, weight_name
from lightning_qat_osc.quantized_layer import QuantizedLayer, latent_weight
from lightning_qat_osc.quantizers import InputQuantizer
from lightning_qat_osc.surgery import quantizable_layers

__all__ = ["Calibrator"]

_SAMPLE_PER_CALL = 2**16  # elements of each layer's input that are kept of a forward pass
_SAMPLE = 2**18  # and of all forward passes, of all ranks


@dataclass
class _Observed:
    """What was seen of one layer's input: a sample, and the extremes and finiteness of all of it."""

    samples: list[Tensor] = field(default_factory=list)
    lows: list[Tensor] = field(default_factory=list)
    highs: list[Tensor] = field(default_factory=list)
    finite: list[Tensor] = field(default_factory=list)
    every: int = field(default=1, kw_only=True)  # element of a call's sample is kept: fewer, the more calls there are

    def add(self, x: Tensor) -> None:
        flat = x.detach().flatten()
        is_finite = flat.isfinite().all()
        flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
        # an odd stride does not fall in step with channels or pixels, of which there is mostly an even number
        stride = -(-flat.numel() // _SAMPLE_PER_CALL) | 1
        self.samples.append(flat[:: stride * self.every].clone())
        self.thin_out(_SAMPLE)
        flat = flat.nan_to_num(0.0, 0.0, 0.0)
        self.lows.append(flat.amin())
        self.highs.append(flat.amax())
        self.finite.append(is_finite)

    def thin_out(self, most: int) -> None:
        """Keep at most so many elements, as large a share of each call."""
        while sum(map(len, self.samples)) > max(most, len(self.samples)):
            self.every *= 3  # odd, as the strides are
            self.samples = [sample[::3].clone() for sample in self.samples]

    def extend(self, other: _Observed) -> None:
        self.samples += other.samples
        self.lows += other.lows
        self.highs += other.highs
        self.finite += other.finite

    def to(self, device: torch.device | str) -> _Observed:
        return _Observed(*([t.to(device) for t in ts] for ts in (self.samples, self.lows, self.highs, self.finite)))


def _child(name: str) -> str:
    return name.partition(".")[0]


class Calibrator:
    """Initialises the ranges of a quantized model from the inputs that its layers see.

    Args:
        module: A model with quantizers.
        config: What was asked of :func:`~lightning_qat_osc.quantize_model`.
        optimized: The parameters that optimizers have, for which those that want a gradient stand in if there are none.
            An average or a target network may want gradients that nobody uses.
    """

    def __init__(self, module: nn.Module, config: QuantConfig, optimized: Iterable[Tensor] = ()) -> None:
        self._config = config
        self._layers = quantizable_layers(module)
        ids = set(map(id, optimized))
        # the first and last layer are the model's, not those of a frozen teacher or loss network beside it
        trainable = {
            name
            for name, layer in self._layers.items()
            if any(p.requires_grad and (not ids or id(p) in ids) for p in own_parameters(layer))
        }
        self._trainable = trainable or set(self._layers)
        self._observed: dict[tuple[str, str], _Observed] = {}  # by layer and argument
        self._same: set[tuple[str, str]] = set()  # arguments that were, in some call, the tensor of one before them
        self._called: dict[str, None] = {}  # in the order of first calls
        self._flow = FollowsOutputs()
        self._followed = False
        self._first: str | None = None
        self._last: str | None = None
        self._running: list[tuple[str, nn.Module]] = []
        weights = {
            id(weight): weight_name(name, parameter)
            for name, layer in quantized_layers(module).items()
            for parameter in layer.parameter_quantizers
            if (weight := layer._parameters.get(parameter)) is not None
        }
        self._watch = WatchesWeights(weights, self._running)

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
                self._followed = True
            yield

    def _enter(self, name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._running.append((name, layer))
        self._called[name] = None
        in_backward = torch._C._current_graph_task_id() != -1  # as activation checkpointing runs layers again
        if name in self._trainable and not in_backward:
            self._flow.arrive((args, kwargs))
            self._last = name
        if not isinstance(layer, QuantizedLayer):
            return
        seen: list[Any] = []
        for i, argument in enumerate(layer.argument_quantizers):
            x = args[i] if i < len(args) else kwargs.get(argument)
            x = x.data if isinstance(x, PackedSequence) else x
            if any(x is other for other in seen):
                self._same.add((name, argument))
                continue  # one tensor is quantized once
            if not isinstance(x, Tensor):
                continue
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
        distributed = dist.is_available() and dist.is_initialized()
        if distributed and dist.get_world_size() > 1:
            self._gather()
        copies = untrained_copies(self._layers, self._trainable)
        words: list[str] = []
        if self._followed and not distributed:  # DDP has to be told of teachers before it waits for them
            words += self._of_teachers(flow.arrived, copies)
        if self._config.first_last_bits is not None:
            words += self._set_first_last_bits(self._config.first_last_bits)
        words += [
            f"The weight of layer '{name}' is also read outside of the layer, by {reader}, in full precision there."
            for name, reader in self._watch.read_outside.items()
        ]
        words += [
            f"Layer '{name}' computes another weight from its quantized one, by {function}, which may be off the grid."
            for name, function in self._watch.changed_inside.items()
        ]
        self._check_recomputation()
        waiting: list[tuple[InputQuantizer, InputQuantizer]] = []
        for name, of in copies.items():
            layer, original = self._layers[name], self._layers[of]
            if isinstance(layer, QuantizedLayer) and isinstance(original, QuantizedLayer) and name != self._first:
                waiting += self._follow(layer, original, called=name in self._called)
        for name, layer in self._layers.items():
            if isinstance(layer, QuantizedLayer):
                for parameter, w in layer.weight_quantizers().items():
                    w.read_outside = self._watch.read_outside.get(weight_name(name, parameter), w.read_outside)
                words += [f"Layer '{name}': {word}." for word in self._calibrate(name, layer, waiting)]
        for x, other in waiting:
            x.take_over(other)
        return words

    def _of_teachers(self, backbones: Collection[str], copies: Collection[str]) -> Iterator[str]:
        """A sentence on layers that nobody trains, but for those of backbones, and one on copies of trained layers."""
        fixed = [
            name
            for name in self._called
            if name not in self._trainable
            and _child(name) not in backbones
            and isinstance(self._layers[name], QuantizedLayer)
        ]
        followers = [name for name in fixed if name in copies]
        beside = {_child(name) for name in followers}
        others = [name for name in fixed if _child(name) not in beside]
        leave_out = "in full precision with LayerRule(pattern='{}', weight_bits=None, activation_bits=None)."
        if others:
            yield (
                f"Nothing that is trained follows {', '.join(others[:5])}, which are quantized and not trained. If "
                "they are of a teacher or a loss network, whose outputs are to stay as they are, leave them "
                f"{leave_out.format(others[0])}"
            )
        if followers:
            yield (
                f"{', '.join(followers[:5])} compute in training and are copies of layers that are trained, and "
                "quantized like these. A moving average or a target network is to be; leave a fixed teacher "
                f"{leave_out.format(followers[0])}"
            )

    def _check_recomputation(self) -> None:
        """Refuse to make a weight again that its layer changes where autograd does not see it.

        Raises:
            ValueError: If ``recompute`` asks for it.
        """
        for name, function in self._watch.changed_unseen.items():
            layer = self._layers[name]
            if isinstance(layer, QuantizedLayer) and any(q.recompute for q in layer.weight_quantizers().values()):
                raise ValueError(
                    f"layer '{name}' changes its quantized weight through .data, by {function}, which recompute=True "
                    "cannot do again in the backward pass: leave recompute out, or the layer, with "
                    f"LayerRule(pattern='{name}', weight_bits=None, activation_bits=None)"
                )

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

    def _set_first_last_bits(self, bits: int) -> list[str]:
        ends = {name for name in (self._first, self._last) if name is not None}
        replaced = set()
        for name in ends:
            layer = self._layers[name]
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
        if others:
            return []
        return [
            f"Every quantized layer is the first or the last and has first_last_bits={bits}, none has {asked}: "
            "first_last_bits=None gives them the bits that are asked for."
            for asked in replaced - {bits, None}
        ]

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
            observed, word = self._observed.get((name, argument)), None
            if q.bits is not None and observed is not None:
                word = self._calibrate_input(q, observed)
            elif q.bits is not None and name in self._called and (name, argument) not in self._same:
                word = f"its input {argument} was no tensor during calibration and stays in full precision"
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
        for seen in self._observed.values():
            seen.thin_out(_SAMPLE // dist.get_world_size())
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
