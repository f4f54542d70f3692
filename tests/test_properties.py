"""Properties that hold for every shape, bit width, dtype and degenerate weight, tested on generated examples."""

import copy
import math
from itertools import pairwise

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from torch import nn

from lightning_qat_osc import QuantConfig, cosine_anneal, fake_quantize, quantize_model, reestimate_batch_norm
from lightning_qat_osc.calibration import Calibrator
from lightning_qat_osc.functional import integer_grid
from lightning_qat_osc.lookup import quantizers
from lightning_qat_osc.oscillation import OscillationState, pass_on_gradient
from lightning_qat_osc.quantizers import WeightQuantizer
from lightning_qat_osc.ranges import activation_grid, estimate_scale

pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op")

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
METHODS = ["mse", "minmax", "percentile", "lsq"]
GRANULARITIES = ["per_tensor", "per_channel"]


def examples(n):
    """Return settings for a search of ``n`` examples that differs between tests but not between runs."""
    return settings(
        max_examples=n, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )


seeds = st.integers(0, 2**31)
bits_ = st.integers(2, 8)
dtypes = st.sampled_from(DTYPES)
FILLS = [
    "normal",
    "zeros",
    "constant",
    "one_outlier",
    "mostly_zero",
    "zero_channel",
    "tiny",
    "denormal",
    "large",
    "huge",
]


