"""Kinds of layers that can be quantized, their quantized parameters and inputs, and replacements for their forwards."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

__all__ = [
    "LayerKind",
    "calling_class",
    "calling_forward",
    "disable_fused_path",
    "input_names",
    "kind_names",
    "kind_of",
    "layer_kind",
    "weight_names",
    "written_parameter",
]


@dataclass(frozen=True)
class LayerKind:
    """What is quantized in one kind of layer.

    Attributes:
        name: Name of the kind, for messages.
        classes: Function that returns the classes of this kind; subclasses of these belong to the kind, too.
        weights: Function from a layer of this kind to the names of its quantized parameters.
        inputs: How many arguments of ``forward``, counted from the first, are quantized.
        channel_dim: The weights' dimension of output channels (for transposed convolutions those of a group).
        forward: A subclass whose forward calls submodules that the layer's own forward does not call, or None.
        remains: What stays in full precision, as a phrase for messages, or None.
    """

    name: str
    classes: Callable[[], tuple[type[nn.Module], ...]]
    weights: Callable[[nn.Module], tuple[str, ...]] = lambda layer: ("weight",)
    inputs: int = 1
    channel_dim: int = 0
    forward: type[nn.Module] | None = None
    remains: str | None = None


class _Attention(nn.MultiheadAttention):
    """MultiheadAttention that calls its output projection as a layer, so that the projection can be quantized.

    It computes the same as ``torch.nn.MultiheadAttention``, without the fused path, which does not call the layers.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal=True is a hint about attn_mask, which is None: pass the mask, too")
        causal = is_causal and key_padding_mask is None and not need_weights
        attn_mask = None if causal else attn_mask
        q, k, v = (self._to_sequences(x) for x in self._project(query, key, value))
        mask = None
        if attn_mask is not None:  # [L, S] or [N * H, L, S] -> [N, H, L, S]
            attn_mask = attn_mask if attn_mask.dim() == 3 else attn_mask[None]
            heads = 1 if len(attn_mask) == 1 else self.num_heads
            mask = _additive(attn_mask, q.dtype).view(-1, heads, *attn_mask.shape[1:])
        if key_padding_mask is not None:  # [N, S] or [S] -> [N, 1, 1, S]
            padding = _additive(key_padding_mask.view(-1, key_padding_mask.shape[-1]), q.dtype)[:, None, None]
            mask = padding if mask is None else mask + padding
        extra = []
        if self.bias_k is not None and self.bias_v is not None:
            extra.append((self.bias_k, self.bias_v))
        if self.add_zero_attn:
            extra.append((k.new_zeros(1, 1, self.embed_dim),) * 2)
        for key_row, value_row in extra:
            k = torch.cat([k, key_row.expand(k.shape[0], 1, -1)], dim=1)  # len() makes a dynamic size static
            v = torch.cat([v, value_row.expand(v.shape[0], 1, -1)], dim=1)
            mask = None if mask is None else F.pad(mask, (0, 1))
        q, k, v = (x.reshape(*x.shape[:2], self.num_heads, -1).transpose(1, 2) for x in (q, k, v))  # [N, H, L, E / H]
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) / self.head_dim**0.5
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            out = weights @ v
            weights = weights.mean(dim=1) if average_attn_weights else weights
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal)
        out = self.out_proj(out.transpose(1, 2).flatten(2))  # [N, L, E]
        if query.dim() == 2:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        bias = self.in_proj_bias
        if self.in_proj_weight is None:
            projections = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        elif query is key and key is value:
            return F.linear(query, self.in_proj_weight, bias).chunk(3, dim=-1)
        else:
            projections = self.in_proj_weight.chunk(3)
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        return tuple(F.linear(x, w, b) for x, w, b in zip((query, key, value), projections, biases))

    def _to_sequences(self, x: Tensor) -> Tensor:
        """[L, N, E], [N, L, E] or [L, E] -> [N, L, E]."""
        if x.dim() == 2:
            return x.unsqueeze(0)
        return x if self.batch_first else x.transpose(0, 1)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask to add to attention scores. A boolean mask is True where attention is not allowed."""
    if mask.is_floating_point():
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


def _attention_weights(layer: nn.Module) -> tuple[str, ...]:
    packed = layer.in_proj_weight is not None
    return ("in_proj_weight",) if packed else ("q_proj_weight", "k_proj_weight", "v_proj_weight")


def _recurrent_weights(layer: nn.Module) -> tuple[str, ...]:
    if isinstance(layer, nn.RNNCellBase):
        return "weight_ih", "weight_hh"
    assert isinstance(layer, nn.RNNBase)
    return tuple(name for name in layer._flat_weights_names if name.startswith("weight_"))  # includes computed ones


def _transformers_conv1d() -> tuple[type[nn.Module], ...]:
    module = sys.modules.get("transformers.pytorch_utils")  # a model that has such layers has imported it
    return () if module is None else (module.Conv1D,)


_KINDS = (
    LayerKind("Conv", lambda: (nn.Conv1d, nn.Conv2d, nn.Conv3d)),
    LayerKind("ConvTranspose", lambda: (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), channel_dim=1),
    LayerKind("Linear", lambda: (nn.Linear,)),
    LayerKind("Bilinear", lambda: (nn.Bilinear,), inputs=2),
    LayerKind("Embedding", lambda: (nn.Embedding, nn.EmbeddingBag), inputs=0),
    LayerKind(
        "MultiheadAttention",
        lambda: (nn.MultiheadAttention,),
        weights=_attention_weights,
        inputs=3,
        forward=_Attention,
        remains="its projected queries, keys and values, and its scores",
    ),
    LayerKind(
        "recurrent",
        lambda: (nn.RNNBase, nn.RNNCellBase),
        weights=_recurrent_weights,
        remains="its recurrent state and the values between its stacked layers",
    ),
    LayerKind("transformers.Conv1D", _transformers_conv1d, channel_dim=1),
)


def layer_kind(layer_class: type[nn.Module]) -> LayerKind | None:
    """Return the kind of a layer class, or None if layers of this class cannot be quantized."""
    return next((kind for kind in _KINDS if issubclass(layer_class, kind.classes())), None)


def kind_of(layer: nn.Module) -> LayerKind:
    """Return the kind of a layer that can be quantized."""
    kind = layer_kind(type(layer))
    assert kind is not None
    return kind


def weight_names(layer: nn.Module) -> tuple[str, ...]:
    """Return the names of the parameters to quantize in a layer that can be quantized."""
    return kind_of(layer).weights(layer)


def written_parameter(hook: object) -> str | None:
    """Return the name of the weight that a torch forward pre-hook computes (a norm, pruning); None for other hooks."""
    if isinstance(hook, (WeightNorm, SpectralNorm)):
        return hook.name
    return hook._tensor_name if isinstance(hook, BasePruningMethod) else None


def kind_names() -> list[str]:
    """Return the names of all kinds, for messages."""
    return [kind.name for kind in _KINDS]


def calling_forward(layer_class: type[nn.Module]) -> type[nn.Module] | None:
    """Return the class whose forward replaces the layer's, or None if the layer keeps its own.

    A subclass that overrides ``forward`` keeps its own.
    """
    kind = layer_kind(layer_class)
    if kind is None or kind.forward is None or not any(layer_class.forward is c.forward for c in kind.classes()):
        return None
    return kind.forward


def calling_class(layer_class: type[nn.Module]) -> type[nn.Module]:
    """Return the layer's class with the forward of :func:`calling_forward`, or the class itself if that is None."""
    calling = calling_forward(layer_class)
    if calling is None or issubclass(layer_class, calling):
        return layer_class
    return calling if layer_class is calling.__base__ else _make_calling(cast(Any, layer_class))


