"""The callbacks, one file each. They decide when something happens; other modules implement how."""

from lightning_qat_osc.callbacks.batch_norm_reestimation import BatchNormReestimation
from lightning_qat_osc.callbacks.iterative_freezing import IterativeFreezing
from lightning_qat_osc.callbacks.model_export import ModelExport
from lightning_qat_osc.callbacks.oscillation_dampening import OscillationDampening
from lightning_qat_osc.callbacks.oscillation_tracking import OscillationTracking
from lightning_qat_osc.callbacks.quantization_aware_training import QuantizationAwareTraining

__all__ = [
    "BatchNormReestimation",
    "IterativeFreezing",
    "ModelExport",
    "OscillationDampening",
    "OscillationTracking",
    "QuantizationAwareTraining",
]
