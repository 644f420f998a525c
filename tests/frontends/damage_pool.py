"""The process that reads damaged files, from outside: started again when one takes it down or keeps it too long."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

ROOT = Path(__file__).parents[2]
PATIENCE = 120.0
"""Seconds after which a file has hung; a slow machine reads the slowest of them in a few."""


class Reader:
    """Does one job after the other in a process of its own."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end()

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
            environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.frontends.damage_worker"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT,
            )  # fmt: skip
        return self._process

    def read(self, do: str, file: Path, out: Path | None = None) -> tuple[str, str]:
        """What became of a file: ``made``, ``refused`` or ``failed``, and what was said of a failure."""
        process = self._started()
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps({"do": do, "file": str(file), "out": str(out or "")}) + "\n")
        process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], PATIENCE)
        line = process.stdout.readline() if ready else ""
        if line:
            reply = json.loads(line)
            return reply["outcome"], reply["said"]
        if not ready:
            self._end()
            return "failed", f"no answer within {PATIENCE:g} seconds"
        code = process.wait()
        self._process = None
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return "failed", f"the process ended: {name}"


__all__ = ["Reader"]
