"""Interleaved measurements: all contenders take turns in each round, so that the machine's state affects all alike."""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Result:
    """The times of one contender.

    Attributes:
        name: Name of the contender.
        times: Seconds in each round.
    """

    name: str
    times: Sequence[float]

    @property
    def median(self) -> float:
        """Median time in seconds."""
        return statistics.median(self.times)

    def ratio(self, other: Result) -> float:
        """Return the median of the ratios to another contender's time in the same round."""
        return statistics.median(a / b for a, b in zip(self.times, other.times))


def race(contenders: Mapping[str, Callable[[], float]], rounds: int, warmup: int = 1) -> list[Result]:
    """Let contenders take turns, and return their times.

    Args:
        contenders: Name -> a function that does the work once and returns the seconds to count.
        rounds: Number of rounds that count.
        warmup: Number of rounds before these, which do not count.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(warmup + rounds):
        for name, contender in contenders.items():
            seconds = contender()
            if i >= warmup:
                times[name].append(seconds)
    return [Result(name, t) for name, t in times.items()]


def timed(function: Callable[[], object]) -> Callable[[], float]:
    """Return a contender that counts the whole time of a function."""

    def run() -> float:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    return run


_KEPT_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_MMAP_THRESHOLD_": str(2**40)}


def keep_memory() -> None:
    """Restart the script once, in a process that returns no memory to the operating system.

    By default, glibc returns free memory at the top of the heap, and the memory of large tensors always, so that each
    step gets it again page by page. The cost for a contender depends on the heap that other contenders left behind.
    """
    if any(os.environ.get(name) != value for name, value in _KEPT_MEMORY.items()):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **_KEPT_MEMORY})


def machine() -> str:
    """Return the machine, the number of threads and the torch version, in one line."""
    threads = torch.get_num_threads()
    return f"{platform.machine()}, {threads} thread{'s' if threads > 1 else ''}, torch {torch.__version__}"


def table(title: str, results: list[Result], unit: float = 1e-3) -> str:
    """Return a Markdown table of a race: median, spread and ratio to the first contender."""
    name = {1e-3: "ms", 1.0: "s"}[unit]
    lines = [f"| {title} | median {name} | fastest to slowest | ratio |", "|---|---|---|---|"]
    lines += [
        f"| {r.name} | {r.median / unit:.1f} | {min(r.times) / unit:.1f} to {max(r.times) / unit:.1f} "
        f"| {r.ratio(results[0]):.2f} |"
        for r in results
    ]
    return "\n".join(lines)
