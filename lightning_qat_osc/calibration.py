"""Calibration: watch a few forward passes, then set the bits of the first and last layer and every range."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager

import torch.distributed as dist
from torch import Tensor, nn

from lightning_qat_osc.config import QuantConfig
from lightning_qat_osc.copies import untrained_copies
from lightning_qat_osc.lookup import own_parameters, weight_name
from lightning_qat_osc.observation import Observation
from lightning_qat_osc.quantized_layer import QuantizedLayer, latent_weight
from lightning_qat_osc.quantizers import InputQuantizer
from lightning_qat_osc.surgery import quantizable_layers

__all__ = ["Calibrator"]


class Calibrator:
    """Initializes the ranges of a quantized model from its weights and from the inputs that its layers see.

    Args:
        module: A model with quantizers.
        config: The configuration given to :func:`~lightning_qat_osc.quantize_model`.
        optimized: The parameters that optimizers hold; if there are none, all that require grad count as trained. The
            parameters of an average or a target network may require grad although no optimizer updates them.
    """

    def __init__(self, module: nn.Module, config: QuantConfig, optimized: Iterable[Tensor] = ()) -> None:
        self._config = config
        layers = quantizable_layers(module)
        ids = set(map(id, optimized))
        # the first and last layer are the model's, not those of a frozen teacher or loss network beside it
        trained = {
            name
            for name, layer in layers.items()
            if any(p.requires_grad and (not ids or id(p) in ids) for p in own_parameters(layer))
        }
        self._trained = trained or set(layers)
        self._layers = layers
        self._quantized = {name: layer for name, layer in layers.items() if isinstance(layer, QuantizedLayer)}
        self._seen = Observation(layers, self._trained)

    def observe(self, *, weights: bool = True) -> AbstractContextManager[None]:
        """Watch every forward pass inside the context.

        Args:
            weights: Also watch what is done to weights; False for a context in which optimizers update them.
        """
        return self._seen.observe(weights=weights)

    def finish(self) -> list[str]:
        """Set the bits of the first and the last layer and the range of every quantizer that has none yet.

        Every rank of a distributed run ends with the same ranges, computed from the batches of all ranks.

        Returns:
            Warnings, one sentence each.

        Raises:
            ValueError: If ``recompute`` is set for a layer that changes its quantized weight unseen by autograd.
        """
        self._seen.finish()
        self._check_recomputation()
        copies = untrained_copies(self._layers, self._trained)
        warnings = [*self._untrained_warnings(copies), *self._weight_warnings()]
        if self._config.first_last_bits is not None:
            warnings += self._set_first_last_bits(self._config.first_last_bits)
        followers = self._set_bits_of(copies)
        for name, layer in self._quantized.items():
            for parameter, w in layer.weight_quantizers().items():
                w.read_outside = self._seen.weights.read_outside.get(weight_name(name, parameter), w.read_outside)
            warnings += [f"Layer '{name}': {problem}." for problem in self._calibrate(name, layer, followers)]
        for x, original in followers.items():
            x.copy_range(original)
        return warnings

    def _untrained_warnings(self, copies: Collection[str]) -> Iterator[str]:
        """Yield warnings about layers that are not trained, except backbones, and about copies of trained layers."""
        if dist.is_available() and dist.is_initialized():
            return  # under DDP, warn_about_teachers warns earlier, before DDP waits for gradients
        part_of, arrived = self._seen.part_of, self._seen.flow.arrived
        fixed = [
            name
            for name in self._seen.called
            if name in self._quantized and name not in self._trained and part_of[name] not in self._seen.backbones
        ]
        followers = [name for name in fixed if name in copies]
        beside = {part_of[name] for name in followers}
        others = [name for name in fixed if part_of[name] not in beside]
        # if all trained layers read untrained ones, as with LoRA, those after the last adapter are not a teacher
        adapted = set() if self._seen.flow.bypassed else {name.partition(".")[0] for name in self._trained}
        unread = [n for n in others if part_of[n] not in arrived and n.partition(".")[0] not in adapted]
        sizes = Counter(part_of[name] for name in others)
        # more than one layer: a network, and not a position table or the like
        read = [name for name in others if part_of[name] in arrived and sizes[part_of[name]] > 1]
        teacher = "If they belong to a teacher or a loss network whose outputs must not change, leave them"
        if unread:
            yield (
                f"Layers {', '.join(unread[:5])} are quantized but not trained, and no trained layer uses their "
                f"outputs. {teacher} {self._leave_out(unread[0])}"
            )
        if read:
            yield (
                f"Layers {', '.join(read[:5])} are quantized but not trained, and only some of the trained layers use "
                f"their outputs. {teacher} {self._leave_out(read[0])}"
            )
        if followers:
            yield (
                f"Layers {', '.join(followers[:5])} run in training and are copies of trained layers, quantized like "
                "them. That is right for a moving average or a target network; leave a fixed teacher "
                f"{self._leave_out(followers[0])}"
            )

    def _leave_out(self, name: str) -> str:
        part = self._seen.part_of[name]
        pattern = name if part == name else f"{part}.*"
        return f"in full precision with LayerRule(pattern='{pattern}', weight_bits=None, activation_bits=None)."

    def _weight_warnings(self) -> Iterator[str]:
        """Yield warnings about weights that are also used in full precision or changed after quantization."""
        for name, reader in self._seen.weights.read_outside.items():
            yield (
                f"The weight of layer '{name}' is also read outside of the layer, by {reader}, where it is in full "
                "precision."
            )
        for name, function in self._seen.weights.changed_inside.items():
            yield f"Layer '{name}' applies {function} to its quantized weight; the result may be off the grid."

    def _check_recomputation(self) -> None:
        for name, function in self._seen.weights.changed_unseen.items():
            layer = self._quantized.get(name)
            if layer is not None and any(q.recompute for q in layer.weight_quantizers().values()):
                raise ValueError(
                    f"layer '{name}' changes its quantized weight through .data, by {function}, which recompute=True "
                    "cannot repeat in the backward pass: set recompute=False, or leave the layer out with "
                    f"LayerRule(pattern='{name}', weight_bits=None, activation_bits=None)"
                )

    def _set_first_last_bits(self, bits: int) -> Iterator[str]:
        first = self._seen.first
        ends = {name for name in (first, self._seen.last) if name is not None}
        replaced = set()
        for name in ends & self._quantized.keys():
            layer = self._quantized[name]
            for w in layer.weight_quantizers().values():
                if not w.calibrated and not w.pinned:
                    replaced.add(w.bits)
                    w.set_bits(bits)
            for x in layer.input_quantizers().values():
                if not x.calibrated and not x.pinned:
                    x.set_bits(None if name == first else bits)
        for asked in () if self._quantized.keys() - ends else replaced - {bits, None}:
            yield (
                f"Every quantized layer is the first or the last and has first_last_bits={bits}, so none has the "
                f"{asked} bits that were asked for: set first_last_bits=None to give them {asked}."
            )

    def _set_bits_of(self, copies: Mapping[str, str]) -> dict[InputQuantizer, InputQuantizer]:
        """Give copies the bits of their originals, so that averages of scales fit both.

        Args:
            copies: Layer of an untrained copy of the network -> the original.

        Returns:
            Quantizers of inputs that calibration did not see -> those of the originals.
        """
        unseen: dict[InputQuantizer, InputQuantizer] = {}
        for name, of in copies.items():
            if name == self._seen.first or not {name, of} <= self._quantized.keys():
                continue
            layer, original = self._quantized[name], self._quantized[of]
            for w, other in zip(layer.weight_quantizers().values(), original.weight_quantizers().values()):
                if not w.calibrated and not w.pinned:
                    w.set_bits(other.bits)
            for x, other_input in zip(layer.input_quantizers().values(), original.input_quantizers().values()):
                if not x.calibrated and not x.pinned:
                    x.set_bits(other_input.bits)
                    if name not in self._seen.called:
                        unseen[x] = other_input
        return unseen

    def _calibrate(self, name: str, layer: QuantizedLayer, followers: Collection[InputQuantizer]) -> Iterator[str]:
        """Set the ranges of a layer, except for inputs that take over another range, and yield problems."""
        for parameter, w in layer.weight_quantizers().items():
            if w.calibrated or w.bits is None:
                continue
            weight = latent_weight(layer, parameter)
            if weight.numel() == 0:
                w.set_bits(None)  # no values, no range
            elif problem := w.calibrate(weight):
                yield f"{parameter}: {problem}"
        inputs = {key: q for key, q in layer.input_quantizers().items() if not q.calibrated and q not in followers}
        if name not in self._seen.called and any(q.bits is not None for q in inputs.values()):
            yield "it was not called during calibration, so its input stays in full precision"
        for argument, q in inputs.items():
            observed, problem = self._seen.inputs.get((name, argument)), None
            if q.bits is not None and observed is not None:
                problem = observed.calibrate(q)
            elif q.bits is not None and name in self._seen.called and (name, argument) not in self._seen.repeated:
                problem = f"its input {argument} was not a tensor during calibration and stays in full precision"
            if problem is not None:
                yield problem
            if not q.calibrated:
                # in full precision also after a resume; an input that repeats an earlier argument needs no range
                q.set_bits(None)