@cache
def _make_calling(layer_class: Any) -> type[nn.Module]:
    def reduce(layer: Any, protocol: Any) -> tuple[Any, ...]:
        """Pickle a reference to the layer's own class, since this class is created at run time."""
        return _new_calling, (layer_class,), nn.Module.__reduce_ex__(layer, max(protocol, 2))[2]

    calling = cast(Any, calling_forward(layer_class))
    attributes = {
        "__module__": layer_class.__module__,
        "__doc__": layer_class.__doc__,
        "__reduce_ex__": reduce,
        "forward": calling.forward,
    }
    return type(layer_class.__name__, (layer_class, calling), attributes)  # instances have the layout of the first base


def _new_calling(layer_class: type[nn.Module]) -> nn.Module:
    calling = cast(Any, calling_class(layer_class))
    return cast(nn.Module, calling.__new__(calling))


def disable_fused_path(module: nn.Module) -> None:
    """Keep an encoder off its fused evaluation path, which reads weights without calling the layers."""
    if isinstance(module, nn.TransformerEncoder):
        module.use_nested_tensor = False  # its layers accept nested tensors only on their fused path
    if isinstance(module, nn.TransformerEncoderLayer):
        module.activation_relu_or_gelu = 0  # the value for activations that the fused path does not support


def input_names(layer_class: type[nn.Module]) -> tuple[str, ...]:
    """Return the names of the arguments of a layer's forward that are quantized."""
    kind = layer_kind(layer_class)
    assert kind is not None
    base = next(c for c in kind.classes() if issubclass(layer_class, c))
    for owner in (layer_class, base):  # a subclass may take *args and pass them on
        parameters = list(inspect.signature(owner.forward).parameters.values())[1:]
        names = tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)[: kind.inputs]
        if len(names) == kind.inputs:
            return names
    raise AssertionError(f"{base.__name__}.forward takes fewer than {kind.inputs} arguments")
