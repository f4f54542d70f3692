import csv
import math

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from models import ConvModule, Data, dataset, trainer
from torch.utils.data import DataLoader, IterableDataset

from lightning_qat_osc import (
    IterativeFreezing,
    OscillationDampening,
    QuantizationAwareTraining,
    oscillation_states,
)
from lightning_qat_osc.callbacks import iterative_freezing
from lightning_qat_osc.lookup import quantized_weights
from lightning_qat_osc.sweep import dampen_and_pass_on

TOTAL = 16  # two epochs of eight steps


def qat(**kwargs):
    return QuantizationAwareTraining(**{"weight_bits": 3, "activation_bits": 3, **kwargs})


def expected_weight(step, final, start):
    t0 = start * TOTAL
    return 0.0 if step <= t0 else final / 2 * (1 - math.cos(math.pi * (step - t0) / (TOTAL - t0)))


AGGREGATE = {
    "sum": lambda x: x.sum(),
    "mean": lambda x: x.mean(),
    "kernel_mean": lambda x: x.sum(0).mean(),
}


FINAL_WEIGHT = {"sum": 0.5, "mean": 50.0, "kernel_mean": 5.0}


class PrintedLoss(ConvModule):
    """Adds the loss as printed in the paper to its own: L = L_task + lambda L_damp."""

    def __init__(self, aggregation):
        super().__init__()
        self.aggregation = aggregation

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.trainer.training and torch.is_grad_enabled():
            weight = expected_weight(self.trainer.global_step, FINAL_WEIGHT[self.aggregation], 0.25)
            for _, w, q in quantized_weights(self, max_bits=4):
                s, n, p = q.scale, q.quant_min, q.quant_max
                w_q = (s * torch.clamp(torch.round(w / s), n, p)).detach()
                loss = loss + weight * AGGREGATE[self.aggregation]((w_q - torch.clamp(w, s * n, s * p)) ** 2)
        return loss


@pytest.mark.parametrize("aggregation", AGGREGATE)
@pytest.mark.parametrize("clip", [None, 0.1])
def test_a_run_equals_one_with_the_printed_loss(aggregation, clip):
    torch.manual_seed(5)
    printed = PrintedLoss(aggregation)
    trainer([qat()], gradient_clip_val=clip).fit(printed, Data())
    torch.manual_seed(5)
    dampened = ConvModule()
    callback = OscillationDampening(final_weight=FINAL_WEIGHT[aggregation], aggregation=aggregation)
    trainer([qat(), callback], gradient_clip_val=clip).fit(dampened, Data())
    for (name, a), b in zip(printed.named_parameters(), dampened.parameters()):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6), name
    torch.manual_seed(5)
    plain = ConvModule()
    trainer([qat()], gradient_clip_val=clip).fit(plain, Data())
    largest = [(a - b).abs().max().item() for a, b in zip(plain.parameters(), dampened.parameters())]
    assert max(largest) > 3e-4  # well above the tolerance for the two runs above


