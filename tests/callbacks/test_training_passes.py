"""Passes over training batches leave no trace in training."""

import random
import warnings

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from models import ConvModule, Data, dataset, loader, trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, Sampler
from torchmetrics import MeanMetric, MinMaxMetric

from lightning_qat_osc import BatchNormReestimation, QuantizationAwareTraining


def callbacks():
    return [QuantizationAwareTraining(3, 3), BatchNormReestimation(3)]


class Assigns(ConvModule):
    """Sets buffers and a wrapped metric anew, where others change theirs in place."""

    def __init__(self):
        super().__init__()
        self.register_buffer("center", torch.zeros(3))
        self.register_buffer("late", None)
        self.extremes = MinMaxMetric(MeanMetric())

    def training_step(self, batch, batch_idx):
        out = self(batch[0])
        self.center = 0.9 * self.center + 0.1 * out.detach().mean(0)
        self.late = torch.ones(1) if self.late is None else self.late + 1
        self.extremes(out.detach().mean())
        return F.cross_entropy(out, batch[1])


class Looks(L.Callback):
    """What a module has before its first step, and around each validation."""

    def __init__(self):
        self.first, self.before, self.after = None, [], []

    def seen(self, module):
        return [None if t is None else t.clone() for t in (module.center, module.late, module.extremes.max_val)]

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.first is None:
            self.first = self.seen(pl_module)
        if batch_idx == 4:
            self.after.append(self.seen(pl_module))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 3:
            self.before.append(self.seen(pl_module))


def test_what_a_training_step_assigns_is_put_back():
    looks = Looks()
    trainer([looks, *callbacks(), looks], val_check_interval=4, num_sanity_val_steps=0).fit(Assigns(), Data())
    assert torch.equal(looks.first[0], torch.zeros(3))
    assert looks.first[1] is None
    assert looks.first[2] == -torch.inf
    assert len(looks.before) == 4
    for before, after in zip(looks.before, looks.after):
        assert all(torch.equal(a, b) for a, b in zip(before, after))


def test_a_training_step_that_moves_parameters_by_itself_is_told():
    class Momentum(ConvModule):
        def __init__(self):
            super().__init__()
            self.target = nn.Parameter(torch.zeros(3), requires_grad=False)

        def training_step(self, batch, batch_idx):
            self.target.lerp_(torch.ones(3), 0.1)
            return super().training_step(batch, batch_idx)

    with pytest.warns(UserWarning, match="training_step moves target by itself"):
        trainer([QuantizationAwareTraining(3, 3)], max_steps=1).fit(Momentum(), Data())


def test_each_batch_of_a_pass_has_its_index():
    class Alternates(ConvModule):
        def __init__(self):
            super().__init__()
            self.second = nn.Linear(8, 3)

        def training_step(self, batch, batch_idx):
            x = F.relu(self.bn1(self.stem(batch[0])))
            x = F.relu(self.point(F.relu(self.bn2(self.depthwise(x))))).mean((2, 3))
            return F.cross_entropy((self.second if batch_idx % 2 else self.head)(x), batch[1])

    module = Alternates()
    trainer([QuantizationAwareTraining(3, 3)], max_steps=2).fit(module, Data())
    assert module.second.input_quantizer.calibrated
    assert module.head.input_quantizer.calibrated


class Epochs(Sampler):
    """A permutation for each epoch, which it counts itself."""

    def __init__(self):
        self.epoch = -1

    def __iter__(self):
        self.epoch += 1
        yield from torch.randperm(64, generator=torch.Generator().manual_seed(self.epoch)).tolist()

    def __len__(self):
        return 64


class Seen(ConvModule):
    def __init__(self):
        super().__init__()
        self.seen = []

    def on_train_batch_start(self, batch, batch_idx):
        self.seen.append(batch[0][0, 0, 0, 0].item())


@pytest.mark.parametrize(
    "own", [lambda s: {"sampler": s, "batch_size": 8}, lambda s: {"batch_sampler": BatchSampler(s, 8, False)}]
)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_sampler_that_counts_its_epochs_goes_on_as_without_passes(own, workers):
    runs = []
    for added in ([], callbacks()):
        torch.manual_seed(0)
        kwargs = {"num_workers": workers, "persistent_workers": workers > 0}
        module = Seen()
        trainer(added, max_epochs=2, num_sanity_val_steps=0).fit(
            module, DataLoader(dataset(), **own(Epochs()), **kwargs), loader(32, 16)
        )
        runs.append(module.seen)
    assert len(runs[0]) == 16
    assert runs[0] == runs[1]


