"""Putting source text together: device functions from their file, long signatures in lines, indentation."""

from __future__ import annotations

import ast
import functools
import textwrap
from collections.abc import Iterable
from pathlib import Path

WIDTH = 120
"""Longest line of generated code."""


@functools.cache
def file_text(file: str) -> str:
    """Text of a file of this folder; it is read, not imported, so that Triton need not be installed."""
    return Path(__file__).with_name(file).read_text(encoding="utf-8")


def function_text(file: str, name: str) -> str:
    """Source text of a function in a file of this folder, decorators included.

    Raises:
        ValueError: when there is no such function.
    """
    found = _functions(file).get(name)
    if found is None:
        raise ValueError(f"no function {name!r} in kernels/{file}")
    return found


@functools.cache
def _functions(file: str) -> dict[str, str]:
    """Source text of every function of a file: parsing takes as long for one as for all."""
    text = file_text(file)
    lines, found = text.splitlines(), {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[node.name] = "\n".join(lines[first - 1 : node.end_lineno])
    return found


def device_function(name: str) -> str:
    """Source text of a function of :mod:`attncompile.kernels.device`.

    Raises:
        ValueError: when there is no such function.
    """
    return function_text("device.py", name)


def wrap(items: Iterable[str], indent: int, width: int = WIDTH) -> str:
    """Comma-separated items in lines of at most ``width``, each line indented and ended by a comma."""
    text = ", ".join(item.replace(" ", "\0") for item in items)
    lines = textwrap.wrap(text, width - indent - 1, break_long_words=False, break_on_hyphens=False)
    return "\n".join(" " * indent + line.rstrip(",").replace("\0", " ") + "," for line in lines)


def signature(head: str, items: Iterable[str], tail: str, indent: int = 0, inside: int = 0) -> str:
    """``head(items)tail`` on one line if it fits, else with the items on lines of their own.

    ``indent`` is written, ``inside`` is how much the caller will indent the lines further.
    """
    items = list(items)
    flat = " " * indent + f"{head}({', '.join(items)}){tail}"
    if len(flat) <= WIDTH - inside:
        return flat
    return f"{' ' * indent}{head}(\n{wrap(items, indent + 4, WIDTH - inside)}\n{' ' * indent}){tail}"


def indented(lines: Iterable[str], indent: int) -> str:
    """The lines, each indented; empty ones stay empty."""
    return "\n".join(" " * indent + line if line else "" for line in lines)
