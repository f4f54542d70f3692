"""Scales are learned in fits with QuantizationAwareTraining. In others the module's optimizer is not to move them."""

from __future__ import annotations

from torch import nn

from lightning_qat_osc.lookup import own_parameters, quantized_layers
from lightning_qat_osc.quantized_layer import QuantizedLayer
from lightning_qat_osc.sharding import reshard

__all__ = ["hold_scales", "release_scales"]


def hold_scales(module: nn.Module) -> None:
    """Have scales want no gradient, until :func:`release_scales`.

    Args:
        module: A quantized model. Scales that want none by themselves are left alone.
    """
    reshard(module)  # it has the parts, where a forward pass may have left whole parameters
    for layer in quantized_layers(module).values():
        for quantizer in layer.quantizers():
            if quantizer.scale.requires_grad:
                quantizer.scale.requires_grad_(False)
                quantizer.held = "trained" if _is_trained(layer) else "frozen"


def release_scales(module: nn.Module) -> None:
    """End that. A layer that was trained and is frozen now, as by ``module.freeze()``, keeps its scales as they are.

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
