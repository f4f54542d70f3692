"""Calibration: watch a few forward passes, then set the bits of the first and last layer and every range."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_qat_osc.config import QuantConfig
from lightning_qat_osc.quantizers import QuantizedLayer
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
        flat = flat.to(torch.promote_types(flat.dtype, torch.float32)).nan_to_num(0.0, 0.0, 0.0)
        # an odd stride does not fall in step with channels or pixels, of which there is mostly an even number
        stride = -(-flat.numel() // _SAMPLE_PER_BATCH) | 1
        self.samples.append(flat[::stride].clone())
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
        trainable = {name for name, layer in self._layers.items() if layer.weight.requires_grad}
        self._trainable = trainable or set(self._layers)
        self._observed: dict[str, _Observed] = {}
        self._first: str | None = None
        self._last: str | None = None

    @contextmanager
    def observe(self) -> Iterator[None]:
        """Watch every forward pass inside the context."""
        handles = [
            layer.register_forward_pre_hook(partial(self._record, name), with_kwargs=True)
            for name, layer in self._layers.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _record(self, name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if name in self._trainable:
            self._first = self._first or name
            self._last = name
        observed = self._observed.setdefault(name, _Observed())
        x = args[0] if args else next(iter(kwargs.values()))
        if x.is_floating_point() and x.numel() > 0 and isinstance(layer, QuantizedLayer) and layer.input_quantizer:
            observed.add(x)

    def finish(self) -> list[str]:
        """Set the bits of the first and the last layer and the range of every quantizer that has none yet.

        Every rank of a distributed run ends with the same ranges, those of all the batches together.

        Returns:
            A sentence for each layer of which there is something to tell.
        """
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self._gather()
        if self._config.first_last_bits is not None:
            self._set_first_last_bits(self._config.first_last_bits)
        words = []
        for name, layer in self._layers.items():
            if isinstance(layer, QuantizedLayer):
                words += [f"Layer '{name}': {word}." for word in self._calibrate(name, layer)]
        return words

    def _set_first_last_bits(self, bits: int) -> None:
        for name in {self._first, self._last} - {None}:
            layer = self._layers[name]  # type: ignore[index]
            if not isinstance(layer, QuantizedLayer):
                continue
            w, x = layer.weight_quantizer, layer.input_quantizer
            if w is not None and not w.calibrated and not w.pinned:
                w.set_bits(bits)
            if x is not None and not x.calibrated and not x.pinned:
                x.set_bits(None if name == self._first else bits)

    def _calibrate(self, name: str, layer: QuantizedLayer) -> Iterator[str]:
        w, x = layer.weight_quantizer, layer.input_quantizer
        if w is not None and not w.calibrated and (word := w.calibrate(layer.weight)):
            yield word
        if name not in self._observed:
            if x is not None and not x.calibrated:
                yield "it was not called during calibration, so its input stays in full precision"
            return
        if x is None or x.bits is None or x.calibrated:
            return
        seen = self._observed[name].to(layer.weight.device)
        if not seen.samples:
            yield "its input was empty or held no floating-point numbers; it stays in full precision"
            return
        if not bool(torch.stack(seen.finite).all()):
            yield "its input held NaN or inf during calibration; its range comes from the finite values"
        low, high = torch.stack(seen.lows).amin().item(), torch.stack(seen.highs).amax().item()
        if low == high == 0.0:
            yield "its input was 0 throughout calibration and stays in full precision"
            return
        x.calibrate(torch.cat(seen.samples), low, high)

    def _gather(self) -> None:
        """Give every rank what all ranks observed, in the order of the ranks."""
        mine = (self._first, self._last, {name: seen.to("cpu") for name, seen in self._observed.items()})
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, mine)
        self._first, self._last, _ = ranks[0]
        self._observed = {}
        for _, _, observed in ranks:
            for name, seen in observed.items():
                self._observed.setdefault(name, _Observed()).extend(seen)
