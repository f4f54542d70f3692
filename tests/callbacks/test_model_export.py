"""Files that ModelExport writes at the end of fit and next to the best checkpoints."""

import copy
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from marks import needs_onnx_export
from models import ConvModule, Data, trainer
from torch.nn import functional as F

from lightning_qat_osc import BatchNormReestimation, ModelExport, QuantizationAwareTraining, load_quantized
from lightning_qat_osc.export import convert, load_packed

pytest.importorskip("safetensors")

X = torch.randn(5, 1, 6, 6, generator=torch.Generator().manual_seed(1))


class Wrapping(L.LightningModule):
    """A LightningModule without a forward, as most are."""

    def __init__(self, compiled=False, wrapped=False):
        super().__init__()
        self.network = ConvModule()
        if compiled:
            self.network.compile(backend="eager")
        if wrapped:
            self.network = torch.compile(self.network, backend="eager")

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.network(x=batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.network(x=batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def fit(module, export, tmp_path, *callbacks, **kwargs):
    callbacks = [QuantizationAwareTraining(3, 4), export, *callbacks]
    t = trainer(callbacks, default_root_dir=tmp_path, **{"num_sanity_val_steps": 0, **kwargs})
    t.fit(module, Data())
    return t


def run_program(path, *args, **kwargs):
    return torch.export.load(path).module()(*args, **kwargs)


def run_onnx(path, x):
    onnxruntime = pytest.importorskip("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


@needs_onnx_export
def test_all_formats_at_the_end_of_fit(tmp_path):
    pytest.importorskip("onnxscript")
    module = ConvModule()
    fit(module, ModelExport(["packed", "onnx", "torch"]), tmp_path, BatchNormReestimation(num_batches=2))
    names = ["model.onnx", "model.pt2", "model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    expected = module.eval()(X).detach()
    assert torch.equal(load_packed(tmp_path / "model.safetensors", ConvModule())(X), expected)
    step = module.head.input_quantizer.scale.item()  # an input halfway between two integers may round either way
    for out in (run_program(tmp_path / "model.pt2", X), run_onnx(tmp_path / "model.onnx", X)):
        assert torch.allclose(out, expected, atol=step)
        assert (out - expected).abs().mean() < 1e-3


@pytest.mark.parametrize(
    ("module", "export", "example_input_array"),
    [
        (ConvModule(), ModelExport(["torch"]), torch.zeros(3, 1, 6, 6)),
        (Wrapping(), ModelExport(["torch"], network="network", dirpath="elsewhere"), None),
        (Wrapping(compiled=True), ModelExport(["torch"], network="network", dirpath="elsewhere"), None),
        (Wrapping(wrapped=True), ModelExport(["torch"], network="network", dirpath="elsewhere"), None),
    ],
)
def test_example_inputs(module, export, example_input_array, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module.example_input_array = example_input_array
    fit(module, export, tmp_path)
    network = module if export.network is None else module.network
    arguments = ((X,), {}) if export.network is None else ((), {"x": X})
    path = tmp_path / "model.pt2" if export.network is None else tmp_path / "elsewhere" / "model.pt2"
    out = run_program(path, *arguments[0], **arguments[1])
    assert out.shape == (5, 3)
    assert (out - network.eval()(X)).abs().mean() < 1e-3
    assert not network._forward_pre_hooks


def test_a_network_that_is_not_called_is_named(tmp_path):
    with pytest.raises(
        MisconfigurationException, match="forward of Wrapping was not called in any training .* set network to"
    ):
        fit(Wrapping(), ModelExport(["torch"]), tmp_path)
    with pytest.raises(MisconfigurationException, match="network must name a submodule of Wrapping, got 'net'"):
        fit(Wrapping(), ModelExport(network="net"), tmp_path)


class Compare(L.Callback):
    """Lists the files in the checkpoint folder at the start of each epoch."""

    def __init__(self):
        self.found = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0:
            self.found.append(sorted(p.name for p in Path(trainer.checkpoint_callback.dirpath).glob("*")))


def test_beside_each_best_checkpoint(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", monitor="val_loss", mode="max", save_top_k=1)
    compare = Compare()

    class Worse(ConvModule):  # best in the epochs 0, 1 and 3
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", torch.tensor([1.0, 2.0, 0.0, 3.0, 1.0][self.current_epoch]))

    module = Worse()
    fit(module, ModelExport(when="best"), tmp_path, compare, checkpoint, max_epochs=5, enable_checkpointing=True)
    pairs = [[f"epoch={n}.ckpt", f"epoch={n}.safetensors"] for n in (0, 1, 1, 3)]
    assert compare.found == [[], *pairs]
    loaded = load_packed(tmp_path / "epoch=3.safetensors", Worse())
    expected = load_quantized(Worse, tmp_path / "epoch=3.ckpt").eval()
    assert torch.equal(loaded(X), expected(X))
    assert not torch.equal(loaded(X), module.eval()(X))  # training went on


def test_the_last_epoch_may_be_the_best_and_all_may_be_kept(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", monitor="epoch_", mode="max", save_top_k=-1)

    class Better(ConvModule):
        def validation_step(self, batch, batch_idx):
            self.log("epoch_", float(self.current_epoch))

    module = Better()
    t = fit(module, ModelExport(when="best"), tmp_path, checkpoint, max_epochs=2, enable_checkpointing=True)
    assert sorted(p.name for p in tmp_path.glob("*.safetensors")) == ["epoch=0.safetensors", "epoch=1.safetensors"]
    assert torch.equal(load_packed(tmp_path / "epoch=1.safetensors", Better())(X), module.eval()(X))
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    callbacks = [QuantizationAwareTraining(3, 4), ModelExport(when="best"), copy.deepcopy(checkpoint)]
    again = trainer(callbacks, default_root_dir=tmp_path, enable_checkpointing=True, max_epochs=3)
    again.fit(Better(), Data(), ckpt_path=t.checkpoint_callback.best_model_path)
    after = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    assert after.keys() - times.keys() == {"epoch=2.safetensors"}
    assert times.items() < after.items()  # existing files are unchanged


class Worsening(ConvModule):
    """Its first epoch is the best."""

    def __init__(self, folder=None):
        super().__init__()
        self.save_hyperparameters()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", float(self.current_epoch))


def test_hyperparameters_may_be_of_any_kind(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", monitor="val_loss")
    fit(Worsening(Path("data")), ModelExport(when="best"), tmp_path, checkpoint, enable_checkpointing=True)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["epoch=0.safetensors"]


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided")
def test_a_best_checkpoint_that_was_not_exported_yet_is_after_a_resume(tmp_path):
    for exports, resume in ([], {}), ([ModelExport(when="best")], {"ckpt_path": tmp_path / "last.ckpt"}):
        checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", monitor="val_loss", save_last=True)
        callbacks = [QuantizationAwareTraining(3, 4), *exports, checkpoint]
        options = {"num_sanity_val_steps": 0, "max_epochs": 2 if resume else 1}
        t = trainer(callbacks, default_root_dir=tmp_path, enable_checkpointing=True, **options)
        t.fit(Worsening(), Data(), **resume)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["epoch=0.safetensors"]


def test_exports_from_before_a_resume_go_with_their_checkpoints(tmp_path):
    class Better(ConvModule):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", -float(self.current_epoch))

    def run(epochs, **resume):
        checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", monitor="val_loss", save_last=True)
        callbacks = [QuantizationAwareTraining(3, 4), ModelExport(when="best"), checkpoint]
        t = trainer(callbacks, default_root_dir=tmp_path, enable_checkpointing=True, max_epochs=epochs)
        t.fit(Better(), Data(), **resume)

    run(2)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["epoch=1.safetensors"]
    run(3, ckpt_path=tmp_path / "last.ckpt")
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["epoch=2.safetensors"]


def test_an_export_that_fails_does_not_end_training(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", monitor="val_loss")
    export = ModelExport(["torch"], when="best")
    module = Wrapping()
    with pytest.warns(UserWarning, match=r"epoch=\d.ckpt was not exported: MisconfigurationException: the forward"):
        t = fit(module, export, tmp_path, checkpoint, enable_checkpointing=True)
    assert t.current_epoch == 2


def test_training_is_the_same_with_it(tmp_path):
    results = []
    for export in (ModelExport(["torch"], when="best"), None):
        torch.manual_seed(0)
        module = ConvModule(dropout=0.2)
        checkpoint = ModelCheckpoint(tmp_path / str(export is None), monitor="val_loss")
        callbacks = [QuantizationAwareTraining(3, 4), *([export] if export else []), checkpoint]
        trainer(callbacks, enable_checkpointing=True).fit(module, Data(shuffle=True))
        results.append(module.state_dict())
    assert list(tmp_path.rglob("*.pt2"))
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(value, results[1][key]) for key, value in results[0].items())


def test_fast_dev_run_writes_nothing(tmp_path):
    for when in ("fit_end", "best"):
        fit(ConvModule(), ModelExport(when=when), tmp_path, fast_dev_run=True)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"formats": []}, "formats must be a list of at least one of packed, onnx, torch, got"),
        ({"formats": "onnx"}, "formats must be a list"),
        ({"formats": 5}, "formats must be a list of at least one of packed, onnx, torch, got 5"),
        ({"formats": ["tflite"]}, "formats must be one of 'packed', 'onnx', 'torch', got 'tflite'"),
        ({"when": "always"}, "when must be one of 'fit_end', 'best', got 'always'"),
        ({"when": "best", "dirpath": "x"}, "dirpath must be None with when='best'.* got 'x'"),
    ],
)
def test_arguments_are_checked(arguments, words):
    with pytest.raises(ValueError, match=words):
        ModelExport(**arguments)


def test_a_folder_that_is_no_path():
    with pytest.raises(TypeError, match="dirpath must be the path of a folder, got 3"):
        ModelExport(dirpath=3)


def test_refused_before_the_first_step(tmp_path, monkeypatch):
    with pytest.raises(MisconfigurationException, match="ModelExport needs quantized weights"):
        trainer([ModelExport()]).fit(ConvModule(), Data())
    with pytest.raises(MisconfigurationException, match="needs the Trainer's ModelCheckpoint"):
        fit(ConvModule(), ModelExport(when="best"), tmp_path)
    with pytest.raises(MisconfigurationException, match="a module in 32 bits, got precision='bf16-true'"):
        fit(ConvModule(), ModelExport(["packed", "torch"]), tmp_path, precision="bf16-true")
    monkeypatch.setattr("lightning_qat_osc.export.extras.find_spec", lambda package: None)
    with pytest.raises(ImportError, match=r"'packed' needs safetensors: pip install \"lightning-qat-osc\[packed\]\""):
        fit(ConvModule(), ModelExport(), tmp_path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # jsonargparse's, about what Lightning calls
def test_from_yaml(tmp_path, monkeypatch):
    pytest.importorskip("jsonargparse")
    from lightning.pytorch.cli import LightningCLI

    (tmp_path / "config.yaml").write_text(f"""
trainer:
  accelerator: cpu
  max_epochs: 1
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  default_root_dir: {tmp_path}
  callbacks:
    - class_path: lightning_qat_osc.QuantizationAwareTraining
      init_args: {{weight_bits: 3, activation_bits: null}}
    - class_path: lightning_qat_osc.ModelExport
      init_args: {{formats: [packed, torch], when: best}}
    - class_path: lightning_qat_osc.ModelExport
      init_args: {{dirpath: {tmp_path}/end, network: point}}
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {{dirpath: {tmp_path}, filename: best, monitor: val_loss}}
""")
    monkeypatch.setattr(sys, "argv", ["fit.py", "fit", "--config", str(tmp_path / "config.yaml")])
    cli = LightningCLI(ConvModule, Data, save_config_callback=None, seed_everything_default=0)
    assert sorted(path.name for path in tmp_path.glob("best*")) == ["best.ckpt", "best.pt2", "best.safetensors"]
    module = cli.model.eval()
    assert torch.equal(load_packed(tmp_path / "best.safetensors", ConvModule())(X), module(X))
    assert torch.equal(
        load_packed(tmp_path / "end" / "model.safetensors", ConvModule().point).weight, convert(module.point).weight
    )


class Scores(ConvModule):
    values = (1.0, 0.5, 0.7, 0.8, 0.6, 0.9)

    def on_validation_epoch_end(self):
        self.log("score", self.values[self.current_epoch])


def test_exports_go_with_checkpoints_that_are_no_longer_among_the_best(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", monitor="score", save_top_k=2)
    own = [QuantizationAwareTraining(3, 3), checkpoint, ModelExport(["packed"], when="best")]
    trainer(own, max_epochs=6, enable_checkpointing=True, num_sanity_val_steps=0).fit(Scores(), Data())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["epoch=1.ckpt", "epoch=1.safetensors", "epoch=4.ckpt"]


def test_what_cannot_be_exported_is_refused_before_training(tmp_path):
    class Untrained(ConvModule):
        def on_train_batch_start(self, batch, batch_idx):
            raise AssertionError("was refused before")

    (tmp_path / "file").touch()
    for arguments, error, words in (
        ({"network": "bn1"}, MisconfigurationException, "a submodule with quantized layers, and 'bn1' has none"),
        ({"dirpath": "memory://folder"}, MisconfigurationException, "writes local files, got memory://folder"),
        ({"dirpath": tmp_path / "file" / "folder"}, NotADirectoryError, "file/folder"),
    ):
        own = [QuantizationAwareTraining(3, 3, calibration_batches=1), ModelExport(["packed"], **arguments)]
        with pytest.raises(error, match=words):
            trainer(own).fit(Untrained(), Data())
    none = ModelCheckpoint(tmp_path, save_top_k=0)
    own = [QuantizationAwareTraining(3, 3), none, ModelExport(["packed"], when="best")]
    with pytest.raises(MisconfigurationException, match="keeps the best checkpoint, got save_top_k=0"):
        trainer(own, enable_checkpointing=True).fit(Untrained(), Data())


class Scaled(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = ConvModule()

    def forward(self, x, *rest, scale, **named):
        return self.inner(scale * x + sum(rest))


class Calling(Wrapping):
    """Calls its network with positional and keyword arguments, and optionally with unnamed positional ones."""

    def __init__(self, *rest):
        super().__init__()
        self.network, self.rest = Scaled(), rest

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.network(batch[0], *self.rest, scale=torch.ones(1)), batch[1])

    def validation_step(self, batch, batch_idx):
        self.training_step(batch, batch_idx)


def test_a_forward_that_takes_any_arguments(tmp_path):
    module = Calling()
    fit(module, ModelExport(["torch"], network="network"), tmp_path, max_epochs=1)
    expected = module.network.eval()(X[:2], scale=torch.ones(1)).detach()
    out = run_program(tmp_path / "model.pt2", x=X[:2], scale=torch.ones(1))
    assert torch.allclose(out, expected, atol=module.network.inner.head.input_quantizer.scale.item())


def test_positions_that_a_forward_does_not_name_are_refused_beside_keywords(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"unnamed positional arguments, .* with both \(\*rest\)"):
        fit(Calling(torch.zeros(1)), ModelExport(["torch"], network="network"), tmp_path, max_epochs=1)


class Partial(ConvModule):
    """Leaves the submodule ``extra`` out of its checkpoints."""

    def __init__(self):
        super().__init__()
        self.strict_loading = False
        self.extra = torch.nn.LayerNorm(3)

    def state_dict(self, *args, **kwargs):
        return {k: v for k, v in super().state_dict(*args, **kwargs).items() if not k.startswith("extra")}


class Growing(ConvModule):
    """Recreates its head when it loads a checkpoint, and calls the head through a list."""

    def __init__(self):
        super().__init__()
        self.stages = [self.head]

    def forward(self, x):
        x = F.relu(self.bn2(self.depthwise(F.relu(self.bn1(self.stem(x))))))
        return self.stages[0](F.relu(self.point(x)).mean((2, 3)))

    def on_load_checkpoint(self, checkpoint):
        self.head = torch.nn.Linear(self.head.in_features, self.head.out_features)
        self.stages = [self.head]


class Remembering(ConvModule):
    """Saves a value and a growing buffer in its checkpoints."""

    def __init__(self):
        super().__init__()
        self.temperature = 1.0
        self.loads = 0
        self.register_buffer("seen", torch.zeros(0))

    def on_train_epoch_start(self):
        self.temperature = 1.0 + self.current_epoch
        self.seen = torch.ones(self.current_epoch + 1)

    def forward(self, x):
        return super().forward(x) * self.temperature + self.seen.sum()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", float(self.current_epoch))  # the first epoch is the best

    def on_save_checkpoint(self, checkpoint):
        checkpoint["temperature"] = self.temperature

    def on_load_checkpoint(self, checkpoint):
        self.temperature = checkpoint["temperature"]
        self.loads += 1
        self.seen = torch.zeros_like(checkpoint["state_dict"]["seen"])


class Compiled(ConvModule):
    """Has a compiled layer."""

    def __init__(self):
        super().__init__()
        self.head = torch.compile(self.head, backend="eager")

    def on_load_checkpoint(self, checkpoint):
        pass


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # from torch, where a hook breaks the graph
@pytest.mark.parametrize("module_class", [Partial, Growing, Compiled])
def test_checkpoints_are_exported_as_their_module_loads_them(module_class, tmp_path):
    best = ModelCheckpoint(tmp_path, filename="best", monitor="val_loss")
    fit(module_class(), ModelExport(when="best"), tmp_path, best, max_epochs=2, enable_checkpointing=True)
    loaded = load_packed(tmp_path / "best.safetensors", module_class())
    with torch.no_grad():
        assert torch.equal(loaded(X), load_quantized(module_class, tmp_path / "best.ckpt").eval()(X))


def test_what_a_module_remembers_is_that_of_the_checkpoint(tmp_path):
    best = ModelCheckpoint(tmp_path, filename="best", monitor="val_loss")
    fit(Remembering(), ModelExport(["torch"], when="best"), tmp_path, best, max_epochs=3, enable_checkpointing=True)
    module = load_quantized(Remembering, tmp_path / "best.ckpt").eval()
    assert (module.temperature, len(module.seen), module.loads) == (1.0, 1, 1)
    with torch.no_grad():
        assert torch.allclose(run_program(tmp_path / "best.pt2", X), module(X), atol=1e-5)


class Quiet(ConvModule):
    """Its steps do not log: Dynamo fails in self.log."""

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self(batch[0])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # from torch, where a hook breaks the graph
def test_a_module_that_is_compiled_as_a_whole(tmp_path):
    module = Quiet()
    export = ModelExport(["packed", "torch"])
    fit(torch.compile(module, backend="eager"), export, tmp_path, max_epochs=1)
    plain = convert(module)
    with torch.no_grad():
        expected = module.eval()(X)
        assert torch.equal(load_packed(tmp_path / "model.safetensors", Quiet())(X), expected)
        assert torch.allclose(run_program(tmp_path / "model.pt2", X), expected, atol=1e-5)
        for p in module.parameters():
            p.zero_()
        assert torch.equal(plain(X), expected)  # so the copy does not call the original's forward


def test_a_run_after_leaves_the_exports_of_one_before(tmp_path):
    export = ModelExport(when="best")
    for fold in ("first", "second"):
        best = ModelCheckpoint(tmp_path / fold, filename="best", monitor="val_loss")
        fit(ConvModule(), export, tmp_path, best, max_epochs=1, enable_checkpointing=True)
        (tmp_path / fold / "best.ckpt").unlink()
    assert (tmp_path / "first" / "best.safetensors").exists()


def test_a_run_that_goes_on_takes_exports_with_the_checkpoints_that_it_removes(tmp_path):
    best = ModelCheckpoint(tmp_path, filename="{epoch}", monitor="score", save_top_k=2)
    t = fit(Scores(), ModelExport(when="best"), tmp_path, best, max_epochs=2, enable_checkpointing=True)
    t.fit_loop.max_epochs = 6
    t.fit(t.lightning_module, Data())
    exported = {p.stem for p in tmp_path.glob("*.safetensors")}
    assert exported
    assert exported <= {p.stem for p in tmp_path.glob("*.ckpt")}


class Fixed(ConvModule):
    """Fixes the batch size when it is exported, because ``len(x)`` is a plain number."""

    def forward(self, x):
        return super().forward(x.view(len(x), *x.shape[1:]))


def test_a_forward_that_fixes_the_batch_size(tmp_path):
    module = Fixed()
    module.example_input_array = X[:2]
    fit(module, ModelExport(["torch"], dynamic_batch=False), tmp_path, max_epochs=1)
    with torch.no_grad():
        assert torch.allclose(run_program(tmp_path / "model.pt2", X[:2]), module.eval()(X[:2]), atol=1e-5)
    with pytest.raises(TypeError, match="dynamic_batch must be"):
        ModelExport(dynamic_batch="no")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"formats": ["packed"]}, {"formats": ["torch", "packed"], "network": "stem"}),
        ({"formats": ["packed"], "when": "best"}, {"formats": ["packed"], "when": "best", "network": "stem"}),
    ],
)
def test_two_that_write_the_same_file_are_refused(one, other, tmp_path):
    best = ModelCheckpoint(tmp_path, monitor="val_loss")
    with pytest.raises(MisconfigurationException, match="would write 'packed' to the same file"):
        fit(ConvModule(), ModelExport(**one), tmp_path, ModelExport(**other), best, enable_checkpointing=True)
    fit(
        ConvModule(), ModelExport(dirpath=str(tmp_path / "a")), tmp_path, ModelExport(dirpath=str(tmp_path / "b")),
        max_epochs=1,
    )  # fmt: skip
    assert {path.parent.name for path in tmp_path.rglob("model.safetensors")} == {"a", "b"}


def test_a_network_that_is_no_name():
    with pytest.raises(TypeError, match="network must be the name of a submodule, got 3"):
        ModelExport(network=3)
