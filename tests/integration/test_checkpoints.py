"""Checkpoints of every kind, loaded into every kind of module."""

import copy
import errno
import pickle
import threading
import zipfile

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from models import ConvModule, Data, trainer

from lightning_qat_osc import (
    BatchNormReestimation,
    IterativeFreezing,
    LayerRule,
    OscillationDampening,
    OscillationTracking,
    QuantConfig,
    QuantizationAwareTraining,
    load_quantized,
    oscillation_states,
    quantize_model,
)
from lightning_qat_osc.lookup import quantizers, scale_parameters

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*below twice the momentum.*"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided.*"),
]


def callbacks(**kwargs):
    return [
        QuantizationAwareTraining(**{"weight_bits": 2, "activation_bits": 3, "scale_learning_rate": 0.01, **kwargs}),
        OscillationTracking(momentum=0.1),
        OscillationDampening(),
        IterativeFreezing(threshold=0.12, final_threshold=0.05),
        BatchNormReestimation(num_batches=2),
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Full and weights-only checkpoints of a float run and a quantized run, and the quantized module."""
    folder = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    t = trainer([], max_epochs=2)
    t.fit(ConvModule(lr=0.1, optimizer="AdamW"), Data())
    t.save_checkpoint(folder / "float.ckpt")
    t.save_checkpoint(folder / "float_weights.ckpt", weights_only=True)
    module = ConvModule(lr=0.3)
    t = trainer(callbacks(), max_epochs=4)
    t.fit(module, Data())
    t.save_checkpoint(folder / "full.ckpt")
    t.save_checkpoint(folder / "weights.ckpt", weights_only=True)
    return folder, module.eval()


X = torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(1))


def test_full_precision_by_ckpt_path_goes_on_with_its_optimizer(runs, tmp_path):
    folder, _ = runs
    saved = torch.load(folder / "float.ckpt", weights_only=True)
    moments, module = [], ConvModule(lr=0.1, optimizer="AdamW")

    class Look(QuantizationAwareTraining):
        def on_train_start(self, trainer, pl_module):
            super().on_train_start(trainer, pl_module)
            optimizer = trainer.optimizers[0]
            scales = {id(s) for s in scale_parameters(pl_module)}
            weights = [p for p in pl_module.parameters() if id(p) not in scales]
            moments.extend(optimizer.state[p]["exp_avg"].clone() for p in weights)

    t = trainer([Look(2, 3), OscillationTracking(momentum=0.1)], max_epochs=4)
    t.fit(module, Data(), ckpt_path=folder / "float.ckpt")
    assert t.current_epoch == 4
    assert t.global_step == 32
    states = saved["optimizer_states"][0]["state"]
    assert len(moments) == len(states)
    assert all(torch.equal(now, states[i]["exp_avg"]) for i, now in enumerate(moments))
    assert module.depthwise.weight_quantizer.calibrated
    t.save_checkpoint(tmp_path / "on.ckpt")
    on = trainer([Look(2, 3), OscillationTracking(momentum=0.1)], max_epochs=5)
    on.fit(ConvModule(lr=0.1, optimizer="AdamW"), Data(), ckpt_path=tmp_path / "on.ckpt")
    assert on.global_step == 40


def test_full_precision_by_load_from_checkpoint(runs):
    folder, _ = runs
    module = ConvModule.load_from_checkpoint(folder / "float.ckpt")
    before = module.depthwise.weight.clone()
    quantized = quantize_model(copy.deepcopy(module), QuantConfig(2, 3))
    assert torch.equal(quantized.depthwise.weight, before)
    trainer(callbacks()).fit(module, Data())
    assert module.depthwise.weight_quantizer.calibrated


def test_quantized_without_a_trainer(runs):
    folder, module = runs
    loaded = load_quantized(ConvModule, folder / "full.ckpt")
    assert loaded.hparams.lr == 0.3
    with torch.no_grad():
        assert torch.equal(loaded.eval()(X), module(X))
    for name, state in oscillation_states(module).items():
        assert torch.equal(oscillation_states(loaded)[name].frequency, state.frequency)
    trainer(callbacks(), max_epochs=1).fit(loaded.train(), Data())  # and training can continue


def test_what_a_module_does_to_its_checkpoint_is_done_without_a_trainer_too(tmp_path):
    class Partial(ConvModule):
        """Renames what it saves, and leaves the stem out."""

        def __init__(self):
            super().__init__(lr=0.3)
            self.strict_loading = False

        def state_dict(self, *args, **kwargs):
            state = super().state_dict(*args, **kwargs)
            return {name: value for name, value in state.items() if not name.startswith("stem")}

        def on_save_checkpoint(self, checkpoint):
            checkpoint["state_dict"] = {f"renamed.{k}": v for k, v in checkpoint["state_dict"].items()}

        def on_load_checkpoint(self, checkpoint):
            state = checkpoint["state_dict"].items()
            checkpoint["state_dict"] = {k.removeprefix("renamed."): v for k, v in state}

    module = Partial()
    t = trainer(callbacks(), max_epochs=1)
    t.fit(module, Data())
    t.save_checkpoint(tmp_path / "partial.ckpt")
    loaded = load_quantized(Partial, tmp_path / "partial.ckpt")
    own = dict(module.named_parameters())
    assert torch.equal(loaded.point.weight, own["point.weight"])
    assert torch.equal(loaded.point.weight_quantizer.scale, own["point.weight_quantizer.scale"])
    assert not torch.equal(loaded.stem.weight, own["stem.weight"])


class Growing(ConvModule):
    """Recreates its head when it loads a checkpoint, and adds as many blocks as the checkpoint has."""

    def __init__(self, config=None):
        super().__init__()
        self.config = config
        self.blocks = torch.nn.ModuleList()

    def on_save_checkpoint(self, checkpoint):
        checkpoint["blocks"] = len(self.blocks)

    def on_load_checkpoint(self, checkpoint):
        self.head = torch.nn.Linear(self.head.in_features, self.head.out_features)
        for _ in range(checkpoint["blocks"]):
            self.blocks.append(torch.nn.Linear(3, 3))


def test_layers_that_a_module_makes_as_it_loads(tmp_path):
    module = Growing()
    module.blocks.append(torch.nn.Linear(3, 3))
    t = trainer(callbacks(), max_epochs=1)
    with pytest.warns(UserWarning, match="was not called during calibration"):
        t.fit(module, Data())
    t.save_checkpoint(tmp_path / "grown.ckpt")
    loaded = load_quantized(Growing, tmp_path / "grown.ckpt")
    assert len(loaded.blocks) == 1
    with torch.no_grad():
        assert torch.equal(loaded.eval()(X), module.eval()(X))
    # an argument of the module may have the same name as one of load_quantized
    assert load_quantized(Growing, tmp_path / "grown.ckpt", config="its own").config == "its own"
    with pytest.raises(TypeError, match="config must be a QuantConfig, got 'none'"):
        load_quantized(ConvModule, tmp_path / "grown.ckpt", config="none")


class Filtering(ConvModule):
    """Loads only the entries of a checkpoint that match its own, and has an attribute that cannot be copied."""

    def __init__(self):
        super().__init__(lr=0.3)
        self.lock = threading.Lock()

    def on_load_checkpoint(self, checkpoint):
        own, state = self.state_dict(), checkpoint["state_dict"]
        checkpoint["state_dict"] = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}


class Forgetful(ConvModule):
    """Drops the quantizers from a checkpoint when it loads it."""

    def __init__(self):
        super().__init__(lr=0.3)
        self.strict_loading = False

    def on_load_checkpoint(self, checkpoint):
        state = checkpoint["state_dict"].items()
        checkpoint["state_dict"] = {k: v for k, v in state if "quantizer" not in k}


def test_a_hook_that_filters_the_state(runs):
    folder, module = runs
    loaded = load_quantized(Filtering, folder / "full.ckpt")
    with torch.no_grad():
        assert torch.equal(loaded.eval()(X), module(X))
    with pytest.raises(ValueError, match="Forgetful.on_load_checkpoint drops the quantizers"):
        load_quantized(Forgetful, folder / "full.ckpt")


def test_a_checkpoint_by_a_url(runs):
    folder, module = runs
    loaded = load_quantized(ConvModule, f"file://{folder / 'full.ckpt'}")
    with torch.no_grad():
        assert torch.equal(loaded.eval()(X), module(X))


def test_a_checkpoint_of_a_device_that_is_not_here(runs, tmp_path):
    folder, module = runs
    if torch.cuda.is_available():
        pytest.skip("there is such a device")
    with zipfile.ZipFile(folder / "full.ckpt") as cpu, zipfile.ZipFile(tmp_path / "gpu.ckpt", "w") as gpu:
        for entry in cpu.namelist():
            content = cpu.read(entry)
            if entry.endswith("data.pkl"):
                content = content.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
            gpu.writestr(entry, content)
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load(tmp_path / "gpu.ckpt", weights_only=True)
    loaded = load_quantized(ConvModule, tmp_path / "gpu.ckpt")
    with torch.no_grad():
        assert torch.equal(loaded.eval()(X), module(X))


def test_weights_only_needs_a_configuration(runs):
    folder, module = runs
    with pytest.raises(ValueError, match="does not contain its quantization configuration.*config="):
        load_quantized(ConvModule, folder / "weights.ckpt")
    loaded = load_quantized(ConvModule, folder / "weights.ckpt", QuantConfig(2, 3))
    with torch.no_grad():
        assert torch.equal(loaded.eval()(X), module(X))
    with pytest.raises(ValueError, match="has no quantizers: use ConvModule.load_from_checkpoint"):
        load_quantized(ConvModule, folder / "float.ckpt")


@pytest.mark.parametrize("name", ["weights", "float_weights"])
def test_training_does_not_go_on_from_weights_alone(runs, name):
    # Lightning's own error: such a checkpoint has no optimizer state
    class Untrained(ConvModule):
        def on_train_batch_start(self, batch, batch_idx):
            raise AssertionError("was refused before")

    folder, _ = runs
    with pytest.raises(KeyError, match="checkpoint contains only the model"):
        trainer(callbacks(), max_epochs=5).fit(Untrained(), Data(), ckpt_path=folder / f"{name}.ckpt")


def test_a_run_that_was_over_in_full_precision_trains_nothing(runs, caplog):
    folder, _ = runs
    module = ConvModule()
    with (
        caplog.at_level("INFO", logger="lightning"),
        pytest.warns(
            UserWarning, match="Nothing was trained, .* at epoch 2 of max_epochs=2 and step 16 of max_steps=-1"
        ),
    ):
        trainer([QuantizationAwareTraining(2, 3)], max_epochs=2).fit(module, Data(), ckpt_path=folder / "float.ckpt")
    assert "continues its run from step 16" in caplog.text
    assert not any(q.calibrated for q in quantizers(module))


def test_a_full_precision_checkpoint_is_tested_in_full_precision(runs):
    folder, _ = runs
    expected = trainer([]).test(ConvModule(), Data(), ckpt_path=folder / "float.ckpt", verbose=False)
    callback = QuantizationAwareTraining(2, 3)
    with pytest.warns(UserWarning, match="no ranges yet, so this runs in full precision"):
        result = trainer([callback]).test(ConvModule(), Data(), ckpt_path=folder / "float.ckpt", verbose=False)
    assert result[0]["test_loss"] == pytest.approx(expected[0]["test_loss"], rel=1e-6)


@pytest.mark.parametrize("name", ["full", "weights"])
def test_trainer_tests_a_checkpoint(runs, name):
    folder, module = runs
    expected = trainer(callbacks()).test(copy.deepcopy(module), Data(), verbose=False)
    result = trainer(callbacks()).test(ConvModule(), Data(), ckpt_path=folder / f"{name}.ckpt", verbose=False)
    assert result == expected


def test_the_best_checkpoint_is_tested_and_reloaded(tmp_path):
    t = trainer([*callbacks(), ModelCheckpoint(tmp_path, monitor="val_loss")], enable_checkpointing=True)
    t.fit(ConvModule(lr=0.3), Data())
    best = t.checkpoint_callback.best_model_score.item()
    assert t.test(datamodule=Data(), ckpt_path="best", verbose=False)[0]["test_loss"] == pytest.approx(best, rel=1e-5)


def test_into_the_plain_float_model(runs):
    folder, module = runs
    with pytest.raises(RuntimeError, match="Unexpected key.*quantizer"):
        ConvModule.load_from_checkpoint(folder / "full.ckpt")
    with pytest.warns(UserWarning, match="Found keys that are not in the model"):
        plain = ConvModule.load_from_checkpoint(folder / "full.ckpt", strict=False)
    assert torch.equal(plain.depthwise.weight, module.depthwise.weight)
    assert not hasattr(plain.depthwise, "weight_quantizer")


@pytest.mark.parametrize(
    ("change", "full", "weights"),
    [
        (
            {"weight_bits": 4},
            "weight_bits: 2 before, 4 now",
            "weight of layer 'depthwise' has 2 bits instead of 4 or 8",
        ),
        (
            {"activation_bits": 4},
            "activation_bits: 3 before, 4",
            "input of layer 'depthwise' has 3 bits instead of 4 or 8",
        ),
        (
            {"rules": (LayerRule("point", weight_bits=4),)},
            "rules: .* before, .*'pattern': 'point'.* now",
            r"weight of layer 'point' has 2 bits instead of 4\.",
        ),
    ],
)  # fmt: skip
def test_other_bits_or_rules_are_refused_with_what_differs(runs, change, full, weights):
    folder, _ = runs
    with pytest.raises(ValueError, match=full):
        trainer(callbacks(**change)).fit(ConvModule(), Data(), ckpt_path=folder / "full.ckpt")
    with pytest.raises(MisconfigurationException, match=weights):
        trainer(callbacks(**change)).test(ConvModule(), Data(), ckpt_path=folder / "weights.ckpt")


@pytest.mark.parametrize(("bits", "what"), [((2, None), "input"), ((None, 3), "weight")])
def test_bits_that_became_none_are_refused_with_the_layer(runs, bits, what):
    folder, _ = runs
    words = f"layer 'depthwise' was quantized with a different configuration: its {what} has bits in the state_dict, "
    words += "but is in full precision here"
    with pytest.raises(RuntimeError, match=words):
        trainer([QuantizationAwareTraining(*bits)]).fit(ConvModule(), Data(), ckpt_path=folder / "full.ckpt")


@pytest.mark.parametrize("name", ["full.ckpt", "weights.ckpt"])
def test_load_quantized_refuses_a_configuration_of_other_bits(runs, name):
    folder, _ = runs
    with pytest.raises(ValueError, match="config does not match .*weight of layer 'depthwise' has 2 bits"):
        load_quantized(ConvModule, folder / name, QuantConfig(4, 3))


def test_another_granularity_is_refused(runs):
    folder, _ = runs
    with pytest.raises(RuntimeError, match="size mismatch for stem.weight_quantizer.scale"):
        load_quantized(ConvModule, folder / "full.ckpt", QuantConfig(2, 3, weight_granularity="per_channel"))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_a_truncated_file_loses_nothing(runs, tmp_path, share):
    folder, module = runs
    content = (folder / "full.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(content[: int(share * len(content))])
    going_on = copy.deepcopy(module).train()
    before = {key: value.clone() for key, value in going_on.state_dict().items()}
    with pytest.raises((RuntimeError, EOFError, OSError, pickle.UnpicklingError)):
        trainer(callbacks()).fit(going_on, Data(), ckpt_path=tmp_path / "cut.ckpt")
    assert all(torch.equal(value, before[key]) for key, value in going_on.state_dict().items())
    with pytest.raises(ValueError, match=r"cut\.ckpt is damaged"):
        load_quantized(ConvModule, tmp_path / "cut.ckpt")
    trainer(callbacks(), max_epochs=1).fit(going_on, Data())


def test_a_file_that_cannot_be_reached_is_not_called_damaged(monkeypatch):
    def fails(*args, **kwargs):
        raise ConnectionResetError(errno.ECONNRESET, "connection reset by peer")

    monkeypatch.setattr("lightning_qat_osc.files.fsspec.open", fails)
    with pytest.raises(ConnectionResetError):
        load_quantized(ConvModule, "s3://bucket/last.ckpt")


def test_a_folder_of_shards_is_refused_with_the_way_out(tmp_path):
    words = r"is a folder of shards: consolidate it with .*lightning\.fabric\.utilities\.consolidate_checkpoint"
    with pytest.raises(ValueError, match=words):
        load_quantized(ConvModule, tmp_path)


def test_weights_in_full_precision_begin_anew(runs):
    folder, _ = runs
    state = torch.load(folder / "float.ckpt", weights_only=True)["state_dict"]
    for load in (
        lambda module: module.load_state_dict(state),
        lambda module: module.load_state_dict(state, strict=False),
    ):
        torch.manual_seed(0)
        module = ConvModule(lr=0.3)
        own = [QuantizationAwareTraining(2, 3), IterativeFreezing(threshold=0.06, momentum=0.05)]
        trainer(own, max_epochs=8).fit(module, Data())
        assert any(s.frozen.any() for s in oscillation_states(module).values())
        bits = [q.bits for q in quantizers(module)]
        load(module)
        torch.manual_seed(0)
        module.hparams.lr = 0.05
        trainer([QuantizationAwareTraining(2, 3)], max_epochs=1).fit(module, Data())
        assert [q.bits for q in quantizers(module)] == bits
        fresh = ConvModule()
        fresh.load_state_dict(state)
        torch.manual_seed(0)
        trainer([QuantizationAwareTraining(2, 3)], max_epochs=1).fit(fresh, Data())
        assert module.state_dict().keys() == fresh.state_dict().keys()
        assert all(torch.equal(a, b) for a, b in zip(module.state_dict().values(), fresh.state_dict().values()))


def test_weights_that_are_exchanged_within_a_run_keep_their_ranges(runs):
    folder, _ = runs
    state = torch.load(folder / "float.ckpt", weights_only=True)["state_dict"]

    class Exchanges(ConvModule):
        def on_validation_epoch_start(self):
            if not self.trainer.sanity_checking:
                self.own = {k: v.clone() for k, v in self.state_dict().items() if k in state}
                self.load_state_dict(state, strict=False)
                assert all(q.active for q in quantizers(self) if q.bits is not None)

        def on_validation_epoch_end(self):
            if not self.trainer.sanity_checking:
                self.load_state_dict(self.own, strict=False)

    module = Exchanges()
    trainer([QuantizationAwareTraining(2, 3)]).fit(module, Data())
    scales = [s.clone() for s in scale_parameters(module)]
    trainer([QuantizationAwareTraining(2, 3)]).test(module, Data(), verbose=False)
    assert all(torch.equal(a, b) for a, b in zip(scales, scale_parameters(module)))
    assert module.depthwise.weight_quantizer.calibrated


def test_a_quantized_module_is_tested_with_weights_in_full_precision(runs):
    folder, _ = runs
    expected = trainer([]).test(ConvModule(), Data(), ckpt_path=folder / "float.ckpt", verbose=False)
    module, callback = ConvModule(), QuantizationAwareTraining(2, 3)
    trainer([callback], max_epochs=1).fit(module, Data())
    with pytest.warns(UserWarning, match="no ranges yet, so this runs in full precision"):
        result = trainer([callback]).test(module, Data(), ckpt_path=folder / "float.ckpt", verbose=False)
    assert result[0]["test_loss"] == pytest.approx(expected[0]["test_loss"], rel=1e-6)


def test_a_state_of_something_else_changes_nothing(runs):
    module = ConvModule()
    own = [QuantizationAwareTraining(2, 3), IterativeFreezing(threshold=0.06, momentum=0.05)]
    trainer(own, max_epochs=1).fit(module, Data())
    before = copy.deepcopy(module.state_dict())
    module.load_state_dict({"bn1.bias": before["bn1.bias"]}, strict=False)
    assert all(torch.equal(a, b) for a, b in zip(module.state_dict().values(), before.values()))
    assert oscillation_states(module)
