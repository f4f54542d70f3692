"""Run by test_ddp.py in two processes: trains, and writes what each rank has."""

import json
import sys
import warnings
from pathlib import Path

import lightning as L
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from models import ConvModule, Data, trainer

from lightning_qat_osc import (
    BatchNormReestimation,
    IterativeFreezing,
    OscillationDampening,
    OscillationTracking,
    QuantizationAwareTraining,
    oscillation_states,
)
from lightning_qat_osc.lookup import scale_parameters


class Look(L.Callback):
    def __init__(self):
        self.initial, self.bn, self.logged = None, [], {}

    def on_train_start(self, trainer, pl_module):
        self.initial = [s.item() for s in scale_parameters(pl_module)]

    def on_validation_epoch_start(self, trainer, pl_module):
        self.bn = pl_module.bn1.running_mean.tolist()

    def on_train_end(self, trainer, pl_module):
        self.logged = {k: v.item() for k, v in trainer.callback_metrics.items() if k.startswith("oscillation")}


def main() -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder, devices = Path(sys.argv[1]), int(sys.argv[2])
    module, look = ConvModule(lr=0.3), Look()
    for bn in (module.bn1, module.bn2):
        bn.num_batches_tracked.fill_(1)  # trained before, so calibration does not depend on the size of a batch
    callbacks = [
        QuantizationAwareTraining(2, 3, scale_learning_rate=0.01, calibration_batches=8),
        OscillationTracking(momentum=0.1),
        OscillationDampening(final_weight=1e-2),
        IterativeFreezing(threshold=0.12, final_threshold=0.05),
        BatchNormReestimation(num_batches=8),
        look,
    ]
    strategy = {"strategy": "ddp", "devices": 2} if devices == 2 else {}
    t = trainer(callbacks, max_epochs=4, log_every_n_steps=1, num_sanity_val_steps=0, **strategy)
    t.fit(module, Data(batch_size=8 // devices))
    result = {
        "initial": look.initial,
        "bn": look.bn,
        "logged": look.logged,
        "scales": [s.item() for s in scale_parameters(module)],
        "weights": [p.sum().item() for p in module.parameters()],
        "states": {n: [s.frequency.sum().item(), s.frozen.sum().item()] for n, s in oscillation_states(module).items()},
    }
    (folder / f"{devices}-{t.global_rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
