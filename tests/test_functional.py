from unittest.mock import Mock

import pytest
import torch
from marks import needs_compiler
from reference import fake_quantize_equation

from lightning_qat_osc import functional, kernels, lsq_gradients
from lightning_qat_osc.functional import fake_quantize, fake_quantize_pair, integer_grid, quantize_to_int

# powers of two: multiplying by their reciprocal, as torch does, rounds in the same way as dividing by them
EXACT_SCALES = [2.0**-5, 0.125, 1.0]


def grids():
    return [(bits, signed) for bits in range(2, 9) for signed in (True, False)]


@pytest.mark.parametrize(
    ("bits", "signed", "expected"),
    [(2, True, (-2, 1)), (3, True, (-4, 3)), (8, True, (-128, 127)), (2, False, (0, 3)), (8, False, (0, 255))],
)
def test_integer_grid(bits, signed, expected):
    assert integer_grid(bits, signed=signed) == expected


@pytest.mark.parametrize("scale", EXACT_SCALES)
@pytest.mark.parametrize(("bits", "signed"), grids())
def test_forward_is_torchs_per_tensor_operator_to_the_bit(bits, signed, scale):
    n, p = integer_grid(bits, signed=signed)
    x = torch.randn(5000) * scale * 2**bits / 2
    x[:100] = torch.arange(-50, 50) * scale + scale / 2  # ties
    expected = torch.fake_quantize_per_tensor_affine(x, scale, 0, n, p)
    assert torch.equal(fake_quantize(x, torch.tensor([scale]), n, p), expected)


@pytest.mark.parametrize("zero_point", [1, 5, 14])
def test_zero_point_as_in_torch(zero_point):
    x = torch.randn(5000)
    expected = torch.fake_quantize_per_tensor_affine(x, 0.125, zero_point, 0, 15)
    assert torch.equal(fake_quantize(x, torch.tensor([0.125]), 0, 15, zero_point=zero_point), expected)


@pytest.mark.parametrize("axis", [0, 1])
def test_forward_is_torchs_per_channel_operator_to_the_bit(axis):
    x = torch.randn(6, 6, 3, 3)
    scale = 2.0 ** torch.arange(-5, 1)
    expected = torch.fake_quantize_per_channel_affine(x, scale, torch.zeros(6, dtype=torch.int32), axis, -4, 3)
    shape = [1, 1, 1, 1]
    shape[axis] = 6
    assert torch.equal(fake_quantize(x, scale.view(shape), -4, 3), expected)


def test_any_scale_differs_from_torch_only_within_an_ulp_of_a_tie():
    x, scale = torch.randn(200_000), torch.tensor([0.0937])
    ours = fake_quantize(x, scale, -8, 7)
    torchs = torch.fake_quantize_per_tensor_affine(x, scale.item(), 0, -8, 7)
    other = ~torch.isclose(ours, torchs, rtol=1e-6, atol=1e-7)
    v = (x / scale)[other].double()
    assert ((v - v.floor() - 0.5).abs() < 1e-5).all()
    assert other.sum() < 20


@pytest.mark.parametrize("shape", [[1], [4, 1, 1], [1, 5, 1]])
@pytest.mark.parametrize("zero_point", [0, 3])
def test_both_gradients_are_autograds_of_the_printed_equation(shape, zero_point):
    n, p = -4, 3
    x = torch.randn(4, 5, 200, dtype=torch.float64, requires_grad=True)
    s = (torch.rand(shape, dtype=torch.float64) * 0.4 + 0.1).requires_grad_()
    upstream = torch.randn(4, 5, 200, dtype=torch.float64)
    fake_quantize(x, s, n, p, zero_point=zero_point).backward(upstream)
    gx, gs = x.grad.clone(), s.grad.clone()
    x.grad = s.grad = None
    fake_quantize_equation(x, s, n - zero_point, p - zero_point).backward(upstream)
    assert torch.allclose(gx, x.grad, rtol=1e-15, atol=0)  # autograd multiplies by s and divides by it again
    assert torch.allclose(gs, s.grad, rtol=1e-12)
    assert 0 < (gx == 0).sum() < gx.numel()  # both zones were visited


