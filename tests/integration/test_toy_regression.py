import importlib
import math
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"

# by hand, for w* = .95, .9, .8, .75, .6 and s = 1
OPTIMA = [0.95, 0.9, 0.8, 0.75, 0.6]
DISTANCES = [0.05, 0.1, 0.2, 0.25, 0.4]
FREQUENCIES = [0.1, 0.2, 0.4, 0.5, 0.8]
PERIODS = [20, 10, 5, 4, 5]
# the value of each positive factor at the threshold
FACTORS = {"EWGS": 1 - 0.2 / 2, "PSG": 0.5 + 0.01, "DSQ": math.log(9) / 2 / 0.8}


@pytest.fixture(scope="module")
def toy():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        yield importlib.import_module("toy_regression")


@pytest.fixture(scope="module")
def traces(toy):
    return toy.run_all()


def per_learning_rate(values):
    """Expect the same five values for each of the three learning rates."""
    return [pytest.approx(values, rel=0, abs=1e-12)] * 3


def test_the_window_holds_whole_periods_of_different_optima(toy):
    assert toy.OPTIMA.tolist() == OPTIMA
    assert toy.LEARNING_RATES.tolist() == [[0.1], [0.01], [0.001]]
    assert [toy.WINDOW % period for period in PERIODS] == [0] * 5


def test_gradient_of_the_exact_expectation(toy):
    latent = torch.tensor([-0.7, 0.2, 0.49, 0.51, 2.2], dtype=torch.float64)
    q = torch.tensor([-1, 0, 0, 1, 2], dtype=torch.float64)
    assert torch.equal(toy.regression_gradient(latent, toy.OPTIMA), q - toy.OPTIMA)


def test_ste_reverses_2d_times_a_step_at_any_learning_rate(toy, traces):
    trace = traces["STE"].between(toy.TRANSIENT)
    reversals = [round(f * toy.WINDOW) for f in FREQUENCIES]
    assert trace.changes.tolist() == [reversals] * 3
    # with only two integers, each change reverses the previous one
    assert trace.weight_int.unique().tolist() == [0, 1]
    # never two steps in a row at 0
    assert (trace.weight_int[1:] + trace.weight_int[:-1]).min() == 1


def test_tracked_frequency_converges_to_2d(toy, traces):
    frequency = traces["STE"].between(toy.TRANSIENT).frequency.double()
    assert frequency.mean(0).tolist() == [pytest.approx(FREQUENCIES, rel=1e-4)] * 3
    # each event moves an exponential moving average by at most the momentum
    assert (frequency - torch.tensor(FREQUENCIES)).abs().max() < toy.MOMENTUM


def test_time_average_is_the_optimum_and_the_moving_average_rounds_to_its_integer(toy, traces):
    trace = traces["STE"].between(toy.TRANSIENT)
    assert trace.quantized.mean(0).tolist() == per_learning_rate(OPTIMA)
    assert (trace.ema_int - torch.tensor(OPTIMA)).abs().max() < toy.MOMENTUM
    assert trace.ema_int.round().unique().tolist() == [1]


@pytest.mark.parametrize("name", ["EWGS", "PSG", "DSQ"])
def test_a_positive_factor_leaves_the_frequency_and_changes_the_band(toy, traces, name):
    trace = traces[name].between(toy.TRANSIENT)
    expected = toy.WINDOW * torch.tensor(FREQUENCIES)
    rates = toy.LEARNING_RATES
    # off by at most one cycle (two changes) in the window, plus half the learning rate as a relative error
    assert ((trace.changes - expected).abs() <= 2 + rates / 2 * expected).all()
    # the band is lr times the factor wide, minus a gap if the orbit is periodic; the factor varies over the band
    band = trace.band / rates / FACTORS[name]
    assert (band <= 1 + rates).all()
    assert (band >= (1 - 1 / torch.tensor(PERIODS)) * (1 - rates)).all()
    assert band[1].max() == pytest.approx(1, abs=0.005)


