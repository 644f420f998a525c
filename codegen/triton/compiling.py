"""Compiling generated kernels in processes of their own: at the same time, and where a crash is theirs alone.

A worker imports a module, makes tensors of zeros like those of the call, and calls it once. Triton's cache on disk then
has what this process needs. What a worker says goes through a pipe of its own: compilers print as they like.

    python -m attncompile.codegen.triton.compiling
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from attncompile.codegen.triton.generate import GeneratedModule

MOST = 8
"""Workers; each keeps a context on the GPU, about half a gigabyte."""
LONGEST = 200
"""Characters of what is said."""


class Workers:
    """Processes that compile; each starts with the first job that finds none idle, all end with :meth:`close`."""

    def __init__(self, count: int | None = None) -> None:
        self.count = count or max(1, min(MOST, (os.cpu_count() or 1) // 2))
        self._pool = ThreadPoolExecutor(self.count, "attncompile-compiling")
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._all: list[_Worker] = []

    def submit(self, module: GeneratedModule, tensors: Sequence[torch.Tensor]) -> Future[str | None]:
        """Compile a module for tensors like these; gives what went wrong, or ``None``."""
        job = {
            "name": module.name,
            "source": module.source,
            "tensors": [[list(t.shape), list(t.stride()), str(t.dtype).removeprefix("torch.")] for t in tensors],
            "device": str(tensors[0].device),
        }
        return self._pool.submit(self._run, job)

    def _run(self, job: dict[str, Any]) -> str | None:
        try:
            worker = self._idle.get_nowait()
        except queue.Empty:
            worker = _Worker()
            self._all.append(worker)
        said = worker.ask(job)
        if said is None:
            worker.close()
            return "its process crashed"
        self._idle.put(worker)
        return said or None

    def stop(self) -> None:
        """End the processes, whatever they are at, and begin anew with the next job."""
        pool, self._pool = self._pool, ThreadPoolExecutor(self.count, "attncompile-compiling")
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in self._all:
            worker.close()
        pool.shutdown()
        for worker in self._all:
            worker.close()  # one may have started in between
        self._idle, self._all = queue.SimpleQueue(), []

    def close(self) -> None:
        """End the processes, whatever they are at."""
        self.stop()
        self._pool.shutdown()


class _Worker:
    """A process and the pipes to it."""

    def __init__(self) -> None:
        replies, told = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "attncompile.codegen.triton.compiling", str(told)],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=(told,), text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)},
        )  # fmt: skip
        os.close(told)
        self._replies = os.fdopen(replies, encoding="utf-8")

    def ask(self, job: dict[str, Any]) -> str | None:
        """What went wrong with a job, empty for nothing; ``None`` when the process has ended."""
        assert self._process.stdin is not None  # it was asked for
        try:
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
            line = self._replies.readline()
        except (OSError, ValueError):  # it was killed, and its pipes closed
            return None
        return str(json.loads(line)["error"]) if line else None

    def close(self) -> None:
        """Kill it."""
        self._process.kill()
        self._process.wait()
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):  # what was being written goes nowhere
                self._process.stdin.close()
        self._replies.close()


def compiled(job: dict[str, Any]) -> str:
    """Do a job in this process; what went wrong in a line, empty for nothing."""
    from attncompile.codegen.triton.cache import load

    try:
        with torch.no_grad():
            run = load(GeneratedModule(job["name"], job["source"], ()))
            run(*(_zeros(shape, strides, dtype, job["device"]) for shape, strides, dtype in job["tensors"]))
            if torch.device(job["device"]).type == "cuda":
                torch.cuda.synchronize(job["device"])
    except Exception as error:  # compilers and drivers raise what they like
        return (str(error).splitlines() or [type(error).__name__])[0][:LONGEST]
    return ""


def _zeros(shape: list[int], strides: list[int], dtype: str, device: str) -> torch.Tensor:
    """A tensor as it lies, of zeros: as positions and lengths they are within every bound."""
    return torch.empty_strided(shape, strides, dtype=getattr(torch, dtype), device=device).zero_()


def main() -> None:
    """Answer each job of a line of standard input in a line of the pipe whose number is the argument."""
    with os.fdopen(int(sys.argv[1]), "w", encoding="utf-8") as replies:
        for line in sys.stdin:
            replies.write(json.dumps({"error": compiled(json.loads(line))}) + "\n")
            replies.flush()


if __name__ == "__main__":
    main()