@pytest.mark.parametrize("layout", ["a ragged row", "channels_last", "per channel", "channels of several blocks"])
def test_large_gradients_are_autograds_of_the_printed_equation(monkeypatch, layout):
    monkeypatch.setattr(kernels, "BLOCK", 1000)
    monkeypatch.setattr(lsq_gradients, "BLOCK", 1000)
    in_blocks = Mock(wraps=lsq_gradients._gradients_in_blocks)
    monkeypatch.setattr(lsq_gradients, "_gradients_in_blocks", in_blocks)
    shape = {"a ragged row": (4321,), "per channel": (9, 70, 3, 3)}.get(layout, (3, 5, 20, 30))
    scales = {"per channel": 9, "channels of several blocks": 3}.get(layout, 1)
    x, upstream = torch.randn(2, *shape, dtype=torch.float64)
    if layout == "channels_last":
        x, upstream = (t.to(memory_format=torch.channels_last) for t in (x, upstream))
    x.requires_grad_()
    s = torch.linspace(0.1, 0.4, scales, dtype=torch.float64).view(-1, *[1] * (x.dim() - 1)).requires_grad_()
    fake_quantize(x, s, -4, 3).backward(upstream)
    gx, gs = x.grad.clone(), s.grad.clone()
    x.grad = s.grad = None
    fake_quantize_equation(x, s, -4, 3).backward(upstream)
    assert in_blocks.call_count == 1
    assert gx.stride() == x.stride()
    assert torch.allclose(gx, x.grad, rtol=1e-15, atol=0)
    assert torch.allclose(gs, s.grad, rtol=1e-12)


@pytest.mark.parametrize("large", [False, True])
def test_of_what_needs_no_gradient_none_is_made(monkeypatch, large):
    made = []

    def gradients(*args):
        made[:] = lsq_gradients.gradients(*args)
        return tuple(made)

    monkeypatch.setattr(lsq_gradients, "BLOCK", 10 if large else 1000)
    monkeypatch.setattr(functional, "gradients", gradients)
    for learned in ([True, False], [False, True]):
        x, s = torch.randn(90, requires_grad=learned[0]), torch.full([1], 0.3, requires_grad=learned[1])
        fake_quantize(x, s, -4, 3).sum().backward()
        assert [t.grad is not None for t in (x, s)] == learned
        assert [g is not None for g in made] == learned


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from the compiler's own imports
@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=needs_compiler)])
def test_a_gradient_penalty_is_differentiated_as_the_printed_equation_is(fused):
    x = torch.randn(40, 1000, dtype=torch.float64, requires_grad=True)
    s = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    w = torch.randn(40, 1000, dtype=torch.float64, requires_grad=True)

    def second_derivatives(quantize):
        loss = (w * quantize(x, s)).square().sum()
        first = torch.autograd.grad(loss, [x, s, w], create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), [x, s, w])

    ours = second_derivatives(lambda x, s: fake_quantize(x, s, -4, 3, fused=fused))
    expected = second_derivatives(lambda x, s: fake_quantize_equation(x, s, -4, 3))
    assert all(torch.allclose(a, b, rtol=1e-10) for a, b in zip(ours, expected))


def test_function_transforms_are_refused_by_torch():
    scale = torch.tensor([0.3])
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(lambda x: fake_quantize(x, scale, -4, 3).sum())(torch.randn(5))


@needs_compiler
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from the compiler's own imports
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 6])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("small", ["weight", "neither", "input"])
def test_a_pair_is_quantized_as_each_alone_is(monkeypatch, small, channels_last, groups, dtype):
    monkeypatch.setattr(functional, "SMALL", 10 if small == "neither" else 100)
    images, channels = (1, 20) if small == "input" else (4, 3)
    x, w = torch.randn(images, 3, 5, 5).to(dtype), torch.randn(6, channels, 1, 1)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    scales = torch.tensor([0.3]), 0.2 + 0.2 * torch.rand(groups, *[1] * (3 if groups > 1 else 0))
    limits = (0, 15), (-4, 3)
    upstream = torch.randn(x.shape).to(dtype), torch.randn(w.shape)
    inputs = [t.clone().requires_grad_() for t in (x, scales[0], w, scales[1])]
    together = fake_quantize_pair((inputs[0], inputs[2]), (inputs[1], inputs[3]), limits)
    got = torch.autograd.grad(together, inputs, upstream)
    alone = fake_quantize(x, scales[0], 0, 15), fake_quantize(w, scales[1], -4, 3)
    assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(together, alone))
    exact = [t.double().requires_grad_() for t in (x, scales[0], w, scales[1])]
    equation = [fake_quantize_equation(exact[i], exact[i + 1], *grid) for i, grid in ((0, limits[0]), (2, limits[1]))]
    wanted = torch.autograd.grad(equation, exact, [g.double() for g in upstream])
    for a, b in zip(got, wanted):
        assert torch.allclose(a.double(), b, rtol=1e-5, atol=1e-5)


