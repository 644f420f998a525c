"""Compiled models that threads call, compile and explain at once, and that a forked child goes on with."""

from __future__ import annotations

import gc
import multiprocessing
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import attncompile as package
from attncompile.backend.compilation import alive
from tests.apart import WAIT
from tests.backend.test_hygiene import Attention, compiled_of, inputs_of, model_of, require_same


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


RESTS = ["eager", pytest.param("inductor", marks=pytest.mark.slow)]


def in_threads(work: Callable[[int], None], numbers: Sequence[int]) -> None:
    """Run work for each number in a thread of its own; what one of them raises is raised."""
    failures: list[BaseException] = []

    def safely(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=safely, args=(number,)) for number in numbers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    if failures:
        raise failures[0]


@pytest.mark.parametrize("rest", RESTS)
def test_threads_compile_and_call_different_models_at_once(rest: str) -> None:
    models = [model_of(number) for number in range(4)]
    together = threading.Barrier(len(models))
    results: dict[int, list[torch.Tensor]] = {}

    def work(number: int) -> None:
        with torch.no_grad():
            together.wait(WAIT)
            compiled = compiled_of(models[number], rest=rest)
            results[number] = [compiled(inputs_of(models[number], length)) for length in (11, 7, 23)]

    in_threads(work, range(len(models)))
    assert sorted(results) == list(range(len(models)))
    for number, model in enumerate(models):
        for length, result in zip((11, 7, 23), results[number], strict=True):
            require_same(result, model, inputs_of(model, length))


@pytest.mark.parametrize("rest", RESTS)
def test_threads_call_one_model_at_once(rest: str) -> None:
    model = model_of(1)
    compiled = compiled_of(model, rest=rest)
    results: dict[int, torch.Tensor] = {}

    def work(length: int) -> None:
        with torch.no_grad():
            results[length] = compiled(inputs_of(model, length))

    in_threads(work, (5, 9, 17, 33))
    assert sorted(results) == [5, 9, 17, 33]
    for length, result in results.items():
        require_same(result, model, inputs_of(model, length))


@pytest.mark.parametrize("rest", RESTS)
def test_threads_compile_and_explain_while_another_calls(rest: str) -> None:
    """A server that goes on answering while models are loaded and dropped beside it."""
    served = model_of(3)
    serving = compiled_of(served, rest=rest)
    answers: list[torch.Tensor] = []
    with torch.no_grad():
        answers.append(serving(inputs_of(served)))
    loaded = threading.Event()

    def work(number: int) -> None:
        with torch.no_grad():
            if number == 3:
                while not loaded.is_set():
                    answers.append(serving(inputs_of(served)))
                return
            try:
                for _ in range(3):
                    model = model_of(number)
                    compiled = package.compile(model, rest=rest)
                    require_same(compiled(inputs_of(model)), model, inputs_of(model))
                    assert len(package.explain(compiled).sites) == 1
                    del compiled
                    assert "graph " in str(package.explain())
                    gc.collect()
            finally:
                if number == 0:
                    loaded.set()

    in_threads(work, (3, 0, 1))
    assert len(answers) > 1 and all(torch.equal(answer, answers[0]) for answer in answers)
    require_same(answers[0], served, inputs_of(served))


def _in_child(compiled: Any, model: Attention, rest: str, answers: Any) -> None:
    with torch.no_grad():
        known = compiled(inputs_of(model))
        fresh = model_of(2)
        new = compiled_of(fresh, rest=rest)(inputs_of(fresh))
    answers.put((known.numpy(), new.numpy(), len(alive())))


@pytest.mark.parametrize("rest", RESTS)
def test_a_forked_child_calls_a_compiled_model_and_compiles_one(
    rest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # so that the child itself has something to compile
    model = model_of(0)
    compiled = compiled_of(model, rest=rest)
    with torch.no_grad():
        compiled(inputs_of(model))
    before = len(alive())  # with what Dynamo keeps of other tests: the first half of a graph that was broken
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python's own word on threads and forks
        child = context.Process(target=_in_child, args=(compiled, model, rest, answers))
        child.start()
    known, new, count = answers.get(timeout=WAIT)
    child.join(WAIT)
    assert child.exitcode == 0 and count == before + 1
    require_same(torch.from_numpy(known), model, inputs_of(model))
    require_same(torch.from_numpy(new), model_of(2), inputs_of(model_of(2)))
