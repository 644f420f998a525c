"""How long a kernel takes: CUDA graphs, events around them, and rounds in which everybody runs once."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

Run = Callable[[], Any]


@dataclass(frozen=True)
class Timed:
    """So many calls, ready to be timed together.

    Attributes:
        run: makes all of them.
        repeats: how many calls that is.
        timed: ``graph`` when they are replayed as a CUDA graph, which times kernels; ``calls`` when Python makes them
            one after the other, which times the host too wherever that is slower than the device.
        kept: what the runs need and do not hold: a graph keeps neither the tensors that it reads nor the library
            objects whose kernels it calls.
    """

    run: Run
    repeats: int
    timed: Literal["graph", "calls"]
    kept: Run | None = None

    def milliseconds(self, rounds: int = 1) -> float:
        """Time of one call, by events around so many runs."""
        return milliseconds(self.run, rounds) / self.repeats


def milliseconds(run: Run, repeats: int) -> float:
    """Time of one call, by events around several."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        run()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / repeats


def repeats_of(run: Run, together: float, most: int) -> int:
    """How many calls take about ``together`` milliseconds: at least 1, at most ``most``."""
    return max(1, min(most, int(together / max(milliseconds(run, 2), 1e-3))))


def called(run: Run, repeats: int) -> Timed:
    """So many calls, made by Python."""

    def loop() -> Any:
        for _ in range(repeats - 1):
            run()
        return run()

    return Timed(loop, repeats, "calls")


def graphed(run: Run, repeats: int) -> Timed:
    """A CUDA graph of so many calls: its replay times kernels, not the host; the calls themselves where that fails."""
    calls = called(run, repeats)
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = calls.run()
    except Exception:  # a library may refuse to be captured in ways of its own
        torch.cuda.synchronize()
        return calls

    def replay() -> Any:
        graph.replay()
        return found

    return Timed(replay, repeats, "graph", kept=run)


def orders(number: int) -> list[list[int]]:
    """Orders of so many contenders in which each comes right behind each other one equally often.

    What runs behind a kernel that heats the card gets a lower clock than what runs behind one that leaves it cool: an
    order that never changes favours the same contenders in every round.

    Follows: Williams 1949, Experimental Designs Balanced for the Estimation of Residual Effects of Treatments.
    """
    zigzag = [(place + 1) // 2 if place % 2 else -(place // 2) for place in range(number)]
    rows = [[(start + step) % number for step in zigzag] for start in range(number)]
    return rows if number % 2 == 0 else [turned for row in rows for turned in (row, row[::-1])]


SETTLING = 50.0
"""Milliseconds that a contender runs before it is timed: by then a card's clock is what its own power allows."""


def interleaved(running: Mapping[str, Timed], rounds: int, runs: int = 1) -> dict[str, list[float]]:
    """Milliseconds of one call in each round; a round times everybody once, in an order of its own (:func:`orders`).

    Everybody runs for about :data:`SETTLING` before its time is taken, in every round.
    """
    before = {
        name: max(1, round(SETTLING / max(timed.milliseconds() * timed.repeats, 1e-3)))
        for name, timed in running.items()
    }
    times: dict[str, list[float]] = {name: [] for name in running}
    names = list(running)
    every = orders(len(names))
    for turn in range(rounds):
        for place in every[turn % len(every)]:
            name = names[place]
            for _ in range(before[name]):
                running[name].run()
            times[name].append(running[name].milliseconds(runs))
    return times


def summary(timed: Timed, times: list[float]) -> dict[str, Any]:
    """The median in milliseconds, the fastest, how far all spread (relative to the median), and how it was timed."""
    median = statistics.median(times)
    spread = (max(times) - min(times)) / median
    return {"timed": timed.timed, "ms": median, "min_ms": min(times), "spread": spread}