@needs_compiler
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_pair_is_differentiated_twice_as_the_printed_equation_is(monkeypatch):
    monkeypatch.setattr(functional, "SMALL", 100)
    tensors = [torch.randn(40, 30), torch.tensor([0.3]), torch.randn(5, 20), torch.tensor([0.2])]
    tensors = [t.double().requires_grad_() for t in tensors]

    def second_derivatives(quantize):
        x_q, w_q = quantize(*tensors)
        loss = (x_q.square().sum() + 1.0) * w_q.square().sum()
        first = torch.autograd.grad(loss, tensors, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), tensors)

    limits = (0, 15), (-4, 3)
    ours = second_derivatives(lambda x, s, w, t: fake_quantize_pair((x, w), (s, t), limits))
    expected = second_derivatives(
        lambda x, s, w, t: (fake_quantize_equation(x, s, 0, 15), fake_quantize_equation(w, t, -4, 3))
    )
    assert all(torch.allclose(a, b, rtol=1e-10) for a, b in zip(ours, expected))


@needs_compiler
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("constant", [[0], [1], [2], [3], [0, 2], [1, 3]], ids=str)
def test_what_needs_no_gradient_of_a_pair_gets_none(monkeypatch, constant):
    monkeypatch.setattr(functional, "SMALL", 100)
    tensors = [torch.randn(40, 30), torch.tensor([0.3]), torch.randn(5, 20), torch.tensor([0.2])]
    for i, t in enumerate(tensors):
        t.requires_grad_(i not in constant)
    limits = (0, 15), (-4, 3)
    x_q, w_q = fake_quantize_pair((tensors[0], tensors[2]), (tensors[1], tensors[3]), limits)
    (x_q.sum() + w_q.square().sum()).backward()
    assert [i for i, t in enumerate(tensors) if t.grad is None] == constant


def test_what_no_kernel_is_worth_or_takes_is_no_pair(monkeypatch):
    monkeypatch.setattr(functional, "SMALL", 100)
    large, small, limits = torch.randn(20, 20), torch.randn(6, 2, 2, 2), ((-4, 3), (-4, 3))
    one, each = torch.tensor([0.1]), torch.full((6, 1, 1, 1), 0.1)
    rejected = {
        "both small": ((small, small), (one, one)),
        "nothing": ((large, small[:0]), (one, one)),
        "rows that do not follow each other": ((large, small.to(memory_format=torch.channels_last)), (one, each)),
        "an order of its own": ((small, large.repeat(2, 1).t()[::2]), (one, one)),
        "one of two learned": ((large.clone().requires_grad_(), small), (one, one)),
        "the scale of one learned": ((large, small), (one, one.clone().requires_grad_())),
    }
    assert [name for name, pair in rejected.items() if fake_quantize_pair(*pair, limits) is not None] == []


@needs_compiler
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scales_of_the_last_dimension_are_not_taken_for_those_of_the_first(monkeypatch):
    monkeypatch.setattr(functional, "SMALL", 0)
    x, scale = torch.randn(5, 5), 0.1 + 0.1 * torch.arange(5.0)
    assert torch.equal(fake_quantize(x, scale, -4, 3, fused=True), fake_quantize(x, scale, -4, 3))


def test_gradient_passes_up_to_the_limits_and_no_further():
    # torch's operator passes gradients where the rounded value is inside, and so up to half a step further out
    v = torch.tensor([-4.4, -4.0001, -4.0, 3.0, 3.0001, 3.4], requires_grad=True)
    fake_quantize(v, torch.ones(1), -4, 3).sum().backward()
    assert v.grad.tolist() == [0, 0, 1, 1, 0, 0]


