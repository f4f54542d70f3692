"""Script that test_strategies.py runs in one process or several: trains, and writes a report for each rank."""

import argparse
import json
import os
import sys
import warnings
from pathlib import Path

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from models import ConvModule, Data, dataset, trainer
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler

from lightning_qat_osc import (
    BatchNormReestimation,
    IterativeFreezing,
    OscillationDampening,
    OscillationTracking,
    QuantConfig,
    QuantizationAwareTraining,
    functional,
    kernels,
    oscillation_states,
    quantize_model,
    sweep,
)
from lightning_qat_osc.lookup import quantized_weights, scale_parameters
from lightning_qat_osc.sharding import full_tensor, local_part, reshard


def config_of(granularity):
    return QuantConfig(2, 3, weight_granularity=granularity, first_last_bits=None)


class Net(ConvModule):
    """A ConvModule, sharded or compiled on request; without batch norm, its gradient is the mean over half batches."""

    def __init__(self, lr, optimizer="SGD", granularity=None, compiled=False, batch_norm=True):
        super().__init__(lr, optimizer=optimizer)
        self.granularity, self.compiled, self.configured = granularity, compiled, False
        self.activation = F.relu
        if not batch_norm:
            self.bn1 = self.bn2 = nn.Identity()
            # sums of quantized products are often exactly 0, where rounding errors decide the gradient of relu
            self.activation = F.silu

    def forward(self, x):
        x = self.activation(self.bn1(self.stem(x)))
        x = self.activation(self.bn2(self.depthwise(x)))
        return self.head(self.activation(self.point(x)).mean((2, 3)))

    def configure_model(self):
        if self.configured:
            return
        self.configured = True
        if self.granularity is not None:
            quantize_model(self, config_of(self.granularity))
            mesh = self.device_mesh["data_parallel"]
            for layer in (self.stem, self.depthwise):
                fully_shard(layer, mesh=mesh)
            fully_shard(self, mesh=mesh)
        if self.compiled:
            for layer in (self.stem, self.depthwise, self.head):
                layer.compile(backend="aot_eager")

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss, sync_dist=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)


class InOrder(Data):
    """Gives all ranks together the batches of one process, in the same order; Lightning's own sampler shuffles."""

    def train_dataloader(self):
        data = dataset()
        sampler = DistributedSampler(data, shuffle=False) if dist.is_initialized() else None
        return DataLoader(data, self.batch_size, sampler=sampler)


class Look(L.Callback):
    def __init__(self):
        self.initial, self.bn, self.logged, self.sent = None, [], {}, []

    def on_train_start(self, trainer, pl_module):
        self.initial = [full_tensor(s).mean().item() for s in scale_parameters(pl_module)]
        wrapper = trainer.strategy.model
        if isinstance(wrapper, nn.parallel.DistributedDataParallel):
            broadcast = wrapper._distributed_broadcast_coalesced

            def counted(tensors, *args, **kwargs):
                self.sent.append(sum(t.numel() * t.element_size() for t in tensors))
                return broadcast(tensors, *args, **kwargs)

            wrapper._distributed_broadcast_coalesced = counted

    def on_validation_epoch_start(self, trainer, pl_module):
        self.bn = [b.tolist() for name, b in pl_module.named_buffers() if name.endswith(("_mean", "_var"))]

    def on_train_end(self, trainer, pl_module):
        ours = ("oscillation/", "batch_norm/")
        self.logged = {k: v.item() for k, v in trainer.callback_metrics.items() if k.startswith(ours)}


class Stop(L.Callback):
    """Ends a longer run after the given number of epochs, as an interruption would."""

    def __init__(self, epochs):
        self.epochs = epochs

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch + 1 == self.epochs:
            trainer.should_stop = True


