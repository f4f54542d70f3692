"""Quantized and calibrated models for tests of exports, without training."""

import warnings

import torch

from lightning_qat_osc import QuantConfig, quantize_model
from lightning_qat_osc.calibration import Calibrator


def calibrated(model, *inputs, weight_bits=4, activation_bits=4, first_last_bits=None, **config):
    config = QuantConfig(weight_bits, activation_bits, first_last_bits=first_last_bits, **config)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*full precision.*")
        warnings.filterwarnings("ignore", message=".*computes its weight.*")
        quantize_model(model, config)
    calibrator = Calibrator(model, config)
    model.eval()
    with torch.no_grad(), calibrator.observe():
        model(*inputs)
    calibrator.finish()
    return model
