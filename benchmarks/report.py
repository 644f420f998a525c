"""What the benchmarks of kernels share: their arguments, the machine they ran on, and a file written row by row."""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch


class Named(Protocol):
    """A row of a benchmark."""

    @property
    def name(self) -> str: ...


Row = TypeVar("Row", bound=Named)


def arguments(about: str | None, rounds: int | None = None, rows: bool = True) -> argparse.ArgumentParser:
    """A parser for what every benchmark takes: the file to write, ``--rows`` and, with a default, ``--rounds``.

    Args:
        about: the module's docstring, whose first line is the description.
    """
    parser = argparse.ArgumentParser(description=(about or "").partition("\n")[0])
    parser.add_argument("output", type=Path, help="JSON file to write")
    if rows:
        parser.add_argument("--rows", default="", help="only rows whose names contain one of these, comma-separated")
    if rounds is not None:
        parser.add_argument("--rounds", type=int, default=rounds, help=f"rounds (default {rounds})")
    return parser


def add_processes(parser: argparse.ArgumentParser, default: int = 8) -> None:
    """``--processes``: how many compile at first."""
    text = f"processes that compile at first (default {default})"
    parser.add_argument("--processes", type=int, default=default, help=text)


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options; ends the program without a GPU, and seeds random numbers."""
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this needs a GPU; torch.cuda.is_available() is false")
    torch.manual_seed(0)
    return options


def chosen(works: Iterable[Row], wanted: str) -> tuple[Row, ...]:
    """Those rows whose names contain one of the comma-separated texts; all without any."""
    parts = [part for part in wanted.split(",") if part]
    return tuple(work for work in works if not parts or any(part in work.name for part in parts))


def machine() -> dict[str, Any]:
    """The device, the versions of what computes on it, and the day."""
    import triton

    from attncompile.report import machine as processor

    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


class Report:
    """A JSON file of :func:`machine`, further facts and rows, written again after each row.

    A run that is cut short then leaves what it had measured.
    """

    def __init__(self, output: Path, facts: Mapping[str, Any]) -> None:
        self._output = output
        self._rows: list[dict[str, Any]] = []
        self._data: dict[str, Any] = {**machine(), **facts, "rows": self._rows}
        self.add()

    def add(self, *rows: dict[str, Any]) -> None:
        """Further rows."""
        self._rows += rows
        self._output.write_text(json.dumps(self._data, indent=1) + "\n", encoding="utf-8")


def shown(result: Mapping[str, Any], text: str) -> str:
    """A result in a printed line: ``text`` filled in from it, and whether calls were timed; or why there is none."""
    if "failure" in result:
        return str(result["failure"])[:80]
    return text.format(**result) + (" (calls)" if result["timed"] == "calls" else "")
