import pytest
import torch
from torchmetrics import MetricCollection

from lightning_qat_osc.metrics import SQNR, FrozenShare, OscillatingShare, OscillationFrequency
from lightning_qat_osc.oscillation import OscillationState


@pytest.fixture
def states():
    a = OscillationState(torch.zeros(4, dtype=torch.int8))
    a.frequency = torch.tensor([0.0, 0.0049, 0.0051, 0.2])
    a.frozen = torch.tensor([True, False, False, False])
    b = OscillationState(torch.zeros(2, 3, dtype=torch.int8))
    b.frequency.fill_(0.1)
    return {"a": a, "b.c": b}


def test_by_hand(states):
    frequency, share, frozen = (
        OscillationFrequency(list(states)),
        OscillatingShare(list(states)),
        FrozenShare(list(states)),
    )
    for metric in (frequency, share, frozen):
        metric.update(states)
    assert frequency.compute()["a"].item() == pytest.approx(0.21 / 4)
    assert frequency.compute()[""].item() == pytest.approx(0.81 / 10)
    assert {k: v.item() for k, v in share.compute().items()} == {"": pytest.approx(0.8), "a": 0.5, "b.c": 1.0}
    assert {k: v.item() for k, v in frozen.compute().items()} == {"": pytest.approx(0.1), "a": 0.25, "b.c": 0.0}


def test_in_a_collection_each_is_itself(states):
    names = list(states)
    collection = MetricCollection([OscillationFrequency(names), OscillatingShare(names), FrozenShare(names)])
    collection.update({name: OscillationState(state.weight_int) for name, state in states.items()})  # all 0
    collection.reset()
    collection.update(states)
    means = [collection[name].compute()["a"].item() for name in sorted(collection.keys())]
    assert means == pytest.approx([0.25, 0.5, 0.0525])


def test_metrics_of_one_class_in_a_collection_are_their_own(states):
    collection = MetricCollection(
        {
            "paper": OscillatingShare(["a"]),
            "often": OscillatingShare(["a"], threshold=0.1),
            "first": OscillationFrequency(["a"]),
            "second": OscillationFrequency(["b.c"]),
        }
    )
    collection.update({name: OscillationState(state.weight_int) for name, state in states.items()})  # all 0
    collection.reset()
    collection.update(states)
    totals = {name: collection[name].compute()[""].item() for name in ("paper", "often", "first", "second")}
    assert totals == pytest.approx({"paper": 0.5, "often": 0.25, "first": 0.0525, "second": 0.1})


def test_threshold(states):
    share = OscillatingShare(["a"], threshold=0.1)
    share.update(states)
    assert share.compute()["a"].item() == 0.25


def test_arguments_that_are_refused(states):
    with pytest.raises(ValueError, match="layers must name at least one tracked layer"):
        OscillationFrequency([])
    with pytest.raises(ValueError, match=r"threshold must be in \[0, 1\], got 1.5"):
        OscillatingShare(["a"], threshold=1.5)
    with pytest.raises(ValueError, match="got none for 'c'"):
        FrozenShare(["a", "c"]).update(states)


def test_single_precision_for_devices_that_have_no_other(states):
    frequency, noise = OscillationFrequency(list(states)), SQNR()
    for metric in (frequency, noise):
        metric.set_dtype(torch.float32)
    frequency.update(states)
    noise.update(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.5]))
    assert {frequency.sums.dtype, frequency.counts.dtype, noise.signal.dtype, noise.noise.dtype} == {torch.float32}
    assert frequency.compute()[""].item() == pytest.approx(0.81 / 10)
    assert noise.compute().item() == pytest.approx(20.0)


def test_reset(states):
    frequency, used = OscillationFrequency(list(states)), OscillationFrequency(list(states))
    used.update({name: OscillationState(state.weight_int) for name, state in states.items()})  # all 0
    used.reset()
    for metric in (frequency, used):
        metric.update(states)
    assert used.compute() == frequency.compute()


def test_sqnr_by_hand():
    sqnr = SQNR()
    sqnr.update(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.5]))
    assert sqnr.compute().item() == pytest.approx(20.0)
    sqnr.update(torch.tensor([5.0]), torch.tensor([5.0]))
    assert sqnr.compute().item() == pytest.approx(10 * torch.log10(torch.tensor(200.0)).item())


def test_sqnr_of_half_precision_and_of_nothing():
    for scale in (1e-3, 300.0):
        x = torch.randn(1000).half() * scale
        x_q = (x / (0.3 * scale)).round() * (0.3 * scale)
        sqnr = SQNR()
        sqnr.update(x, x_q)
        expected = 10 * torch.log10(x.double().square().sum() / (x.double() - x_q.double()).square().sum())
        assert sqnr.compute().item() == pytest.approx(expected.item(), rel=1e-5)
    nothing = SQNR()
    nothing.update(torch.zeros(3), torch.zeros(3))
    assert nothing.compute() == torch.inf


def test_what_is_no_list_of_names_or_of_two_shapes():
    with pytest.raises(TypeError, match="layers must be a sequence of names, got 'abc'"):
        FrozenShare("abc")
    with pytest.raises(ValueError, match=r"x_q must have the shape of x, \(2, 3\), got \(3,\)"):
        SQNR().update(torch.ones(2, 3), torch.ones(3))
