"""Run one task per forked process, so that a crash, a hang or a hunger for memory of one model is a row like others."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

MEMORY = 4 * 2**30
"""Bytes of private memory that one task may have."""

GRACE = 15.0
"""Seconds after its limit in which a task may still say what it was doing."""

Row = dict[str, Any]
Task = dict[str, Any]


class OverLimit(BaseException):
    """A task took longer than it may. No error, so that nobody who goes on after errors goes on after this."""


@dataclass
class _Running:
    task: Task
    process: Any
    results: Connection
    started: float


def said(error: BaseException) -> str:
    """An error in one line, without paths: its cause, type, message, and the file and line that raised it."""
    while error.__cause__ is not None:
        error = error.__cause__
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}{place}"


def _child(work: Callable[[Task], Row], task: Task, results: Connection, limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)

    def stop(*_: Any) -> None:
        raise OverLimit(f"over {limit} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(limit)
    try:
        row = work(task)
    except BaseException as error:
        row = {"error": said(error)}
    signal.alarm(0)
    row["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    results.send(row)
    results.close()
    os._exit(0)  # what a model's libraries do at exit is of no interest


def run_tasks(
    tasks: Sequence[Task], work: Callable[[Task], Row], *, jobs: int, limit: int
) -> Iterator[tuple[Task, Row]]:
    """Each task with its row, in the order in which they finish.

    Args:
        tasks: what to do.
        work: runs in the child process.
        jobs: processes at a time.
        limit: seconds per task.
    """
    context = multiprocessing.get_context("fork")
    waiting, running = list(tasks), list[_Running]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                task = waiting.pop(0)
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_child, args=(work, task, theirs, limit), daemon=False)
                process.start()
                theirs.close()
                running.append(_Running(task, process, ours, time.monotonic()))
            wait([one.results for one in running], timeout=1.0)
            for one in list(running):
                row = _row_of(one, limit)
                if row is not None:
                    running.remove(one)
                    row["total_s"] = round(time.monotonic() - one.started, 2)
                    yield one.task, row
    finally:
        for one in running:
            one.process.kill()
            one.process.join()


def _row_of(one: _Running, limit: int) -> Row | None:
    """The row of a process that has ended or must end, or None."""
    late = time.monotonic() - one.started > limit + GRACE
    if not one.results.poll():
        if not late:
            return None
        row = {"error": f"killed after {limit + GRACE:.0f} s"}
    else:
        try:
            row = one.results.recv()
        except EOFError:
            one.process.join()
            row = {"error": f"the process ended with {_ending(one.process.exitcode)}"}
    one.process.kill()
    one.process.join()
    one.results.close()
    return row


def _ending(code: int | None) -> str:
    return signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
