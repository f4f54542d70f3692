"""Frozen weights: the base class of callbacks that hold them in place, and their release without such a callback."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_qat_osc.lookup import is_quantized, weights_with_quantizers
from lightning_qat_osc.sharding import full_tensor

__all__ = ["HoldsFrozenWeights", "release_frozen_weights"]


class HoldsFrozenWeights(pl.Callback):
    """A callback that puts frozen weights of at most ``max_bits`` bits back in place after each optimizer step."""

    max_bits: int


@torch.no_grad()
def release_frozen_weights(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Unfreeze weights that an earlier run froze and that no callback of this run holds, and warn about them."""
    holding = [c for c in trainer.callbacks if isinstance(c, HoldsFrozenWeights)]  # type: ignore[attr-defined]
    max_bits = max((c.max_bits for c in holding), default=0)
    frozen = [
        q.oscillation.frozen
        for _, _, q in weights_with_quantizers(pl_module)
        if q.oscillation is not None and not is_quantized(q, max_bits)
    ]
    released = int(torch.stack([full_tensor(mask.sum()) for mask in frozen]).sum()) if frozen else 0
    if released:
        for mask in frozen:
            mask.zero_()
        what = f"raise its max_bits={max_bits}, which excludes them" if holding else "add IterativeFreezing"
        rank_zero_warn(
            f"{released} weights that an earlier run froze have been unfrozen, because no IterativeFreezing in this "
            f"run holds them. To keep them frozen, {what}."
        )
