"""The command ``lightning-qat-osc``: inspect a checkpoint, export it, and compare the outputs."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from inspect import signature
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, get_args
from zipfile import BadZipFile, is_zipfile

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_qat_osc.arguments import call_arguments
from lightning_qat_osc.checkpoints import config_of_state, format_weights, inspect_state, read_checkpoint
from lightning_qat_osc.export.comparison import OUTPUT, Difference, difference, float_model, layer_outputs
from lightning_qat_osc.export.convert import convert
from lightning_qat_osc.export.formats import SUFFIXES, ExportFormat, export_model
from lightning_qat_osc.export.packed import load_packed
from lightning_qat_osc.export.pt2e import register_operators
from lightning_qat_osc.files import read_tensors
from lightning_qat_osc.loading import config_of_checkpoint, load_with_arguments
from lightning_qat_osc.lookup import quantized_layers
from lightning_qat_osc.tables import table

__all__ = ["main"]

_SHOWN = 8  # number of output values to print
_TOLD = (
    ValueError,
    TypeError,
    RuntimeError,
    ImportError,
    AttributeError,
    OSError,
    UnpicklingError,
    argparse.ArgumentError,  # from modules that LightningCLI has created
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: The command-line arguments, without the program's name; those of ``sys.argv`` if None.

    Returns:
        0, or 1 after an error, which is printed to standard error.
    """
    options = _parser().parse_args(arguments)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # where the user's modules are, as for `python -m`
    try:
        options.run(options)
    except _TOLD as error:
        _say(f"lightning-qat-osc {options.command}: {error}", sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-qat-osc", description="Inspect a checkpoint, export it, and compare the outputs."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    inspect = commands.add_parser(
        "inspect", help="list the quantized layers of a checkpoint; the module's class is not needed"
    )
    _add_checkpoint(inspect)
    inspect.set_defaults(run=_inspect)

    export = commands.add_parser(
        "export", help="export a checkpoint as ONNX, packed integers or a torch.export program"
    )
    _add_module(export)
    export.add_argument("--to", choices=get_args(ExportFormat), required=True, help="the output format")
    export.add_argument("--output", type=Path, help="output file (default: next to the checkpoint)")
    export.add_argument(
        "--input",
        type=Path,
        help="arguments of forward, for onnx and torch: .npy or .pt with a tensor, .pt with a tuple of arguments, .npz "
        "or .pt with a dictionary of keyword arguments (default: the module's example_input_array)",
    )
    export.add_argument(
        "--fixed-batch", action="store_true", help="keep the batch size of the input, for a forward that fixes it"
    )
    export.set_defaults(run=_export)

    compare = commands.add_parser("compare", help="compare float, fake-quantized and exported outputs, layer by layer")
    _add_module(compare)
    compare.add_argument("--data", type=Path, required=True, help="arguments of forward, as for export --input")
    compare.add_argument(
        "--exported", type=Path, help="an exported file (default: the converted model); .onnx and .pt2 files have no "
        "layers, so only their outputs are compared"
    )  # fmt: skip
    compare.set_defaults(run=_compare)
    return parser


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="a checkpoint, from the middle or the end of training")
    parser.add_argument(
        "--trusted", action="store_true",
        help="load objects of any type, for example among the hyperparameters; unpickling them may run code",
    )  # fmt: skip


def _add_module(parser: argparse.ArgumentParser) -> None:
    _add_checkpoint(parser)
    parser.add_argument("--module", required=True, help="import path of the LightningModule's class")
    parser.add_argument(
        "--module-args", type=_json, default={}, metavar="JSON",
        help="arguments of the class that are not among the checkpoint's hyperparameters",
    )  # fmt: skip
    parser.add_argument("--network", help="name of the submodule to use (default: the whole module)")


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be JSON, got {text}: {error}") from error


def _inspect(options: argparse.Namespace) -> None:
    checkpoint, state = read_checkpoint(options.checkpoint, weights_only=not options.trusted)
    if {"epoch", "global_step"} <= checkpoint.keys():
        _say(f"epoch {checkpoint['epoch']}, optimizer step {checkpoint['global_step']}")
    _say(format_weights(inspect_state(state)))


def _export(options: argparse.Namespace) -> None:
    module, network = _load(options)
    example_input = getattr(module, "example_input_array", None) if network is module else None
    if options.input is not None:
        example_input = _read_arguments(options.input)
    if example_input is None and options.to != "packed":
        why = (
            "the module has no example_input_array"
            if network is module
            else "example_input_array belongs to the whole module, not to --network"
        )
        raise ValueError(f"--input must be given for '{options.to}': {why}")
    output = options.output or options.checkpoint.with_suffix(SUFFIXES[options.to])
    export_model(network, output, options.to, example_input, dynamic_batch=not options.fixed_batch)
    _say(f"{output}: {output.stat().st_size} bytes")


