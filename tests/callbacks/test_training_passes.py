"""Passes over training batches leave no trace in training."""

import gc
import random
import warnings
from collections import deque
from itertools import chain, islice
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from models import ConvModule, Data, dataset, loader, trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    Sampler,
    random_split,
)
from torchmetrics import MeanMetric, MinMaxMetric

from lightning_qat_osc import BatchNormReestimation, QuantizationAwareTraining
from lightning_qat_osc.callbacks._loader_copies import independent_copy
from lightning_qat_osc.callbacks._training_batches import _share_of_rank


def callbacks():
    return [QuantizationAwareTraining(3, 3), BatchNormReestimation(3)]


class Assigns(ConvModule):
    """Assigns new tensors to its buffers and a wrapped metric, instead of changing them in place."""

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
    """Records buffers and a metric before the first step, and before and after each validation."""

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


@pytest.mark.parametrize("past_autograd", [False, True])
def test_a_training_step_that_moves_parameters_by_itself_is_told(past_autograd):
    class Momentum(ConvModule):
        def __init__(self):
            super().__init__()
            self.target = nn.Parameter(torch.zeros(3), requires_grad=False)

        def training_step(self, batch, batch_idx):
            if past_autograd:
                self.target.data = self.target.data * 0.9 + 0.1
            else:
                self.target.lerp_(torch.ones(3), 0.1)
            return super().training_step(batch, batch_idx)

    with pytest.warns(UserWarning, match="training_step itself changes target"):
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
    """Draws a permutation for each epoch, and counts the epochs itself."""

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


class Buckets:
    """Shuffles its own list, as bucket samplers do."""

    def __init__(self):
        self.buckets = [list(range(i, i + 8)) for i in range(0, 64, 8)]

    def __iter__(self):
        random.shuffle(self.buckets)
        return iter(self.buckets)

    def __len__(self):
        return 8


class Files(IterableDataset):
    """Shuffles its own list, which is longer than that of ``Buckets``."""

    def __init__(self):
        self.samples, self.order = dataset(80), list(range(80))

    def __iter__(self):
        random.shuffle(self.order)
        return (self.samples[i] for i in self.order)


class Order(Sampler):
    """Shuffles an array in place."""

    def __init__(self):
        self.order = np.arange(64)

    def __iter__(self):
        np.random.shuffle(self.order)
        for i in range(64):
            yield int(self.order[i])

    def __len__(self):
        return 64


class Around:
    """A loader that wraps others."""

    def __init__(self, *loaders, held=list):
        self.inner = held(loaders)

    def __iter__(self):
        for each in self.inner:
            yield from each

    def __len__(self):
        return sum(map(len, self.inner))


class Endless(DataLoader):
    """Uses the same iterator in all epochs, as loaders that keep their workers do."""

    class Repeated:
        def __init__(self, batches):
            self.batches = batches

        def __iter__(self):
            while True:
                yield from self.batches

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        object.__setattr__(self, "batch_sampler", self.Repeated(self.batch_sampler))
        self.iterator = super().__iter__()

    def __iter__(self):
        for _ in range(8):
            yield next(self.iterator)

    def __len__(self):
        return 8


class Held(Dataset):
    """Keeps the generator of its noise in an object inside a list."""

    def __init__(self):
        self.clean, self.transforms = dataset(64), [Augmented(np.random.default_rng(1))]

    def __len__(self):
        return 64

    def __getitem__(self, i):
        x, y = self.clean[i]
        return x + 0.01 * drawn(self.transforms[0].rng, 8)[0], y


LOADERS = {
    "batch sampler": lambda: DataLoader(dataset(), batch_sampler=Buckets()),
    "sampler of an array": lambda: DataLoader(dataset(), 8, sampler=Order()),
    "stream": lambda: DataLoader(Files(), 8),
    "loader around a generator": lambda: Around(
        DataLoader(dataset(), 8, shuffle=True, generator=torch.Generator().manual_seed(3))
    ),
    "loader around workers": lambda: Around(DataLoader(dataset(), 8, num_workers=1, persistent_workers=True)),
    **{
        f"loaders in a {held.__name__}": lambda held=held: Around(
            DataLoader(dataset(), 8, num_workers=1, persistent_workers=True), held=held
        )
        for held in (tuple, deque)
    },
    "one iterator": lambda: Endless(dataset(), 8, shuffle=True),
    "generators inside of a dataset": lambda: DataLoader(ConcatDataset([Held()]), 8),
}


@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS.keys())
def test_loaders_give_training_the_same_batches_as_without_passes(make):
    seen = []
    for some in ([], callbacks()):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        module = Seen()
        kwargs = {"max_epochs": 2, "limit_train_batches": 8, "val_check_interval": 3, "num_sanity_val_steps": 0}
        trainer(some, **kwargs).fit(module, make(), loader(32, 16))
        seen.append(module.seen)
    assert len(seen[0]) == 16
    assert seen[0] == seen[1]


class Stream(IterableDataset):
    """Closes its store when it is deleted, and holds two large arrays of data next to a short list of indices."""

    def __init__(self, path):
        self.store, self.order = {"open": True}, np.arange(16)
        self.tokens, self.long = np.memmap(path, np.uint16, "w+", shape=(64,)), torch.empty(2**24 + 1, dtype=torch.int8)

    def __iter__(self):
        return iter(self.order)

    def __del__(self):
        self.store["open"] = False


