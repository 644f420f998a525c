"""The benchmark of whole models: who runs at the same time, and what is compared with what."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import backend
from tests.apart import ROOT, WAIT

TRAINING = next(work for work in backend.WORKS if work.phase == "training")


def test_contenders_whose_times_are_compared_compile_in_one_group() -> None:
    """Ours and both ways of Inductor: of training steps the memory holds three at a time."""
    groups = [[contender.name for contender in group] for group in TRAINING.groups()]
    assert groups == [["sdpa", "sdpa cuDNN", "flex"], ["inductor static", "inductor", "attncompile"]]
    assert all(len(work.groups()) == 1 for work in backend.WORKS if work is not TRAINING)
    few = dataclasses.replace(TRAINING, contenders=TRAINING.contenders[3:])
    assert [len(group) for group in few.groups()] == [3]


def test_the_judge_is_the_first_that_gave_something(tmp_path: Path) -> None:
    work = next(work for work in backend.WORKS if work.name == "bloom-prefill")
    names = [contender.name for contender in work.contenders]
    results: dict[tuple[str, int], dict[str, Any]] = {(name, 8192): {} for name in names}
    saved = {}
    for number, name in enumerate(names[1:], 1):  # the judge found no memory
        saved[name, 8192] = tmp_path / f"{number}.pt"
        torch.save(torch.full((4,), float(number)), saved[name, 8192])
    row = backend.compared(work, 8192, results, saved, None)
    assert (row["judge"], list(row["results"])) == (names[1], names)
    assert [row["results"][name].get("difference") for name in names] == [None, 0.0, 1.0, 2.0, 3.0]


def test_weights_of_the_judge_are_rounded_as_those_of_the_others() -> None:
    class Narrow(backend.Work):
        dtype = torch.bfloat16

    work = Narrow("minilm", "minilm", "prefill", (128,), (backend.FLOAT32, backend.EAGER), device="cpu")
    judge, other = (backend.model_of(work, contender, 1) for contender in work.contenders)
    pairs = list(zip(judge.parameters(), other.parameters(), strict=True))
    assert pairs and all(mine.dtype is torch.float32 and torch.equal(mine, its.float()) for mine, its in pairs)


@pytest.mark.slow
def test_groups_end_in_one_file(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.backend", str(tmp_path / "out.json"), "--device", "cpu"]
    few = ["--rows", "minilm", "--contenders", "sdpa,attncompile", "--layers", "1", "--rounds", "1", "--together", "1"]
    done = subprocess.run([*command, *few], cwd=ROOT, capture_output=True, text=True, timeout=WAIT, check=False)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["rows"]
    assert row["judge"] == "sdpa" and [found["group"] for found in row["results"].values()] == [0, 1]
    assert all(found["ms"] > 0 and found["difference"] < 1e-5 for found in row["results"].values())
