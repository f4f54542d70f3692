import pytest
import torch

from lightning_qat_osc.functional import fake_quantize
from lightning_qat_osc.regularizers import dampening_gradient, dampening_loss

AGGREGATE = {
    "sum": lambda squares: squares.sum(),
    "mean": lambda squares: squares.mean(),
    "kernel_mean": lambda squares: squares.sum(0).mean(),
}


@pytest.mark.parametrize("aggregation", AGGREGATE)
@pytest.mark.parametrize("shape", [[1], [6, 1, 1, 1]])
def test_gradient_is_autograds_of_the_printed_loss(aggregation, shape):
    w = (torch.randn(6, 3, 4, 4, dtype=torch.float64) * 2).requires_grad_()
    s = (torch.rand(shape, dtype=torch.float64) + 0.3).requires_grad_()
    w_q = fake_quantize(w, s, -4, 3).detach()
    printed = AGGREGATE[aggregation]((w_q - torch.clamp(w, s * -4, s * 3)) ** 2)
    printed.backward()
    loss = dampening_loss(w, s, -4, 3, aggregation)
    assert loss.item() == pytest.approx(printed.item(), rel=1e-12)
    gradient = dampening_gradient(w, s, -4, 3, aggregation)
    assert torch.allclose(gradient, w.grad, rtol=1e-12, atol=1e-15)
    assert 0 < (w.grad == 0).sum() < w.numel()
    assert s.grad.abs().max() < 1e-12  # where the clamp limits w, the distance is 0
    w.grad = None
    loss.backward()
    assert torch.allclose(w.grad, gradient, rtol=1e-12, atol=1e-15)


def test_zero_at_the_grid_points():
    w = torch.arange(-4.0, 4.0)
    assert dampening_loss(w, torch.ones(1), -4, 3) == 0
    assert (dampening_gradient(w, torch.ones(1), -4, 3) == 0).all()


def test_unknown_aggregation():
    with pytest.raises(ValueError, match="aggregation='max'"):
        dampening_loss(torch.ones(2), torch.ones(1), -4, 3, "max")
