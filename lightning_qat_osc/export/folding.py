"""Folding of batch norms into the layers before them: integers stay, scales become one per channel."""

from __future__ import annotations

import copy
import gc
import inspect
import warnings
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.dropout import _DropoutNd

from lightning_qat_osc.export.integers import IntegerWeight
from lightning_qat_osc.layers import layer_kind
from lightning_qat_osc.lookup import qualified_name

__all__ = ["CannotFoldError", "Folding", "affine", "fold_batch_norm", "remove_batch_norm", "scaled_channels"]

_FUNCTIONS = {
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.Conv3d: F.conv3d,
    nn.ConvTranspose1d: F.conv_transpose1d,
    nn.ConvTranspose2d: F.conv_transpose2d,
    nn.ConvTranspose3d: F.conv_transpose3d,
    nn.Linear: F.linear,
}
_Foldable = _ConvNd | nn.Linear
_NOTHING_IN_EVALUATION = (nn.Identity, _DropoutNd)
_MUTABLE = (dict, OrderedDict, defaultdict, list, deque, set)


class CannotFoldError(Exception):
    """Raised if a batch norm cannot be folded, with the reason."""


@dataclass(frozen=True)
class Folding:
    """The batch norms of a model that were folded, and those that were not.

    Attributes:
        into: Name of a folded batch norm -> name of the layer that it was folded into.
        kept: Name of a batch norm that was not folded -> the reason.
    """

    into: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)


@torch.no_grad()
def fold_batch_norm(
    module: nn.Module, weights: Mapping[str, IntegerWeight]
) -> tuple[dict[str, IntegerWeight], Folding]:
    r"""Fold the batch norms of a model into the layers before them, in place.

    .. math::
        a = \gamma / \sqrt{\sigma^2 + \epsilon}, \qquad
        w' = a \, s z = (|a| s) \, (\mathrm{sign}(a) z), \qquad
        b' = \beta + a \, (b - \mu)

    The integers z stay, and the scale s becomes :math:`|a| s`, one per channel, computed in double precision and
    rounded once. Scales are positive, so the integers of a channel with a negative :math:`\gamma` are negated. The grid
    has no :math:`-q_{min}`, so a batch norm with a negative :math:`\gamma` in a channel that uses :math:`q_{min}`
    is not folded. A channel with :math:`\gamma = 0` gets integers of 0 and keeps its scale.

    A batch norm is folded if graphs of the model in evaluation mode show that its input is the output of one
    convolution, transposed convolution or linear layer, that nothing else uses or stores this output, and that the
    batch norm and the layer are each called once. Two graphs must agree, one of a call with every argument given and
    one with all defaults, because a forward may check which arguments are None. If ``torch.fx`` cannot trace a module,
    its children are traced one by one, assuming that each is called as a whole. As in ``torch.nn.utils.fusion``, the
    channel dimension of the batch norm is assumed to be that of the layer's output features.

    Args:
        module: A converted model in evaluation mode. Folded batch norms become ``nn.Identity``, and the layers before
            them get a bias. Full-precision weights are changed, too; quantized ones are left for the caller to set.
        weights: Key of a parameter -> its integers.

    Returns:
        The integers of all quantized weights after folding, and which batch norms were folded.
    """
    weights, folding = dict(weights), Folding()
    graphs, graphs_of_defaults = _Graphs(module), _Graphs(module, defaults=True)
    for name, norm in graphs.norms.items():
        try:
            layer_name, layer = graphs.layer_before(norm)
            if graphs_of_defaults.layer_before(norm) != (layer_name, layer):
                raise CannotFoldError(
                    "the layer before it differs between a call with all arguments and a call with the defaults"
                )
            assert norm.running_mean is not None
            assert norm.running_var is not None
            statistics = norm.running_mean, norm.running_var
            factor, bias = affine(layer.bias, norm.weight, norm.bias, *statistics, norm.eps)
            keys = [qualified_name(other, "weight") for other in graphs.names[layer]]
            axis = 1 if isinstance(layer, _ConvTransposeNd) else 0
            if keys[0] in weights:
                weights.update(dict.fromkeys(keys, scaled_channels(weights[keys[0]], factor, axis)))
            elif layer._parameters.get("weight") is None:
                raise CannotFoldError(f"the weight of '{layer_name}' is computed from other parameters")
            else:
                layer.weight.copy_(layer.weight.double() * factor.view(_channels_at(axis, layer.weight.dim())))
        except CannotFoldError as reason:
            folding.kept[name] = str(reason)
            continue
        remove_batch_norm(module, name, layer_name)
        layer.get_parameter("bias").copy_(bias)
        folding.into[name] = layer_name
    return weights, folding