def test_band_of_the_ste(toy, traces):
    band = traces["STE"].between(toy.TRANSIENT).band / toy.LEARNING_RATES
    assert band.tolist() == [pytest.approx([1 - 1 / period for period in PERIODS], abs=1e-9)] * 3


def test_dampening_stops_the_oscillation_only_above_d(toy, traces):
    assert toy.DAMPENING_RATIOS.tolist() == [[0.9], [0.99], [1.01], [1.1]]
    trace = traces["dampening"].between(toy.TRANSIENT)
    low, lowest, *above = trace.change_rate.tolist()
    assert min(lowest) > 0
    assert low == pytest.approx([0.2 * d / (1 - 1.8 * d) for d in DISTANCES], rel=0.03)
    assert above == [[0] * 5] * 2
    assert (trace.weight_int[:, 2:] == 1).all()


def test_dampened_weights_settle_and_a_lambda_above_1_minus_d_holds_the_wrong_integer(toy):
    d = torch.tensor(DISTANCES, dtype=torch.float64)
    weak, strong = 1.1 * d, torch.full_like(d, 0.97)
    trace = toy.simulate(learning_rate=0.1, dampening=torch.stack([weak, strong]), steps=1500)
    assert trace.weight_int[-1].tolist() == [[1] * 5, [0] * 5]
    # where the two terms balance: w_up - d / (2 lambda), w_dn + (1 - d) / (2 lambda)
    assert trace.latent[-1, 0].tolist() == pytest.approx([1 - 1 / 2.2] * 5, abs=1e-6)
    assert trace.latent[-1, 1].tolist() == pytest.approx([w / 1.94 for w in OPTIMA], abs=1e-6)


def test_freezing_ends_the_oscillation_at_the_nearest_grid_point(toy, traces):
    trace = traces["freezing"]
    before, after = trace.between(toy.TRANSIENT, toy.FREEZE_FROM), trace.between(toy.FREEZE_FROM)
    assert before.change_rate.tolist() == per_learning_rate(FREQUENCIES)
    assert not before.frozen.any()
    assert after.frozen.all()
    # the step that freezes a weight may still change its integer
    assert after.changed[1:].sum() == 0
    assert (after.weight_int == 1).all()
    assert (after.latent == 1).all()
    assert before.ema_int[-1].round().unique().tolist() == [1]


def test_only_weights_above_the_threshold_freeze(toy):
    trace = toy.simulate(freeze_threshold=0.45, freeze_from=toy.TRANSIENT, steps=toy.TRANSIENT + 400)
    assert trace.frozen[-1].tolist() == [False, False, False, True, True]
    after = trace.between(toy.TRANSIENT + 200)
    assert after.change_rate.tolist() == pytest.approx([0.1, 0.2, 0.4, 0, 0], rel=0, abs=1e-12)


def test_a_moving_average_that_remembers_its_start_freezes_at_the_wrong_integer(toy):
    trace = toy.simulate(freeze_threshold=toy.FREEZE_THRESHOLD, freeze_from=0, steps=200)
    assert trace.frozen[-1].all()
    # the frequency passes the threshold before the average is halfway from 0 to 1; for .95 the two nearly coincide
    assert trace.weight_int[-1, 1:].tolist() == [0] * 4


def test_tables_and_picture(toy, traces, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(toy, "run_all", lambda: traces)
    monkeypatch.setattr("sys.argv", ["toy_regression.py", "--output", str(tmp_path / "toy")])
    toy.main()
    printed = capsys.readouterr().out
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("|")]
    # five tables with two heading lines each: four with a row per optimum, one with four estimators times five optima
    assert len(lines) == 5 * 2 + 4 * 5 + 20
    assert lines[2] == ["0.9500", *["0.1000"] * 7]
    assert (tmp_path / "toy" / "toy_regression.png").stat().st_size > 10_000
