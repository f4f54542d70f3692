"""Batch-norm re-estimation, against the same forward passes with batch statistics but without collecting them.

``python benchmarks/reestimation.py`` prints a table for the conv net.
"""

from __future__ import annotations

import torch
from networks import WORKLOADS
from racing import machine, race, table, timed
from training import quantized

from lightning_qat_osc import reestimate_batch_norm
from lightning_qat_osc.batch_norm import batch_norm_layers


def main() -> None:
    """Run the benchmark."""
    workload = WORKLOADS["conv net"]
    network = quantized(workload)
    batches = [workload.batch() for _ in range(5)]

    @torch.no_grad()
    def passes() -> None:
        network.eval()
        for layer in batch_norm_layers(network).values():
            layer.train()
        for batch in batches:
            network(batch)

    contenders = {
        "forward passes": timed(passes),
        "re-estimation": timed(lambda: reestimate_batch_norm(network, batches)),
    }
    print(machine(), table("5 batches of the conv net", race(contenders, 15, warmup=2)), sep="\n\n")


if __name__ == "__main__":
    main()