def remove_batch_norm(module: nn.Module, norm_name: str, layer_name: str) -> None:
    """Replace a folded batch norm with ``nn.Identity``, and give the layer before it a new bias of zeros.

    Args:
        module: The model, which is changed in place.
        norm_name: Name of the batch norm.
        layer_name: Name of the layer.

    Raises:
        CannotFoldError: If the module of that name is not a batch norm.
    """
    norm, layer = module.get_submodule(norm_name), module.get_submodule(layer_name)
    if not isinstance(norm, _BatchNorm):
        raise CannotFoldError(
            f"'{norm_name}', folded into '{layer_name}' in the file, is not a batch norm, but {type(norm).__name__}"
        )
    for parent in list(module.modules()):
        for child_name, child in list(parent._modules.items()):  # it may have several names
            if child is norm:
                setattr(parent, child_name, nn.Identity())
    weight, bias = layer.get_parameter("weight"), layer._parameters.get("bias")
    trains = weight.requires_grad if bias is None else bias.requires_grad
    layer.bias = nn.Parameter(weight.detach().new_zeros(_channels(layer)), requires_grad=trains)


def affine(
    bias: Tensor | None, gamma: Tensor | None, beta: Tensor | None, mean: Tensor, variance: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """Return the factor and bias that a layer gets from the batch norm after it, in evaluation mode.

    Args:
        bias: Bias of the layer, [C], or None.
        gamma: Weight of the batch norm, [C], or None.
        beta: Bias of the batch norm, [C], or None.
        mean: Running mean of the batch norm, [C].
        variance: Running variance of the batch norm, [C].
        epsilon: Constant that the batch norm adds to the variance.

    Returns:
        The factor on the layer's output without bias, and the layer's new bias, each [C] in double precision.

    Raises:
        CannotFoldError: If the factor or the bias is not finite.
    """
    factor = (variance.double() + epsilon).rsqrt()
    if gamma is not None:
        factor = factor * gamma.double()
    shift = -mean.double() if bias is None else bias.double() - mean.double()
    bias = shift * factor if beta is None else beta.double() + shift * factor
    if not bool((factor.isfinite() & bias.isfinite()).all()):
        raise CannotFoldError("its statistics or parameters are not finite")
    return factor, bias


def scaled_channels(weight: IntegerWeight, factor: Tensor, axis: int) -> IntegerWeight:
    """Multiply an integer weight by a factor per channel: magnitudes go into the scales, signs into the integers.

    Args:
        weight: The weight, with a single scale or one per channel.
        factor: The factors, [C], in double precision.
        axis: The weight's channel dimension.

    Raises:
        CannotFoldError: If a factor is negative in a channel with an integer whose negative is not on the grid.
    """
    shape = _channels_at(axis, weight.values.dim())
    scale = weight.scale.double().broadcast_to([len(factor) if size == -1 else 1 for size in shape])
    scaled = (scale * factor.abs().view(shape)).to(weight.scale.dtype)
    gone = scaled < torch.finfo(scaled.dtype).tiny  # gamma is 0, or the scale underflows
    integers = weight.values.to(torch.int16)
    integers = torch.where(factor.view(shape) < 0, -integers, integers).masked_fill(gone, 0)
    outside = (integers > weight.quant_max).movedim(axis, 0).flatten(1).any(dim=1)
    if bool(outside.any()):
        channel = int(outside.nonzero()[0])
        raise CannotFoldError(
            f"channel {channel} has a negative gamma and an integer weight of {weight.quant_min}, whose negative, "
            f"{-weight.quant_min}, is not on the grid"
        )
    return replace(
        weight,
        values=integers.to(weight.values.dtype),
        scale=torch.where(gone, scale.to(scaled.dtype), scaled),
        channel_axis=axis,
    )


def _channels(layer: nn.Module) -> int:
    return int(layer.out_channels if isinstance(layer, _ConvNd) else layer.out_features)  # type: ignore[arg-type]


def _channels_at(axis: int, dims: int) -> list[int]:
    return [-1 if i == axis else 1 for i in range(dims)]


class _LayerTracer(fx.Tracer):
    """A tracer whose leaves include batch norms and layers of known kinds, regardless of the package of their class."""

    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__()
        self._proxies: WeakValueDictionary[fx.Node, fx.Proxy] = WeakValueDictionary()

    def proxy(self, node: fx.Node) -> fx.Proxy:
        self._proxies[node] = proxy = super().proxy(node)
        return proxy

    def kept(self) -> set[fx.Node]:
        """Return the nodes whose outputs outlive the forward: in an attribute, in a list or in a hook."""
        if self._proxies:
            gc.collect()  # unpacking a proxy or converting it to bool creates a cycle with the forward's frame
        return set(self._proxies)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = isinstance(m, _BatchNorm) or layer_kind(type(m)) is not None
        return known or super().is_leaf_module(m, module_qualified_name)


def _trace(module: nn.Module, defaults: bool) -> tuple[fx.Graph, set[fx.Node]]:
    """Return the graph of a module's forward, and the nodes whose outputs outlive the forward.

    Args:
        module: The module.
        defaults: Whether arguments with a default keep it. Otherwise they are proxies like the others, never None.
    """
    arguments = inspect.signature(type(module).forward).parameters if defaults else {}
    tracer = _LayerTracer()
    with _as_it_was(module), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the forward runs on proxies
        graph = tracer.trace(module, {key: a.default for key, a in arguments.items() if a.default is not a.empty})
        return graph, tracer.kept()


class _Graphs:
    """The graphs of a model, and the layers that its batch norms can be folded into.

    Args:
        module: The model.
        defaults: Whether arguments of modules keep their defaults.

    Attributes:
        norms: Name -> batch norm.
        names: Submodule -> all its names.
    """

    def __init__(self, module: nn.Module, *, defaults: bool = False) -> None:
        self.norms = {name: m for name, m in module.named_modules() if isinstance(m, _BatchNorm)}
        self.names: dict[nn.Module, list[str]] = {}
        for name, m in module.named_modules(remove_duplicate=False):
            self.names.setdefault(m, []).append(name)
        self._holders = Counter(id(p) for m in module.modules() for p in m._parameters.values() if p is not None)
        self._calls: dict[nn.Module, tuple[nn.Module, fx.Node]] = {}  # module -> its traced caller, the call
        self._counts: Counter[nn.Module] = Counter()
        self._kept: set[fx.Node] = set()
        self._untraced: dict[str, str] = {}
        self._root, self._defaults = module, defaults
        with _as_it_was(module):  # a forward may change modules that are not its children
            self._trace("", module, set())

    def _trace(self, name: str, module: nn.Module, seen: set[nn.Module]) -> None:
        if module in seen or isinstance(module, _BatchNorm) or layer_kind(type(module)) is not None:
            return
        seen.add(module)
        try:
            graph, kept = _trace(module, self._defaults)
        except Exception as error:  # a forward on proxies may raise anything
            if any(isinstance(m, _BatchNorm) for m in module.modules()):
                self._untraced[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
                for child_name, child in module.named_children():
                    self._trace(qualified_name(name, child_name), child, seen)
            return
        self._kept |= kept
        for node in graph.nodes:
            if node.op == "call_module":
                called = module.get_submodule(node.target)
                self._counts[called] += 1
                self._calls[called] = module, node

    def layer_before(self, norm: _BatchNorm) -> tuple[str, _Foldable]:
        """Return the name of the layer that a batch norm can be folded into, and the layer.

        Raises:
            CannotFoldError: If there is no such layer, or folding is not possible.
        """
        if norm not in self._calls:
            raise CannotFoldError(
                f"no call to it was found when the model was traced{self._why_untraced(self.names[norm][0])}"
            )
        if self._counts[norm] > 1:
            raise CannotFoldError("it is called more than once")
        traced, call = self._calls[norm]
        if type(norm).forward not in (_BatchNorm.forward, nn.SyncBatchNorm.forward):
            raise CannotFoldError(f"{type(norm).__name__} overrides forward")
        if norm.running_mean is None or norm.running_var is None:
            raise CannotFoldError("it has no running statistics")
        source = call.args[0] if call.args else call.kwargs["input"]
        while self._is_nothing(traced, source):
            source = source.args[0]  # type: ignore[union-attr]
        assert isinstance(source, fx.Node)
        layer = traced.get_submodule(str(source.target)) if _calls_module(source) else None
        if not isinstance(layer, _Foldable):
            before = type(layer).__name__ if layer is not None else source.name
            raise CannotFoldError(f"its input does not come from a convolution or linear layer, but from {before}")
        name = self.names[layer][0]
        self._check(name, layer, norm, traced, source)
        return name, layer

    def _why_untraced(self, name: str) -> str:
        """Return why a module that contains the named one cannot be traced; an empty string if all can be."""
        while name:
            name = name.rpartition(".")[0]
            if name in self._untraced:
                holder = f"'{name}'" if name else "the model"
                return f"; {holder} cannot be traced: {self._untraced[name]}"
        return ""

    def _is_nothing(self, traced: nn.Module, source: object) -> bool:
        if not _calls_module(source):
            return False
        assert isinstance(source, fx.Node)
        called = traced.get_submodule(str(source.target))
        alone = len(source.users) == 1 and source not in self._kept
        return isinstance(called, _NOTHING_IN_EVALUATION) and alone and not _has_hooks(called)

    def _check(self, name: str, layer: _Foldable, norm: _BatchNorm, traced: nn.Module, source: fx.Node) -> None:
        if len(source.users) > 1:
            raise CannotFoldError(f"the output of '{name}' is also used elsewhere")
        if source in self._kept:
            raise CannotFoldError(f"the output of '{name}' is kept in an attribute or by a hook")
        if self._counts[layer] > 1:
            raise CannotFoldError(f"'{name}' is called more than once")
        for what in (layer, norm):
            if traced is not self._root and len(self.names[what]) > 1:
                raise CannotFoldError(f"'{self.names[what][0]}' has several names and may be called under each of them")
            own = [p for p in what._parameters.values() if p is not None]
            if any(self._holders[id(p)] > 1 for p in own):
                raise CannotFoldError(f"'{self.names[what][0]}' shares a parameter with another module")
        if _has_hooks(norm) or layer._forward_hooks:
            raise CannotFoldError(f"it or '{name}' has forward hooks")
        read = {str(node.target) for node in source.graph.nodes if node.op == "get_attr"}
        for what in (layer, norm):
            for key in (*what._parameters, *what._buffers):
                if any(qualified_name(self._within(traced, what), key) == attribute for attribute in read):
                    raise CannotFoldError(f"{key} of '{self.names[what][0]}' is read outside of it")
        if isinstance(layer, _ConvTransposeNd) and layer.groups > 1:
            raise CannotFoldError(
                f"'{name}' is a transposed convolution with groups, whose output channels lie along two dimensions of "
                "its weight"
            )
        if norm.num_features != _channels(layer):
            raise CannotFoldError(
                f"it has {norm.num_features} channels, but '{name}' has {_channels(layer)} output channels"
            )
        if not _is_affine(layer, self._defaults):
            raise CannotFoldError(
                f"{type(layer).__name__} '{name}' overrides forward, and may do more than apply its weight"
            )

    @staticmethod
    def _within(traced: nn.Module, what: nn.Module) -> str:
        names: Iterator[str] = (name for name, m in traced.named_modules() if m is what)
        return next(names)


def _calls_module(source: object) -> bool:
    return isinstance(source, fx.Node) and source.op == "call_module"


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _is_affine(layer: nn.Module, defaults: bool) -> bool:
    """Whether the layer only applies its weight to some tensor and adds its bias."""
    base = next(c for c in _FUNCTIONS if isinstance(layer, c))
    if all(getattr(type(layer), key, None) is getattr(base, key, None) for key in ("forward", "_conv_forward")):
        return True
    twin = copy.copy(layer)  # with a bias, since it has one after folding
    twin._parameters = {**layer._parameters, "bias": nn.Parameter(torch.zeros(1))}
    try:
        graph, kept = _trace(twin, defaults)
    except Exception:  # the forward may depend on the values of its input
        return False
    (output,) = (node for node in graph.nodes if node.op == "output")
    call = output.args[0]
    if not isinstance(call, fx.Node) or call.op != "call_function" or call.target is not _FUNCTIONS[base]:
        return False
    if call in kept:
        return False
    given = {**dict(zip(("input", "weight", "bias"), call.args)), **call.kwargs}
    for key in ("weight", "bias"):
        reads = [node for node in graph.nodes if node.op == "get_attr" and node.target == key]
        if [list(read.users) for read in reads] != [[call]] or given.get(key) not in reads:
            return False
    return given.get("input") not in (given["weight"], given["bias"])


@contextmanager
def _as_it_was(module: nn.Module) -> Iterator[None]:
    """Restore what a traced forward sets or changes in place, so that no proxies remain."""
    before: dict[int, tuple[Any, Any]] = {}
    for m in module.modules():
        _remember(vars(m), before)
    try:
        yield
    finally:
        for container, contents in before.values():
            container.clear()
            (container.extend if isinstance(container, (list, deque)) else container.update)(contents)


def _remember(value: Any, before: dict[int, tuple[Any, Any]]) -> None:
    """Save the contents of nested containers. Other classes, which may not allow changes, are left alone."""
    if id(value) in before or type(value) not in (*_MUTABLE, tuple):
        return
    if type(value) is not tuple:
        before[id(value)] = value, copy.copy(value)
    for item in value.values() if isinstance(value, dict) else value:
        _remember(item, before)