def filled(shape, fill, dtype, seed):
    """Return a tensor with the property that ``fill`` names; huge and denormal are relative to the dtype."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    info = torch.finfo(dtype)
    if fill == "zeros":
        x = torch.zeros_like(x)
    elif fill == "constant":
        x = torch.full_like(x, 0.37 if seed % 2 else -0.37)
    elif x.numel() and fill == "one_outlier":
        x.view(-1)[seed % x.numel()] = 1000.0
    elif fill == "mostly_zero":
        x = x * (x > 2.0)
    elif x.dim() and fill == "zero_channel":
        x[:1] = 0.0
    elif fill == "tiny":
        x = x * 1e-4
    elif fill == "denormal":
        x = x * info.tiny / 16
    elif fill == "large":
        x = x.clamp(-3, 3) * 1000.0
    elif fill == "huge":
        x = x.clamp(-1, 1) * info.max
    return x.to(dtype)


@st.composite
def layers(draw):
    """Draw a linear, embedding or convolution layer and the shape of an input, which is None for an embedding."""
    kind = draw(st.sampled_from(["Linear", "Embedding", *(f"Conv{t}{d}d" for t in ("", "Transpose") for d in "123")]))
    batch = draw(st.integers(1, 3))
    if kind == "Linear":
        inputs, outputs = draw(st.integers(1, 9)), draw(st.integers(1, 5))
        return nn.Linear(inputs, outputs, bias=draw(st.booleans())), (batch, inputs)
    if kind == "Embedding":
        padding_idx = draw(st.sampled_from([None, 0]))
        return nn.Embedding(7, draw(st.integers(1, 6)), padding_idx=padding_idx), None
    dims, groups = int(kind[-2]), draw(st.sampled_from([1, 2]))
    inputs, outputs = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    kernel, stride = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    padding = draw(st.integers(0, kernel - 1))
    kwargs = {"groups": groups, "stride": stride, "bias": draw(st.booleans())}
    if "Transpose" not in kind:
        modes = ["zeros", "reflect", "replicate", "circular"]
        kwargs |= {"padding": padding, "padding_mode": draw(st.sampled_from(modes))}
    return getattr(nn, kind)(inputs, outputs, kernel, **kwargs), (batch, inputs, *[draw(st.integers(3, 5))] * dims)


def grid_points(quantizer, dtype):
    """Return all values of a quantized weight, [scales, integers]: products in the wider dtype, then rounded."""
    wide = torch.promote_types(quantizer.scale.dtype, dtype)
    integers = torch.arange(-(2 ** (quantizer.bits - 1)), 2 ** (quantizer.bits - 1), dtype=wide)
    return (quantizer.scale.detach().reshape(-1, 1).to(wide) * integers).to(dtype)


def on_the_grid(quantizer, weight):
    rows = quantizer(weight).detach().movedim(quantizer.channel_dim, 0)
    points = grid_points(quantizer, weight.dtype)
    rows = rows.reshape(len(points), -1)
    return bool((rows.unsqueeze(2) == points.unsqueeze(1)).any(2).all())


def calibrated(layer, config, *inputs):
    model = nn.Sequential(layer)
    quantize_model(model, config)
    calibrator = Calibrator(model, config)
    with torch.no_grad(), calibrator.observe():
        for x in inputs:
            model(x)
    calibrator.finish()
    return model


def config_of(bits, granularity, weight_range, activation_range):
    return QuantConfig(
        bits,
        bits,
        first_last_bits=None,
        weight_granularity=granularity,
        weight_range=weight_range,
        activation_range=activation_range,
    )


@examples(250)
@given(
    layers(),
    bits_,
    dtypes,
    st.sampled_from(GRANULARITIES),
    st.sampled_from(METHODS),
    st.sampled_from(METHODS),
    st.sampled_from(FILLS[:-1]),
    st.sampled_from(["normal", "zeros", "constant", "one_outlier", "mostly_zero", "tiny", "denormal"]),
    st.booleans(),
    seeds,
)
def test_any_layer_trains_on_the_grid(
    layer_and_shape, bits, dtype, granularity, weight_range, activation_range, fill, x_fill, positive, seed
):
    layer, shape = layer_and_shape
    layer = layer.to(dtype)
    with torch.no_grad():
        layer.weight.copy_(filled(layer.weight.shape, fill, dtype, seed))
    x = torch.randint(0, 7, (2, 3)) if shape is None else filled(shape, x_fill, dtype, seed + 1)
    x = x.abs() if positive else x
    with torch.no_grad():
        plain = copy.deepcopy(layer).double()(x if shape is None else x.double())
    assume((plain.abs() < torch.finfo(dtype).max / 100).all())  # or it would overflow when quantized, too
    model = calibrated(layer, config_of(bits, granularity, weight_range, activation_range), x)
    w = layer.weight_quantizer
    assert w.active
    state = w.start_tracking(layer.weight.detach())
    optimizer = torch.optim.SGD([layer.weight], lr=0.5)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(4):
        out = model(x)
        assert out.isfinite().all()
        assert out.dtype == dtype
        optimizer.zero_grad()
        (out.double() * torch.randn(out.shape, generator=generator)).mean().backward()
        for name, p in model.named_parameters():
            assert p.grad is None or p.grad.isfinite().all(), name
        assert layer.weight.grad is not None
        assert w.scale.grad is not None
        pass_on_gradient(w.scale.grad, layer.weight.grad, state.weight_int, state.frozen)
        optimizer.step()
        with torch.no_grad():  # move weights back and forth by a grid step, so that some freeze
            layer.weight.add_(w.scale * torch.randint(-1, 2, layer.weight.shape, generator=generator))
        state.update(w.to_int(layer.weight.detach()), 0.5)
        state.freeze(0.4)
        state.hold_frozen(layer.weight, w.scale)
        assert on_the_grid(w, layer.weight)
        if fill != "denormal":  # for which a grid step may be smaller than a step of the dtype
            assert torch.equal(w.to_int(layer.weight.detach())[state.frozen], state.weight_int[state.frozen])
        assert -(2 ** (bits - 1)) <= state.weight_int.amin().item() <= state.weight_int.amax().item() < 2 ** (bits - 1)
        assert state.frequency.isfinite().all()
    for q in quantizers(model):
        assert (q.scale > 0).all()
        assert q.scale.isfinite().all()


@examples(120)
@given(
    st.lists(st.integers(1, 4), min_size=2, max_size=4),
    bits_,
    dtypes,
    st.sampled_from(GRANULARITIES),
    st.sampled_from(METHODS),
    st.sampled_from(["normal", "huge", "denormal", "zeros"]),
    st.sampled_from([float("nan"), float("inf"), -float("inf")]),
    st.booleans(),
    seeds,
)
def test_a_weight_that_is_not_finite_or_huge_gets_a_range_all_the_same(
    shape, bits, dtype, granularity, method, fill, bad, everywhere, seed
):
    weight = filled(shape, fill, dtype, seed)
    if everywhere:
        weight = torch.full_like(weight, bad)
    else:
        weight.view(-1)[seed % weight.numel()] = bad
    w = WeightQuantizer(bits, weight, granularity=granularity, method=method)
    assert "NaN or inf" in w.calibrate(weight)
    assert (w.scale > 0).all()
    assert w.scale.isfinite().all()
    state = w.start_tracking(weight)
    for _ in range(3):
        state.update(w.to_int(weight), 0.1)
        state.freeze(0.05)
        state.hold_frozen(weight, w.scale)
    assert state.frequency.isfinite().all()
    assert state.ema_int.isfinite().all()
    assert not w(weight).isnan()[~weight.isnan()].any()  # NaNs do not spread


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("make", [lambda: nn.Linear(0, 4), lambda: nn.Linear(4, 0), lambda: nn.Embedding(4, 0)])
def test_a_layer_without_weights_is_left_in_full_precision(make, granularity):
    layer = make()
    x = torch.randint(0, 4, (2, 3)) if isinstance(layer, nn.Embedding) else torch.randn(2, layer.in_features)
    model = calibrated(layer, config_of(4, granularity, "mse", "mse"), x)
    assert not layer.weight_quantizer.active
    assert model(x).shape == nn.Sequential(make())(x).shape


@examples(60)
@given(layers(), bits_, st.sampled_from(GRANULARITIES), seeds)
def test_an_empty_batch_passes(layer_and_shape, bits, granularity, seed):
    layer, shape = layer_and_shape
    assume(shape is not None)
    empty = torch.zeros(0, *shape[1:])
    try:
        expected = layer(empty).shape
    except RuntimeError:  # torch does not support empty batches with some paddings
        assume(False)
    model = calibrated(
        layer, config_of(bits, granularity, "mse", "mse"), empty, filled(shape, "normal", layer.weight.dtype, seed)
    )
    assert layer.input_quantizer.active
    out = model(empty)
    assert out.shape == expected
    out.sum().backward()
    assert layer.weight_quantizer.scale.grad.eq(0).all()


@examples(300)
@given(
    st.integers(1, 3),
    st.sampled_from([1, 2, 30, 2500]),
    bits_,
    st.booleans(),
    st.sampled_from(METHODS),
    st.sampled_from([f for f in FILLS if f != "zeros"]),
    dtypes,
    seeds,
)
def test_every_range_method_gives_a_positive_finite_scale(rows, n, bits, signed, method, fill, dtype, seed):
    x = filled((rows, n), fill, dtype, seed)
    x = x if signed else x.abs()
    quant_min, quant_max = integer_grid(bits, signed=signed)
    scale = estimate_scale(x, quant_min, quant_max, method)
    assert scale.shape == (rows,)
    assert (scale > 0).all()
    assert scale.isfinite().all()


@examples(100)
@given(bits_, st.sampled_from(METHODS), st.sampled_from([1, 300, 3000]), st.integers(-140, 126), seeds)
def test_ranges_have_no_favourite_magnitude(bits, method, n, exponent, seed):
    # scales are proportional to the weights, exactly so for powers of 2, as long as no number is denormal
    x = filled((2, n), "normal", torch.float32, seed).clamp(-1.9, 1.9)
    grid = integer_grid(bits, signed=True)
    unit = estimate_scale(x, *grid, method)
    expected = unit.double() * 2.0**exponent
    assume((expected > 4 * torch.finfo(torch.float32).tiny).all() and (expected < 1e38).all())
    scaled = x.double() * 2.0**exponent
    assume(scaled.abs().min() > torch.finfo(torch.float32).tiny)
    assert torch.equal(estimate_scale(scaled.float(), *grid, method).double(), expected)


@examples(150)
@given(
    bits_,
    st.sampled_from(METHODS),
    st.sampled_from([1, 30, 3000]),
    st.sampled_from([f for f in FILLS if f != "zeros"]),
    st.sampled_from([1.0, -1.0, 0.0]),
    seeds,
)
def test_every_activation_grid_holds_its_zero(bits, method, n, fill, sign, seed):
    x = filled((n,), fill, torch.float32, seed)
    x = x if sign == 0.0 else sign * x.abs()
    assume(x.any())
    quant_min, quant_max, zero_point = activation_grid(x, x.min().item(), x.max().item(), bits, method)
    assert (quant_min, quant_max) == (0, 2**bits - 1)
    assert quant_min <= zero_point <= quant_max
    assert (zero_point == 0) == bool(x.min() >= 0)
    scale = estimate_scale(x.view(1, -1), quant_min - zero_point, quant_max - zero_point, method)
    assert scale.item() > 0
    assert math.isfinite(scale.item())
    zero = fake_quantize(torch.zeros(1), scale, quant_min, quant_max, zero_point=zero_point)
    assert zero.item() == 0.0


def steps_of(dtype):
    """Draw scales whose grids do not overflow in the dtype and whose points it can tell apart."""
    low, high = (2.0**-14, 100.0) if dtype == torch.float16 else (1e-30, 1e30)
    return st.floats(math.log(low), math.log(high)).map(math.exp)


@examples(200)
@given(dtypes.flatmap(lambda d: st.tuples(st.just(d), steps_of(d))), bits_, st.booleans(), st.booleans(), seeds)
def test_quantizing_twice_is_quantizing_once(dtype_and_step, bits, signed, shifted, seed):
    dtype, step = dtype_and_step
    scale = torch.tensor([step], dtype=torch.promote_types(dtype, torch.float32))
    quant_min, quant_max = integer_grid(bits, signed=signed)
    zero_point = seed % (quant_max + 1) if shifted and not signed else 0
    x = (filled((64,), "normal", torch.float64, seed) * step * 2.0**bits / 2).to(dtype)
    once = fake_quantize(x, scale, quant_min, quant_max, zero_point=zero_point)
    assert torch.equal(fake_quantize(once, scale, quant_min, quant_max, zero_point=zero_point), once)
    points = (torch.arange(quant_min, quant_max + 1) - zero_point) * scale
    assert torch.isin(once, points.to(dtype)).all()
    nearest = (x.double().unsqueeze(1) - points.double()).abs().amin(1)
    slack = 4 * torch.finfo(dtype).eps * points.double().abs().max()
    assert ((once.double() - x.double()).abs() <= nearest + slack).all()


@examples(200)
@given(dtypes.flatmap(lambda d: st.tuples(st.just(d), steps_of(d))), bits_, st.floats(0.01, 1.0), seeds)
def test_what_is_frozen_rounds_to_its_integer_whatever_the_scale_does(dtype_and_step, bits, momentum, seed):
    dtype, step = dtype_and_step
    generator = torch.Generator().manual_seed(seed)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scale = torch.tensor([step], dtype=torch.promote_types(dtype, torch.float32))
    start = torch.randint(low, high + 1, (40,), generator=generator, dtype=torch.int8)
    weight = (start * scale).to(dtype)
    state, held = OscillationState(start), {}
    for _ in range(12):
        moved = torch.randint(low, high + 1, (40,), generator=generator, dtype=torch.int8)
        weight = (moved * scale).to(dtype)  # an optimizer that moves even frozen weights
        state.update(moved, momentum)
        state.freeze(0.3 * momentum)
        scale = scale * (1.0 + 0.02 * torch.randn(1, generator=generator, dtype=scale.dtype))
        state.hold_frozen(weight, scale)
        integers = torch.round(weight.double() / scale.double())
        for i in state.frozen.nonzero().flatten().tolist():
            assert integers[i] == state.weight_int[i] == held.setdefault(i, state.weight_int[i].item())
    assert len(held) > 0
    assert ((state.frequency >= 0) & (state.frequency <= 1)).all()
    assert ((state.ema_int >= low) & (state.ema_int <= high)).all()


values = st.floats(-1e6, 1e6)


@examples(200)
@given(values, values, st.integers(1, 10**9), st.floats(0, 1, exclude_max=True), st.lists(st.integers(0, 2 * 10**9)))
def test_annealing_stays_between_its_ends_and_never_turns_round(initial, final, total, start, steps):
    schedule = cosine_anneal(initial, final, total, start)
    assert (schedule(0), schedule(total)) == (initial, final)
    path = [schedule(t) for t in sorted(steps)]
    slack = 1e-12 * max(abs(initial), abs(final))
    assert all(min(initial, final) - slack <= v <= max(initial, final) + slack for v in path)
    assert all((b - a) * (final - initial) >= -slack * abs(final - initial) for a, b in pairwise(path))


@examples(60)
@given(
    st.lists(st.integers(2, 9), min_size=1, max_size=6),
    st.sampled_from([(3,), (3, 4), (2, 3, 3), (2, 2, 3, 2)]),
    st.sampled_from([torch.float32, torch.float64]),
    st.floats(-50, 50),
    seeds,
)
def test_batch_norm_statistics_do_not_depend_on_how_the_data_is_cut(sizes, shape, dtype, offset, seed):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(sum(sizes), *shape, generator=generator, dtype=torch.float64) + offset).to(dtype)
    kind = {1: nn.BatchNorm1d, 2: nn.BatchNorm1d, 3: nn.BatchNorm2d, 4: nn.BatchNorm3d}[len(shape)]
    bn = kind(shape[0]).to(dtype)
    reestimate_batch_norm(nn.Sequential(bn), torch.split(x, sizes))
    seen = x.double().transpose(0, 1).flatten(1)
    rtol = 1e-4 if dtype == torch.float32 else 1e-10  # torch computes a batch's own moments in the data's dtype
    assert torch.allclose(bn.running_mean.double(), seen.mean(1), rtol=rtol, atol=rtol)
    assert torch.allclose(bn.running_var.double(), seen.var(1), rtol=rtol, atol=rtol)