def report(module, look=None) -> dict:
    """Return a rank's results as plain numbers: sharded tensors in full, and how many histories are on this rank."""
    reshard(module)
    states = oscillation_states(module)
    return {
        **({} if look is None else {"initial": look.initial, "bn": look.bn, "logged": look.logged, "sent": look.sent}),
        "quantized": [w.name for w in quantized_weights(module)],
        "scales": [full_tensor(s).detach().flatten().tolist() for s in scale_parameters(module)],
        "weights": [full_tensor(p).detach().double().abs().sum().item() for p in module.parameters()],
        "integers": {n: full_tensor(s.weight_int).flatten().tolist() for n, s in states.items()},
        "frozen": sum(int(full_tensor(s.frozen).sum()) for s in states.values()),
        "frequency": {n: full_tensor(s.frequency).sum().item() for n, s in states.items()},
        "here": sum(local_part(s.weight_int).numel() for s in states.values()),
        "all": sum(s.weight_int.numel() for s in states.values()),
        "kernels": kernels.compiled.cache_info().currsize,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--strategy", default="one")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--no-batch-norm", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--fused", action="store_true", help="with kernels for tensors as small as these")
    parser.add_argument("--granularity", default="per_tensor")
    parser.add_argument("--quantize-first", action="store_true")
    parser.add_argument("--optimizer", default="SGD")
    parser.add_argument("--lr", type=float, default=0.3)
    parser.add_argument("--scale-lr", type=float, default=0.01)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--stop", type=int)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--resume", type=Path)
    a = parser.parse_args()
    warnings.filterwarnings("ignore")
    warnings.filterwarnings("error", message=".*self.log.'(oscillation|batch_norm)/.*sync_dist=True.*")
    warnings.filterwarnings("default", message="Training runs in copies.*")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if a.fused:
        functional.SMALL = sweep.SMALL = 0

    strategies = {
        "one": "auto",
        "ddp": DDPStrategy(process_group_backend="gloo"),
        "ddp_spawn": "ddp_spawn",
        "ddp_notebook": "ddp_notebook",
        "fsdp2": ModelParallelStrategy(a.devices, 1, process_group_backend="gloo"),
        "fsdp2, one file": ModelParallelStrategy(a.devices, 1, False, process_group_backend="gloo"),
    }
    sharded = a.granularity if a.strategy.startswith("fsdp2") else None
    module, look = Net(a.lr, a.optimizer, sharded, a.compile, not a.no_batch_norm), Look()
    if not a.no_batch_norm:
        for bn in (module.bn1, module.bn2):
            bn.num_batches_tracked.fill_(1)  # as if trained, so that calibration does not depend on the batch size
    if a.quantize_first:
        quantize_model(module, config_of(a.granularity))
    callbacks = [
        QuantizationAwareTraining(
            2,
            3,
            first_last_bits=None,
            weight_granularity=a.granularity,
            scale_learning_rate=a.scale_lr,
            recompute=a.recompute,
            fused=a.fused,
            calibration_batches=8,
        ),
        OscillationTracking(momentum=0.1),
        OscillationDampening(final_weight=1e-2),
        IterativeFreezing(threshold=0.12, final_threshold=0.05),
        BatchNormReestimation(num_batches=8, log_divergence=True),
        look,
    ]
    if a.stop is not None:
        callbacks.append(Stop(a.stop))
    devices = 1 if a.strategy == "one" else a.devices
    t = trainer(
        callbacks,
        max_epochs=a.epochs,
        log_every_n_steps=1,
        strategy=strategies[a.strategy],
        devices=devices,
        precision=a.precision,
        use_distributed_sampler=False,
    )
    torch.manual_seed(1)
    t.fit(module, InOrder(batch_size=8 // devices), ckpt_path=a.resume)
    (a.folder / f"rank{t.global_rank}.json").write_text(json.dumps(report(module, look)))
    if a.save is not None:
        t.save_checkpoint(a.save)
        t.test(module, InOrder(batch_size=8 // devices), ckpt_path=a.save)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()  # a process that ends early closes the connections of the other
        dist.destroy_process_group()
    sys.stderr.flush()
    os._exit(0)  # all results are written; in a normal exit, gloo's threads sometimes abort the interpreter


if __name__ == "__main__":
    main()
