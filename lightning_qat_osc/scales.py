"""Scales are learned only in fits with QuantizationAwareTraining. Other fits' optimizers must not update them."""

from __future__ import annotations

from torch import nn

from lightning_qat_osc.lookup import own_parameters, quantized_layers
from lightning_qat_osc.quantized_layer import QuantizedLayer
from lightning_qat_osc.sharding import reshard

__all__ = ["hold_scales", "release_scales"]


def hold_scales(module: nn.Module) -> None:
    """Set ``requires_grad=False`` on all scales until :func:`release_scales` undoes it.

    Args:
        module: A quantized model. Scales that already have ``requires_grad=False`` are left alone.
    """
    reshard(module)  # a forward pass may have left whole parameters in place of the sharded ones
    for layer in quantized_layers(module).values():
        for quantizer in layer.quantizers():
            if quantizer.scale.requires_grad:
                quantizer.scale.requires_grad_(False)
                quantizer.held = "trained" if _is_trained(layer) else "frozen"


def release_scales(module: nn.Module) -> None:
    """Undo :func:`hold_scales`. The scales of a layer that was frozen in the meantime, as by ``freeze()``, stay fixed.

    Args:
        module: A quantized model.
    """
    reshard(module)
    for layer in quantized_layers(module).values():
        for quantizer in layer.quantizers():
            if quantizer.held == "frozen" or (quantizer.held == "trained" and _is_trained(layer)):
                quantizer.scale.requires_grad_(True)
            quantizer.held = None


def _is_trained(layer: QuantizedLayer) -> bool:
    return any(p.requires_grad for p in own_parameters(layer))
