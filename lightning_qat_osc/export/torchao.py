"""Conversion of a quantized model to one whose linear layers have torchao tensors as weights."""

from __future__ import annotations

from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from lightning_qat_osc.export.convert import integer_model
from lightning_qat_osc.export.extras import require_extra
from lightning_qat_osc.export.integers import IntegerWeight

__all__ = ["convert_to_torchao"]

Module = TypeVar("Module", bound=nn.Module)


def convert_to_torchao(module: Module) -> Module:
    """Convert a quantized model, with the integers of its linear layers in torchao tensors.

    Weights of 8 bits become ``Int8Tensor``. Weights of fewer bits become ``IntxUnpackedToInt8Tensor`` with a
    ``target_dtype`` of the same width (``torch.int4``, ``torch.int3``). Both are per tensor or per channel and
    weight-only, as torchao's own ``Int8WeightOnlyConfig`` and ``IntxWeightOnlyConfig`` create them, but with the
    trained integers and scales. ``Int8Tensor`` multiplies by the scale after the product with the integers, so outputs
    are equal up to float rounding; ``IntxUnpackedToInt8Tensor`` dequantizes to the weight that training computed with,
    bit for bit. All other layers, and quantized inputs, are as in :func:`~lightning_qat_osc.export.convert`. A weight
    that a linear layer shares with another kind of layer is no longer shared.

    Args:
        module: A model with calibrated quantizers. It is not changed.

    Returns:
        The converted copy, of the same class, in evaluation mode.

    Raises:
        ImportError: If torchao is not installed, or torch is older than 2.10.
        TypeError: If ``module`` is not a module.
        ValueError: If no linear layer of the module has a quantized weight, a layer cannot be converted, or the module
            is not in 32-bit floating point.
    """
    require_extra("torchao", "convert_to_torchao")
    model = integer_model(module)
    odd = {weight.dtype for weight in model.weights.values()} - {torch.float32}
    if odd:
        raise ValueError(f"module must be in torch.float32, but has weights of {odd.pop()}: call module.float()")
    made: dict[int, nn.Parameter] = {}
    for key, weight in model.weights.items():
        name, _, parameter = key.rpartition(".")
        layer = model.module.get_submodule(name)
        # a custom forward may use the weight in ways that torchao's tensors do not support
        if isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward and parameter == "weight":
            if id(weight) not in made:
                made[id(weight)] = nn.Parameter(_torchao_tensor(weight), requires_grad=False)
            layer.weight = made[id(weight)]
    if not made:
        raise ValueError(
            f"{type(module).__name__} has no linear layer with a quantized weight, and torchao's weight-only tensors "
            "support only linear layers: use lightning_qat_osc.export.convert for other layers"
        )
    return cast(Module, model.module)


def _torchao_tensor(weight: IntegerWeight) -> Tensor:
    """Return a weight [out, in] as a torchao tensor with one block per scale."""
    from torchao.quantization import Int8Tensor, IntxUnpackedToInt8Tensor

    rows, columns = weight.values.shape
    block = [rows if weight.channel_axis is None else 1, columns]
    scale = weight.scale.to(weight.dtype).reshape(-1, 1)  # [out, 1] or [1, 1]
    if weight.bits == 8:
        return cast(Tensor, Int8Tensor(weight.values, scale, block, weight.dtype))
    zero_point = torch.zeros_like(scale, dtype=torch.int8)
    target = getattr(torch, f"int{weight.bits}")
    made = IntxUnpackedToInt8Tensor(weight.values, scale, zero_point, target, tuple(block), weight.dtype, None)
    return cast(Tensor, made)
