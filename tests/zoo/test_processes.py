"""A crash, a hang, an error and a hunger for memory of one task are rows like others."""

from __future__ import annotations

import os
import signal

from benchmarks.zoo.processes import MEMORY, Row, Task, run_tasks


def work(task: Task) -> Row:
    if task["does"] == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    if task["does"] == "hang":
        while True:
            try:
                signal.pause()
            except Exception:
                continue  # a model whose handlers go on after everything
    if task["does"] == "eat":
        return {"size": len(bytearray(MEMORY))}
    if task["does"] == "raise":
        raise ValueError("no such thing") from LookupError("first cause")
    return {"answer": 42}


def test_every_end_is_a_row() -> None:
    tasks = [{"does": name} for name in ("answer", "raise", "crash", "eat", "hang")]
    rows = {task["does"]: row for task, row in run_tasks(tasks, work, jobs=2, limit=2)}
    assert rows["answer"]["answer"] == 42 and rows["answer"]["peak_mb"] > 0
    assert rows["raise"]["error"].startswith("LookupError: first cause")
    assert rows["crash"]["error"] == "the process ended with SIGKILL"
    assert rows["eat"]["error"].startswith("MemoryError")
    assert rows["hang"]["error"].startswith("OverLimit: over 2 s")
