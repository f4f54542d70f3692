"""Quantizing again in the backward pass: the same gradients, without the quantized tensors in memory."""

import gc
import weakref

import pytest
import torch
from marks import needs_compiler
from models import ConvModule, Data, trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_qat_osc import QuantConfig, QuantizationAwareTraining, functional, quantize_model
from lightning_qat_osc.calibration import Calibrator
from lightning_qat_osc.lookup import quantizers

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # from the compiler's own imports
    pytest.mark.filterwarnings("ignore:.*in full precision"),
]


def quantized(network, *batch, bits=3):
    config = QuantConfig(bits, bits, first_last_bits=None)
    quantize_model(network, config)
    calibrator = Calibrator(network, config)
    with torch.no_grad(), calibrator.observe():
        network(*batch)
    calibrator.finish()
    return network


def recompute(network, on):
    for q in quantizers(network):
        q.recompute = on


def gradients(network, x):
    network.zero_grad()
    x = x.clone().requires_grad_()
    out = network(x)
    out = out[0] if isinstance(out, tuple) else out
    out.square().sum().backward()
    return [x.grad, *(p.grad for p in network.parameters())]


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0]


NETWORKS = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)), (7, 6)),
    "linear of sequences": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), (3, 7, 6)),
    "convolutions": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.ConvTranspose2d(4, 2, 3)),
        (2, 3, 8, 8),
    ),
    "attention": (Attends, (2, 5, 8)),
    "recurrent": (lambda: nn.LSTM(4, 3), (5, 2, 4)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_the_same_to_the_bit(name):
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    x = torch.randn(shape)
    network = quantized(make(), x)
    kept = gradients(network, x)
    recompute(network, True)
    made_again = gradients(network, x)
    assert all(g is not None and torch.equal(a, g) for a, g in zip(kept, made_again))


def test_a_gradient_penalty_is_the_same():
    make, shape = NETWORKS["linear"]
    torch.manual_seed(0)
    x = torch.randn(shape).requires_grad_()
    network = quantized(make(), x)

    def of_penalty():
        (gradient,) = torch.autograd.grad(network(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), [p for p in network.parameters() if p.dim() > 1])

    kept = of_penalty()
    recompute(network, True)
    assert all(torch.equal(a, g) for a, g in zip(kept, of_penalty()))


def left_after_forward(network, x):
    """Return references to the quantized tensors that are still alive while only the output is referenced."""
    made = []
    hooks = [q.register_forward_hook(lambda q, args, out: made.append(weakref.ref(out))) for q in quantizers(network)]
    out = network(x)
    for hook in hooks:
        hook.remove()
    gc.collect()
    assert out.grad_fn is not None
    return [ref for ref in made if ref() is not None]


@pytest.mark.parametrize("name", ["linear", "convolutions", "attention"])
def test_nothing_quantized_is_kept_for_the_backward_pass(name):
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    x = torch.randn(shape).requires_grad_()
    network = quantized(make(), x)
    assert len(left_after_forward(network, x)) >= 3
    recompute(network, True)
    assert not left_after_forward(network, x)


def test_activation_checkpointing_decides_by_itself():
    torch.manual_seed(0)
    x = torch.randn(7, 6)
    network = quantized(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)), x)
    kept = gradients(network, x)
    recompute(network, True)
    called = []
    hook = network[0].weight_quantizer.register_forward_hook(lambda *args: called.append(1))
    network.zero_grad()
    leaf = x.clone().requires_grad_()
    checkpoint(network, leaf, use_reentrant=False).square().sum().backward()
    hook.remove()
    assert len(called) == 2  # in the forward pass, and again when checkpointing reruns it
    assert all(torch.equal(a, g) for a, g in zip(kept, [leaf.grad, *(p.grad for p in network.parameters())]))


def test_a_compiled_network_is_one_graph_and_chooses_by_itself():
    make, shape = NETWORKS["convolutions"]
    torch.manual_seed(0)
    x = torch.randn(shape)
    network = quantized(make(), x)
    kept = gradients(network, x)
    recompute(network, True)
    compiled = gradients(torch.compile(network, fullgraph=True, backend="aot_eager"), x)
    assert all(torch.allclose(a, g, rtol=1e-4, atol=1e-5) for a, g in zip(kept, compiled))


def test_a_change_in_place_before_the_backward_pass_is_an_error():
    torch.manual_seed(0)
    x = torch.randn(4, 6)
    network = quantized(nn.Sequential(nn.Linear(6, 5)), x)
    recompute(network, True)
    for q in quantizers(network):
        q.scale.requires_grad_(False)  # so that autograd itself does not check the version of x
    out = network(x)
    x.add_(1.0)
    with pytest.raises(RuntimeError, match="modified in place before the backward"):
        out.sum().backward()


class Activates(nn.Conv2d):
    def forward(self, x):
        return super().forward(F.relu(x, inplace=True))


def test_a_layer_may_change_its_quantized_input_in_place():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    network = quantized(nn.Sequential(Activates(3, 4, 3)), x.clone())
    found = []
    for on in (False, True):
        recompute(network, on)
        network.zero_grad()
        network(x.clone()).square().sum().backward()
        found.append([p.grad for p in network.parameters()])
    assert all(torch.equal(kept, made) for kept, made in zip(*found))


@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=needs_compiler)])
def test_a_run_is_the_same_to_the_bit(fused, monkeypatch):
    monkeypatch.setattr(functional, "SMALL", 1000)  # so that the inputs of this small model count as large
    trained = []
    for on in (False, True):
        torch.manual_seed(3)
        module = ConvModule()
        trainer([QuantizationAwareTraining(3, 3, fused=fused, recompute=on)]).fit(module, Data())
        assert all(q.recompute is on for q in quantizers(module))
        trained.append(module.state_dict())
    assert all(torch.equal(tensor, trained[1][name]) for name, tensor in trained[0].items())


def test_only_true_or_false():
    with pytest.raises(TypeError, match="recompute must be True or False, got 1"):
        QuantizationAwareTraining(recompute=1)
