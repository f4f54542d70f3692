"""Fake-quantized W4A4 networks of peers, per tensor, for the same training loop. Needs torchao and brevitas."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def brevitas(network: nn.Module, batch: Tensor) -> nn.Module:
    """Quantize with Brevitas: LSQ-like learned activation scales, weight scales from statistics."""
    import brevitas.nn as qnn
    from brevitas.graph.calibrate import finalize_collect_stats
    from brevitas.graph.quantize import layerwise_quantize
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerTensorFloat

    class W4(Int8WeightPerTensorFloat):  # type: ignore[misc]
        bit_width = 4

    class A4(Int8ActPerTensorFloat):  # type: ignore[misc]
        bit_width = 4

    options = {"input_quant": A4, "weight_quant": W4, "bias_quant": None, "return_quant_tensor": False}
    layers = {nn.Conv2d: (qnn.QuantConv2d, options), nn.Linear: (qnn.QuantLinear, options)}
    quantized: nn.Module = layerwise_quantize(network, layers).train()
    quantized(batch)
    quantized.apply(finalize_collect_stats)
    return quantized


def torchao(network: nn.Module, batch: Tensor) -> nn.Module:
    """Quantize with PT2E of torchao: moving averages of minimum and maximum."""
    from torchao.quantization.pt2e import allow_exported_model_train_eval
    from torchao.quantization.pt2e.fake_quantize import FusedMovingAvgObsFakeQuantize
    from torchao.quantization.pt2e.observer import MovingAverageMinMaxObserver
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec, Quantizer

    def spec(dtype: torch.dtype, quant_min: int, quant_max: int, scheme: torch.qscheme) -> Any:
        return QuantizationSpec(
            dtype=dtype,
            quant_min=quant_min,
            quant_max=quant_max,
            qscheme=scheme,
            is_dynamic=False,
            observer_or_fake_quant_ctr=FusedMovingAvgObsFakeQuantize.with_args(
                observer=MovingAverageMinMaxObserver, eps=2**-12
            ),
        )

    inputs = spec(torch.uint8, 0, 15, torch.per_tensor_affine)
    weights = spec(torch.int8, -8, 7, torch.per_tensor_symmetric)

    class W4A4(Quantizer):  # type: ignore[misc]
        def annotate(self, model: Any) -> Any:
            for node in model.graph.nodes:
                if node.op == "call_function" and node.target in (
                    torch.ops.aten.conv2d.default,
                    torch.ops.aten.linear.default,
                ):
                    node.meta["quantization_annotation"] = QuantizationAnnotation(
                        input_qspec_map={node.args[0]: inputs, node.args[1]: weights}, _annotated=True
                    )
            return model

        def validate(self, model: Any) -> None:
            pass

    prepared: nn.Module = prepare_qat_pt2e(torch.export.export(network.train(), (batch,)).module(), W4A4())
    allow_exported_model_train_eval(prepared)
    prepared.train()
    prepared(batch)
    return prepared