def test_added_once_a_step_under_accumulation():
    looks, expected = [], []

    class Look(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            weight, q = pl_module.depthwise.weight, pl_module.depthwise.weight_quantizer
            looks.append(weight.grad.clone())
            w = weight.detach().clone().requires_grad_()
            w_q = q(w).detach()
            ((w_q - torch.clamp(w, q.scale.detach() * -4, q.scale.detach() * 3)) ** 2).sum().backward()
            expected.append(0.5 * w.grad)

    first, second = Look(), Look()
    callback = OscillationDampening(final_weight=0.5, initial_weight=0.5)
    trainer([qat(), first, callback, second], accumulate_grad_batches=4, max_epochs=1).fit(ConvModule(), Data())
    assert len(looks) == 4
    for before, after, added in zip(looks[::2], looks[1::2], expected[::2]):
        assert torch.allclose(after - before, added, rtol=1e-4, atol=1e-6)
        assert added.abs().max() > 1e-3


def test_logs(tmp_path):
    logger = CSVLogger(tmp_path)
    module = ConvModule()
    trainer([qat(), OscillationDampening(final_weight=0.5)], logger=logger, log_every_n_steps=1).fit(module, Data())
    with open(f"{logger.log_dir}/metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["oscillation/dampening_weight"]]
    weights = [float(row["oscillation/dampening_weight"]) for row in rows]
    assert weights == pytest.approx([expected_weight(t, 0.5, 0.25) for t in range(TOTAL)])
    loss = sum(
        ((s * torch.clamp(torch.round(w / s), n, p)) - torch.clamp(w, s * n, s * p)).square().sum()
        for w, s, n, p in ((w, q.scale, q.quant_min, q.quant_max) for _, w, q in quantized_weights(module, 4))
    )
    assert float(rows[-1]["oscillation/dampening_loss"]) == pytest.approx(loss.item(), rel=1e-4)
    assert all(key.startswith(("oscillation/", "train_loss", "val_loss", "step", "epoch")) for key in rows[0])


class Endless(IterableDataset):
    def __iter__(self):
        return iter(dataset())


@pytest.mark.parametrize(
    ("kwargs", "data"),
    [({"max_epochs": -1}, None), ({"max_epochs": 2}, DataLoader(Endless(), batch_size=8))],
    ids=["max_epochs=-1", "unsized"],
)
def test_a_run_without_a_known_end_names_the_argument_to_set(kwargs, data):
    t = trainer([qat(), OscillationDampening()], **kwargs)
    with pytest.raises(MisconfigurationException, match=r"dampening weight.*max_steps"):
        t.fit(ConvModule(), Data().train_dataloader() if data is None else data, Data().val_dataloader())


def test_a_constant_weight_or_max_steps_will_do():
    data = Data().train_dataloader(), Data().val_dataloader()
    constant = OscillationDampening(1e-3, initial_weight=1e-3)
    endless = DataLoader(Endless(), batch_size=8)
    trainer([qat(), constant], max_epochs=1).fit(ConvModule(), endless, data[1])
    trainer([qat(), OscillationDampening()], max_epochs=-1, max_steps=3).fit(ConvModule(), *data)


def test_without_quantization_it_says_what_is_missing():
    with pytest.raises(MisconfigurationException, match="add QuantizationAwareTraining"):
        trainer([OscillationDampening()]).fit(ConvModule(), Data())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"final_weight": -1.0}, r"final_weight must be in \[0, inf\), got -1.0"),
        ({"final_weight": float("nan")}, "final_weight"),
        ({"initial_weight": float("inf")}, "initial_weight"),
        ({"anneal_start": 1.0}, r"anneal_start must be in \[0, 1\), got 1.0"),
        ({"aggregation": "max"}, "aggregation must be one of 'sum'"),
        ({"max_bits": 9}, "max_bits"),
    ],
)
def test_unsuited_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        OscillationDampening(**arguments)


@pytest.mark.filterwarnings("ignore:IterativeFreezing's lowest threshold")
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_dampening_in_the_pass_of_freezing_is_dampening_by_itself(granularity, monkeypatch):
    """Dampening runs in the pass of IterativeFreezing, or in its own pass if their max_bits differ."""
    trained, passes = [], []
    monkeypatch.setattr(
        iterative_freezing, "dampen_and_pass_on", lambda *args: (passes.append(1), dampen_and_pass_on(*args))
    )
    for max_bits in (4, 5):  # no weight has 5
        torch.manual_seed(5)
        module = ConvModule(lr=0.5)
        callbacks = [
            qat(weight_bits=2, first_last_bits=None, weight_granularity=granularity),
            OscillationDampening(0.01, initial_weight=0.01, max_bits=max_bits),
            IterativeFreezing(threshold=0.15, momentum=0.1),
        ]
        trainer(callbacks, max_epochs=8).fit(module, Data())
        trained.append({name: tensor.clone() for name, tensor in module.state_dict().items()})
        assert len(passes) == 4 * TOTAL  # every step of the first run, no step of the second
    assert sum(state.frozen.sum() for state in oscillation_states(module).values()) > 0
    for name, tensor in trained[0].items():
        assert torch.allclose(tensor.float(), trained[1][name].float(), atol=1e-6), name
