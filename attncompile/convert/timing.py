"""Size and latency before and after, in ONNX Runtime on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir

from attncompile.convert.calibration import Call
from attncompile.convert.memory import release
from attncompile.convert.runtime import feeds, session
from attncompile.report import Measurement

WARM_UP = 3
ROUNDS = 7
"""Repetitions of each between two looks at the medians."""

SETTLED = 0.01
"""The ratio of both medians has settled when one more set of rounds moves it by less than this share."""

SECONDS = 30.0
"""Time after which the medians are taken as they are."""


def size_measurement(before: Path, after: Path, which: str = "") -> Measurement:
    """Size of both models with their weights, in megabytes; ``which`` says of what, behind a space."""
    sizes = [_bytes(path) / 1e6 for path in (before, after)]
    return Measurement(name=f"size{which}", before=sizes[0], after=sizes[1], unit="MB", note="weights included")


def _bytes(path: Path) -> int:
    """Bytes of a model's file and of the weights beside it, without the gaps that align these."""
    tensors = (value.const_value for graph in onnx_ir.load(path).graphs() for value in graph.initializers.values())
    beside = sum(tensor.nbytes for tensor in tensors if isinstance(tensor, onnx_ir.ExternalTensor))
    return path.stat().st_size + beside


def latency_measurement(
    before: Path, after: Path, provider: str, call: Call, what: str, which: str = ""
) -> Measurement:
    """Latency of both models on a call, in milliseconds.

    Args:
        before, after: what to run; what: what ``before`` is, in words.
        provider: where; call: on what; which: of what model, behind a space.
    """
    medians, rounds, settled = medians_in_turns([partial(_loaded, file, provider, call) for file in (before, after)])
    note = f"medians of {rounds} runs in turns" + ("" if settled else ", not settled: the machine is busy")
    return Measurement(
        name=f"latency{which}, {call.what}",
        before=1e3 * medians[0],
        after=1e3 * medians[1],
        unit="ms",
        note=f"{note}; before is {what}",
    )


def _loaded(file: Path, provider: str, call: Call) -> Callable[[], object]:
    """A model in a session of its own, which ends with what is returned."""
    loaded = session(file, provider, defaults=True)
    return partial(loaded.run, None, feeds(loaded, call))


def medians_in_turns(
    loads: Sequence[Callable[[], Callable[[], object]]], seconds: float = SECONDS
) -> tuple[list[float], int, bool]:
    """Median seconds of functions of which one at a time may be in memory.

    Each is loaded, run and let go in its turn, and the order of the turns is reversed each time, so that a machine that
    slows down slows all of them. Where its weights come to lie in memory, which moves a latency by some per cent, is
    another place in each turn.

    Args:
        loads: give what to run.
        seconds: see :func:`interleaved_medians`, which gives the same results.
    """
    times: list[list[float]] = [[] for _ in loads]
    turns = list(zip(times, loads, strict=True))

    def take_turns() -> None:
        for record, load in turns:
            run = load()
            for _ in range(WARM_UP):
                run()
            record += [_seconds_of(run) for _ in range(ROUNDS)]
            del run
            release()
        turns.reverse()

    return _settled_medians(times, take_turns, seconds)


def interleaved_medians(
    runs: Sequence[Callable[[], object]], seconds: float = SECONDS
) -> tuple[list[float], int, bool]:
    """Median seconds of each function, in turns until the ratio of the first two medians settles (of one, its own).

    Returns:
        The medians, how often each was run, and whether the ratio settled within the time.
    """
    for _ in range(WARM_UP):
        for run in runs:
            run()
    times: list[list[float]] = [[] for _ in runs]

    def interleave() -> None:
        for _ in range(ROUNDS):
            for record, run in zip(times, runs, strict=True):
                record.append(_seconds_of(run))

    return _settled_medians(times, interleave, seconds)


def _seconds_of(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _settled_medians(
    times: Sequence[Sequence[float]], measure: Callable[[], None], seconds: float
) -> tuple[list[float], int, bool]:
    """What :func:`interleaved_medians` gives; ``measure`` adds to all times."""
    end = time.perf_counter() + seconds
    last = 0.0
    while True:
        measure()
        medians = [float(np.median(record)) for record in times]
        ratio = medians[0] / medians[1] if len(medians) > 1 else medians[0]
        settled = abs(ratio - last) < SETTLED * ratio
        if settled or time.perf_counter() > end:
            return medians, len(times[0]), settled
        last = ratio


def slower(measurements: Sequence[Measurement]) -> list[str]:
    """A sentence for every latency that grew by more than a twentieth."""
    return [
        f"SLOWER than before: {row.name} went from {_digits(row.before)} to {_digits(row.after)} ms on this machine"
        for row in measurements
        if row.unit == "ms" and row.before is not None and row.after > 1.05 * row.before
    ]


def _digits(milliseconds: float) -> str:
    """As many digits as tell a twentieth apart."""
    return f"{milliseconds:.1f}" if milliseconds >= 10 else f"{milliseconds:.3g}"
