"""The record of what kernels take of GPUs: of every row, for every target, on the oldest and the newest Triton."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton.experimental.gluon")

from attncompile.codegen.gluon.structure import TRITON
from attncompile.codegen.triton.ahead import TARGETS
from benchmarks.ahead_of_time import Work, jobs, works

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "ahead_of_time.json"


def releases() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RESULTS.read_text())["releases"]
    return found


@pytest.mark.parametrize("work", works(), ids=lambda work: work.name)
def test_every_row_has_kernels_for_every_target(work: Work) -> None:
    found = [(language, target) for language, target, _ in jobs(work)]
    without = {target for target in TARGETS if work.name == "fp8" and target.arch in (80, "gfx942")}
    assert {target for language, target in found if language == "triton"} == set(TARGETS) - without
    assert work.hopper == any(language == "gluon" for language, _ in found)


@pytest.mark.parametrize("end", TRITON, ids=str)
def test_both_ends_are_recorded_and_everything_compiled(end: tuple[int, int]) -> None:
    (release,) = (found for version, found in releases().items() if version.startswith(f"{end[0]}.{end[1]}."))
    assert not [row for row in release["rows"] if "failure" in row]
    expected = {(work.name, language, str(target)) for work in works() for language, target, _ in jobs(work)}
    recorded = {(row["work"], row["language"], row["target"]) for row in release["rows"]}
    wanted = {row for row in expected if row[0] in {name for name, _, _ in recorded}}
    assert recorded == wanted and {language for _, language, _ in recorded} >= {"gluon", "triton"}