def test_scale_gradient_by_hand():
    s = torch.tensor([1.0], requires_grad=True)
    x = torch.tensor([0.3, 1.6, -9.0, 9.0])
    fake_quantize(x, s, -4, 3).backward(torch.tensor([1.0, 10.0, 100.0, 1000.0]))
    assert s.grad.item() == pytest.approx((0 - 0.3) + 10 * (2 - 1.6) + 100 * -4 + 1000 * 3, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype_is_the_inputs(dtype):
    x = torch.randn(100).to(dtype).requires_grad_()
    s = torch.tensor([0.1], dtype=torch.float32, requires_grad=True)
    y = fake_quantize(x, s, -4, 3)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == dtype
    assert s.grad.dtype == torch.float32
    assert torch.equal(y, fake_quantize(x.detach().double(), s.detach().double(), -4, 3).to(dtype))


def test_integers_are_those_of_the_quantized_values():
    x, s = torch.randn(1000), torch.tensor([0.11])
    z = quantize_to_int(x, s, -4, 3)
    assert z.dtype == torch.int8
    assert torch.equal(z * s, fake_quantize(x, s, -4, 3))
    u = quantize_to_int(x, s, 0, 255, zero_point=100)
    assert u.dtype == torch.uint8
    assert torch.equal((u.int() - 100) * s, fake_quantize(x, s, 0, 255, zero_point=100))


def test_channels_last_stays():
    x = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
    y = fake_quantize(x, torch.tensor([0.1]), -4, 3)
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(64,), (8, 8), (4, 5, 6), (2, 30, 40), (3, 3, 20, 20), (2, 3, 8, 8, 8)])
@pytest.mark.parametrize("scales", [1, 2])
def test_compiles_without_graph_break(shape, scales):
    shape = (scales, *shape) if scales > 1 else shape
    x = torch.randn(shape, requires_grad=True)
    s = torch.linspace(0.1, 0.3, scales).view(-1, *[1] * (len(shape) - 1)).requires_grad_()
    grad = torch.randn(shape)
    fake_quantize(x, s, -4, 3).backward(grad)
    gx, gs = x.grad.clone(), s.grad.clone()
    x.grad = s.grad = None
    torch.compiler.reset()  # torch.compile limits how often it recompiles one function for new shapes
    compiled = torch.compile(fake_quantize, fullgraph=True, backend="aot_eager")
    y = compiled(x, s, -4, 3)
    y.backward(grad)
    assert torch.equal(y, fake_quantize(x, s, -4, 3))
    assert torch.equal(x.grad, gx)
    assert torch.allclose(s.grad, gs)


def test_elsewhere_than_on_cpus_a_compiled_scale_is_summed_as_norms_sum():
    terms = torch.empty(2, 3, 20, 20)
    assert lsq_gradients._partly_summed(terms, on_cpu=False).shape == (1, 3, 1, 1)
    assert lsq_gradients._partly_summed(torch.empty(2, 40, 30), on_cpu=False).shape == (2, 40, 1)
    assert lsq_gradients._partly_summed(terms[..., 0, 0], on_cpu=False).shape == (2, 3)


@needs_compiler
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from the compiler's own imports
def test_compiled_gradients_of_tokens_in_any_layout():
    tokens = torch.randn(4, 60, 48, requires_grad=True)
    scales = torch.linspace(0.1, 0.4, 4).unsqueeze(1).requires_grad_()

    def loss(tokens, scales):
        layouts = tokens, tokens.transpose(0, 2), tokens[:, 3::2], tokens[:1].expand(3, -1, -1)
        quantized = [fake_quantize(torch.nn.functional.gelu(x), s, -4, 3) for x, s in zip(layouts, scales)]
        turned = [x_q.transpose(1, 2) for x_q in quantized]  # whose gradients are transposed too
        sums = [(x_q * torch.arange(x_q.numel()).view(x_q.shape).cos()).sum() for x_q in (*quantized, *turned)]
        return sum(sums)

    expected = torch.autograd.grad(loss(tokens, scales), (tokens, scales))
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(tokens, scales), (tokens, scales))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@needs_compiler
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from the compiler's own imports
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_gradients_of_images_in_any_layout(dynamic):
    images = torch.randn(4, 24, 12, 10).to(memory_format=torch.channels_last).requires_grad_()
    scales = torch.linspace(0.1, 0.4, 6).unsqueeze(1).requires_grad_()
    weight = torch.randn(8, 24, 3, 3)

    def loss(images, scales):
        y = torch.nn.functional.batch_norm(images, None, None, training=True).relu()
        layouts = y, y.contiguous(), y[:, ::2], y[:, :1], y.permute(0, 2, 3, 1), y[:1].expand(3, -1, -1, -1)
        quantized = [fake_quantize(x, s, 0, 7) for x, s in zip(layouts, scales)]
        sums = [(x_q * torch.arange(x_q.numel()).view(x_q.shape).cos()).sum() for x_q in quantized]
        return sum(sums) + torch.nn.functional.conv2d(quantized[0], weight).square().mean()

    expected = torch.autograd.grad(loss(images, scales), (images, scales))
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic)
    got = torch.autograd.grad(compiled(images, scales), (images, scales))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@needs_compiler
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from the compiler's own imports
def test_a_result_of_kernels_may_be_changed_in_place(monkeypatch):
    monkeypatch.setattr(functional, "SMALL", 10)
    x, scale = torch.randn(4, 16, requires_grad=True), torch.tensor([0.3], requires_grad=True)
    gradients = []
    for fused in (False, True):
        x.grad = scale.grad = None
        fake_quantize(x, scale, -4, 3, fused=fused).relu_().square().sum().backward()
        gradients.append((x.grad, scale.grad))
    assert torch.equal(gradients[1][0], gradients[0][0])
    assert torch.allclose(gradients[1][1], gradients[0][1])


