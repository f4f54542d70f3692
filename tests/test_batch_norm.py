import pytest
import torch
from torch import nn

from lightning_qat_osc import batch_norm_divergence, reestimate_batch_norm
from lightning_qat_osc.batch_norm import _Moments


@pytest.mark.parametrize("sizes", [[64], [32, 32], [40, 20, 4], [2, 62], [1, 63]])
def test_first_layer_gets_the_moments_of_the_concatenated_batches(sizes):
    x = torch.randn(64, 3, 5, 5) * 7 + torch.tensor([100.0, 0.0, -3.0]).view(3, 1, 1)
    bn = nn.BatchNorm2d(3)
    reestimate_batch_norm(bn, x.split(sizes))
    flat = x.double().transpose(0, 1).flatten(1)
    assert torch.allclose(bn.running_mean.double(), flat.mean(1), rtol=1e-5)
    assert torch.allclose(bn.running_var.double(), flat.var(1), rtol=1e-5)


def test_deeper_layer_and_several_calls_a_pass():
    seen = []

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.bn = nn.Linear(4, 6), nn.BatchNorm1d(6)

        def forward(self, x):
            for part in (x, 2 * x):
                seen.append(self.fc(part).detach())
                self.bn(seen[-1])

    net = Net()
    reestimate_batch_norm(net, [torch.randn(8, 4), torch.randn(5, 4)])
    everything = torch.cat(seen).double()
    assert torch.allclose(net.bn.running_mean.double(), everything.mean(0), rtol=1e-5, atol=1e-7)
    assert torch.allclose(net.bn.running_var.double(), everything.var(0), rtol=1e-5)


def network():
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 6), nn.BatchNorm1d(6))
    net.train()
    net[3].eval()
    return net


def test_nothing_else_changes():
    net = network()
    net(torch.randn(8, 4))
    net[1].momentum = None
    before = {k: v.clone() for k, v in net.state_dict().items()}
    modes = [m.training for m in net.modules()]
    inputs = []
    net[3].register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
    reestimate_batch_norm(net, [torch.randn(8, 4)])
    assert (inputs[0] != 0).all()  # dropout was off
    changed = {k for k, v in net.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"1.running_mean", "1.running_var", "4.running_mean", "4.running_var"}
    assert [m.training for m in net.modules()] == modes
    assert net[1].momentum is None
    assert not net[1]._forward_hooks


def test_a_batch_that_raises_changes_nothing():
    net = network()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    modes = [m.training for m in net.modules()]
    with pytest.raises(RuntimeError, match="mat1"):
        reestimate_batch_norm(net, [torch.randn(8, 4), torch.randn(8, 99)])
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert [m.training for m in net.modules()] == modes
    assert all(not m._forward_hooks for m in net.modules())


def test_stale_nan_is_healed():
    bn = nn.BatchNorm1d(3)
    bn.running_mean.fill_(float("nan"))
    bn.running_var.fill_(float("inf"))
    reestimate_batch_norm(bn, [torch.randn(10, 3)])
    assert bn.running_mean.isfinite().all()
    assert bn.running_var.isfinite().all()


def test_no_batches():
    with pytest.raises(ValueError, match="at least one batch"):
        reestimate_batch_norm(network(), [])


def test_layer_that_saw_nothing_keeps_its_statistics():
    net = nn.ModuleList([nn.BatchNorm1d(3), nn.BatchNorm1d(3)])
    divergence = reestimate_batch_norm(net, [torch.randn(10, 3)], lambda batch: net[0](batch))
    assert torch.equal(net[1].running_mean, torch.zeros(3))
    assert torch.equal(net[1].running_var, torch.ones(3))
    assert divergence["0"].abs().sum() > 0
    assert torch.allclose(divergence["1"], torch.zeros(3))


def test_divergence_is_torchs_kl_of_normals():
    mean, running_mean = torch.randn(2, 5, dtype=torch.float64)
    var, running_var = torch.rand(2, 5, dtype=torch.float64) + 0.1
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, var.sqrt()), torch.distributions.Normal(running_mean, running_var.sqrt())
    )
    assert torch.allclose(batch_norm_divergence(mean, var, running_mean, running_var), expected)