def test_what_a_copy_leaves_alone(tmp_path):
    closing = DataLoader(Stream(tmp_path / "tokens"), 8)
    assert independent_copy(closing).dataset is closing.dataset
    gc.collect()
    assert closing.dataset.store["open"]

    class Plain(IterableDataset):
        def __init__(self, of):
            vars(self).update(vars(of))

        def __iter__(self):
            return iter(self.order)

    plain = DataLoader(Plain(closing.dataset), 8)
    copied = independent_copy(plain).dataset
    assert copied is not plain.dataset
    assert copied.order is not plain.dataset.order
    assert copied.tokens is plain.dataset.tokens
    assert copied.long is plain.dataset.long


def of_three(rank):
    kwargs = {"num_replicas": 3, "rank": rank}
    return SimpleNamespace(distributed_sampler_kwargs=kwargs, limit_train_batches=1.0)


@pytest.mark.parametrize("batches", [5, 6, 100])
@pytest.mark.parametrize("num_batches", [1, 2, 50])
def test_outside_fit_ranks_take_as_many_batches_each_and_none_twice(batches, num_batches):
    taken = []
    for rank in range(3):
        share = _share_of_rank(of_three(rank), [range(2), range(batches)], num_batches)
        taken.append(list(islice(range(batches), share.start, share.stop, share.step)))
    assert {len(own) for own in taken} == {min(num_batches, batches // 3)}
    assert len(set(chain(*taken))) == len(list(chain(*taken)))


def test_outside_fit_ranks_share_what_is_too_little_for_all():
    shares = [range(2)[_share_of_rank(of_three(rank), [range(2)], 5)] for rank in range(3)]
    assert shares == [range(2)] * 3


@pytest.mark.parametrize(("limit", "expected"), [(3, 3), (0.5, 4), (100, 8), (1.0, 8), (0, 0)])
def test_the_trainers_limit_holds_outside_fit_too(limit, expected):
    run = []
    reestimation = BatchNormReestimation(50, forward_fn=lambda module, batch: run.append(module(batch[0])))
    module, data = ConvModule(), Data()
    assert len(data.train_dataloader()) == 8
    trainer([QuantizationAwareTraining(3, 3)], max_epochs=1).fit(module, data)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is no training data")  # if the limit is 0
        callbacks = [QuantizationAwareTraining(3, 3), reestimation]
        trainer(callbacks, limit_train_batches=limit).validate(module, data, verbose=False)
    assert len(run) == expected


def test_the_trainers_limit_holds_for_a_stream():
    without_length = iter(range(100))
    for limit, expected in ((3, 3), (1.0, 50), (0.0, 0)):
        stand_in = SimpleNamespace(distributed_sampler_kwargs=None, limit_train_batches=limit)
        share = _share_of_rank(stand_in, [without_length, range(4)], 50)
        assert list(range(100))[share] == list(range(expected))


def test_generators_of_modules_and_data_modules_go_on_as_without_passes():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.drawing = {"noise": torch.Generator().manual_seed(2)}

    class Mixes(ConvModule):
        def __init__(self):
            super().__init__()
            self.inner, self.losses = Inner(), []

        def training_step(self, batch, batch_idx):
            share = torch.rand((), generator=self.inner.drawing["noise"])
            x = share * batch[0] + (1 - share) * batch[0].flip(0)
            return F.cross_entropy(self(x), batch[1])

        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.losses.append(outputs["loss"].item())

    class Augments(Data):
        def __init__(self):
            super().__init__()
            self.rng = random.Random(5)

        def on_before_batch_transfer(self, batch, dataloader_idx):
            return (batch[0] * self.rng.random(), batch[1]) if self.trainer.training else batch

    runs = []
    for some in ([], [BatchNormReestimation(3)]):
        torch.manual_seed(0)
        module = Mixes()
        trainer([QuantizationAwareTraining(3, 3), *some], max_epochs=2).fit(module, Augments())
        runs.append(module.losses)
    assert runs[0] == runs[1]


def test_calibration_leaves_statistics_as_they_are_where_a_training_step_sets_modes():
    class Labels(ConvModule):
        def training_step(self, batch, batch_idx):
            self.eval()
            self.train()
            return super().training_step(batch, batch_idx)

    class Look(L.Callback):
        def on_train_start(self, trainer, pl_module):
            self.mean, self.count = pl_module.bn1.running_mean.clone(), pl_module.bn1.num_batches_tracked.item()

    module, look = Labels(), Look()
    trainer([], max_epochs=1).fit(module, Data())
    mean, count = module.bn1.running_mean.clone(), module.bn1.num_batches_tracked.item()
    trainer([QuantizationAwareTraining(3, 3), look], max_epochs=1).fit(module, Data())
    assert look.count == count
    assert torch.equal(look.mean, mean)


def test_a_data_module_keeps_the_split_that_it_has_made():
    class Split(Data):
        def setup(self, stage):
            if stage == "fit":
                self.parts = random_split(dataset(), [48, 16])

        def train_dataloader(self):
            return DataLoader(self.parts[0], 8)

    data, module = Split(), ConvModule()
    t = trainer(callbacks(), max_epochs=1)
    t.fit(module, data)
    parts, mean = data.parts, module.bn1.running_mean.clone()
    t.test(module, data, verbose=False)
    assert data.parts is parts
    assert not torch.equal(module.bn1.running_mean, mean)  # re-estimated on another split


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
            assert [logger.log_dir for logger in self.loggers] == [logger.log_dir for logger in loggers]
            assert [(g.name, g.version, g.save_dir) for g in self.loggers] == [
                (name, 0, str(tmp_path)) for name in ("a", "b")
            ]
            return super().training_step(batch, batch_idx)

    loggers = [L.pytorch.loggers.CSVLogger(tmp_path, name) for name in ("a", "b")]
    trainer(callbacks(), logger=loggers).fit(Writes(), loader(16), loader(16))
