"""Loading of a quantized module from its checkpoint, without a Trainer."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from inspect import signature
from os import PathLike
from typing import Any, TypeVar, cast

from torch import nn
from torch.utils._pytree import tree_leaves

from lightning_qat_osc.config import QuantConfig
from lightning_qat_osc.files import read_tensors
from lightning_qat_osc.lookup import quantizers
from lightning_qat_osc.rules import bits_differences
from lightning_qat_osc.scales import hold_scales
from lightning_qat_osc.surgery import quantize_model

__all__ = ["apply_load_hook", "config_of_checkpoint", "load_quantized", "load_with_arguments"]

Module = TypeVar("Module", bound=nn.Module)


def load_quantized(
    module_class: type[Module],
    checkpoint_path: str | PathLike[str],
    config: QuantConfig | None = None,
    *,
    map_location: Any = None,
    weights_only: bool = True,
    **kwargs: Any,
) -> Module:
    """Create a LightningModule, with its quantizers, from a checkpoint of quantization-aware training.

    ``module_class.load_from_checkpoint`` runs no callbacks, and so raises for a checkpoint with quantizers. This
    function does the same, but also inserts the quantizers. (``load_from_checkpoint`` with ``strict=False`` loads the
    latent weights into the plain float model.)

    Args:
        module_class: The LightningModule's class.
        checkpoint_path: A checkpoint of :class:`~lightning_qat_osc.QuantizationAwareTraining`.
        config: How the module is quantized. None: as the checkpoint says; a checkpoint that was saved with
            ``save_weights_only=True``, or by a Trainer without QuantizationAwareTraining, does not say it. Any value
            other than a QuantConfig is passed to the module, if the module has an argument called ``config``.
        map_location: Where to put the tensors, as in ``torch.load``. None: on the device that they were saved from, or
            on the CPU if that device does not exist.
        weights_only: Read only tensors and plain values. Use False for a trusted checkpoint with other objects, for
            example among its hyperparameters.
        **kwargs: The module's arguments that are not among the checkpoint's hyperparameters.

    Returns:
        The module, with its oscillation histories. Training with the callbacks can continue from it; until then, its
        scales have ``requires_grad=False``.

    Raises:
        TypeError: If ``module_class`` is not the class of a LightningModule, ``checkpoint_path`` is not a path, or
            ``config`` is neither a QuantConfig nor an argument of the module.
        OSError: If the file does not exist or cannot be opened.
        ValueError: If the checkpoint is damaged, is a folder of shards, is only a state_dict, or has no quantizers;
            if it does not say how it is quantized and ``config`` is None; if its bits differ from those of ``config``;
            or if the module's ``on_load_checkpoint`` leaves the quantizers out.
        RuntimeError: If the checkpoint does not fit the module.
    """
    if not isinstance(module_class, type) or not hasattr(module_class, "load_from_checkpoint"):
        raise TypeError(f"module_class must be the class of a LightningModule, got {module_class!r}")
    if not isinstance(checkpoint_path, (str, PathLike)):
        raise TypeError(f"checkpoint_path must be the path of a file, got {checkpoint_path!r}")
    if config is not None and not isinstance(config, QuantConfig):
        if "config" not in signature(module_class).parameters:
            raise TypeError(f"config must be a QuantConfig, got {config!r}")
        config, kwargs = None, {"config": config, **kwargs}
    return load_with_arguments(
        module_class, checkpoint_path, kwargs, config, map_location=map_location, weights_only=weights_only
    )


def load_with_arguments(
    module_class: type[Module],
    checkpoint_path: str | PathLike[str],
    arguments: Mapping[str, Any],
    config: QuantConfig | None = None,
    *,
    map_location: Any = None,
    weights_only: bool = True,
) -> Module:
    """Do the same as :func:`load_quantized`, for a module whose arguments may have any names."""
    # this state is only copied from, so it stays on the CPU
    checkpoint = read_tensors(checkpoint_path, map_location="cpu", weights_only=weights_only)
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(
            f"checkpoint_path must be a Lightning checkpoint, but {checkpoint_path} has no 'state_dict': load a plain "
            "state_dict into the module that quantize_model(module, config) returns"
        )
    state = checkpoint["state_dict"]
    grids = [value for key, value in state.items() if key.endswith("_quantizer.grid")]
    if not grids:
        raise ValueError(
            f"checkpoint_path must be a checkpoint of a quantized module, but {checkpoint_path} has no quantizers: use "
            f"{module_class.__name__}.load_from_checkpoint"
        )
    config = config or config_of_checkpoint(checkpoint)
    if config is None:
        raise ValueError(
            f"{checkpoint_path} does not contain its quantization configuration (maybe it was saved with "
            "save_weights_only=True): pass config=QuantConfig(...) with the settings of QuantizationAwareTraining"
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Found keys that are.*")
        module: Module = cast(Any, module_class).load_from_checkpoint(
            checkpoint_path, map_location=map_location, strict=False, weights_only=weights_only, **arguments
        )
        warnings.filterwarnings("ignore", message=".*full precision.*")  # training has already warned
        quantize_model(module, config)
    apply_load_hook(module, checkpoint)  # after quantize_model: the hook may drop keys that the module lacks
    module.load_state_dict(checkpoint["state_dict"], strict=cast(Any, module).strict_loading)
    if not any(q.calibrated for q in quantizers(module)) and any(grid[-1] for grid in grids):
        raise ValueError(
            f"{module_class.__name__}.on_load_checkpoint drops the quantizers of {checkpoint_path}: keep the keys with "
            "'_quantizer.' in its state_dict"
        )
    differences = bits_differences(module, config)
    if differences:
        raise ValueError(
            f"config does not match {checkpoint_path}, where {'; '.join(differences[:5])}. To use other bits, load "
            f"only the weights, with {module_class.__name__}.load_from_checkpoint(path, strict=False)"
        )
    hold_scales(module)
    return module


def apply_load_hook(module: nn.Module, checkpoint: dict[str, Any], *, with_values: bool = False) -> None:
    """Apply the module's ``on_load_checkpoint`` to a checkpoint, without changing the module's layers.

    The hook may create layers that the module already has, with quantizers, so it runs on a twin of the module.

    Args:
        module: A LightningModule.
        checkpoint: The checkpoint, which is changed in place.
        with_values: Copy other attributes that the hook sets back to the module: numbers, tensors and the like, but
            nothing that holds layers.
    """
    hook = "on_load_checkpoint"
    lightnings = [base for base in type(module).__mro__ if hook in vars(base)][-1]
    if getattr(getattr(module, hook), "__func__", None) is not vars(lightnings)[hook]:
        twins: dict[nn.Module, nn.Module] = {}
        cast(Any, _twin(module, twins)).on_load_checkpoint(checkpoint)
        for original, twin in twins.items() if with_values else ():
            vars(original).update({k: v for k, v in vars(twin).items() if k != "_modules" and not _holds_layers(v)})


def _holds_layers(value: Any) -> bool:
    """Whether a value is or contains a callable, which may be a layer of the twin."""
    return any(callable(x) for x in tree_leaves(list(value) if isinstance(value, set) else value))


def _twin(module: nn.Module, twins: dict[nn.Module, nn.Module]) -> nn.Module:
    """Return a twin of a module and its submodules, with the same attribute values, since not all can be copied."""
    if module not in twins:
        twin = twins[module] = object.__new__(type(module))
        vars(twin).update(vars(module))
        for name, held in vars(module).items():
            if type(held) in (dict, list, set):
                vars(twin)[name] = copy.copy(held)
        # bypass __setattr__: a compiled module passes attributes on to the module inside it
        vars(twin)["_modules"] = {
            name: None if child is None else _twin(child, twins) for name, child in module._modules.items()
        }
    return twins[module]


def config_of_checkpoint(checkpoint: dict[str, Any]) -> QuantConfig | None:
    """Return the configuration from the state of QuantizationAwareTraining, or None if the checkpoint has none."""
    for state in checkpoint.get("callbacks", {}).values():
        if isinstance(state, dict) and {"config", "scale_updates"} <= state.keys():
            return QuantConfig.from_dict(state["config"])
    return None
