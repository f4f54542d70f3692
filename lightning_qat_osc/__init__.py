"""Lightning callbacks that make quantization-aware training work at low bit widths.

Contains the callbacks for the Trainer and the functions that they are built on.
"""

from lightning_qat_osc.batch_norm import batch_norm_divergence, reestimate_batch_norm
from lightning_qat_osc.callbacks import (
    BatchNormReestimation,
    IterativeFreezing,
    ModelExport,
    OscillationDampening,
    OscillationTracking,
    QuantizationAwareTraining,
)
from lightning_qat_osc.config import LayerRule, QuantConfig
from lightning_qat_osc.functional import fake_quantize
from lightning_qat_osc.loading import load_quantized
from lightning_qat_osc.lookup import oscillation_states
from lightning_qat_osc.metrics import SQNR, FrozenShare, OscillatingShare, OscillationFrequency
from lightning_qat_osc.oscillation import OscillationState
from lightning_qat_osc.plan import quantization_plan
from lightning_qat_osc.regularizers import dampening_loss
from lightning_qat_osc.schedules import cosine_anneal
from lightning_qat_osc.surgery import quantize_model

__version__ = "0.1.0"

__all__ = [
    "SQNR",
    "BatchNormReestimation",
    "FrozenShare",
    "IterativeFreezing",
    "LayerRule",
    "ModelExport",
    "OscillatingShare",
    "OscillationDampening",
    "OscillationFrequency",
    "OscillationState",
    "OscillationTracking",
    "QuantConfig",
    "QuantizationAwareTraining",
    "__version__",
    "batch_norm_divergence",
    "cosine_anneal",
    "dampening_loss",
    "fake_quantize",
    "load_quantized",
    "oscillation_states",
    "quantization_plan",
    "quantize_model",
    "reestimate_batch_norm",
]