@pytest.mark.parametrize(("n", "p"), [(2, 7), (-7, -2), (0, 7), (-7, 0), (-8, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_gradients_end_at_the_limits_to_the_bit(n, p, dtype):
    limits = torch.tensor([n, p], dtype=dtype)
    outside = torch.nextafter(limits, torch.tensor([-torch.inf, torch.inf], dtype=dtype))
    normal = torch.tensor([-1, 1], dtype=dtype) * torch.finfo(dtype).smallest_normal
    outside = torch.where(limits == 0, normal, outside)
    inside = torch.nextafter(limits, torch.tensor([torch.inf, -torch.inf], dtype=dtype))
    x = torch.cat([limits, outside, inside]).requires_grad_()
    fake_quantize(x, torch.ones(1, dtype=dtype), n, p).sum().backward()
    assert x.grad.tolist() == [1, 1, 0, 0, 1, 1]


def test_zero_is_inside_an_unsigned_grid_where_denormal_numbers_are_zero():
    if not torch.set_flush_denormal(True):
        pytest.skip("not on this processor")
    try:
        x = torch.zeros(64, requires_grad=True)
        fake_quantize(x, torch.ones(1), 0, 15).sum().backward()
    finally:
        torch.set_flush_denormal(False)
    assert x.grad.sum() == 64


def test_a_scale_is_a_tensor_and_a_grid_not_empty():
    with pytest.raises(TypeError, match=r"scale must be a tensor, got 0.1: pass torch\.tensor\(\[0.1\]\)"):
        fake_quantize(torch.ones(3), 0.1, -4, 3)
    with pytest.raises(ValueError, match="quant_min must be at most quant_max, -4, got 3"):
        fake_quantize(torch.ones(3), torch.ones(1), 3, -4)


@pytest.mark.parametrize("fused", [False, True])
def test_one_number_stays_one_number(fused):
    x, scale = torch.tensor(0.26, requires_grad=True), torch.tensor([0.1], requires_grad=True)
    y = fake_quantize(x, scale, -4, 3, fused=fused)
    assert y.shape == ()
    assert y.item() == pytest.approx(0.3)
    y.backward()
    assert x.grad.item() == 1.0
    assert scale.grad.tolist() == pytest.approx([0.4], abs=1e-5)
    assert fake_quantize(x, torch.tensor([0.1, 0.2]), -4, 3, fused=fused).tolist() == pytest.approx([0.3, 0.2])


@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=needs_compiler)])
def test_a_scale_without_dimensions_is_one_scale(fused):
    x, scale = torch.randn(300, 300).bfloat16(), torch.tensor(0.0123, requires_grad=True)
    whole = torch.tensor([0.0123], requires_grad=True)
    out, expected = (fake_quantize(x, s, -128, 127, fused=fused) for s in (scale, whole))
    assert torch.equal(out, expected)
    out.float().square().sum().backward(), expected.float().square().sum().backward()
    assert torch.equal(scale.grad, whole.grad.view(()))
    assert torch.equal(*(quantize_to_int(x, s.detach(), -128, 127) for s in (scale, whole)))
    assert quantize_to_int(torch.tensor(0.5), torch.tensor([0.1]), -8, 7).shape == ()
