"""What each optimizer step does to many weights at once: small ones together, large ones in blocks or fused kernels.

The equations are in :mod:`lightning_qat_osc.oscillation` and :mod:`lightning_qat_osc.regularizers`, as functions that
work in place on one weight's tensors, element by element. Here they are applied to a whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import repeat

import torch
from torch import Tensor

from lightning_qat_osc.functional import rows
from lightning_qat_osc.kernels import SMALL, compiled
from lightning_qat_osc.lookup import QuantizedWeight
from lightning_qat_osc.oscillation import OscillationState, add_frozen_scale_gradient, advance, pass_on_gradient
from lightning_qat_osc.regularizers import Aggregation, add_dampening_gradient, dampening_factor
from lightning_qat_osc.sharding import is_sharded

__all__ = ["add_dampening", "advance_states", "pass_on_frozen_gradients"]

_BLOCK = 2**17  # elements that stay in a CPU's cache from one operation to the next


@torch.no_grad()
def advance_states(weights: Sequence[QuantizedWeight], momentum: float, threshold: float | None = None) -> None:
    """Advance the oscillation states by one optimizer step, and freeze and hold what oscillates too often.

    Args:
        weights: Weights, all of which are tracked.
        momentum: Weight of the new value in the moving averages.
        threshold: Frequency above which weights freeze; infinity only holds those that are frozen, None not even that.
    """
    for batch in _batches(weights):
        states = [_state(w) for w in batch]
        changed = [[getattr(state, name) for state in states] for name in ("weight_int", "direction", "frequency")]
        changed += [[state.ema_int for state in states], [_bytes(state.frozen) for state in states]]
        changed += [[w.weight.detach() for w in batch]]
        limits = None if threshold is None else _scalar(threshold, batch)
        _apply(advance, batch, [_scales(batch)], changed, _scalar(momentum, batch), limits, changed=len(changed))


@torch.no_grad()
def add_dampening(weights: Sequence[QuantizedWeight], weight: float, aggregation: Aggregation) -> None:
    """Add the gradient of the dampening loss to those of the weights that have one.

    Args:
        weights: Weights.
        weight: Weight of the loss, lambda.
        aggregation: How the squared distances are reduced.
    """
    for batch in _batches([w for w in weights if w.weight.grad is not None]):
        scales = _scales(batch)
        pull = [s * (weight * dampening_factor(w.weight.shape, aggregation)) for s, w in zip(scales, batch)]
        columns = [[w.weight.grad for w in batch], [w.weight.detach() for w in batch]]
        _apply(add_dampening_gradient, batch, [scales, pull], columns, changed=1)  # type: ignore[arg-type]


@torch.no_grad()
def pass_on_frozen_gradients(weights: Sequence[QuantizedWeight]) -> None:
    """Give scales what their frozen weights owe them, and take it from the weights."""
    ready = [w for w in weights if w.quantizer.oscillation is not None and w.weight.grad is not None]
    for batch in _batches([w for w in ready if w.quantizer.scale_grad is not None]):
        grads: list[Tensor] = [w.quantizer.scale_grad for w in batch]  # type: ignore[misc]
        if is_sharded(batch[0].weight):
            add_frozen_scale_gradient(_state(batch[0]), batch[0].weight.grad, grads[0])  # type: ignore[arg-type]
            continue
        states = [_state(w) for w in batch]
        columns = [
            [w.weight.grad for w in batch],
            [state.weight_int for state in states],
            [_bytes(state.frozen) for state in states],
        ]
        owed = _apply(pass_on_gradient, batch, [[torch.zeros_like(g) for g in grads]], columns, changed=1)  # type: ignore[arg-type]
        torch._foreach_add_(grads, owed)


def _state(w: QuantizedWeight) -> OscillationState:
    return w.quantizer.start_tracking(w.weight)


def _scales(batch: Sequence[QuantizedWeight]) -> list[Tensor]:
    return [w.quantizer.scale.detach() for w in batch]


def _bytes(mask: Tensor) -> Tensor:
    """A mask as numbers 0 and 1, without a copy: compiled kernels and CPUs are slow with booleans."""
    return mask if is_sharded(mask) else mask.view(torch.int8)


def _scalar(value: float, batch: Sequence[QuantizedWeight]) -> Tensor:
    """A number as a tensor: a compiled kernel would be made anew for each number, and a copy to a GPU would wait."""
    return torch.full((), value, device=batch[0].weight.device)


def _batches(weights: Sequence[QuantizedWeight]) -> Iterator[list[QuantizedWeight]]:
    """Weights that go through a kernel together: small ones of one grid and dtype; large and sharded ones alone."""
    together: dict[object, list[QuantizedWeight]] = {}
    for w in weights:
        q = w.quantizer
        alone = w.weight.numel() > SMALL or is_sharded(w.weight)
        key = w.name if alone else (q.quant_min, q.quant_max, q.fused, q.scale.dtype, w.weight.dtype, w.weight.device)
        together.setdefault(key, []).append(w)
    yield from together.values()


def _apply(
    kernel: Callable[..., None],
    batch: Sequence[QuantizedWeight],
    scales: list[list[Tensor]],
    columns: list[list[Tensor]],
    *scalars: Tensor | None,
    changed: int,
) -> list[Tensor]:
    """Run a kernel that works in place.

    Args:
        kernel: Called with a tensor for each list in ``scales`` and ``columns``, the scalars and the grid's limits.
        batch: Weights of one grid.
        scales: Tensors of the scales' shapes, a list of one for each weight.
        columns: Tensors of the weights' shapes, likewise.
        scalars: Tensors without dimensions.
        changed: How many of the columns, from the first, the kernel changes.

    Returns:
        The last of ``scales``, summed over the elements that each stands for if the kernel has added to it.
    """
    q = batch[0].quantizer
    run = compiled(kernel) if q.fused and sum(t.numel() for t in columns[0]) > SMALL else kernel
    last = (*scalars, q.quant_min, q.quant_max)
    if len(batch) == 1:
        single = [s[0] for s in scales], [c[0] for c in columns]
        views = None if is_sharded(batch[0].weight) else rows(single[0], single[1])
        if views is not None:
            for block in [views] if q.fused or not views[0].is_cpu else _blocks(views, len(scales)):
                run(*block, *last)
            return scales[-1]
        if not q.fused:
            kernel(*single[0], *single[1], *last)
            return scales[-1]
    spread = [torch.cat([t.expand_as(like).flatten() for t, like in zip(s, columns[0])]) for s in scales]
    joined = [torch.cat([t.flatten() for t in column]) for column in columns]
    run(*spread, *joined, *last)
    sizes = [t.numel() for t in columns[0]]
    for column, values in list(zip(columns, joined))[:changed]:
        torch._foreach_copy_(column, [v.view_as(t) for v, t in zip(torch.split(values, sizes), column)])
    parts = zip(torch.split(spread[-1], sizes), columns[0], scales[-1])
    return [part.view_as(like).sum_to_size(scale.shape) for part, like, scale in parts]


def _blocks(views: Sequence[Tensor], scales: int) -> Iterator[Sequence[Tensor]]:
    """Views of :func:`rows` in pieces that fit the cache."""
    if views[-1].dim() == 1:
        pieces = [repeat(s) for s in views[:scales]] + [torch.split(t, _BLOCK) for t in views[scales:]]
    else:
        size = max(1, _BLOCK // views[-1].shape[1])
        pieces = [torch.split(t, size) for t in views]
    return zip(*pieces)
