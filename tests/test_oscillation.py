import copy
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from reference import WeightLoop, masked_fake_quantize
from torch import nn

from lightning_qat_osc.functional import fake_quantize, quantize_to_int
from lightning_qat_osc.oscillation import OscillationState, pass_on_gradient


def walk(weights, steps, seed=0, low=-4, high=3):
    """Yield integers that stay, drift or oscillate: a random walk with a push that alternates in direction."""
    generator = torch.Generator().manual_seed(seed)
    position = torch.rand(weights, generator=generator) * (high - low) + low
    for t in range(steps):
        restless = torch.arange(weights) % 4 != 0
        step = torch.randn(weights, generator=generator) * 0.4 + 0.5 * (-1) ** t
        position = torch.where(restless, (position + step).clamp(low, high), position)
        yield position.round().to(torch.int8)


@pytest.mark.parametrize("threshold", [None, 0.11])
def test_thousands_of_steps_against_the_slow_loop(threshold):
    weights, steps, momentum = 40, 4000, 0.01
    sequence = list(walk(weights, steps + 1))
    state = OscillationState(sequence[0])
    loops = [WeightLoop(int(z), momentum, threshold or float("inf")) for z in sequence[0]]
    for t, integers in enumerate(sequence[1:]):
        state.update(integers, momentum)
        if threshold is not None:
            state.freeze(threshold)
        for loop, z in zip(loops, integers.tolist()):
            loop.step(z)
        if t % 100 == 0 or t == steps - 1:
            assert state.weight_int.tolist() == [loop.integer for loop in loops]
            assert state.frozen.tolist() == [loop.frozen for loop in loops]
            assert state.frequency.tolist() == pytest.approx([loop.frequency for loop in loops], abs=1e-6)
            assert state.ema_int.tolist() == pytest.approx([loop.ema for loop in loops], abs=1e-4)
            assert state.direction.tolist() == [loop.last_direction for loop in loops]
    if threshold is not None:
        assert 0 < state.frozen.sum() < weights


def test_first_change_is_no_oscillation_and_a_pause_does_not_forget():
    state = OscillationState(torch.tensor([0], dtype=torch.int8))
    frequencies = []
    for z in (1, 1, 1, 0, 0, -1, 0):
        state.update(torch.tensor([z], dtype=torch.int8), 1.0)
        frequencies.append(state.frequency.item())
    assert frequencies == [0, 0, 0, 1, 0, 0, 1]


def test_jump_across_the_whole_grid_does_not_overflow():
    state = OscillationState(torch.tensor([-128], dtype=torch.int8))
    for z in (127, -128, 127):
        state.update(torch.tensor([z], dtype=torch.int8), 1.0)
    assert state.frequency.item() == 1
    assert state.direction.item() == 1


def test_frozen_integer_is_the_rounded_average_and_never_changes():
    state = OscillationState(torch.tensor([0, 0], dtype=torch.int8))
    for t in range(9):
        state.update(torch.tensor([0 if t % 4 == 0 else 1, 0], dtype=torch.int8), 0.2)
    state.freeze(0.05)
    assert state.frozen.tolist() == [True, False]
    assert state.weight_int.tolist() == [round(state.ema_int[0].item()), 0]
    held = state.weight_int[0].item()
    for z in (3, -4, 2):
        state.update(torch.tensor([z, z], dtype=torch.int8), 0.2)
        state.freeze(10.0)
        assert state.weight_int.tolist() == [held, z]
    assert state.frozen.tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_held_latent_weights_round_to_their_integer(dtype):
    w = torch.randn(5000).to(dtype)
    for scale in (0.003, 0.0371, 1.7):
        s = torch.tensor([scale])
        state = OscillationState(quantize_to_int(torch.randn(5000), s, -128, 127))
        state.frozen = torch.rand(5000) < 0.5
        before = w.clone()
        state.hold_frozen(w, s)
        assert torch.equal(quantize_to_int(w, s, -128, 127)[state.frozen], state.weight_int[state.frozen])
        assert torch.equal(w[~state.frozen], before[~state.frozen])


