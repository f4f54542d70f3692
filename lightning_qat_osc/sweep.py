"""Per-step updates of many weights at once: small weights together, large ones in blocks or fused kernels.

The equations are in :mod:`lightning_qat_osc.oscillation` and :mod:`lightning_qat_osc.regularizers`, as functions that
work in place on the tensors of one weight, element by element. This module applies them to a whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from lightning_qat_osc.kernels import (
    SMALL,
    Limit,
    as_rows,
    blocks,
    cached_scalar,
    compiled,
    joined_copy,
    memory_view,
    split_like,
)
from lightning_qat_osc.lookup import QuantizedWeight
from lightning_qat_osc.oscillation import OscillationState, advance, pass_on_gradient
from lightning_qat_osc.regularizers import Aggregation, add_dampening_gradient, dampening_factor
from lightning_qat_osc.sharding import is_sharded

__all__ = [
    "WeightBatch",
    "add_dampening",
    "advance_states",
    "dampen_and_pass_on",
    "make_batches",
    "pass_on_frozen_gradients",
]


@torch.no_grad()
def advance_states(batches: Sequence[WeightBatch], momentum: float, threshold: float | None = None) -> None:
    """Advance the oscillation states by one optimizer step, and freeze and hold weights that oscillate too often.

    Args:
        batches: Weights, all of which are tracked.
        momentum: Weight of the new value in the moving averages.
        threshold: Frequency above which weights freeze. Infinity only holds weights that are already frozen, and None
            neither freezes nor holds any.
    """
    for batch in batches:
        history = batch.history("weight_int", "direction", "frequency", "ema_int", "frozen")
        limit = None if threshold is None else batch.scalar(threshold)
        batch.run(advance, [batch.scales], batch.weights, history, batch.scalar(momentum), limit, *batch.grid)


@torch.no_grad()
def add_dampening(batches: Sequence[WeightBatch], weight: float, aggregation: Aggregation) -> None:
    """Add the gradient of the dampening loss to the gradients of the weights.

    Args:
        batches: Weights, some of which may have no gradient.
        weight: Weight of the loss, lambda.
        aggregation: How the squared distances are reduced.
    """
    for batch in batches:
        scales = [batch.scales, _pull(batch, weight, aggregation)]
        batch.run(add_dampening_gradient, scales, batch.gradients(), [batch.weights], *batch.grid)


@torch.no_grad()
def pass_on_frozen_gradients(batches: Sequence[WeightBatch]) -> None:
    """Apply :func:`~lightning_qat_osc.oscillation.pass_on_gradient` to all weights and their scales.

    Args:
        batches: Weights, all of which are tracked, and some of which may have no gradient.
    """
    for batch in batches:
        history = batch.history("weight_int", "frozen")
        batch.run(pass_on_gradient, [], batch.gradients(), history, owed_to=batch.scale_gradients())


@torch.no_grad()
def dampen_and_pass_on(batches: Sequence[WeightBatch], weight: float, aggregation: Aggregation) -> None:
    """Run :func:`add_dampening` and :func:`pass_on_frozen_gradients` in one pass."""
    for batch in batches:
        scales = [batch.scales, _pull(batch, weight, aggregation)]
        others: list[Tensor | list[Tensor]] = [batch.weights, *batch.history("weight_int", "frozen")]
        owed_to = batch.scale_gradients()
        batch.run(_dampen_and_pass_on, scales, batch.gradients(), others, *batch.grid, owed_to=owed_to)


def _dampen_and_pass_on(
    owed: Tensor,
    scale: Tensor,
    pull: Tensor,
    grad: Tensor,
    weight: Tensor,
    weight_int: Tensor,
    frozen: Tensor,
    quant_min: Limit,
    quant_max: Limit,
) -> None:
    add_dampening_gradient(scale, pull, grad, weight, quant_min, quant_max)
    pass_on_gradient(owed, grad, weight_int, frozen)


def _pull(batch: WeightBatch, weight: float, aggregation: Aggregation) -> list[Tensor]:
    factors = [weight * dampening_factor(w.shape, aggregation) for w in batch.weights]
    return list(torch._foreach_mul(batch.scales, factors))


class WeightBatch:
    """Weights that a kernel processes together: several small ones of one grid and dtype, or a single one.

    The oscillation states of several weights lie next to each other in memory, so that a step need not join them.

    Args:
        weights: Weights. If there are several, each scale must apply to contiguous elements of its weight.

    Attributes:
        weights: The latent weights.
        scales: Their scales.
        grid: The smallest and the largest integer, in the form that the kernel takes.
    """

    def __init__(self, weights: Sequence[QuantizedWeight]) -> None:
        self._quantizers = [w.quantizer for w in weights]
        self.weights: list[Tensor] = [w.weight for w in weights]
        self.scales: list[Tensor] = [q.scale for q in self._quantizers]
        first = self._quantizers[0]
        self._size = sum(w.numel() for w in self.weights)
        self._sharded = is_sharded(self.weights[0])
        self._fused = first.fused and self._size > SMALL and not self._sharded
        self.grid = self.scalar(first.quant_min), self.scalar(first.quant_max)
        self._stretches: Tensor | None = None
        if len(weights) > 1:
            lengths = [w.numel() // s.numel() for w, s in zip(self.weights, self.scales) for _ in range(s.numel())]
            self._stretches = torch.tensor(lengths, device=self.weights[0].device)

    def has_gradients(self) -> bool:
        """Whether any of the weights has a gradient. Layers that this step's forward passes skipped have none."""
        return any(w.grad is not None for w in self.weights)

    def gradients(self) -> list[Tensor]:
        """Return the gradients of the weights. A missing one is replaced by temporary zeros, which are discarded."""
        return [torch.zeros_like(w) if w.grad is None else w.grad for w in self.weights]

    def scale_gradients(self) -> list[Tensor]:
        """Return the gradients of the scales. A missing one is replaced by temporary zeros, which are discarded."""
        return [torch.zeros_like(q.scale) if q.scale_grad is None else q.scale_grad for q in self._quantizers]

    def history(self, *names: str) -> list[Tensor]:
        """Return tensors of the oscillation states, each joined over all weights.

        Args:
            names: Names of attributes of :class:`~lightning_qat_osc.OscillationState`.
        """
        states = [q.start_tracking(w) for q, w in zip(self._quantizers, self.weights)]
        return [self._joined(states, name) for name in names]

    def _joined(self, states: list[OscillationState], name: str) -> Tensor:
        tensors: list[Tensor] = [getattr(state, name) for state in states]
        if len(tensors) == 1:
            joined = tensors[0]
        elif _one_behind_the_other(tensors):
            joined = memory_view(tensors[0], self._size)
        else:
            joined = joined_copy(tensors)
            for state, part in zip(states, split_like(joined, tensors)):
                setattr(state, name, part)
        # booleans as numbers 0 and 1, without a copy: compiled kernels and CPUs are slow with booleans
        return joined.view(torch.int8) if joined.dtype == torch.bool and not self._sharded else joined

    def scalar(self, value: float) -> Tensor | float:
        """Return a number in the form that the kernel takes."""
        return cached_scalar(value, self.weights[0].device) if self._fused else value

    def run(
        self,
        kernel: Callable[..., None],
        scales: Sequence[list[Tensor]],
        changed: list[Tensor],
        others: Sequence[Tensor | list[Tensor]],
        *scalars: Tensor | float | None,
        owed_to: list[Tensor] | None = None,
    ) -> None:
        """Run a kernel that works in place.

        Args:
            kernel: Called with one tensor for ``owed_to`` (if given), one for each list in ``scales``, one for
                ``changed``, one for each entry of ``others``, and the scalars.
            scales: Lists with a tensor for each weight, in the shape of its scale.
            changed: A tensor for each weight, in its shape, which the kernel changes.
            others: Lists with a tensor for each weight, in its shape, or single tensors joined over all weights.
            scalars: Values that are the same for all weights.
            owed_to: A tensor for each weight, in the shape of its scale, to which the kernel's sums are added.
        """
        if self._stretches is None:
            first = [s[0] for s in ([] if owed_to is None else [owed_to]) + [*scales]]
            columns = [changed[0], *(t if isinstance(t, Tensor) else t[0] for t in others)]
            views = None if self._sharded else as_rows(first, columns)
            if views is None:
                kernel(*first, *columns, *scalars)
            else:
                self._run(kernel, views, scalars)
            return
        owed = [] if owed_to is None else [changed[0].new_zeros(self._size, dtype=owed_to[0].dtype)]
        spread = [torch.repeat_interleave(joined_copy(s), self._stretches, output_size=self._size) for s in scales]
        joined = [t if isinstance(t, Tensor) else joined_copy(t) for t in (changed, *others)]
        self._run(kernel, [*owed, *spread, *joined], scalars)
        torch._foreach_copy_(changed, list(split_like(joined[0], changed)))
        if owed_to is not None:
            torch._foreach_add_(
                owed_to, [p.sum_to_size(s.shape) for p, s in zip(split_like(owed[0], changed), owed_to)]
            )

    def _run(self, kernel: Callable[..., None], views: list[Tensor], scalars: Sequence[Tensor | float | None]) -> None:
        if self._fused:
            compiled(kernel)(*views, *scalars)
        elif views[0].is_cpu:
            for block in blocks(views):
                kernel(*block, *scalars)
        else:
            kernel(*views, *scalars)


def make_batches(weights: Sequence[QuantizedWeight]) -> list[WeightBatch]:
    """Group weights into batches: small ones of one grid and dtype together, large and sharded ones alone.

    Weights whose scales do not each apply to contiguous elements are alone, too.
    """
    together: dict[object, list[QuantizedWeight]] = {}
    for w in weights:
        q, scale = w.quantizer, w.quantizer.scale
        in_stretches = scale.numel() in (1, scale.shape[0])
        alone = w.weight.numel() > SMALL or not in_stretches or is_sharded(w.weight)
        key = w.name if alone else (q.quant_min, q.quant_max, q.fused, scale.dtype, w.weight.dtype, w.weight.device)
        together.setdefault(key, []).append(w)
    return [WeightBatch(batch) for batch in together.values()]


def _one_behind_the_other(tensors: Sequence[Tensor]) -> bool:
    first = tensors[0]
    starts = accumulate((t.numel() * t.element_size() for t in tensors[:-1]), initial=first.data_ptr())
    storages = {t.untyped_storage().data_ptr() for t in (first, tensors[-1])}
    return len(storages) == 1 and all(t.data_ptr() == start and t.is_contiguous() for t, start in zip(tensors, starts))
