"""What benchmarks write down: how each result was timed, and every row as soon as it is there."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from benchmarks import report, timing


@dataclass
class Graph:
    """Stands for a CUDA graph where there is no GPU; counts replays."""

    replays: int = 0

    def replay(self) -> None:
        self.replays += 1


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Graph:
    graph = Graph()

    @contextmanager
    def capture(_: Graph) -> Iterator[None]:
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return graph


def test_a_captured_run_is_replayed(made: Graph) -> None:
    calls: list[int] = []
    timed = timing.graphed(lambda: calls.append(1), 3)
    assert (timed.timed, len(calls)) == ("graph", 3)
    timed.run()
    assert (made.replays, len(calls)) == (1, 3)


def test_what_cannot_be_captured_says_that_calls_were_timed(made: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    @contextmanager
    def refuse(_: Graph) -> Iterator[None]:
        raise RuntimeError("operation not permitted when stream is capturing")
        yield

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    timed = timing.graphed(lambda: calls.append(1), 3)
    timed.run()
    assert (timed.timed, len(calls), made.replays) == ("calls", 3, 0)
    result = timing.summary(timed, [2.0, 1.0, 4.0])
    assert result == {"timed": "calls", "ms": 2.0, "min_ms": 1.0, "spread": 1.5}
    assert report.shown(result, "{ms:.1f} ms") == "2.0 ms (calls)"
    assert report.shown({**result, "timed": "graph"}, "{ms:.1f} ms") == "2.0 ms"
    assert report.shown({"failure": "no such variant"}, "{ms:.1f} ms") == "no such variant"


def test_rows_are_written_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "machine", lambda: {"device": "none"})
    written = report.Report(tmp_path / "x.json", {"rounds": 2})
    written.add({"name": "one"})
    assert json.loads((tmp_path / "x.json").read_text()) == {"device": "none", "rounds": 2, "rows": [{"name": "one"}]}
    written.add({"name": "two"})
    assert [row["name"] for row in json.loads((tmp_path / "x.json").read_text())["rows"]] == ["one", "two"]


def test_rows_are_chosen_by_parts_of_their_names() -> None:
    works = (Path("d64-causal"), Path("d128-full"))
    assert report.chosen(works, "") == works
    assert report.chosen(works, "128,window") == works[1:]


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 6, 7])
def test_each_contender_runs_behind_each_other_one_equally_often(number: int) -> None:
    every = timing.orders(number)
    assert all(sorted(order) == list(range(number)) for order in every)
    behind = Counter(pair for order in every for pair in itertools.pairwise(order))
    assert len(behind) == number * (number - 1)
    assert len(set(behind.values())) <= 1


def test_a_round_times_everybody_once_in_an_order_of_its_own_and_settled() -> None:
    ran: list[str] = []

    class Named(timing.Timed):
        def milliseconds(self, rounds: int = 1) -> float:
            ran.append(self.run().upper())
            return timing.SETTLING / 2

    def of(name: str) -> timing.Timed:
        return Named(lambda: ran.append(name) or name, 1, "calls")

    times = timing.interleaved({name: of(name) for name in "abc"}, 6)
    assert {name: len(found) for name, found in times.items()} == {"a": 6, "b": 6, "c": 6}
    timed = "".join(ran[6:])  # behind how long each takes
    rounds = [timed[start : start + 12] for start in range(0, len(timed), 12)]
    assert len(set(rounds)) == len(rounds) == 6
    for order in rounds:
        assert sorted(order[start : start + 4] for start in range(0, 12, 4)) == ["aaaA", "bbbB", "cccC"]
