r"""A regression with one weight, for which the oscillations of quantization-aware training can be computed by hand.

.. math:: \min_w \; E_x\left[\tfrac12 (x w_* - x \, q(w))^2\right], \qquad E[x^2] = \sigma^2

The regression is from Nagel et al., arXiv 2203.11086, Sec. 2.2 and App. A.1, with the expectation taken exactly: the
straight-through gradient is :math:`\sigma^2 (q(w) - w_*)`. Here s = sigma = 1, and five optima w* lie between the grid
points 0 and 1, nearer to 1, with d = |w* - q(w*)|. The gradient is d where q(w) = 1 and -(1 - d) where q(w) = 0, so w
is driven to the rounding threshold 1/2 from both sides and keeps crossing it. The script measures the following
consequences, and prints each next to its prediction:

1. q(w) is 0 in a share d of the steps, never twice in a row. So the integer reverses 2 d/s times per step at any
   learning rate, and the tracked frequency converges to this value.
2. The time average of q(w) is w*, and the moving average of the integers, over enough steps, rounds to q(w*).
3. EWGS, PSG and DSQ multiply the gradient by a positive factor: w swings less or more, but equally often. The width of
   the band in which w swings is the learning rate times the factor at the threshold (a little less if the orbit is
   periodic). The factor varies over that band, so the frequency is 2 d/s only in the limit of a small learning rate.
   Otherwise its relative deviation is at most half the learning rate.
4. Dampening adds 2 lambda (w - q(w)), which is -lambda just above the threshold. The gradient there, d - lambda,
   changes sign, and the oscillation stops, if and only if lambda > d/s. If lambda also exceeds 1 - d/s, the other grid
   point traps the weight, too, and the weight stays at the one that it reaches first.
5. Freezing ends the oscillation, at q(w*) once the moving average has forgotten its initial value. A weight that is
   frozen earlier may be held at the wrong integer, so here freezing starts late.

Run it with ``python examples/toy_regression.py``; it takes a few seconds.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_qat_osc.functional import fake_quantize, integer_grid, quantize_to_int
from lightning_qat_osc.oscillation import OscillationState
from lightning_qat_osc.regularizers import dampening_gradient

QUANT_MIN, QUANT_MAX = integer_grid(4, signed=True)
SCALE = torch.ones(1, dtype=torch.float64)
SIGMA = 1.0
OPTIMA = torch.tensor([0.95, 0.9, 0.8, 0.75, 0.6], dtype=torch.float64)
LEARNING_RATES = torch.tensor([[0.1], [0.01], [0.001]], dtype=torch.float64)
DAMPENING_RATIOS = torch.tensor([[0.9], [0.99], [1.01], [1.1]], dtype=torch.float64)
"""Lambda as a multiple of d/s."""

START = math.sqrt(2) - 1
"""A little below the threshold, and irrational: no step from here lands exactly on 1/2."""
MOMENTUM = 0.01
FREEZE_THRESHOLD = 0.05
"""Below the frequencies of all five optima."""
TRANSIENT = 1000
"""Steps until every weight has reached the threshold and the moving averages have forgotten their start."""
WINDOW = 1000
"""Steps that are measured after that: a multiple of 20, 10, 5, 4 and 5, the periods of the five oscillations."""
FREEZE_FROM = TRANSIENT + WINDOW // 2


@dataclass(frozen=True)
class Trace:
    """The state after each step. Time is the first dimension.

    Attributes:
        latent: Latent weights.
        weight_int: Integers of the weights.
        changed: Whether the integer differs from that of the previous step.
        frequency: Tracked frequency f.
        ema_int: Moving average of the integers.
        frozen: Whether the weight is frozen.
    """

    latent: Tensor
    weight_int: Tensor
    changed: Tensor
    frequency: Tensor
    ema_int: Tensor
    frozen: Tensor

    def between(self, start: int, stop: int | None = None) -> Trace:
        """Return the steps from ``start`` up to ``stop``."""
        return Trace(*(values[start:stop] for values in vars(self).values()))

    @property
    def quantized(self) -> Tensor:
        """Quantized weights."""
        return SCALE * self.weight_int

    @property
    def changes(self) -> Tensor:
        """Number of integer changes. Between two neighboring grid points, each change reverses the previous one."""
        return self.changed.sum(0)

    @property
    def change_rate(self) -> Tensor:
        """Integer changes per step."""
        return self.changed.double().mean(0)

    @property
    def band(self) -> Tensor:
        """Width of the band in which the latent weight moves."""
        return self.latent.amax(0) - self.latent.amin(0)


def ste(gradient: Tensor, offset: Tensor) -> Tensor:
    """Plain straight-through estimator: 1."""
    return torch.ones_like(offset)


def ewgs(gradient: Tensor, offset: Tensor, delta: float = 0.2) -> Tensor:
    """Element-wise gradient scaling, CVPR 2021: 1 + delta sign(g) (w - q(w))."""
    return 1.0 + delta * gradient.sign() * offset


def psg(gradient: Tensor, offset: Tensor, epsilon: float = 0.01) -> Tensor:
    """Position-based scaled gradient: |w - q(w)| + epsilon."""
    return offset.abs() + epsilon


def dsq(gradient: Tensor, offset: Tensor, alpha: float = 0.2) -> Tensor:
    """Differentiable soft quantization, arXiv 1908.05033: the slope of its smooth staircase.

    Between two grid points with midpoint m, it is tanh(k (w - m)) / (2 tanh(k/2)), where tanh(k/2) = 1 - alpha.
    """
    k = math.log(2.0 / alpha - 1.0)
    from_middle = 0.5 - offset.abs()
    return 0.5 * k / math.tanh(0.5 * k) / torch.cosh(k * from_middle).square()


Estimator = Callable[[Tensor, Tensor], Tensor]
"""Maps the gradient g and (w - q(w)) / s to a positive factor that multiplies g."""
ESTIMATORS: dict[str, Estimator] = {"STE": ste, "EWGS": ewgs, "PSG": psg, "DSQ": dsq}


def quantize(latent: Tensor) -> Tensor:
    """Return q(w) on the grid of this example."""
    return fake_quantize(latent, SCALE, QUANT_MIN, QUANT_MAX)


def regression_gradient(latent: Tensor, optimum: Tensor) -> Tensor:
    """Return the straight-through gradient of 1/2 sigma^2 (w* - q(w))^2, computed by autograd."""
    latent = latent.detach().requires_grad_()
    loss = 0.5 * SIGMA**2 * (optimum - quantize(latent)).square().sum()
    return torch.autograd.grad(loss, latent)[0]


def simulate(
    estimator: Estimator = ste,
    *,
    learning_rate: float | Tensor = 0.01,
    dampening: float | Tensor = 0.0,
    freeze_threshold: float | None = None,
    freeze_from: int = 0,
    steps: int = TRANSIENT + WINDOW,
    momentum: float = MOMENTUM,
    optimum: Tensor = OPTIMA,
) -> Trace:
    """Run gradient descent on the toy regression, for all optima at once.

    Args:
        estimator: Computes the factor on the gradient of the regression.
        learning_rate: Learning rate, broadcast against ``optimum``.
        dampening: Lambda, broadcast against ``optimum``.
        freeze_threshold: Tracked frequency above which a weight is frozen; None to freeze none.
        freeze_from: First step in which weights may be frozen.
        steps: Number of steps.
        momentum: Weight of the new value in the tracker's moving averages.
        optimum: w*.

    Returns:
        All steps, in tensors of shape ``[steps, *shape]``.
    """
    shapes = [torch.as_tensor(p).shape for p in (optimum, learning_rate, dampening)]
    latent = torch.full(torch.broadcast_shapes(*shapes), START, dtype=torch.float64)
    state = OscillationState(quantize_to_int(latent, SCALE, QUANT_MIN, QUANT_MAX))
    history: list[tuple[Tensor, ...]] = []
    for step in range(steps):
        before = state.weight_int.clone()
        gradient = regression_gradient(latent, optimum)
        gradient = gradient * estimator(gradient, latent / SCALE - before)
        gradient = gradient + dampening * dampening_gradient(latent, SCALE, QUANT_MIN, QUANT_MAX)
        latent = latent - learning_rate * gradient
        state.update(quantize_to_int(latent, SCALE, QUANT_MIN, QUANT_MAX), momentum)
        if freeze_threshold is not None and step >= freeze_from:
            state.freeze(freeze_threshold)
            state.hold_frozen(latent, SCALE)
        changed = state.weight_int != before
        # the two averages are updated in place
        integers, averages = state.weight_int.clone(), (state.frequency.clone(), state.ema_int.clone())
        history.append((latent, integers, changed, *averages, state.frozen.clone()))
    return Trace(*(torch.stack(values) for values in zip(*history)))


def distance(optimum: Tensor = OPTIMA) -> Tensor:
    """Return d/s, with d = |w* - q(w*)|."""
    return (optimum - quantize(optimum)).abs() / SCALE


def dampened_frequency(dampening: Tensor, optimum: Tensor = OPTIMA) -> Tensor:
    """Return 2 (d - lambda) / (1 - 2 lambda) for lambda < d, else 0: the limit as the learning rate goes to 0.

    At the threshold, dampening changes the gradients from d and -(1 - d) to d - lambda and -(1 - d - lambda).
    """
    return 2.0 * (distance(optimum) - dampening).clamp(min=0.0) / (1.0 - 2.0 * dampening)


def run_all() -> dict[str, Trace]:
    """Run the simulations for the tables, of shape ``[steps, 3 learning rates or 4 lambdas, 5 optima]``."""
    traces = {name: simulate(estimator, learning_rate=LEARNING_RATES) for name, estimator in ESTIMATORS.items()}
    # just below the critical lambda a weight crosses the threshold once in a thousand steps
    traces["dampening"] = simulate(
        learning_rate=0.001, dampening=DAMPENING_RATIOS * distance(), steps=TRANSIENT + 5 * WINDOW
    )
    traces["freezing"] = simulate(
        learning_rate=LEARNING_RATES, freeze_threshold=FREEZE_THRESHOLD, freeze_from=FREEZE_FROM
    )
    return traces


Row = dict[str, Any]


def _by_learning_rate(label: str, values: Tensor, i: int) -> Row:
    """Return one column per learning rate, for the i-th optimum."""
    return {
        f"{label}lr {rate:g}": value for rate, value in zip(LEARNING_RATES.flatten().tolist(), values[:, i].tolist())
    }


def frequency_rows(ste_trace: Trace) -> list[Row]:
    """Return the table of prediction 1: the frequency at each learning rate, counted and tracked."""
    trace = ste_trace.between(TRANSIENT)
    return [
        {
            "w*": w,
            "predicted 2 d/s": 2.0 * d,
            **_by_learning_rate("counted, ", trace.change_rate, i),
            **_by_learning_rate("mean f, ", trace.frequency.mean(0), i),
        }
        for i, (w, d) in enumerate(zip(OPTIMA.tolist(), distance().tolist()))
    ]


def average_rows(ste_trace: Trace) -> list[Row]:
    """Return the table of prediction 2: time averages by learning rate, and the overall range of the moving average."""
    trace = ste_trace.between(TRANSIENT)
    lowest, highest = trace.ema_int.amin((0, 1)), trace.ema_int.amax((0, 1))
    return [
        {
            "predicted w*": w,
            **_by_learning_rate("mean q(w), ", trace.quantized.mean(0), i),
            "EMA, lowest": lowest[i].item(),
            "highest": highest[i].item(),
            "predicted q(w*)": int(q),
            "EMA rounds to": f"{lowest[i].item():.0f} .. {highest[i].item():.0f}",
        }
        for i, (w, q) in enumerate(zip(OPTIMA.tolist(), quantize(OPTIMA).tolist()))
    ]


def estimator_rows(traces: dict[str, Trace]) -> list[Row]:
    """Return the table of prediction 3: frequencies by learning rate, and the width of the band at the middle rate."""
    rows = []
    for name, estimator in ESTIMATORS.items():
        trace = traces[name].between(TRANSIENT)
        band = trace.band / LEARNING_RATES
        # the limit at the threshold from above, where the gradient is positive
        widest = estimator(torch.ones(1), torch.tensor([-0.5])).item()
        rows += [
            {
                "estimator": name,
                "w*": w,
                "predicted 2 d/s": 2.0 * d,
                **_by_learning_rate("counted, ", trace.change_rate, i),
                "band / lr, predicted <=": widest,
                "measured": band[1, i].item(),
            }
            for i, (w, d) in enumerate(zip(OPTIMA.tolist(), distance().tolist()))
        ]
    return rows


def dampening_rows(dampening_trace: Trace) -> list[Row]:
    """Return the table of prediction 4: the frequency with lambda below and above d/s."""
    measured = dampening_trace.between(TRANSIENT).change_rate
    predicted = dampened_frequency(DAMPENING_RATIOS * distance())
    rows = []
    for i, (w, d) in enumerate(zip(OPTIMA.tolist(), distance().tolist())):
        row = {"w*": w, "critical lambda d/s": d}
        for j, ratio in enumerate(DAMPENING_RATIOS.flatten().tolist()):
            row[f"{ratio:g} of it: predicted"] = predicted[j, i].item()
            row[f"{ratio:g}: measured"] = measured[j, i].item()
        rows.append(row)
    return rows


def freezing_rows(freezing_trace: Trace) -> list[Row]:
    """Return the table of prediction 5: integer changes before and after freezing, and the frozen integer, by rate."""
    before = freezing_trace.between(TRANSIENT, FREEZE_FROM)
    # the step that freezes a weight may still change its integer, to round(ema)
    after = freezing_trace.between(FREEZE_FROM + 1)
    return [
        {
            "w*": w,
            **_by_learning_rate("before, ", before.changes, i),
            "predicted after": 0,
            **_by_learning_rate("after, ", after.changes, i),
            "predicted q(w*)": int(q),
            **_by_learning_rate("held at, ", after.weight_int[-1], i),
        }
        for i, (w, q) in enumerate(zip(OPTIMA.tolist(), quantize(OPTIMA).tolist()))
    ]


def table(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table with aligned columns."""
    cells = [list(rows[0])]
    cells += [[f"{v:.4f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = [f"| {' | '.join(cell.rjust(width) for cell, width in zip(line, widths))} |" for line in cells]
    lines.insert(1, f"|{'|'.join('-' * (width + 1) + ':' for width in widths)}|")
    return "\n".join(lines)


def draw(traces: dict[str, Trace], path: Path) -> None:
    """Plot the path of one weight under each method, and measured against predicted frequencies."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    optimum, learning_rate, steps, freeze_from = 0.8, 0.2, 60, 30
    methods: dict[str, dict[str, Any]] = {
        "STE": {},
        "EWGS: smaller swings, as often": {"estimator": ewgs},
        "PSG: smaller swings, as often": {"estimator": psg},
        "DSQ: larger swings, as often": {"estimator": dsq},
        "dampening, λ = 0.9 d/s: seldom": {"dampening": 0.9 * (1.0 - optimum)},
        "dampening, λ = 1.1 d/s: it stops": {"dampening": 1.1 * (1.0 - optimum)},
        f"freezing from step {freeze_from} on: it stops": {"freeze_threshold": 0.1, "freeze_from": freeze_from},
    }
    latent_color, quantized_color, line_color = "#1f4e8c", "#f0a35e", "#777777"
    figure, axes = plt.subplots(2, 4, figsize=(16, 7.4), layout="constrained")
    for axis, (title, options) in zip(axes.flat, methods.items()):
        # with a momentum of 0.1 the averages settle within the plotted steps
        trace = simulate(
            learning_rate=learning_rate,
            steps=steps,
            momentum=0.1,
            optimum=torch.tensor([optimum], dtype=torch.float64),
            **options,
        )
        t = range(1, steps + 1)
        (latent,) = axis.plot(t, trace.latent[:, 0], color=latent_color, linewidth=1.9, zorder=3)
        (quantized,) = axis.step(t, trace.quantized[:, 0], where="mid", color=quantized_color, linewidth=1.2)
        target = axis.axhline(optimum, color=line_color, linewidth=1.2, linestyle=":")
        threshold = axis.axhline(0.5, color=line_color, linewidth=0.9, linestyle="--")
        axis.set(title=title, xlim=(0, steps), ylim=(-0.08, 1.08), xlabel=f"step, at learning rate {learning_rate:g}")
        axis.set_yticks([0, 0.5, optimum, 1], ["0", "½", "w*", "1"])
    figure.legend(
        [latent, quantized, target, threshold],
        ["latent weight w", "quantized weight q(w)", f"optimum w* = {optimum:g}", "rounding threshold"],
        loc="outside upper center",
        ncols=4,
        frameon=False,
        fontsize="large",
    )

    axis = axes[1, 3]
    axis.plot([5e-4, 1.0], [5e-4, 1.0], color=line_color, linewidth=0.9, zorder=0)
    # from large to small, so that overlapping markers all remain visible
    markers = {
        "STE": {"s": 190, "marker": "o", "color": "#c3d5ea"},
        "EWGS": {"s": 75, "marker": "s", "color": "#5b8fc7"},
        "PSG": {"s": 48, "marker": "^", "color": "white", "edgecolor": latent_color},
        "DSQ": {"s": 8, "marker": "o", "color": "#c8372d"},
    }
    for name, style in markers.items():
        measured = traces[name].between(TRANSIENT).change_rate
        predicted = (2.0 * distance()).expand_as(measured)
        axis.scatter(predicted, measured, label=name, **style)
    # a logarithmic axis cannot show 0, so only lambdas below d/s
    below = DAMPENING_RATIOS.flatten() < 1.0
    measured = traces["dampening"].between(TRANSIENT).change_rate[below]
    predicted = dampened_frequency(DAMPENING_RATIOS * distance())[below]
    axis.scatter(predicted, measured, s=26, marker="D", color=quantized_color, label="dampening, λ < d/s")
    axis.set(title="reversals per step, five w*", xlabel="predicted", ylabel="measured", xscale="log", yscale="log")
    axis.legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Simulate, print the tables and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/toy_regression"), help="folder for the plot")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    traces = run_all()
    tables = {
        "1. STE: reversals per step, counted and tracked": frequency_rows(traces["STE"]),
        "2. STE: time averages": average_rows(traces["STE"]),
        "3. Gradients times a positive factor: as many reversals per step, over another band": estimator_rows(traces),
        "4. Dampening: reversals per step, on both sides of the critical lambda": dampening_rows(traces["dampening"]),
        f"5. Freezing: integer changes in the {WINDOW // 2} steps before and after it": freezing_rows(
            traces["freezing"]
        ),
    }
    for title, rows in tables.items():
        print(f"{title}\n\n{table(rows)}\n")
    path = arguments.output / "toy_regression.png"
    draw(traces, path)
    print(f"Saved the plot to {path}.")


if __name__ == "__main__":
    main()