def _compare(options: argparse.Namespace) -> None:
    _, network = _load(options)
    data = _read_arguments(options.data)
    args, kwargs = call_arguments(data)
    layers = list(quantized_layers(network))
    in_float = layer_outputs(float_model(network), layers, args, kwargs)
    quantized = layer_outputs(network, layers, args, kwargs)
    if not quantized[OUTPUT]:
        raise ValueError("the network's output contains no floating-point tensor to compare")
    exported = _exported_outputs(options, network, layers, args, kwargs)
    rows = [("layer", "float to quantized, dB", "quantized to exported, dB", "largest difference", "")]
    parted = False
    for name in quantized:
        of_quantization = _difference(in_float, quantized, name)
        of_export = _difference(quantized, exported, name)
        parts = of_export is not None and of_export.largest != 0.0
        rows.append(
            (name, _texts(of_quantization)[0], *_texts(of_export), "first difference" if parts and not parted else "")
        )
        parted |= parts
    _say(table(rows))
    _say("\nThe first values of the output:")
    for name, outputs in (("float", in_float), ("quantized", quantized), ("exported", exported)):
        values = outputs[OUTPUT][0].flatten()[:_SHOWN].tolist()
        _say(f"{name:10}" + " ".join(f"{value:12.6g}" for value in values))


def _difference(one: dict[str, list[Tensor]], other: dict[str, list[Tensor]], name: str) -> Difference | None:
    """Return how a layer's outputs differ; None if it ran in only one model, or on different numbers of values."""
    if name not in one or name not in other:
        return None
    try:
        return difference(one[name], other[name])
    except ValueError:  # different sizes, as when a router sends the layer other samples
        if name == OUTPUT:
            raise
        return None


def _texts(found: Difference | None) -> tuple[str, str]:
    return ("", "") if found is None else (f"{found.sqnr:.1f}", f"{found.largest:.3g}")


def _load(options: argparse.Namespace) -> tuple[nn.Module, nn.Module]:
    """Return the quantized module of a checkpoint, in evaluation mode, and the submodule that --network names."""
    if not isinstance(options.module_args, dict):
        raise ValueError(f"--module-args must be a JSON object, got {options.module_args}")
    checkpoint, state = read_checkpoint(options.checkpoint, weights_only=not options.trusted)
    module_class = _class(options.module)
    parameters = signature(module_class).parameters.values()
    unknown = options.module_args.keys() - {p.name for p in parameters}
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters):
        raise ValueError(f"--module-args must be arguments of {options.module}, got {', '.join(sorted(unknown))}")
    module = load_with_arguments(
        module_class,
        options.checkpoint,
        options.module_args,
        config_of_checkpoint(checkpoint) or config_of_state(state),
        map_location="cpu",
        weights_only=not options.trusted,
    ).eval()
    return module, module if options.network is None else module.get_submodule(options.network)


def _class(path: str) -> type[nn.Module]:
    package, _, name = path.replace(":", ".").rpartition(".")
    found = getattr(import_module(package), name, None) if package else None
    if not isinstance(found, type) or not issubclass(found, nn.Module):
        raise ValueError(f"--module must be the import path of a LightningModule's class, got {path}")
    return found


def _read_arguments(path: Path) -> Any:
    """Read the arguments of forward from a file: one argument, a tuple, or a dictionary of keyword arguments."""
    if path.suffix in (".npy", ".npz"):
        try:
            with path.open("rb") as file:
                found = np.load(file, allow_pickle=False)
                if path.suffix == ".npy":
                    return torch.from_numpy(found)
                return {name: torch.from_numpy(found[name]) for name in found.files}
        except (ValueError, EOFError, BadZipFile) as error:
            raise ValueError(f"{path} is damaged, or contains objects other than arrays of numbers: {error}") from error
    try:
        found = read_tensors(path, map_location="cpu", weights_only=True)
    except ValueError as error:
        raise ValueError(f"{path} is damaged, or is not a .npy, .npz or .pt file of tensors") from error
    return tuple(found) if isinstance(found, list) else found


def _exported_outputs(
    options: argparse.Namespace, network: nn.Module, layers: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, list[Tensor]]:
    path: Path | None = options.exported
    if path is None:
        return layer_outputs(convert(network), layers, args, kwargs)
    if path.suffix == ".onnx":
        return {OUTPUT: _run_onnx(path, args, kwargs)}
    if path.suffix == ".pt2":
        register_operators()
        with path.open("rb") as file:
            if not is_zipfile(file):  # torch would print a message of its own, too
                raise ValueError(f"{path} cannot be read: it is damaged, or was not saved by torch.export")
        try:
            program = torch.export.load(path)
        except (BadZipFile, RuntimeError, ValueError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        return layer_outputs(program.module(), [], args, kwargs)
    loaded = load_packed(path, network)
    return layer_outputs(loaded, layers, args, kwargs)


def _run_onnx(path: Path, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError('comparing with ONNX needs onnxruntime: pip install "lightning-qat-osc[onnx]"') from error
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has its own class for each reason
        raise RuntimeError(f"{path} cannot be read: {error}") from error
    names = [given.name for given in session.get_inputs()]
    inputs = {name: x for name, x in kwargs.items() if name in names and isinstance(x, Tensor)}
    others = {name: x for name, x in kwargs.items() if name not in inputs}
    by_position = [x for x in pytree.tree_leaves((args, others)) if isinstance(x, Tensor)]
    without = [name for name in names if name not in inputs]
    if len(without) != len(by_position):
        given = len(inputs) + len(by_position)
        raise ValueError(f"{path} takes {len(names)} tensors ({', '.join(names)}), got {given}")
    inputs |= dict(zip(without, by_position))
    try:
        arrays = session.run(None, {name: x.numpy() for name, x in inputs.items()})
    except Exception as error:
        raise RuntimeError(f"{path} does not run: {error}") from error
    return [x for x in map(torch.from_numpy, arrays) if x.is_floating_point()]


def _say(text: str, file: Any = None) -> None:
    (file or sys.stdout).write(f"{text}\n")


if __name__ == "__main__":
    sys.exit(main())
