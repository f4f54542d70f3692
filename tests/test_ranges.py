import math

import pytest
import torch

from lightning_qat_osc.functional import fake_quantize, integer_grid
from lightning_qat_osc.ranges import activation_grid, estimate_scale


def mean_squared_error(x, scale, n, p):
    return (fake_quantize(x, scale.reshape(1), n, p) - x).double().square().mean().item()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("size", [300, 200_000])
@pytest.mark.parametrize("tails", ["normal", "heavy"])
def test_mse_is_within_a_percent_of_a_brute_force_search(bits, size, tails):
    n, p = integer_grid(bits, signed=True)
    x = torch.randn(size)
    if tails == "heavy":
        x = x * torch.rand(size).reciprocal().clamp(max=30)
    found = mean_squared_error(x, estimate_scale(x.unsqueeze(0), n, p, "mse"), n, p)
    covering = (x.abs().max() / p).item()
    best = min(mean_squared_error(x, torch.tensor([covering * k / 1000]), n, p) for k in range(5, 1001, 5))
    assert found <= best * 1.01


@pytest.mark.parametrize(("bits", "size", "outlier"), [(2, 200_000, 200.0), (3, 200_000, 400.0), (4, 600_000, 700.0)])
def test_one_huge_value_does_not_take_the_grid_from_all_others(bits, size, outlier):
    n, p = integer_grid(bits, signed=True)
    x = torch.cat([torch.randn(size), torch.tensor([outlier])])
    found = mean_squared_error(x, estimate_scale(x.unsqueeze(0), n, p, "mse"), n, p)
    scales = torch.logspace(-2, math.log10(outlier), 200)
    assert found <= min(mean_squared_error(x, scale, n, p) for scale in scales) * 1.05


def test_the_default_dtype_does_not_coarsen_a_search():
    x = torch.randn(1, 20_000)
    expected = estimate_scale(x, -128, 127)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(estimate_scale(x, -128, 127), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_rows_are_estimated_as_if_alone():
    x = torch.randn(5, 4000) * torch.tensor([[0.01], [0.1], [1.0], [10.0], [100.0]])
    for method in ("mse", "minmax", "percentile", "lsq"):
        together = estimate_scale(x, -4, 3, method)
        alone = torch.cat([estimate_scale(row.unsqueeze(0), -4, 3, method) for row in x])
        assert torch.allclose(together, alone, rtol=1e-5)


def test_minmax_covers_both_ends():
    x = torch.tensor([[-4.0, 1.0, 2.0]])
    assert estimate_scale(x, -4, 3, "minmax").item() == 1.0
    assert estimate_scale(-x, -4, 3, "minmax").item() == pytest.approx(4 / 3)
    assert estimate_scale(x.abs(), 0, 15, "minmax").item() == pytest.approx(4 / 15)


def test_percentile_leaves_a_thousandth_out_at_each_end():
    x = torch.arange(100_001).float().unsqueeze(0)
    assert estimate_scale(x, 0, 1, "percentile").item() == pytest.approx(99_900, rel=1e-3)
    assert estimate_scale(x - 50_000, -1, 1, "percentile").item() == pytest.approx(49_900, rel=1e-3)
    mostly_zero = torch.zeros(1, 100_000)
    mostly_zero[0, 0] = 3.0
    assert estimate_scale(mostly_zero, 0, 3, "percentile").item() > 0


def test_lsq_formula():
    x = torch.randn(1, 1000)
    assert estimate_scale(x, -4, 3, "lsq").item() == pytest.approx(2 * x.abs().mean().item() / 3**0.5, rel=1e-6)


def test_unknown_method():
    with pytest.raises(ValueError, match="method='max'"):
        estimate_scale(torch.ones(1, 2), -4, 3, "max")


@pytest.mark.parametrize("method", ["mse", "minmax", "percentile", "lsq"])
def test_constant_rows_give_a_usable_scale(method):
    for value in (1e-6, 0.5, -0.5, 1e6):
        scale = estimate_scale(torch.full((1, 3000), value), -4, 3, method)
        assert scale.isfinite().all()
        assert (scale > 0).all()


def test_grid_is_unsigned_for_non_negative_inputs():
    assert activation_grid(torch.rand(100), 0.0, 1.0, 4) == (0, 15, 0)


def test_grid_has_its_zero_where_the_data_has():
    x = torch.cat([torch.linspace(-1, 3, 10_000)])
    assert activation_grid(x, -1.0, 3.0, 4, "minmax") == (0, 15, 4)
    assert activation_grid(-x, -3.0, 1.0, 4, "minmax") == (0, 15, 11)
    assert activation_grid(-x.abs(), -3.0, -0.0, 4, "minmax") == (0, 15, 15)
    tiny_negative = torch.nn.functional.silu(torch.randn(10_000) * 100)
    assert activation_grid(tiny_negative, tiny_negative.min().item(), tiny_negative.max().item(), 4)[2] >= 1


def test_one_outlier_does_not_take_a_side_of_the_grid():
    x = torch.randn(100_000)
    x[0] = 1000.0
    assert 6 <= activation_grid(x, x.min().item(), x.max().item(), 4, "mse")[2] <= 9
    assert activation_grid(x, x.min().item(), x.max().item(), 4, "minmax")[2] == 1


@pytest.mark.parametrize("outlier", [1e3, 1e5, 1e8])
def test_percentiles_do_not_see_one_outlier(outlier):
    torch.manual_seed(0)
    x = torch.randn(100_000)
    without = estimate_scale(x[None], -8, 7, "percentile")
    x[0] = outlier
    assert torch.allclose(estimate_scale(x[None], -8, 7, "percentile"), without, rtol=0.02)
    assert 6 <= activation_grid(x, x.min().item(), outlier, 4, "mse")[2] <= 9


def test_a_grid_has_an_integer_above_zero_where_there_are_positive_values():
    x = torch.cat([-torch.rand(1000), torch.tensor([0.01])])
    assert activation_grid(x, -1.0, 0.01, 4, "minmax") == (0, 15, 14)


def test_lsq_of_inputs_below_0():
    x = torch.randn(1, 4096, generator=torch.Generator().manual_seed(0)).abs().neg()
    below = estimate_scale(x, -255, 0, "lsq")
    assert below.item() == pytest.approx(estimate_scale(-x, 0, 254, "lsq").item())
    levels = (x / below).round().clamp(-255, 0).unique()
    assert len(levels) > 16
