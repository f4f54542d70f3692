"""Complete models from transformers, as plain LightningModules: fit, evaluate, stop and resume."""

import lightning as L
import pytest
import torch
from models import trainer
from torch.utils.data import DataLoader, Dataset

from lightning_qat_osc import (
    BatchNormReestimation,
    IterativeFreezing,
    OscillationDampening,
    OscillationTracking,
    QuantizationAwareTraining,
    load_quantized,
    oscillation_states,
)
from lightning_qat_osc.lookup import quantized_layers, quantized_weights

transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*below twice the momentum.*"),
    pytest.mark.filterwarnings("ignore:Parameters outside the layers.*stay in full precision"),
    pytest.mark.filterwarnings("ignore:.*was not called during calibration.*"),
    pytest.mark.filterwarnings("ignore:.*is all zero; the range is set as for torch's default.*"),
    pytest.mark.filterwarnings("ignore:.*was 0 throughout calibration.*"),
    pytest.mark.filterwarnings("ignore:.*computes its weight from other parameters.*"),
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training.*"),
    pytest.mark.filterwarnings("ignore:There is no training data to re-estimate batch norm from.*"),
]

SMALL = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}


def image_classifier(model):
    return model, {"pixel_values": torch.randn(8, 3, 32, 32), "labels": torch.randint(3, (8,))}


def mobilenet_v2():
    config = transformers.MobileNetV2Config(depth_multiplier=0.25, image_size=32, num_labels=3)
    return image_classifier(transformers.MobileNetV2ForImageClassification(config))


def vit():
    config = transformers.ViTConfig(**SMALL, image_size=32, patch_size=8, num_labels=3)
    return image_classifier(transformers.ViTForImageClassification(config))


def deit():
    config = transformers.DeiTConfig(**SMALL, image_size=32, patch_size=8, num_labels=3)
    return image_classifier(transformers.DeiTForImageClassification(config))


def bert():
    config = transformers.BertConfig(**SMALL, vocab_size=50, max_position_embeddings=16, num_labels=3)
    mask = torch.ones(8, 12, dtype=torch.long)
    mask[:, 9:] = 0
    batch = {"input_ids": torch.randint(50, (8, 12)), "attention_mask": mask, "labels": torch.randint(3, (8,))}
    return transformers.BertForSequenceClassification(config), batch


def gpt2():
    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    tokens = torch.randint(50, (8, 12))
    return transformers.GPT2LMHeadModel(config), {"input_ids": tokens, "labels": tokens.clone()}


def whisper():
    config = transformers.WhisperConfig(
        vocab_size=50, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, num_mel_bins=8, max_source_positions=16,
        max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    batch = {"input_features": torch.randn(8, 8, 32), "labels": torch.randint(3, 50, (8, 6))}
    return transformers.WhisperForConditionalGeneration(config), batch


def wav2vec2():
    config = transformers.Wav2Vec2Config(
        **SMALL, conv_dim=(8, 8), conv_stride=(5, 2), conv_kernel=(10, 3), num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2, num_labels=3, apply_spec_augment=False, classifier_proj_size=8, layerdrop=0.0,
    )  # fmt: skip
    batch = {"input_values": torch.randn(8, 400), "labels": torch.randint(3, (8,))}
    return transformers.Wav2Vec2ForSequenceClassification(config), batch


MODELS = [mobilenet_v2, vit, deit, bert, gpt2, whisper, wav2vec2]


class Wrapped(L.LightningModule):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.model, self.examples = globals()[name]()

    def forward(self, **batch):
        return self.model(**batch)

    def training_step(self, batch, batch_idx):
        loss = self(**batch).loss
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self(**batch).loss)

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


class Rows(Dataset):
    def __init__(self, batch):
        self.batch = batch

    def __len__(self):
        return 8

    def __getitem__(self, i):
        return {key: value[i] for key, value in self.batch.items()}


def callbacks():
    return [
        QuantizationAwareTraining(3, 4, scale_learning_rate=0.01, calibration_batches=2),
        OscillationTracking(momentum=0.1),
        OscillationDampening(),
        IterativeFreezing(threshold=0.12, final_threshold=0.05),
        BatchNormReestimation(num_batches=2),
    ]


def run(name, max_steps=5, **kwargs):
    module = Wrapped(name)
    data = DataLoader(Rows(module.examples), batch_size=4)
    torch.manual_seed(1)
    t = trainer(callbacks(), max_epochs=-1, max_steps=max_steps, num_sanity_val_steps=0, check_val_every_n_epoch=1)
    t.fit(module, data, data, **kwargs)
    return module, t, data


@pytest.mark.parametrize("name", [f.__name__ for f in MODELS])
def test_five_steps_evaluation_and_reload(name, tmp_path):
    plain = Wrapped(name)
    expected = {n for n, m in plain.named_modules() if type(m).__name__ in ("Linear", "Conv1d", "Conv2d", "Conv1D")}
    module, t, data = run(name)
    assert t.global_step == 5
    assert expected <= set(quantized_layers(module))
    assert all(torch.isfinite(p).all() for p in module.parameters())
    for _, weight, q in quantized_weights(module):
        values = (q(weight) / q.scale).detach()
        assert torch.allclose(values, values.round(), atol=1e-4)
        assert values.min() >= q.quant_min - 1e-4
        assert values.max() <= q.quant_max + 1e-4
    loss = t.test(module, data, verbose=False)[0]["val_loss"]
    t.save_checkpoint(tmp_path / "end.ckpt")
    assert trainer(callbacks()).test(Wrapped(name), data, tmp_path / "end.ckpt", verbose=False)[0]["val_loss"] == loss
    loaded = load_quantized(Wrapped, tmp_path / "end.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), module.parameters()))
    states = oscillation_states(module)
    assert states
    assert oscillation_states(loaded).keys() == states.keys()


@pytest.mark.parametrize("name", [f.__name__ for f in MODELS])
def test_a_stopped_run_ends_with_the_same_bits(name, tmp_path):
    class Seed(L.Callback):  # for dropout: a checkpoint does not store the states of random generators
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            torch.manual_seed(trainer.global_step)

    class Save(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.global_step == 2:
                trainer.save_checkpoint(tmp_path / "stop.ckpt")

    unbroken, resumed = Wrapped(name), Wrapped(name)
    data = DataLoader(Rows(unbroken.examples), batch_size=4)
    for module, last, path in ((unbroken, [Save()], None), (resumed, [], tmp_path / "stop.ckpt")):
        t = trainer([*callbacks(), Seed(), *last], max_epochs=3, num_sanity_val_steps=0)
        t.fit(module, data, data, ckpt_path=path)
        assert t.global_step == 6
    assert unbroken.state_dict().keys() == resumed.state_dict().keys()
    for (key, value), other in zip(unbroken.state_dict().items(), resumed.state_dict().values()):
        assert torch.equal(value, other), key


def test_a_tied_head_is_quantized_once():
    module, _, _ = run("gpt2")
    model = module.model
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.lm_head.weight_quantizer is model.transformer.wte.weight_quantizer
    assert model.transformer.h[0].attn.c_attn.weight_quantizer.bits == 3
