"""Interleaved measurements: every contender takes its turn in each round, so that all meet the same machine."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Result:
    """What one contender took.

    Attributes:
        name: Of the contender.
        median: Median time in seconds.
        low: The fastest.
        high: The slowest.
        ratio: Median of the ratios to the first contender's time in the same round.
    """

    name: str
    median: float
    low: float
    high: float
    ratio: float


def race(contenders: Mapping[str, Callable[[], float]], rounds: int, warmup: int = 1) -> list[Result]:
    """Let contenders take turns.

    Args:
        contenders: Name -> a function that does the work once and returns the seconds that count. The first is what
            the others are compared with.
        rounds: Rounds that count.
        warmup: Rounds before them that do not.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(warmup + rounds):
        for name, contender in contenders.items():
            seconds = contender()
            if i >= warmup:
                times[name].append(seconds)
    first = next(iter(times.values()))
    return [
        Result(name, statistics.median(t), min(t), max(t), statistics.median(a / b for a, b in zip(t, first)))
        for name, t in times.items()
    ]


def timed(function: Callable[[], object]) -> Callable[[], float]:
    """A contender from a function whose whole time counts."""

    def run() -> float:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    return run


def machine() -> str:
    """The machine and the versions, in one line."""
    threads = torch.get_num_threads()
    return f"{platform.machine()}, {threads} thread{'s' if threads > 1 else ''}, torch {torch.__version__}"


def table(title: str, results: list[Result], unit: float = 1e-3) -> str:
    """A Markdown table of a race: median, spread and ratio."""
    name = {1e-3: "ms", 1.0: "s"}[unit]
    lines = [f"| {title} | median {name} | fastest to slowest | ratio |", "|---|---|---|---|"]
    lines += [
        f"| {r.name} | {r.median / unit:.1f} | {r.low / unit:.1f} to {r.high / unit:.1f} | {r.ratio:.2f} |"
        for r in results
    ]
    return "\n".join(lines)
