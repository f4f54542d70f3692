"""ModelExport: exports integer weights at the end of fit, or next to each best checkpoint."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from lightning_qat_osc.callbacks._requirements import require_quantization
from lightning_qat_osc.checks import check_choice, check_flag
from lightning_qat_osc.deepcopies import deep_copy
from lightning_qat_osc.export.formats import SUFFIXES, ExportFormat, export_model, require_packages
from lightning_qat_osc.loading import apply_load_hook
from lightning_qat_osc.lookup import quantized_layers

__all__ = ["ModelExport"]

When = Literal["fit_end", "best"]


class ModelExport(pl.Callback):
    """Exports the quantized model at the end of fit, or next to each best checkpoint of the Trainer's ModelCheckpoint.

    Files are made on the CPU, on rank zero, from a copy of the model. At the end of fit they are ``model.safetensors``,
    ``model.onnx`` and ``model.pt2`` in ``dirpath``. Next to a checkpoint ``epoch=3-step=40.ckpt`` they are
    ``epoch=3-step=40.safetensors`` and so on, made from that checkpoint, and removed after ModelCheckpoint has removed
    it. "onnx" and "torch" need an example input: the module's ``example_input_array`` if it is set and the whole
    module is exported, or else the inputs of the last call of the exported module's forward in the first training batch
    that calls it. If an export next to a checkpoint fails, there is a warning, and training continues; if the export at
    the end of fit fails, it raises.

    A run with ``fast_dev_run`` exports nothing.

    Args:
        formats: "packed" (safetensors with b bits per weight, for ``lightning_qat_osc.export.load_packed``), "onnx"
            (ONNX with QuantizeLinear and DequantizeLinear) and "torch" (a ``torch.export`` program with integer
            weights).
        when: "fit_end", or "best" for an export next to each best checkpoint.
        dirpath: Folder for the files at the end of fit. None: the Trainer's ``default_root_dir``.
        network: Name of the submodule to export, such as "network", if the module's own ``forward`` is not what you
            want to deploy. None: the whole module.
        dynamic_batch: Whether "onnx" and "torch" accept any batch size. Set it to False for a forward that fixes the
            batch size, as ``x.view(len(x), -1)`` does: the batch size is then that of the example input.

    Raises:
        TypeError: If ``dirpath`` is not a path, ``network`` not a string, or ``dynamic_batch`` not a bool.
        ValueError: If a choice is unknown, there are no formats, or ``dirpath`` is given with "best".
    """

    def __init__(
        self,
        formats: Sequence[ExportFormat] = ("packed",),
        *,
        when: When = "fit_end",
        dirpath: str | None = None,
        network: str | None = None,
        dynamic_batch: bool = True,
    ) -> None:
        super().__init__()
        if isinstance(formats, str) or not isinstance(formats, Sequence) or not formats:
            raise ValueError(f"formats must be a list of at least one of {', '.join(SUFFIXES)}, got {formats!r}")
        for export_format in formats:
            check_choice("formats", export_format, ExportFormat)
        check_choice("when", when, When)
        if dirpath is not None and not isinstance(dirpath, (str, PathLike)):
            raise TypeError(f"dirpath must be the path of a folder, got {dirpath!r}")
        if network is not None and not isinstance(network, str):
            raise TypeError(f"network must be the name of a submodule, got {network!r}")
        if dirpath is not None and when == "best":
            raise ValueError(
                f"dirpath must be None with when='best', whose files are next to checkpoints, got {dirpath!r}"
            )
        self.formats: tuple[ExportFormat, ...] = tuple(formats)
        self._need_input = set(self.formats) != {"packed"}
        self.when = when
        self.dirpath = dirpath
        check_flag("dynamic_batch", dynamic_batch)
        self.network = network
        self.dynamic_batch = dynamic_batch
        self._example_input: Any = None
        self._capturing: RemovableHandle | None = None
        self._exported: tuple[str, int] | None = None  # path of a checkpoint, and when it was written
        self._files: dict[str, list[Path]] = {}  # path of a checkpoint -> files exported next to it

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Raise for what would otherwise fail only after hours of training."""
        if stage != "fit":
            return
        # keep only files next to checkpoints that this run may still remove
        kept = getattr(trainer.checkpoint_callback, "best_k_models", {})
        self._files = {path: files for path, files in self._files.items() if path in kept}
        require_quantization(trainer, self)
        if isinstance(trainer.strategy, ModelParallelStrategy):
            raise MisconfigurationException(
                "ModelExport cannot export a model whose weights are sharded over processes: consolidate its "
                "checkpoint, and export that with the command `lightning-qat-osc export`."
            )
        if self.when == "best" and trainer.checkpoint_callback is None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise MisconfigurationException(
                "ModelExport(when='best') needs the Trainer's ModelCheckpoint: add one, or use when='fit_end'."
            )
        if self._need_input and trainer.precision in ("16-true", "bf16-true", "64-true"):
            raise MisconfigurationException(
                f"ModelExport's formats 'onnx' and 'torch' need a module in 32 bits, got "
                f"precision='{trainer.precision}': train with mixed precision, or export only 'packed'."
            )
        checkpoint = trainer.checkpoint_callback
        if self.when == "best" and isinstance(checkpoint, ModelCheckpoint) and checkpoint.save_top_k == 0:
            raise MisconfigurationException(
                "ModelExport(when='best') needs a ModelCheckpoint that keeps the best checkpoint, got save_top_k=0."
            )
        folder = self.dirpath if self.when == "fit_end" else getattr(checkpoint, "dirpath", None)
        folder = str(folder or trainer.default_root_dir)
        if "://" in folder:
            raise MisconfigurationException(
                f"ModelExport writes local files, got {folder}: set dirpath to a local folder, with when='fit_end'."
            )
        for export_format in self.formats:
            require_packages(export_format)
        self._refuse_to_overwrite(trainer)
        if self.when == "fit_end" and trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            Path(folder).mkdir(parents=True, exist_ok=True)

    def _refuse_to_overwrite(self, trainer: pl.Trainer) -> None:
        """Raise if another ModelExport would write the same files."""
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if not isinstance(other, ModelExport) or other is self or other.when != self.when:
                continue
            folders = {str(Path(callback.dirpath or trainer.default_root_dir)) for callback in (self, other)}
            shared = sorted({*self.formats} & {*other.formats})
            if shared and (self.when == "best" or len(folders) == 1):
                raise MisconfigurationException(
                    f"two ModelExports with when='{self.when}' would write '{shared[0]}' to the same file: give each a "
                    "dirpath of its own, with when='fit_end', or export the second network with the command "
                    "`lightning-qat-osc export`."
                )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the network, find existing exports of the best checkpoint, and read ``example_input_array``."""
        if not quantized_layers(self._network(pl_module)):
            raise MisconfigurationException(
                f"network must name a submodule with quantized layers, and {self.network!r} has none"
            )
        best = self._best(trainer)
        if best is not None:
            files = self._beside(best[0])
            if all(file.is_file() and file.stat().st_mtime_ns >= best[1] for file in files):
                self._exported, self._files[best[0]] = best, files
        self._example_input = None
        if self.network is None:
            self._example_input = _on_cpu(pl_module.example_input_array)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Export the best checkpoint if it is new, and capture an example input if one is needed."""
        self._export_best(trainer, pl_module)
        wanted = self._example_input is None and self._need_input
        if wanted and self._capturing is None and trainer.is_global_zero:
            network = self._network(pl_module)
            capture = torch.compiler.disable(self._capture)  # type: ignore[no-untyped-call]
            self._capturing = network.register_forward_pre_hook(capture, with_kwargs=True)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop capturing an example input."""
        self._stop_capturing()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raise if no batch of the epoch has given an example input, rather than after all of training."""
        if self.when == "fit_end" and trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._check_example_input(self._network(pl_module))

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Export the best checkpoint if it is new."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._export_best(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Export the model as it is now, or the last best checkpoint."""
        if self.when == "best":
            self._export_best(trainer, pl_module)
        elif trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            folder = Path(self.dirpath or trainer.default_root_dir)
            self._export(deep_copy(self._network(pl_module)), self._with_suffixes(folder / "model"))

    @property
    def state_key(self) -> str:
        """Return a key that differs between several ModelExports in one Trainer."""
        return self._generate_state_key(
            formats=self.formats, when=self.when, dirpath=str(self.dirpath), network=self.network
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the files that were exported next to each checkpoint, which are removed with it."""
        files = {path: [str(file) for file in files] for path, files in self._files.items()}
        return {"files": files} if files else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the files that were exported next to each checkpoint."""
        self._files = {path: [Path(file) for file in files] for path, files in state_dict["files"].items()}

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Remove the hook from the network."""
        self._stop_capturing()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Remove the hook from the network."""
        self._stop_capturing()

    def _network(self, pl_module: pl.LightningModule) -> nn.Module:
        try:
            network = pl_module if self.network is None else pl_module.get_submodule(self.network)
            return getattr(network, "_orig_mod", network)  # unwrap torch.compile(network)
        except AttributeError as error:
            raise MisconfigurationException(
                f"network must name a submodule of {type(pl_module).__name__}, got {self.network!r}: {error}"
            ) from error

    def _capture(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # under DDP forward is training_step at first, and is restored before training_step calls it
        forward = getattr(network.forward, "_torchdynamo_orig_callable", network.forward)  # of torch.compile(module)
        if getattr(forward, "__func__", None) is not type(network).forward:
            return
        inputs: Any = args
        if kwargs:
            inputs = _by_name(network, args, kwargs)
        self._example_input = _on_cpu(inputs)

    def _stop_capturing(self) -> None:
        if self._capturing is not None:
            self._capturing.remove()
            self._capturing = None

    def _best(self, trainer: pl.Trainer) -> tuple[str, int] | None:
        """Return the path and the modification time of the best checkpoint, or None if there is none yet."""
        checkpoint = trainer.checkpoint_callback
        if self.when != "best" or not isinstance(checkpoint, ModelCheckpoint) or not checkpoint.best_model_path:
            return None
        path = Path(checkpoint.best_model_path)
        return (str(path), path.stat().st_mtime_ns) if path.is_file() else None

    def _export_best(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Export the best checkpoint if it is new, and remove the exports of checkpoints that were removed."""
        if not trainer.is_global_zero:
            return
        for path in [path for path in self._files if not Path(path).exists()]:
            for file in self._files.pop(path):
                file.unlink(missing_ok=True)
        best = self._best(trainer)
        if best is None or best == self._exported:
            return
        self._exported = best
        try:
            module = deep_copy(pl_module)
            # read the file, not the model: the model may have changed since, and averaged weights are not in it now
            # this run wrote the file, so it is trusted, whatever hyperparameters it contains
            checkpoint = torch.load(best[0], map_location="cpu", weights_only=False)
            apply_load_hook(module, checkpoint, with_values=True)
            module.load_state_dict(checkpoint["state_dict"], strict=module.strict_loading)
            self._files[best[0]] = self._beside(best[0])
            self._export(self._network(module), self._files[best[0]])
        except Exception as error:  # a failed export must not end the training
            rank_zero_warn(f"{best[0]} was not exported: {type(error).__name__}: {error}")

    def _beside(self, checkpoint: str) -> list[Path]:
        return self._with_suffixes(Path(checkpoint).with_suffix(""))

    def _with_suffixes(self, path: Path) -> list[Path]:
        """Return the path of each format's file."""
        return [path.with_name(path.name + SUFFIXES[export_format]) for export_format in self.formats]

    def _export(self, network: nn.Module, files: list[Path]) -> None:
        """Export ``network``, which is a copy of the model's, in each format."""
        network.cpu()
        self._check_example_input(network)
        for export_format, file in zip(self.formats, files):
            export_model(network, file, export_format, self._example_input, dynamic_batch=self.dynamic_batch)
            rank_zero_info(f"Exported {file}")

    def _check_example_input(self, network: nn.Module) -> None:
        if self._example_input is None and self._need_input:
            name = type(network).__name__ if self.network is None else f"'{self.network}'"
            raise MisconfigurationException(
                f"the forward of {name} was not called in any training batch so far, so there is no example input for "
                "the export: set network to a submodule whose forward is called, or set the module's "
                "example_input_array."
            )


def _on_cpu(inputs: Any) -> Any:
    """Copy the inputs of a forward to the CPU."""
    return pytree.tree_map_only(Tensor, lambda x: x.detach().cpu().clone(), inputs)


def _by_name(network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return all arguments of a call of a network by name.

    Raises:
        MisconfigurationException: If some positional arguments have no name.
    """
    signature = inspect.signature(network.forward)
    arguments = dict(signature.bind(*args, **kwargs).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments.update(arguments.pop(parameter.name, {}))
        if parameter.kind is parameter.VAR_POSITIONAL and arguments.get(parameter.name):
            raise MisconfigurationException(
                f"ModelExport's example input cannot combine keyword arguments with unnamed positional arguments, and "
                f"the forward of {type(network).__name__} is called with both (*{parameter.name}): set the module's "
                "example_input_array."
            )
        if parameter.kind is parameter.VAR_POSITIONAL:
            arguments.pop(parameter.name, None)
    return arguments
