"""Every attempt on one version of ONNX Runtime: prepared models, a child process, and the judgement of its results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from attncompile.codegen.onnx.tried import Outcome
from benchmarks.onnx_capabilities import around, group_query, multi_head, opsets, recurrent, standard
from benchmarks.onnx_capabilities.attempt import Attempt, Prepared

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
SECONDS = 60.0
"""After which a model that has not ended is killed, and counts as a crash."""

WHOLE_MODELS = ("opset", "IR version")
"""Attempts that no single operator stands for: a provider may leave nodes of them to the CPU."""

_WORST: tuple[Outcome, ...] = ("crashed", "refused", "unstable", "wrong", "ignored", "right")
"""Of several calls of one attempt the first of these counts."""


@dataclass(frozen=True)
class Row:
    """An attempt in one dtype, with the numbers of its prepared models."""

    attempt: Attempt
    dtype: str
    prepared: Sequence[Prepared]
    first: int


@dataclass(frozen=True)
class Verdict:
    """What a version does, and in words why it is not right."""

    outcome: Outcome
    said: str = ""


def all_attempts() -> list[Attempt]:
    """Every attempt, in the table's order."""
    modules = (group_query, multi_head, standard, recurrent, around, opsets)
    return [attempt for module in modules for attempt in module.attempts()]


def prepare(folder: Path, attempts: Sequence[Attempt]) -> list[Row]:
    """Write the models and inputs of all attempts into a folder, numbered."""
    rows: list[Row] = []
    count = 0
    for attempt in attempts:
        for dtype in attempt.dtypes:
            prepared = attempt.cases(dtype)
            for place, one in enumerate(prepared):
                number = count + place
                (folder / f"{number}.onnx").write_bytes(one.model)
                np.savez(folder / f"{number}.npz", **one.fed)  # type: ignore[arg-type]
                shared = {f"output_{output}": f"input_{source}" for output, source in one.shared.items()}
                told = {"shared": shared, "operator": attempt.operator not in WHOLE_MODELS}
                (folder / f"{number}.json").write_text(json.dumps(told))
            rows.append(Row(attempt, dtype, prepared, count))
            count += len(prepared)
    return rows


def judge(folder: Path, rows: Sequence[Row], site: Path | None, provider: str) -> tuple[str, list[Verdict]]:
    """Run all models on one ONNX Runtime; its version, and a verdict for each row.

    Args:
        folder: that :func:`prepare` filled; rows: what it returned.
        site: folder of an installed ONNX Runtime; ``None`` for the interpreter's own.
        provider: ``cpu`` or ``cuda``.

    Raises:
        RuntimeError: when that ONNX Runtime cannot be imported, or has no such provider.
    """
    total = sum(len(row.prepared) for row in rows)
    version, said = _run_all(folder, total, site, PROVIDERS[provider])
    made = []
    for row in rows:
        verdicts = [
            _verdict(one, said[row.first + place], folder / f"{row.first + place}.out.npz")
            for place, one in enumerate(row.prepared)
        ]
        made.append(min(verdicts, key=lambda verdict: _WORST.index(verdict.outcome)))
    for leftover in folder.glob("*.out.npz"):
        leftover.unlink()
    return version, made


def _run_all(folder: Path, total: int, site: Path | None, provider: str) -> tuple[str, dict[int, str]]:
    version, said, first = "", {}, 0
    while first < total:
        for line in _lines(folder, first, total, site, provider):
            number, _, rest = line.partition(" ")
            if number == "version":
                version = rest
                continue
            first = int(number)
            if rest != "begins":
                said[first] = rest
        if not version:
            raise RuntimeError(f"ONNX Runtime in {site} cannot be imported, or has no {provider}")
        if first not in said:  # it began and did not end: once more alone, for it may not be to blame
            alone = [line.partition(" ")[2] for line in _lines(folder, first, first + 1, site, provider)]
            said[first] = alone[-1] if len(alone) > 2 else "crashed"
        first += 1
    return version, said


def _lines(folder: Path, first: int, last: int, site: Path | None, provider: str) -> Iterator[str]:
    """What a child says, line by line; it is killed when it says nothing for too long."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if site is not None:
        environment["PYTHONPATH"] = str(site)
    command = [sys.executable, "-P", str(Path(__file__).with_name("child.py")), str(folder), provider]
    child = subprocess.Popen(
        [*command, str(first), str(last)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert child.stdout is not None
    try:
        while (line := _within(SECONDS, child.stdout.readline, child.kill)) != "":
            yield line.strip()
    finally:
        child.kill()
        child.wait()


def _within(seconds: float, read: Callable[[], str], stop: Callable[[], None]) -> str:
    """A line; ``stop`` is called, and the reading ends, when none comes in time."""
    import threading

    timer = threading.Timer(seconds, stop)
    timer.start()
    try:
        return read()
    finally:
        timer.cancel()


def _verdict(prepared: Prepared, said: str, results: Path) -> Verdict:
    if said == "crashed":
        return Verdict("crashed", "the process ends")
    if said.startswith("refused"):
        return Verdict("refused", said.removeprefix("refused "))
    found = dict(np.load(results))
    unstable, ignored = False, True
    worst = ""
    for number, (expected, other) in enumerate(zip(prepared.expected, prepared.others, strict=True)):
        if expected is None:
            continue
        array = found.get(f"output_{number}")
        if array is None:
            return Verdict("wrong", f"no result {number}")
        got, again = (
            torch.from_numpy(np.asarray(one)).double()[prepared.judged.get(number, slice(None))]
            for one in (array, found[f"again_output_{number}"])
        )
        unstable = unstable or got.shape != again.shape or _apart(got, again) > 0
        if got.shape != expected.right.shape:
            shapes = f"{list(got.shape)}, not {list(expected.right.shape)}"
            return Verdict("wrong", f"result {number} has the shape {shapes}")
        error = _apart(got, expected.right)
        if error <= expected.bound:
            if other is not None and _apart(got, other) > expected.bound:
                ignored = False  # this one does follow the feature
            continue
        worst = worst or f"result {number} is {error:.2g} off, where {expected.bound:.1g} is rounding"
        if other is None or _apart(got, other) > expected.bound:
            ignored = False
    if unstable:
        return Verdict("unstable", worst or "a second run gave something else")
    if not worst:
        return Verdict("right")
    return Verdict("ignored", "as without it") if ignored else Verdict("wrong", worst)


def _apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference; infinite where one has NaN or an infinity and the other has not."""
    other = other.double()
    same = (one == other) | (one.isnan() & other.isnan())
    apart = torch.where(same, 0.0, (one - other).abs())
    return float(apart.nan_to_num(torch.inf, torch.inf).max()) if apart.numel() else 0.0
