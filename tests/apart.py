"""Code in a process of its own, where no test framework keeps log records or hooks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
WAIT = 300.0
"""Seconds after which a child process or thread that has not ended hangs: they take a few."""


def finished(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process that has run code, with what it printed."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=False,
    )


def run_apart(code: str, *arguments: str, **environment: str) -> str:
    """What code prints; AssertionError, with what it said, when it fails."""
    done = finished(code, *arguments, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout
