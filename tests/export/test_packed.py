"""Packed files are small, are refused if damaged, and load as the converted model."""

import copy
import json
import os
import sys
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from calibrated import calibrated
from hypothesis import HealthCheck, given, settings
from models import ConvModule, Data, trainer
from test_convert import LAYERS, Only, Tied, assert_equal, old_norms
from torch import nn

from lightning_qat_osc import QuantizationAwareTraining, load_quantized, oscillation_states, quantization_plan
from lightning_qat_osc.export import convert, integer_weights, load_packed, save_packed
from lightning_qat_osc.export.formats import export_model
from lightning_qat_osc.export.packed import pack, unpack

safetensors = pytest.importorskip("safetensors.torch")


def assert_same_model(one, other):
    assert list(one.state_dict()) == list(other.state_dict())
    for key, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key
        assert value.dtype == other.state_dict()[key].dtype, key
    assert [type(m) for m in one.modules()] == [type(m) for m in other.modules()]


@settings(max_examples=100, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_bits_are_where_a_loop_puts_them(data):
    bits = data.draw(st.integers(2, 8))
    values = data.draw(st.lists(st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1), max_size=40))
    stream = sum((value % 2**bits) << bits * i for i, value in enumerate(values))
    expected = stream.to_bytes(-(-len(values) * bits // 8), "little")
    packed = pack(torch.tensor(values, dtype=torch.int8), bits)
    assert bytes(packed.tolist()) == expected
    assert unpack(packed, bits, [len(values)]).tolist() == values


@old_norms
@pytest.mark.parametrize("activation_bits", [None, 3])
@pytest.mark.parametrize("kind", LAYERS)
def test_the_converted_model_comes_back(kind, activation_bits, tmp_path):
    make, inputs = LAYERS[kind]
    bits = 2 + list(LAYERS).index(kind) % 7
    granularity = ["per_tensor", "per_channel"][len(kind) % 2]
    model = calibrated(
        Only(make()), *inputs, weight_bits=bits, activation_bits=activation_bits, weight_granularity=granularity
    )
    expected = convert(model)
    save_packed(model, tmp_path / "model.safetensors")
    fresh = Only(make())
    before = {key: value.clone() for key, value in fresh.state_dict().items()}
    loaded = load_packed(tmp_path / "model.safetensors", fresh)
    assert_same_model(loaded, expected)
    assert not loaded.training
    assert_equal(loaded(*inputs), expected(*inputs))
    assert all(torch.equal(value, before[key]) for key, value in fresh.state_dict().items())
    assert_same_model(load_packed(tmp_path / "model.safetensors", model), expected)  # a quantized module works too


def test_shared_weights_are_stored_once(tmp_path):
    tokens = torch.randint(0, 10, (2, 5))
    model = calibrated(Tied(), tokens)
    save_packed(model, tmp_path / "tied.safetensors")
    assert set(safetensors.load_file(tmp_path / "tied.safetensors")) == {"embedding.weight", "embedding.weight.scale"}
    loaded = load_packed(tmp_path / "tied.safetensors", Tied())
    assert loaded.head.weight is loaded.embedding.weight
    assert torch.equal(loaded(tokens), model(tokens))


def test_with_batch_norm_folded(tmp_path):
    x = torch.randn(4, 1, 6, 6)
    model = calibrated(ConvModule(), x, weight_bits=5)
    save_packed(model, tmp_path / "model.safetensors", fold_batch_norm=True)
    loaded = load_packed(tmp_path / "model.safetensors", ConvModule())
    expected = convert(model, fold_batch_norm=True)
    assert_same_model(loaded, expected)
    assert torch.equal(loaded(x), expected(x))


def test_after_training_from_lightning(tmp_path):
    module = ConvModule(lr=0.3)
    trainer([QuantizationAwareTraining(3, 3)], max_epochs=2).fit(module, Data())
    save_packed(module, tmp_path / "new" / "folder" / "model.safetensors")
    loaded = load_packed(tmp_path / "new" / "folder" / "model.safetensors", ConvModule())
    x = torch.randn(4, 1, 6, 6)
    assert torch.equal(loaded(x), module.eval()(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype, tmp_path):
    x = torch.randn(4, 1, 6, 6)
    model = calibrated(ConvModule(), x).to(dtype)
    save_packed(model, tmp_path / "model.safetensors")
    loaded = load_packed(tmp_path / "model.safetensors", ConvModule().to(dtype))
    assert_same_model(loaded, convert(model))
    assert torch.equal(loaded(x.to(dtype)), model(x.to(dtype)))


def residual_net(width=64):
    """Return a network with the weights of a ResNet-18 for small images, 11.2 million."""
    layers, channels = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()], width
    for stage in range(4):
        for block in range(2):
            for _ in range(2):
                out = width * 2**stage
                stride = 2 if stage and not block and channels != out else 1
                layers += [nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
                channels = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 100))


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_file_is_as_large_as_its_bits(bits, fold, tmp_path):
    model = calibrated(residual_net(), torch.randn(1, 3, 8, 8), weight_bits=bits, weight_range="lsq")
    save_packed(model, tmp_path / "model.safetensors", fold_batch_norm=fold)
    weights = integer_weights(model)
    float_bytes = sum(4 * weight.values.numel() for weight in weights.values())
    ideal = float_bytes * bits / 32
    assert float_bytes > 4e7
    assert ideal < (tmp_path / "model.safetensors").stat().st_size < 1.03 * ideal


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    torch.manual_seed(0)
    x = torch.randn(4, 1, 6, 6)
    model = calibrated(ConvModule(), x, weight_bits=3)
    path = tmp_path_factory.mktemp("packed") / "model.safetensors"
    save_packed(model, path)
    return path.read_bytes()


def test_every_truncated_file_is_refused(small, tmp_path):
    path = tmp_path / "model.safetensors"
    fresh = ConvModule()
    before = copy.deepcopy(fresh.state_dict())
    for length in [*range(0, 64), *range(64, len(small), 97), len(small) - 1]:
        path.write_bytes(small[:length])
        with pytest.raises(ValueError, match="is not a packed model"):
            load_packed(path, fresh)
    assert all(torch.equal(value, before[key]) for key, value in fresh.state_dict().items())


def test_every_edited_file_is_refused(small, tmp_path):
    path = tmp_path / "model.safetensors"
    fresh = nn.Identity()  # the file must be refused before the model is looked at
    for position in range(len(small)):
        path.write_bytes(small[:position] + bytes([small[position] ^ 1]) + small[position + 1 :])
        with pytest.raises(ValueError, match=r"is damaged|is not a packed model"):
            load_packed(path, fresh)
    path.write_bytes(small + b"\0")
    with pytest.raises(ValueError, match="is not a packed model"):
        load_packed(path, fresh)


def test_other_files_are_refused(small, tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="lacks format='lightning-qat-osc packed'"):
        load_packed(path, ConvModule())
    with pytest.raises(FileNotFoundError):
        load_packed(tmp_path / "none.safetensors", ConvModule())
    path.write_bytes(small)
    for other in (nn.Linear(3, 4), nn.Sequential(nn.Conv2d(1, 4, 3))):
        with pytest.raises(ValueError, match=f"does not fit {type(other).__name__}"):
            load_packed(path, other)
    wider = ConvModule()
    wider.head = nn.Linear(8, 5)
    with pytest.raises(ValueError, match="does not fit ConvModule"):
        load_packed(path, wider)


def test_a_later_version_is_refused(small, tmp_path, monkeypatch):
    from lightning_qat_osc.export import packed

    monkeypatch.setattr(packed, "_VERSION", 2)
    path = tmp_path / "model.safetensors"
    save_packed(calibrated(ConvModule(), torch.randn(4, 1, 6, 6)), path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="has version 2 of the format, but this package reads version 1"):
        load_packed(path, ConvModule())


def test_the_manifest_is_for_people_too(small, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(small)
    with safetensors.safe_open(path, framework="pt") as file:
        manifest = json.loads(file.metadata()["manifest"])
    entry = manifest["weights"]["depthwise.weight"]
    assert entry == {
        "layer": "depthwise", "parameter": "weight", "shape": [4, 1, 3, 3], "bits": 3, "quant_min": -4, "quant_max": 3,
        "zero_point": 0, "channel_axis": None, "dtype": "float32",
    }  # fmt: skip
    assert manifest["inputs"]["head"]["input"]["bits"] == 4


def test_a_failure_leaves_the_earlier_file(small, tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    path.write_bytes(small)

    write = Path.write_bytes

    def fails(file, content):
        write(file, content[:100])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", fails)
    with pytest.raises(OSError, match="no space"):
        save_packed(calibrated(ConvModule(), torch.randn(4, 1, 6, 6)), path)
    assert path.read_bytes() == small
    assert list(tmp_path.iterdir()) == [path]


def test_state_that_is_no_tensor_is_refused(tmp_path):
    class Extra(Only):
        def get_extra_state(self):
            return {"epoch": 3}

        def set_extra_state(self, state): ...

    model = calibrated(Extra(nn.Linear(3, 4)), torch.randn(4, 3))
    with pytest.raises(ValueError, match="entry '_extra_state' must be a tensor to be packed, got dict"):
        save_packed(model, tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_arguments_of_another_kind(tmp_path):
    model, path = calibrated(nn.Linear(3, 4), torch.randn(4, 3)), tmp_path / "model.safetensors"
    for call, words in (
        (lambda: save_packed(path, model), "path must be the path of a file, got Quantized"),
        (lambda: save_packed(model, None), "path must be the path of a file, got None"),
        (lambda: load_packed(None, model), "path must be the path of a file, got None"),
        (lambda: load_quantized(ConvModule, None), "checkpoint_path must be the path of a file, got None"),
        (lambda: load_quantized(nn.Linear, path), "module_class must be the class of a LightningModule, got .*Linear"),
        (lambda: quantization_plan(path), "module must be a torch.nn.Module, got .*model"),
        (lambda: oscillation_states(ConvModule), "module must be a module, got the class ConvModule"),
        (lambda: load_packed(model, path), "path must be the path of a file, got Quantized"),
        (
            lambda: load_packed(path, ConvModule),
            r"module must be a module, got the class ConvModule: pass an instance, ConvM",
        ),
        (lambda: load_quantized(path, ConvModule), "module_class must be the class of a LightningModule, got .*model"),
        (lambda: load_quantized(model, path), "module_class must be the class of a LightningModule, got Quantized"),
        (lambda: export_model(model, torch.randn(4, 3), "packed"), r"path must be the path of a file, got tensor"),
    ):
        with pytest.raises(TypeError, match=words):
            call()
    with pytest.raises(ValueError, match="export_format must be one of 'packed', 'onnx', 'torch', got 'pt2'"):
        export_model(model, path, "pt2")
    assert list(tmp_path.iterdir()) == []


def test_others_may_read_the_file(tmp_path):
    ordinary = tmp_path / "ordinary"
    ordinary.touch()
    save_packed(calibrated(nn.Linear(3, 4), torch.randn(4, 3)), tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").stat().st_mode == ordinary.stat().st_mode


def test_without_the_package_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r'pip install "lightning-qat-osc\[packed\]"'):
        load_packed(tmp_path / "model.safetensors", ConvModule())
    with pytest.raises(ImportError, match=r'save_packed needs safetensors: pip install "lightning-qat-osc\[packed\]"'):
        save_packed(ConvModule(), tmp_path / "model.safetensors")


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm, nn.utils.spectral_norm])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_norm_folded_into_a_weight_that_was_computed(tmp_path, norm):
    def make():
        return nn.Sequential(norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4))

    x = torch.randn(4, 3, 5, 5)
    model = calibrated(make(), x, activation_bits=None)
    save_packed(model, tmp_path / "m.safetensors", fold_batch_norm=True)
    loaded = load_packed(tmp_path / "m.safetensors", make())
    assert_same_model(loaded, convert(model, fold_batch_norm=True))


def test_a_converted_model_is_refused(tmp_path):
    model = calibrated(nn.Sequential(nn.Linear(4, 4)), torch.randn(8, 4))
    save_packed(model, tmp_path / "model.safetensors")
    with os.scandir(tmp_path) as entries:
        load_packed(next(entries), nn.Sequential(nn.Linear(4, 4)))  # any path-like object works
    with pytest.raises(ValueError, match="module must be newly created, but this Sequential is already converted"):
        load_packed(tmp_path / "model.safetensors", convert(model))


def test_dtypes_that_the_format_lacks_are_named(tmp_path):
    module = calibrated(nn.Sequential(nn.Linear(4, 4)), torch.randn(4, 4))
    module.register_buffer("phases", torch.zeros(2, dtype=torch.complex128))
    with pytest.raises(
        ValueError, match=r"entry 'phases' has dtype torch.complex128, which safetensors does not support"
    ):
        save_packed(module, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:.*full precision.*")
def test_a_file_of_another_attention_does_not_fit(tmp_path):
    x = torch.randn(3, 2, 8)
    save_packed(calibrated(nn.MultiheadAttention(8, 2), x, x, x), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="does not fit MultiheadAttention"):
        load_packed(tmp_path / "model.safetensors", nn.MultiheadAttention(8, 2, kdim=4))


def test_a_link_stays_and_its_target_is_written(tmp_path):
    module = calibrated(nn.Sequential(nn.Linear(4, 4)), torch.randn(4, 4))
    target, link = tmp_path / "of_today.safetensors", tmp_path / "model.safetensors"
    target.touch()
    link.symlink_to(target)
    save_packed(module, link)
    assert link.is_symlink()
    assert load_packed(target, nn.Sequential(nn.Linear(4, 4)))
