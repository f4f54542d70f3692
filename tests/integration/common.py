"""Helpers of the integration tests: all callbacks together, snapshots of a module, slow loops over its integers."""

import math

import lightning as L
import pytest
import torch
from models import dataset
from reference import WeightLoop

from lightning_qat_osc import (
    BatchNormReestimation,
    IterativeFreezing,
    OscillationDampening,
    OscillationTracking,
    QuantizationAwareTraining,
    oscillation_states,
)
from lightning_qat_osc.lookup import quantized_weights, scale_parameters

MOMENTUM = 0.1
THRESHOLD, FINAL_THRESHOLD, ANNEAL_START = 0.12, 0.05, 0.25
DAMPENING = 1e-2


def all_callbacks(*, record=None, forward_fn=None, momentum=MOMENTUM, **qat):
    """Return every callback, set so that weights freeze within a few epochs, with ``record`` after the first."""
    qat = {"weight_bits": 2, "activation_bits": 3, "first_last_bits": None, "scale_learning_rate": 0.01, **qat}
    return [
        QuantizationAwareTraining(forward_fn=forward_fn, **qat),
        *([] if record is None else [record]),
        OscillationTracking(momentum=momentum),
        OscillationDampening(final_weight=DAMPENING, anneal_start=ANNEAL_START),
        IterativeFreezing(THRESHOLD, FINAL_THRESHOLD, anneal_start=ANNEAL_START),
        BatchNormReestimation(num_batches=3, forward_fn=forward_fn),
    ]


class Order:
    """Gives batches in a different order in each epoch, and can resume in mid-epoch from a checkpoint."""

    def __init__(self):
        self.data, self.epoch, self.position, self.begin = dataset(), 0, 0, 0
        self.sampler = self

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return 8

    def __iter__(self):
        order = torch.randperm(64, generator=torch.Generator().manual_seed(self.epoch)).view(8, 8)
        begin, self.begin = self.begin, 0
        for i in range(begin, 8):
            self.position = (i + 1) % 8  # after the last batch, the next epoch begins
            yield self.data[order[i]]

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.begin = state["position"]


def snapshot(module):
    """Return copies of everything that a run leaves behind in a module, by name."""
    state = {name: value.clone() for name, value in module.state_dict().items()}
    for name, states in oscillation_states(module).items():
        state |= {f"{name}.{key}": value.clone() for key, value in states.state_dict().items()}
    return state


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def annealed(initial, final, position, length):
    """Return the value of the paper's cosine schedule at a position of a run."""
    start = ANNEAL_START * length
    progress = min(1.0, max(0.0, (position - start) / (length - start)))
    return final + (initial - final) * (1 + math.cos(math.pi * progress)) / 2


def integers(module, latents=None):
    """Compute the integers of the current weights, or of ``latents``, in double precision."""
    latents = latents or {w.name: w.weight.detach() for w in quantized_weights(module)}
    return {
        w.name: torch.clamp(
            torch.round(latents[w.name].double() / w.quantizer.scale.detach().double()),
            w.quantizer.quant_min,
            w.quantizer.quant_max,
        )
        .int()
        .flatten()
        .tolist()
        for w in quantized_weights(module)
    }


def scales(module):
    return torch.cat([s.detach().flatten() for s in scale_parameters(module)])


class Record(L.Callback):
    """Records each optimizer step with its own hooks.

    Latent weights are copied before the package's hooks run, by a hook registered earlier; scales are read after them.
    """

    def __init__(self):
        self.initial, self.steps, self.batch, self.latents = None, [], -1, {}

    def on_fit_start(self, trainer, pl_module):
        def remember(*args):
            self.latents = {w.name: w.weight.detach().clone() for w in quantized_weights(pl_module)}

        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(remember)

    def on_train_start(self, trainer, pl_module):
        self.initial = integers(pl_module)
        for i, optimizer in enumerate(trainer.optimizers):
            optimizer.register_step_post_hook(lambda optimizer, *args, i=i: self._look(optimizer, pl_module, i))

    def on_train_batch_start(self, *args):
        self.batch += 1

    def _look(self, optimizer, pl_module, i):
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        names = {w.name for w in quantized_weights(pl_module) if id(w.weight) in own}
        latent = {name: z for name, z in integers(pl_module, self.latents).items() if name in names}
        self.steps.append((i, self.batch, latent, scales(pl_module)))


def assert_states_are_those_of_slow_loops(module, record, threshold):
    """Check each weight's history against Algorithm 1 in Python floats, over the steps of the optimizer that owns it.

    ``threshold`` is a function of the index of a step and the index of its batch.
    """
    loops = {name: [WeightLoop(z, MOMENTUM) for z in initial] for name, initial in record.initial.items()}
    for index, (_, batch, latent, _) in enumerate(record.steps):
        limit = threshold(index, batch)
        for name, step in latent.items():
            for loop, z in zip(loops[name], step):
                loop.threshold = limit
                loop.step(z)
    states = oscillation_states(module)
    assert set(states) == set(loops)
    for name, state in states.items():
        assert state.weight_int.flatten().tolist() == [loop.integer for loop in loops[name]]
        assert state.frozen.flatten().tolist() == [loop.frozen for loop in loops[name]]
        assert state.frequency.flatten().tolist() == pytest.approx([loop.frequency for loop in loops[name]], abs=1e-6)
        assert state.ema_int.flatten().tolist() == pytest.approx([loop.ema for loop in loops[name]], abs=1e-5)


def freezing_threshold(position, length):
    """Return the freeze threshold of ``all_callbacks`` at a position of a run: infinite before annealing begins."""
    if position < ANNEAL_START * length:
        return math.inf
    return annealed(THRESHOLD, FINAL_THRESHOLD, position, length)


def frozen_weights(module):
    return sum(int(state.frozen.sum()) for state in oscillation_states(module).values())


def assert_frozen_weights_lie_on_the_grid(module):
    """Check that frozen latent weights are scale times integer in their dtype, and that they round to that integer."""
    for _, w, q in quantized_weights(module):
        frozen, z = q.oscillation.frozen, q.oscillation.weight_int
        on_grid = (q.scale.detach() * z).to(w.dtype)
        assert torch.equal(w.detach()[frozen], on_grid[frozen])
        ratio = (w.detach().double() / q.scale.detach().double()).round().clamp(q.quant_min, q.quant_max)
        assert torch.equal(ratio[frozen], z[frozen].double())
