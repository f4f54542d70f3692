"""Re-estimation of batch-norm statistics, which oscillating weights leave stale."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_qat_osc.checks import check_module
from lightning_qat_osc.modes import evaluation_mode

__all__ = ["batch_norm_divergence", "batch_norm_layers", "batch_statistics", "reestimate_batch_norm"]


def batch_norm_layers(module: nn.Module) -> dict[str, _BatchNorm]:
    """Return the batch-norm layers of a model that track running statistics, by name.

    Layers with ``track_running_stats=False``, such as those that Lightning's BaseFinetuning has frozen, are left out.
    """
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, _BatchNorm)
        and layer.track_running_stats
        and layer.running_mean is not None
        and layer.running_var is not None
    }


def batch_norm_divergence(mean: Tensor, var: Tensor, running_mean: Tensor, running_var: Tensor) -> Tensor:
    r"""Return the KL divergence of each channel's population from the normal with the running mean and variance.

    .. math::
        D(p \| q) = \log \frac{\sigma_2}{\sigma_1} + \frac{\sigma_1^2 + (\mu_1 - \mu_2)^2}{2 \sigma_2^2} - \frac{1}{2}

    Source: Nagel et al., arXiv 2203.11086, Sec. 2.3.1. Its footnote prints the logarithm of the ratio of variances
    instead of standard deviations, which is twice the correct term.

    Args:
        mean: Mean of the population p, [C].
        var: Variance of the population p, [C].
        running_mean: Mean that the layer normalizes with, q, [C].
        running_var: Variance that the layer normalizes with, q, [C].

    Returns:
        Divergences in nats, [C]. 0 if both variances are 0 and the means equal; huge if only the running variance is 0.
    """
    tiny, huge = torch.finfo(var.dtype).tiny, torch.finfo(var.dtype).max
    ratio = (var.clamp_min(tiny) / running_var.clamp_min(tiny)).clamp_max(huge)
    return 0.5 * (ratio - ratio.log() - 1.0 + (mean - running_mean).square() / running_var.clamp_min(tiny))


class _Moments:
    """Count, mean and sum of squared deviations of all values so far (Chan et al., 1983), in float64 except on MPS."""

    def __init__(self, like: Tensor) -> None:
        dtype = torch.float32 if like.device.type == "mps" else torch.float64
        self.count = torch.zeros((), dtype=dtype, device=like.device)
        self.mean = torch.zeros_like(like, dtype=dtype)
        self.m2 = torch.zeros_like(like, dtype=dtype)

    def merge(self, count: Tensor | float, mean: Tensor, m2: Tensor) -> None:
        total = self.count + count
        delta = mean - self.mean
        share = torch.nan_to_num(count / total)  # 0 / 0 if neither side has seen any values
        self.m2 += m2 + delta.square() * (self.count * share)
        self.mean += delta * share
        self.count = total

    def merge_ranks(self) -> None:
        """Merge the moments of all ranks, in the order of the ranks, so that all get bitwise identical results."""
        mine = torch.cat([self.count.view(1), self.mean, self.m2])
        ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(ranks, mine)
        self.count, self.mean, self.m2 = (torch.zeros_like(t) for t in (self.count, self.mean, self.m2))
        channels = self.mean.numel()
        for rank in ranks:
            self.merge(rank[0], rank[1 : 1 + channels], rank[1 + channels :])

    @property
    def variance(self) -> Tensor:
        """The unbiased variance, as torch keeps it in ``running_var``."""
        return self.m2 / (self.count - 1.0).clamp_min(1.0)


@contextmanager
def batch_statistics(layers: list[_BatchNorm]) -> Iterator[list[_Moments]]:
    """Make layers normalize with batch statistics and collect their moments. Restore layers and statistics on exit.

    In training mode with a momentum of 1, a layer stores the mean and the unbiased variance of each batch in its
    running statistics, which costs nothing beyond its forward pass.
    """
    before = [(layer.training, layer.momentum, [b.clone() for b in layer.buffers(recurse=False)]) for layer in layers]
    moments = [_Moments(layer.running_mean) for layer in layers if layer.running_mean is not None]
    handles = []
    try:
        for layer, m in zip(layers, moments):
            layer.train()
            if not layer.training:  # its own train() keeps it frozen, so it normalizes here as it does in training
                continue
            layer.momentum = 1.0
            layer.reset_running_stats()  # a stale NaN would survive the multiplication by 0

            def collect(bn: nn.Module, args: tuple[Tensor, ...], output: Any, m: _Moments = m) -> None:
                assert isinstance(bn, _BatchNorm)
                assert bn.running_mean is not None
                assert bn.running_var is not None
                if output.numel() == 0 or not bn.training:  # a pass in evaluation mode has no batch statistics
                    return
                mean, var = bn.running_mean.to(m.mean.dtype), bn.running_var.to(m.mean.dtype)
                count = output.numel() // bn.num_features  # wherever a subclass puts its channels
                if isinstance(bn, nn.SyncBatchNorm) and dist.is_initialized():
                    count *= dist.get_world_size()  # its statistics already cover all ranks
                m.merge(count, mean, var * (count - 1))

            handles.append(layer.register_forward_hook(collect))
        yield moments
    finally:
        for handle in handles:
            handle.remove()
        for layer, (training, momentum, buffers) in zip(layers, before):
            layer.train(training)
            layer.momentum = momentum
            for buffer, value in zip(layer.buffers(recurse=False), buffers):
                buffer.copy_(value)


@torch.no_grad()
def reestimate_batch_norm(
    module: nn.Module,
    batches: Iterable[Any],
    forward: Callable[[Any], object] | None = None,
    *,
    layers: dict[str, _BatchNorm] | None = None,
) -> dict[str, Tensor]:
    r"""Set batch-norm statistics to the mean and variance over some batches (arXiv 2203.11086, Sec. 2.3.1).

    Each layer gets exactly the mean and the unbiased variance of all values that it normalized: those of the
    concatenated batches, whatever their sizes, and of all ranks in a distributed run. During the passes, these layers
    use batch statistics, as in training, and all other modules run in evaluation mode. Weights, other buffers, modes
    and ``num_batches_tracked`` do not change, nor do the statistics of a layer that saw no batch. If a pass or
    ``batches`` raises, nothing is changed.

    Args:
        module: The model.
        batches: Batches to estimate from, on the model's device.
        forward: Function that runs the model on a batch; ``module(batch)`` if None.
        layers: The layers to re-estimate, by name; all that keep running statistics if None.

    Returns:
        Layer name -> :func:`batch_norm_divergence` of the new statistics from the old ones, [C]. Both variances
        include the layer's ``eps``, because the layer normalizes with it.

    Raises:
        ValueError: If there are no batches.
    """
    check_module("module", module)
    run = module if forward is None else forward
    layers = batch_norm_layers(module) if layers is None else layers
    seen = False
    with evaluation_mode(module), batch_statistics(list(layers.values())) as moments:
        for batch in batches:
            run(batch)
            seen = True
    if not seen:
        raise ValueError("batches must contain at least one batch to re-estimate batch norm from, got none")
    distributed = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    divergence = {}
    for (name, layer), moment in zip(layers.items(), moments):
        assert layer.running_mean is not None
        assert layer.running_var is not None
        if distributed and not isinstance(layer, nn.SyncBatchNorm):
            moment.merge_ranks()
        mean, var = moment.mean, moment.variance
        unseen = moment.count == 0
        old_mean, old_var = layer.running_mean.to(mean.dtype), layer.running_var.to(var.dtype)
        mean, var = torch.where(unseen, old_mean, mean), torch.where(unseen, old_var, var)
        divergence[name] = batch_norm_divergence(mean, var + layer.eps, old_mean, old_var + layer.eps).float()
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(var)
    return divergence