@pytest.mark.parametrize("shape", [[1], [8, 1]])
def test_gradients_are_autograds_of_the_masked_forward(shape):
    torch.manual_seed(0)
    n, p = -4, 3
    s = (torch.rand(shape, dtype=torch.float64) * 0.3 + 0.2).requires_grad_()
    w = torch.randn(8, 50, dtype=torch.float64, requires_grad=True)
    state = OscillationState(quantize_to_int(torch.randn(8, 50), s, n, p))
    state.weight_int[:, :2] = torch.tensor([n, p], dtype=torch.int8)  # the ends of the grid
    state.frozen = torch.rand(8, 50) < 0.5
    state.frozen[:, :2] = True
    upstream = torch.randn(8, 50, dtype=torch.float64)

    masked_fake_quantize(w, s, n, p, state.frozen, state.weight_int).backward(upstream)
    expected_w, expected_s = w.grad, s.grad

    with torch.no_grad():
        state.hold_frozen(w, s)
    w.grad = s.grad = None
    fake_quantize(w, s, n, p).backward(upstream)
    pass_on_gradient(s.grad, w.grad, state.weight_int, state.frozen)
    assert torch.allclose(w.grad, torch.where(state.frozen, 0.0, expected_w), rtol=1e-14, atol=0)
    assert torch.allclose(s.grad, expected_s, rtol=1e-9, atol=1e-9)


def test_an_ulp_outside_the_grid_is_not_counted_twice():
    z = torch.tensor([3], dtype=torch.int8)
    s = torch.tensor([0.1], dtype=torch.float64, requires_grad=True)
    state = OscillationState(z)
    state.frozen = torch.tensor([True])
    for latent in (0.1 * 3, 0.1 * 3 * (1 + 1e-15), 0.1 * 3 * (1 - 1e-15)):
        w = torch.tensor([latent], dtype=torch.float64, requires_grad=True)
        s.grad = None
        fake_quantize(w, s, -4, 3).backward(torch.tensor([2.0], dtype=torch.float64))
        pass_on_gradient(s.grad, w.grad, state.weight_int, state.frozen)
        assert s.grad.item() == pytest.approx(6.0, abs=1e-9)


def test_state_saves_and_loads_but_is_no_buffer():
    state = OscillationState(torch.tensor([1, -2], dtype=torch.int8))
    state.update(torch.tensor([2, -2], dtype=torch.int8), 0.1)
    assert not list(state.buffers())
    assert not list(state.parameters())
    other = OscillationState(torch.zeros(2, dtype=torch.int8))
    other.load_state_dict(state.state_dict())
    for name in ("weight_int", "direction", "frequency", "ema_int", "frozen"):
        assert torch.equal(getattr(other, name), getattr(state, name))
        assert getattr(other, name) is not getattr(state, name)
    other.update(torch.tensor([1, -2], dtype=torch.int8), 0.1)
    assert other.frequency[0] > 0
    assert state.frequency[0] == 0
    with pytest.raises(RuntimeError, match="size mismatch"):
        OscillationState(torch.zeros(3, dtype=torch.int8)).load_state_dict(state.state_dict())
    with pytest.raises(RuntimeError, match="Missing"):
        state.load_state_dict({})


def test_state_keeps_its_precision_and_follows_devices():
    model = nn.Sequential(OscillationState(torch.tensor([1], dtype=torch.int8)))
    model.to(torch.bfloat16)
    assert model[0].frequency.dtype == torch.float32
    assert model[0].weight_int.dtype == torch.int8
    model.half().double()
    assert model[0].ema_int.dtype in (torch.float32, torch.float64)
    assert model.to("meta")[0].frequency.is_meta
    copied = copy.deepcopy(nn.Sequential(OscillationState(torch.tensor([1], dtype=torch.int8))))
    assert copied[0].weight_int.item() == 1


def test_bytes_a_weight():
    state = OscillationState(torch.zeros(1000, dtype=torch.int8))
    assert sum(t.nbytes for t in state.state_dict().values()) == 11 * 1000


def test_a_frequency_at_the_threshold_does_not_freeze():
    state = OscillationState(torch.tensor([0], dtype=torch.int8))
    for z in (1, 0):
        state.update(torch.tensor([z], dtype=torch.int8), 0.125)
    assert state.frequency.item() == 0.125
    state.freeze(0.125)
    assert not state.frozen.any()
    state.freeze(0.124)
    assert state.frozen.all()


def test_a_copy_by_pickling_has_memory_of_its_own():
    # as a spawned process unpickles it, from tensors in shared memory
    state = OscillationState(torch.zeros(4, dtype=torch.int8))
    for name in ("weight_int", "direction", "frequency", "ema_int", "frozen"):
        getattr(state, name).share_memory_()
    received = ForkingPickler.loads(bytes(ForkingPickler.dumps(state)))
    received.frequency.fill_(1.0)
    assert state.frequency.sum() == 0.0
    assert not received.frequency.is_shared()
