"""Updates of many weights at once, on every path, against slow loops and autograd."""

import pytest
import torch
from marks import needs_compiler
from reference import WeightLoop, fake_quantize_equation, masked_fake_quantize
from torch import nn

from lightning_qat_osc import (
    LayerRule,
    QuantConfig,
    dampening_loss,
    fake_quantize,
    functional,
    kernels,
    lsq_gradients,
    quantize_model,
    sweep,
)
from lightning_qat_osc.calibration import Calibrator
from lightning_qat_osc.kernels import why_nothing_compiles
from lightning_qat_osc.lookup import quantized_weights

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from the compiler's own imports
FUSED = [False, pytest.param(True, marks=needs_compiler)]
PATHS = ["together", "alone"]


@pytest.fixture
def path(request, monkeypatch):
    """Process small weights together or, as if they were large, each alone and in blocks."""
    for module in (sweep, functional):
        monkeypatch.setattr(module, "SMALL", 2**15 if request.param == "together" else 0)
    for module in (kernels, lsq_gradients):
        monkeypatch.setattr(module, "BLOCK", 7)


def weights_of(granularity, dtype, fused):
    torch.manual_seed(0)
    model = nn.ModuleList(
        [
            nn.Linear(6, 5),
            nn.Conv2d(4, 3, 3).to(memory_format=torch.channels_last),
            nn.ConvTranspose2d(3, 4, 2),
            nn.Linear(3, 8),
        ]
    ).to(dtype)
    config = QuantConfig(3, None, first_last_bits=None, weight_granularity=granularity)
    Calibrator(quantize_model(model, config), config).finish()
    weights = quantized_weights(model)
    for w in weights:
        w.quantizer.fused = fused
        w.quantizer.start_tracking(w.weight)
    return weights


@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize("path", PATHS, indirect=True)
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_states_are_those_of_slow_loops(path, fused, granularity, dtype):
    weights = weights_of(granularity, dtype, fused)
    loops = {w.name: [WeightLoop(z, 0.1) for z in w.quantizer.to_int(w.weight).flatten().tolist()] for w in weights}
    for step in range(40):
        threshold = 0.12 if step > 10 else float("inf")
        for w in weights:
            moved = w.weight.detach() + 0.7 * (-1) ** step * w.quantizer.scale.detach() * torch.rand(w.weight.shape)
            w.weight.data.copy_(moved)
            for loop, z in zip(loops[w.name], w.quantizer.to_int(w.weight).flatten().tolist()):
                loop.threshold = threshold
                loop.step(z)
        sweep.advance_states(sweep.make_batches(weights), 0.1, threshold)
        for w in weights:
            state = w.quantizer.oscillation
            assert state.weight_int.flatten().tolist() == [loop.integer for loop in loops[w.name]]
            assert state.frozen.flatten().tolist() == [loop.frozen for loop in loops[w.name]]
            assert state.direction[~state.frozen].tolist() == [
                loop.last_direction for loop in loops[w.name] if not loop.frozen
            ]
            assert state.frequency.flatten().tolist() == pytest.approx([x.frequency for x in loops[w.name]], abs=1e-6)
            assert state.ema_int.flatten().tolist() == pytest.approx([x.ema for x in loops[w.name]], abs=1e-5)
            held = (w.quantizer.scale.detach() * state.weight_int).to(dtype)
            assert torch.equal(w.weight.detach()[state.frozen], held[state.frozen])
    assert all(0 < w.quantizer.oscillation.frozen.sum() < w.weight.numel() for w in weights)


@pytest.mark.parametrize("path", PATHS, indirect=True)
def test_tracking_alone_leaves_weights_and_masks_alone(path):
    weights = weights_of("per_tensor", torch.float32, False)
    for w in weights:
        w.quantizer.oscillation.frequency.fill_(0.9)
    before = [w.weight.detach().clone() for w in weights]
    sweep.advance_states(sweep.make_batches(weights), 0.1)
    assert all(torch.equal(w.weight.detach(), b) for w, b in zip(weights, before))
    assert not any(w.quantizer.oscillation.frozen.any() for w in weights)


