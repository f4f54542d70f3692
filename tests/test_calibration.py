import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_qat_osc import LayerRule, QuantConfig, quantize_model
from lightning_qat_osc.calibration import Calibrator
from lightning_qat_osc.lookup import quantizers
from lightning_qat_osc.observation import ObservedInput


class Net(nn.Module):
    """Layers that are defined in a different order than they are called in, and one that is never called."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(4, 2)
        self.middle = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)
        self.first = nn.Linear(4, 4)

    def forward(self, x):
        return self.last(self.middle(torch.relu(self.first(x))) - 1.0)


def calibrate(net, config, batches):
    quantize_model(net, config)
    calibrator = Calibrator(net, config)
    with calibrator.observe():
        for batch in batches:
            net(batch)
    assert all(not m._forward_pre_hooks for m in net.modules())
    return calibrator.finish()


def bits(net):
    return {n: (m.weight_quantizer.bits, m.input_quantizer.bits) for n, m in net.named_children()}


def test_first_and_last_are_found_by_execution():
    net = Net()
    words = calibrate(net, QuantConfig(3, 4), [torch.randn(64, 4)])
    assert bits(net) == {"first": (8, None), "last": (8, 8), "middle": (3, 4), "unused": (3, None)}
    assert (net.middle.input_quantizer.zero_point, net.middle.input_quantizer.quant_max) == (0, 15)
    assert net.last.input_quantizer.zero_point > 0
    assert len(words) == 1
    assert "'unused'" in words[0]
    assert "not called" in words[0]
    assert not net.unused.input_quantizer.active


def test_nothing_but_first_and_last():
    x = torch.randn(64, 4)
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    (word,) = calibrate(net, QuantConfig(3, 4), [x])
    assert "has first_last_bits=8, so none has the 3 bits that were asked for: set first_last_bits=None" in word
    assert [layer.weight_quantizer.bits for layer in (net[0], net[2])] == [8, 8]
    for config in (QuantConfig(8, 4), QuantConfig(None, 4), QuantConfig(3, 4, rules=[LayerRule("*", weight_bits=3)])):
        net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        assert calibrate(net, config, [x]) == []


def test_first_and_last_like_the_rest():
    net = Net()
    calibrate(net, QuantConfig(3, 4, first_last_bits=None), [torch.randn(64, 4)])
    assert bits(net) == {"first": (3, 4), "last": (3, 4), "middle": (3, 4), "unused": (3, None)}
    assert net.first.input_quantizer.active


def test_rules_hold_for_first_and_last():
    net = Net()
    rules = (LayerRule("first", weight_bits=2, activation_bits=6), LayerRule("last", weight_bits=5))
    calibrate(net, QuantConfig(3, 4, rules=rules), [torch.randn(64, 4)])
    assert bits(net)["first"] == (2, 6)
    assert bits(net)["last"] == (5, 8)


def test_a_first_layer_left_out_is_still_the_first():
    net = Net()
    rules = (LayerRule("first", weight_bits=None, activation_bits=None),)
    quantize_model(net, QuantConfig(3, 4, rules=rules))
    calibrator = Calibrator(net, QuantConfig(3, 4, rules=rules))
    with calibrator.observe():
        net(torch.randn(64, 4))
    calibrator.finish()
    assert (net.middle.weight_quantizer.bits, net.middle.input_quantizer.bits) == (3, 4)


def test_ranges_come_from_all_batches():
    net = Net()
    small, large = torch.rand(64, 4), 10 * torch.rand(64, 4)
    config = QuantConfig(4, 4, first_last_bits=None, activation_range="minmax")
    calibrate(net, config, [small, large])
    assert net.first.input_quantizer.scale.item() == pytest.approx(large.max().item() / 15)


def test_calibrated_ranges_are_kept():
    net = Net()
    calibrate(net, QuantConfig(4, 4), [torch.rand(64, 4)])
    scale = net.middle.input_quantizer.scale.clone()
    calibrate(net, QuantConfig(4, 4), [100 * torch.rand(64, 4)])
    assert torch.equal(net.middle.input_quantizer.scale, scale)


def test_nan_in_an_input_is_told_and_the_rest_estimated():
    net = Net()
    x = torch.rand(64, 4)
    x[0, 0] = float("nan")
    words = calibrate(net, QuantConfig(4, 4, first_last_bits=None), [x])
    assert any("'first'" in w and "NaN or inf" in w for w in words)
    assert net.first.input_quantizer.scale.isfinite().all()


def test_input_that_is_always_zero_is_told():
    net = Net()
    words = calibrate(net, QuantConfig(4, 4, first_last_bits=None), [torch.zeros(8, 4)])
    assert any("'first'" in w and "was 0 throughout" in w for w in words)
    assert not net.first.input_quantizer.active
    assert net(torch.randn(2, 4)).isfinite().all()


def test_an_input_that_is_no_tensor_is_told():
    class Summed(nn.Linear):
        def forward(self, parts):
            return super().forward(sum(parts))

    model = nn.Sequential(Summed(4, 4))
    words = calibrate(model, QuantConfig(4, 4, first_last_bits=None), [[torch.randn(3, 4), torch.randn(3, 4)]])
    assert words == [
        "Layer '0': its input parts was not a tensor during calibration and stays in full precision.",
    ]
    assert not model[0].input_quantizer.active


def test_an_argument_is_observed_where_it_is_a_tensor_of_its_own():
    class BothWays(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair = nn.Bilinear(4, 4, 4)

        def forward(self, x):
            return self.pair(x, x) + self.pair(x, 3.0 * x)

    model = BothWays()
    assert calibrate(model, QuantConfig(4, 4, first_last_bits=None), [torch.randn(64, 4)]) == []
    first, second = model.pair.input_quantizers().values()
    assert second.active
    assert second.scale > 2.0 * first.scale


def test_hooks_are_gone_after_an_exception():
    net = Net()
    quantize_model(net, QuantConfig())
    calibrator = Calibrator(net, QuantConfig())
    with pytest.raises(RuntimeError, match="mat1"), calibrator.observe():
        net(torch.randn(2, 99))
    assert all(not m._forward_pre_hooks for m in net.modules())


def test_a_sample_does_not_grow_with_the_batches():
    seen, few = ObservedInput(), ObservedInput()
    batches = [torch.randn(2**17) * (1 + i % 3) for i in range(24)]
    for batch in batches:
        seen.add(batch)
        few.add(batch[:1000])
        assert sum(map(len, seen.samples)) <= 2**18
    assert len(seen.lows) == 24
    assert sum(map(len, few.samples)) == 24_000  # so few values are all kept
    lengths = [len(sample) for sample in seen.samples]
    assert min(lengths) > 0.99 * max(lengths)  # each batch has the same weight
    assert torch.cat(seen.samples).std().item() == pytest.approx(torch.cat(batches).std().item(), rel=0.02)
    few.thin_out(10)
    assert [len(sample) for sample in few.samples] == [1] * 24


def test_minmax_covers_what_a_sample_leaves_out():
    x = torch.rand(4096, 64)
    x[1000, 1] = 10.0
    net = nn.Sequential(nn.Linear(64, 4))
    calibrate(net, QuantConfig(8, 8, first_last_bits=None, activation_range="minmax"), [x])
    quantizer = net[0].input_quantizer
    assert (quantizer.scale * quantizer.quant_max).item() == pytest.approx(10.0)


@pytest.mark.parametrize(("function", "told"), [("cummax", True), ("mul", True), ("flatten", False), ("float", False)])
def test_what_leaves_the_grid_is_told(function, told):
    class Own(nn.Linear):
        def forward(self, x):
            changed = {
                "cummax": lambda w: w.cummax(1).values,
                "mul": lambda w: w * 0.5,
                "flatten": lambda w: w.flatten().view_as(w),
                "float": lambda w: w.float(),
            }[function](self.weight)
            return nn.functional.linear(x, changed, self.bias)

    words = calibrate(nn.Sequential(Own(4, 4)), QuantConfig(3, None, first_last_bits=None), [torch.randn(8, 4)])
    said = f"applies {function} to its quantized weight; the result may be off the grid"
    assert any(said in word for word in words) == told


class Standardized(nn.Conv2d):
    def forward(self, x):
        rows = self.weight.reshape(1, self.out_channels, -1)
        weight = nn.functional.batch_norm(rows, None, None, training=True).reshape_as(self.weight)
        return nn.functional.conv2d(x, weight, self.bias)


class Renormalized(nn.Conv2d):
    def forward(self, x):
        self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=0.5)
        return super().forward(x)


class Masked(nn.Conv2d):
    def forward(self, x):
        self.weight.data *= 1.0 - torch.eye(3)
        return super().forward(x)


@pytest.mark.parametrize(
    ("kind", "function"), [(Standardized, "batch_norm"), (Renormalized, "renorm"), (Masked, "mul_")]
)
def test_other_views_of_a_weight_leave_the_grid_too(kind, function):
    words = calibrate(
        nn.Sequential(kind(2, 4, 3)), QuantConfig(3, None, first_last_bits=None), [torch.randn(2, 2, 5, 5)]
    )
    said = f"applies {function} to its quantized weight; the result may be off the grid"
    assert [said in word for word in words] == [True]


def test_rows_of_a_weight_that_a_layer_returns_are_an_output():
    class Positions(nn.Embedding):  # like Whisper's
        def forward(self, x):
            return self.weight[: x.shape[1]]

    class Added(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.positions, self.head = nn.Embedding(9, 4), Positions(8, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.tokens(x) + self.positions(x))

    assert calibrate(Added(), QuantConfig(3, None, first_last_bits=None), [torch.randint(9, (2, 5))]) == []


@pytest.mark.parametrize(("kind", "fits"), [(Masked, False), (Renormalized, True), (Standardized, True)])
def test_a_weight_that_is_changed_past_autograd_is_not_recomputed(kind, fits):
    config, x = QuantConfig(3, None, first_last_bits=None), torch.randn(2, 2, 5, 5)
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        net = quantize_model(nn.Sequential(nn.Conv2d(2, 2, 1), kind(2, 4, 3)), config)
        for q in quantizers(net):
            q.recompute = recompute
        calibrator = Calibrator(net, config)
        with torch.no_grad(), calibrator.observe():
            net(x)
        if recompute and not fits:
            with pytest.raises(ValueError, match=r"layer '1' changes its quantized weight through .data, by mul_"):
                calibrator.finish()
            return
        calibrator.finish()
        net(x).square().sum().backward()
        gradients.append([p.grad for p in net.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


@pytest.mark.parametrize(
    ("read", "told"),
    [
        (lambda x, w: nn.functional.linear(x, weight=w), True),
        (lambda x, w: x @ w.t(), True),
        (lambda x, w: nn.functional.linear(x, w.detach()), True),
        (lambda x, w: x @ w.data.t(), True),
        (lambda x, w: x + w.detach().norm(), False),
        (lambda x, w: torch.eye(8).to_sparse() @ x, False),
        (lambda x, w: torch.func.vmap(torch.dot)(x, x), False),
        (lambda x, w: x.type_as(w), False),
        (lambda x, w: x + w.new_zeros(4), False),
        (lambda x, w: x + torch.zeros_like(w[0].detach()), True),
    ],
)
def test_a_weight_that_is_read_outside_is_told(read, told):
    class Outside(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return read(self.layer(x), self.layer.weight)

    words = calibrate(Outside(), QuantConfig(3, None, first_last_bits=None), [torch.randn(8, 4)])
    assert any("read outside of the layer" in word for word in words) == told


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_layers_that_run_again_in_the_backward_pass_are_not_the_last(use_reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.block, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(checkpoint(self.block, self.stem(x), use_reentrant=use_reentrant))

    config, net = QuantConfig(3, 3, first_last_bits=8), Checkpointed()
    quantize_model(net, config)
    calibrator = Calibrator(net, config)
    with calibrator.observe(weights=False):
        net(torch.randn(8, 4)).sum().backward()
    calibrator.finish()
    assert [layer.weight_quantizer.bits for layer in (net.stem, net.block, net.head)] == [8, 3, 8]


def test_hooks_of_other_kinds_are_not_taken_for_norms():
    class Hook:
        name = "weight"

        def __call__(self, module, args):
            raise AssertionError("only a forward pass calls it")

    layer = nn.Linear(4, 4)
    layer.register_forward_pre_hook(Hook())
    quantize_model(layer, QuantConfig(3, None, first_last_bits=None))


@pytest.mark.parametrize("method", ["mse", "percentile", "lsq", "minmax"])
def test_values_that_the_sample_has_missed(method):
    x = torch.zeros(8, 2**15)
    x[0, 1] = x[3, 3] = 2.0
    net = nn.Sequential(nn.Linear(2**15, 1))
    calibrate(net, QuantConfig(None, 4, first_last_bits=None, activation_range=method), [x])
    quantized = net[0].input_quantizer(x)
    assert quantized.max().item() == pytest.approx(2.0, rel=0.3)
    assert not quantized[x == 0].any()


def test_a_rule_for_either_of_two_layers_with_one_weight():
    for name in ("embedding", "head"):
        net = nn.ModuleDict({"embedding": nn.Embedding(10, 4), "head": nn.Linear(4, 10, bias=False)})
        net["head"].weight = net["embedding"].weight
        net.forward = lambda i, net=net: net["head"](net["embedding"](i))
        calibrate(net, QuantConfig(4, None, rules=[LayerRule(name, weight_bits=4)]), [torch.arange(10)])
        assert net["head"].weight_quantizer is net["embedding"].weight_quantizer
        assert net["head"].weight_quantizer.bits == 4


@pytest.mark.parametrize("method", ["mse", "lsq"])
def test_what_is_not_finite_takes_no_part(method):
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0)).abs()
    config = QuantConfig(None, 4, first_last_bits=None, activation_range=method)
    scales = []
    for values in (x, torch.cat([x, torch.full_like(x, float("nan")), torch.full_like(x, float("inf"))])):
        net = nn.Sequential(nn.Linear(4, 4))
        calibrate(net, config, [values])
        scales.append(net[0].input_quantizer.scale.item())
    assert scales[0] == pytest.approx(scales[1], rel=1e-3)


def first_layer(model, run):
    quantize_model(model, QuantConfig(3, 3))
    calibrator = Calibrator(model, QuantConfig(3, 3))
    with torch.no_grad(), calibrator.observe():
        run(model, torch.randn(4, 8))
    calibrator.finish()
    (name,) = [n for n, layer in model.named_modules() if getattr(layer, "weight_quantizer", None) is not None
               and layer.input_quantizer.bits is None]  # fmt: skip
    return name


def backbone_and_head():
    backbone = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).requires_grad_(False)
    return nn.ModuleDict({"backbone": backbone, "head": nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))})


def test_a_frozen_backbone_holds_the_first_layer():
    def padded(m, x):
        hidden = m["backbone"][0](x)
        buffer = torch.zeros(6, 8)
        buffer[:4] = hidden
        return m["head"](m["backbone"][2](buffer.relu_()))

    assert first_layer(backbone_and_head(), lambda m, x: m["head"](m["backbone"](x))) == "backbone.0"
    assert first_layer(backbone_and_head(), padded) == "backbone.0"
    # if the data flow cannot be traced, the first layer is the first trained one
    apart = first_layer(backbone_and_head(), lambda m, x: m["head"](torch.tensor(m["backbone"](x).tolist())))
    assert apart == "head.0"


def test_a_teacher_beside_its_student_does_not():
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    parts = {"stem": nn.Linear(8, 8), "teacher": teacher, "student": nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))}
    model = nn.ModuleDict({"net": nn.ModuleDict(parts)})
    model["net"]["stem"].requires_grad_(False)
    teacher.requires_grad_(False)

    def run(m, x):
        m["net"]["teacher"](torch.rand_like(x))
        m["net"]["student"](m["net"]["stem"](x))

    assert first_layer(model, run) == "net.stem"


def test_a_teacher_whose_features_are_projected_is_told_by_the_part_that_it_is():
    model = nn.ModuleDict({**backbone_and_head(), "projection": nn.Linear(8, 2)})
    config = QuantConfig(3, 3)
    quantize_model(model, config)
    calibrator = Calibrator(model, config)
    with torch.no_grad(), calibrator.observe():
        x = torch.randn(4, 8)
        model["head"](x) - model["projection"](model["backbone"](x))
    (told,) = calibrator.finish()
    assert "backbone.0, backbone.2 are quantized but not trained, and only some of the trained layers use" in told
    assert "If they belong to a teacher" in told
    assert "LayerRule(pattern='backbone.*'" in told


@pytest.mark.parametrize("batches", [2, 8])
@pytest.mark.parametrize("shape", [(300,), (700,), (7, 10, 10)])  # tokens, and windows of an image
def test_a_sample_is_of_all_features(shape, batches):
    # a few features are larger than the others, and the index of none of them is a multiple of 3
    torch.manual_seed(0)
    size = torch.ones(192)
    size[torch.tensor([1, 40, 100, 151])] = 8.0
    seen = ObservedInput()
    values = [torch.randn(*shape, 192) * size for _ in range(batches)]
    for x in values:
        seen.add(x)
    share = [(sample.abs() > 5.0).float().mean().item() for sample in (torch.cat(seen.samples), torch.cat(values))]
    assert share[0] == pytest.approx(share[1], rel=0.1)


@pytest.mark.parametrize("steps", [400, 900])
@pytest.mark.parametrize("batch", [1, 4])
def test_a_sample_of_many_calls_is_of_all_features(steps, batch):
    # as for a recurrent cell that is called once per time step; each value is the index of its feature
    seen = ObservedInput()
    for _ in range(4 * steps):
        seen.add(torch.arange(256.0).expand(batch, 256))
    counts = torch.bincount(torch.cat(seen.samples).long(), minlength=256) / (seen.kept / 256)
    assert seen.kept > 2**16
    assert counts.min() > 0.85
    assert counts.max() < 1.15


def test_a_sample_of_more_elements_than_floats_count_is_of_all_features():
    seen = ObservedInput()
    seen.add(torch.arange(1024, dtype=torch.float16).expand(2**15, 1024))
    counts = torch.bincount(seen.samples[0].long(), minlength=1024)
    assert counts.min() > 0.8 * counts.float().mean()


def test_what_is_behind_adapters_is_no_teacher():
    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.base, self.down, self.up = nn.Linear(8, 8), nn.Linear(8, 2), nn.Linear(2, 8)

        def forward(self, x):
            return self.base(x) + self.up(self.down(x))

    model = nn.ModuleDict({"net": nn.Sequential(nn.Linear(8, 8), Adapted(), nn.Linear(8, 8), nn.Linear(8, 3))})
    for name, p in model.named_parameters():
        p.requires_grad_("down" in name or "up" in name)
    config = QuantConfig(4, 4)
    quantize_model(model, config)
    calibrator = Calibrator(model, config)
    with torch.no_grad(), calibrator.observe():
        model["net"](torch.randn(4, 8))
    assert calibrator.finish() == []


def test_a_frozen_teacher_does_not():
    for run in (
        lambda m, x: m["backbone"](x).sum() + m["head"](x).sum(),
        lambda m, x: (t := m["backbone"](x), m["head"](x.type_as(t)), m["head"][0](torch.rand_like(t))),
        lambda m, x: m["head"][0](x) * m["head"](m["backbone"](x))[:, :1],  # a projection of its features is trained
    ):
        assert first_layer(backbone_and_head(), run) == "head.0"