def test_divergence_of_the_new_statistics_from_the_old():
    bn = nn.BatchNorm1d(1)
    bn.running_mean.fill_(1.0)
    x = torch.randn(1000, 1)
    divergence = reestimate_batch_norm(bn, [x])[""]
    expected = batch_norm_divergence(x.mean(0), x.var(0), torch.ones(1), torch.ones(1))
    assert torch.allclose(divergence, expected, rtol=1e-4)


def test_variances_of_zero():
    zero, one = torch.zeros(1), torch.ones(1)
    assert batch_norm_divergence(one, zero, one, zero) == 0
    assert batch_norm_divergence(one, zero, zero, zero) > 1e30
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        none = torch.zeros(1, dtype=dtype)
        assert batch_norm_divergence(none, none + 100.0, none, none) >= 0.4 * torch.finfo(dtype).max
    assert batch_norm_divergence(one, zero, one, one).isfinite().all()
    bn = nn.BatchNorm1d(2)
    bn.running_var.zero_()
    assert reestimate_batch_norm(bn, [torch.randn(10, 2)])[""].isfinite().all()


def test_a_batch_of_nothing_counts_for_nothing():
    x = torch.randn(6, 3)
    bn = nn.BatchNorm1d(3)
    reestimate_batch_norm(bn, [x[:0], x[:4], x[:0], x[4:]])
    assert torch.allclose(bn.running_mean, x.mean(0), atol=1e-6)
    assert torch.allclose(bn.running_var, x.var(0))


def test_who_has_seen_nothing_yet_takes_what_others_have():
    x = torch.randn(6, 3, dtype=torch.float64)
    moments = _Moments(torch.zeros(3))
    moments.merge(0.0, torch.zeros(3), torch.zeros(3))  # a rank whose batches did not reach the layer
    moments.merge(6.0, x.mean(0), (x - x.mean(0)).square().sum(0))
    assert torch.allclose(moments.mean, x.mean(0))
    assert torch.allclose(moments.variance, x.var(0))


def test_passes_in_evaluation_mode_estimate_nothing():
    torch.manual_seed(0)
    net, batches = nn.Sequential(nn.BatchNorm1d(3)), [torch.randn(8, 3) * 2 + 5 for _ in range(4)]

    def with_pseudo_labels(x):
        net.eval()
        net(x)
        net.train()
        return net(x)

    reestimate_batch_norm(net, batches, with_pseudo_labels)
    together = torch.cat(batches)
    assert torch.allclose(net[0].running_mean, together.mean(0))
    assert torch.allclose(net[0].running_var, together.var(0))


class Frozen(nn.BatchNorm1d):
    """Stays in evaluation mode, as frozen backbones do."""

    def train(self, mode=True):
        return super().train(False)


def test_a_layer_that_stays_in_evaluation_mode_normalises_as_it_does():
    net, batches = nn.Sequential(Frozen(3), nn.Tanh(), nn.BatchNorm1d(3)), [torch.randn(8, 3) for _ in range(4)]
    net[0].running_mean.fill_(2.0), net[0].running_var.fill_(9.0)
    net.train()
    reestimate_batch_norm(net, batches)
    assert torch.equal(net[0].running_mean, torch.full((3,), 2.0))
    seen = net[1](net[0](torch.cat(batches)))
    assert torch.allclose(net[2].running_mean, seen.mean(0), atol=1e-6)
    assert torch.allclose(net[2].running_var, seen.var(0))


def test_channels_elsewhere():
    class OfSequences(nn.BatchNorm1d):
        def forward(self, x):
            return super().forward(x.transpose(1, 2)).transpose(1, 2)

    torch.manual_seed(0)
    net, batches = OfSequences(3), [torch.randn(4, length, 3) + length for length in (2, 5, 9)]
    reestimate_batch_norm(net, batches)
    together = torch.cat([x.flatten(0, 1) for x in batches])
    assert torch.allclose(net.running_mean, together.mean(0))
    assert torch.allclose(net.running_var, together.var(0))