@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize("path", PATHS, indirect=True)
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("aggregation", ["sum", "kernel_mean"])
def test_dampening_adds_autograds_gradient_of_the_printed_loss(path, fused, granularity, aggregation):
    weights = weights_of(granularity, torch.float32, fused)
    expected = []
    for w in weights:
        q = w.quantizer
        w.weight.data.mul_(1.5)  # some are outside the grid
        (0.3 * dampening_loss(w.weight, q.scale.detach(), q.quant_min, q.quant_max, aggregation)).backward()
        expected.append(w.weight.grad.clone() + 1.0)
        w.weight.grad = torch.ones_like(w.weight)
    sweep.add_dampening(sweep.make_batches(weights), 0.3, aggregation)
    for w, gradient in zip(weights, expected):
        assert torch.allclose(w.weight.grad, gradient, rtol=0, atol=1e-6)


def freeze_half(w):
    """Freeze half of a weight, set our forward pass's gradients, and return autograd's for the masked forward pass."""
    q, state = w.quantizer, w.quantizer.oscillation
    state.frozen = torch.rand(w.weight.shape) < 0.5
    state.hold_frozen(w.weight.detach(), q.scale.detach())
    upstream = torch.randn(w.weight.shape)
    w.weight.grad, q.scale_grad = torch.autograd.grad(q(w.weight), (w.weight, q.scale), upstream)
    masked = masked_fake_quantize(w.weight, q.scale, q.quant_min, q.quant_max, state.frozen, state.weight_int)
    return torch.autograd.grad(masked, (w.weight, q.scale), upstream)


@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize("path", PATHS, indirect=True)
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("dampening", [False, True])
def test_frozen_gradients_are_autograds_of_the_masked_forward(path, fused, granularity, dampening):
    weights = weights_of(granularity, torch.float32, fused)
    expected = []
    for w in weights:
        q = w.quantizer
        of_weight, of_scale = freeze_half(w)
        if dampening:
            loss = 0.3 * dampening_loss(w.weight, q.scale.detach(), q.quant_min, q.quant_max, "mean")
            of_weight = of_weight + torch.autograd.grad(loss, w.weight)[0]
        expected.append((torch.where(q.oscillation.frozen, 0.0, of_weight), of_scale))
    batches = sweep.make_batches(weights)
    if dampening:
        sweep.dampen_and_pass_on(batches, 0.3, "mean")
    else:
        sweep.pass_on_frozen_gradients(batches)
    for w, (of_weight, of_scale) in zip(weights, expected):
        assert torch.allclose(w.weight.grad, of_weight, rtol=1e-5, atol=1e-6 if dampening else 1e-8)
        assert torch.allclose(w.quantizer.scale_grad, of_scale, rtol=1e-4, atol=1e-4)


def test_states_of_small_weights_share_memory_and_are_saved_each_for_itself():
    weights = weights_of("per_tensor", torch.float32, False)
    sweep.advance_states(sweep.make_batches(weights), 0.1)
    states = [w.quantizer.oscillation for w in weights]
    assert len({state.frequency.untyped_storage().data_ptr() for state in states}) == 1
    for state, w in zip(states, weights):
        saved = state.state_dict()
        assert all(t.untyped_storage().nbytes() == t.nbytes for t in saved.values())
        assert saved["frequency"].shape == w.weight.shape