def test_a_dataset_that_can_be_iterated_once_is_refused():
    class Stream(IterableDataset):
        def __init__(self):
            self.items = iter(dataset())

        def __iter__(self):
            return self

        def __next__(self):
            return next(self.items)

    with pytest.raises(MisconfigurationException, match="the training data is a Stream, which can be iterated only"):
        trainer(callbacks(), max_steps=1).fit(ConvModule(), DataLoader(Stream(), 8), loader(32, 16))


def test_what_was_warned_of_once_is_not_warned_of_again():
    class Deprecated(ConvModule):
        def on_train_epoch_start(self):
            warnings.warn("the user's own", stacklevel=1)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        filters = list(warnings.filters)
        trainer(callbacks(), max_epochs=4).fit(Deprecated(), Data())
        assert warnings.filters == filters
    assert [str(w.message) for w in caught].count("the user's own") == 1
    assert not [w for w in caught if "self.log" in str(w.message)]


GENERATORS = {
    "torch": lambda: torch.Generator().manual_seed(1),
    "python": lambda: random.Random(1),
    "numpy": lambda: np.random.default_rng(1),
    "numpy, of old": lambda: np.random.RandomState(1),
}


def drawn(generator, n):
    if isinstance(generator, torch.Generator):
        return torch.randperm(n, generator=generator).tolist()
    order = list(range(n))
    generator.shuffle(order)
    return order


class Shuffled(Sampler):
    def __init__(self, generator):
        self.source_of_randomness = generator

    def __len__(self):
        return 32

    def __iter__(self):
        return iter(drawn(self.source_of_randomness, 32))


class Augmented(torch.utils.data.Dataset):
    def __init__(self, generator):
        self.clean, self.rng = dataset(32), generator

    def __len__(self):
        return 32

    def __getitem__(self, i):
        x, y = self.clean[i]
        return x + 0.01 * drawn(self.rng, 8)[0], y


@pytest.mark.parametrize("make", GENERATORS.values(), ids=GENERATORS.keys())
@pytest.mark.parametrize("of_dataset", [False, True])
def test_generators_of_samplers_and_datasets_go_on_as_without_passes(make, of_dataset):
    seen = []
    for some in ([], callbacks()):
        batches = []

        class Noting(ConvModule):
            def on_train_batch_start(self, batch, batch_idx):
                batches.append(batch[0].clone())  # noqa: B023

        data = Augmented(make()) if of_dataset else dataset(32)
        train = DataLoader(data, 8, sampler=None if of_dataset else Shuffled(make()))
        trainer(some, max_epochs=2).fit(Noting(), train, loader(16))
        seen.append(torch.stack(batches))
    assert torch.equal(*seen)


def test_distributed_samplers_give_the_same_batches_in_each_epoch():
    seen = []

    def look(module, batch):
        seen.append(batch[0].sum().item())
        return module(batch[0])

    data = dataset(32)
    train = DataLoader(data, 8, sampler=DistributedSampler(data, 1, 0))
    some = [QuantizationAwareTraining(3, 3), BatchNormReestimation(2, forward_fn=look)]
    trainer(some, max_epochs=3, num_sanity_val_steps=0).fit(ConvModule(), train, loader(16))
    assert len(seen) >= 6
    assert len(set(seen)) == 2


class LowRank(nn.Linear):
    """Merges its update into the weight for evaluation, as adapters do."""

    def __init__(self, *args):
        super().__init__(*args)
        self.a, self.b = nn.Parameter(torch.randn(2, self.in_features)), nn.Parameter(torch.zeros(self.out_features, 2))
        self.weight.requires_grad_(False)
        self.merged = False

    def train(self, mode=True):
        super().train(mode)
        if self.merged == mode:
            self.weight.data += (self.b @ self.a).data * (-1.0 if mode else 1.0)
            self.merged = not mode
        return self

    def forward(self, x):
        return super().forward(x) if self.merged else super().forward(x) + x @ self.a.t() @ self.b.t()


def test_layers_that_merge_for_evaluation_train_apart():
    class Adapted(ConvModule):
        def __init__(self):
            super().__init__()
            self.head = LowRank(8, 3)

    module = Adapted()
    trainer(callbacks()).fit(module, loader(16), loader(16))
    assert not module.head.merged
    assert module.head.b.abs().max() > 0


def test_each_of_several_loggers_has_a_stand_in(tmp_path):
    class Writes(ConvModule):
        def training_step(self, batch, batch_idx):
            for logger in self.loggers:
                logger.log_metrics({"batch": batch_idx})
            assert len(self.loggers) == 2
            return super().training_step(batch, batch_idx)

    loggers = [L.pytorch.loggers.CSVLogger(tmp_path, name) for name in ("a", "b")]
    trainer(callbacks(), logger=loggers).fit(Writes(), loader(16), loader(16))