def test_states_that_were_loaded_go_on_as_those_that_were_not():
    weights = weights_of("per_tensor", torch.float32, False)
    batches = sweep.make_batches(weights)

    def steps(seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(5):
            for w in weights:
                w.weight.data += w.quantizer.scale.detach() * torch.randn(w.weight.shape, generator=generator)
            sweep.advance_states(batches, 0.1, 0.2)

    steps(1)
    middle = [(w.weight.detach().clone(), w.quantizer.oscillation.state_dict()) for w in weights]
    steps(2)
    unbroken = [w.quantizer.oscillation.state_dict() for w in weights]
    for w, (latent, state) in zip(weights, middle):
        w.weight.data.copy_(latent)
        w.quantizer.oscillation.load_state_dict(state)
    steps(2)
    for w, state in zip(weights, unbroken):
        for name, tensor in w.quantizer.oscillation.state_dict().items():
            assert torch.equal(tensor, state[name])
        assert state["frequency"].count_nonzero() > 0


@needs_compiler
@pytest.mark.parametrize("path", ["alone"], indirect=True)
@pytest.mark.parametrize("shape", [(4, 3, 5, 5), (6, 40)], ids=str)
@pytest.mark.parametrize("groups", ["one", "rows", "columns"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_fused_gradients_are_autograds_of_the_equation(path, shape, groups, channels_last):
    torch.manual_seed(1)
    x = 3 * torch.randn(shape)
    if channels_last and len(shape) == 4:
        x = x.to(memory_format=torch.channels_last)
    sizes = {"one": [1], "rows": [shape[0], *[1] * (len(shape) - 1)], "columns": [1, shape[1], *[1] * (len(shape) - 2)]}
    scale = 0.2 + 0.2 * torch.rand(sizes[groups])
    upstream = torch.randn(shape)
    results = []
    for function in (
        lambda a, s: fake_quantize_equation(a, s, -5, 10),
        lambda a, s: fake_quantize(a, s, 0, 15, zero_point=5, fused=True),
    ):
        a, s = x.clone().requires_grad_(), scale.clone().requires_grad_()
        out = function(a, s)
        results.append((out, *torch.autograd.grad(out, (a, s), upstream)))
    for got, wanted in zip(results[1], results[0]):
        assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-4)
    assert results[1][0].stride() == x.stride()


@needs_compiler
@pytest.mark.parametrize("path", ["alone"], indirect=True)
def test_kernels_of_many_variants_leave_recompilations_to_the_users_model(path):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for granularity in ("per_tensor", "per_channel"):
            weights = weights_of(granularity, dtype, True)
            for w in weights:
                freeze_half(w)
            batches = sweep.make_batches(weights)
            sweep.pass_on_frozen_gradients(batches)
            sweep.advance_states(batches, 0.1)
            sweep.advance_states(batches, 0.1, 0.2)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU())
    x = torch.randn(4, 6)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    assert torch.allclose(compiled, model(x))


@needs_compiler
def test_a_compiler_that_is_there_has_no_problem():
    assert why_nothing_compiles(torch.device("cpu")) is None


def test_what_fails_to_compile_is_told(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(torch, "compile", fail)
    assert why_nothing_compiles(torch.device("cpu")) == "RuntimeError: no compiler"


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_weights_without_a_gradient_leave_the_others_theirs(granularity):
    alone, together = (weights_of(granularity, torch.float32, False) for _ in range(2))
    for some in (alone, together):
        torch.manual_seed(1)
        for w in some:
            w.weight.grad = torch.randn_like(w.weight)
            w.quantizer.scale_grad = torch.zeros_like(w.quantizer.scale)
            w.quantizer.oscillation.frozen = torch.rand(w.weight.shape) < 0.3
        some[1].weight.grad = some[1].quantizer.scale_grad = None
    batches = sweep.make_batches(together)
    assert len(batches[0].weights) >= 3
    sweep.advance_states(batches, 0.1)
    places = [w.quantizer.oscillation.frequency.data_ptr() for w in together]
    assert batches[0].has_gradients()
    sweep.dampen_and_pass_on(batches, 0.1, "mean")
    assert [w.quantizer.oscillation.frequency.data_ptr() for w in together] == places
    for w in alone:
        sweep.advance_states(sweep.make_batches([w]), 0.1)
        if w.weight.grad is not None:
            sweep.dampen_and_pass_on(sweep.make_batches([w]), 0.1, "mean")
    for w, other in zip(together, alone):
        if other.weight.grad is None:
            assert w.weight.grad is w.quantizer.scale_grad is None
        else:
            assert torch.equal(w.weight.grad, other.weight.grad)
            assert torch.allclose(w.quantizer.scale_grad, other.quantizer.scale_grad)
    for w in together:
        w.weight.grad = None
    assert not any(batch.has_gradients() for batch in batches)


def test_weights_of_other_bits_keep_their_own_grid():
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(6, 5), nn.Linear(5, 8), nn.Linear(8, 4)])
    config = QuantConfig(2, None, first_last_bits=None, rules=[LayerRule("1", weight_bits=4)])
    Calibrator(quantize_model(model, config), config).finish()
    weights = quantized_weights(model)
    for w in weights:
        w.quantizer.start_tracking(w.weight)
        w.weight.data.mul_(2.0)
    sweep.advance_states(sweep.make_batches(weights), 0.1)
    for w in weights:
        assert torch.equal(w.quantizer.oscillation.weight_int, w.quantizer.to_int(w.weight))
    assert weights[1].quantizer.oscillation.weight_int.abs().max() > 2
