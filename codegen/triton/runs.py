"""The limits of key loops as text."""

from __future__ import annotations

from collections import Counter

from attncompile.codegen.triton.expressions import Scope, print_triton
from attncompile.codegen.triton.visits import KeyRange, Visits
from attncompile.ir.expr import TRUE, Expr
from attncompile.kernels.dense import KeyRuns


def key_runs(found: Visits, scope: Scope) -> tuple[KeyRuns, str]:
    """The key loops' limits in Triton, and all their text."""
    lines: list[str] = []
    numbers: Counter[str] = Counter()

    def text(expr: Expr) -> str:
        printed = print_triton(expr, scope, numbers)
        lines.extend(printed.lines)
        return printed.value

    def pair(limits: KeyRange | None) -> tuple[str, str] | None:
        return None if limits is None else (text(limits.start), text(limits.stop))

    first, main, full = pair(found.first), (text(found.main.start), text(found.main.stop)), pair(found.full)
    limits = len(lines)
    test = None if found.test == TRUE else text(found.test)
    runs = KeyRuns(first, main, full, test, tuple(lines[:limits]), tuple(lines[limits:]))
    texts = [*lines, *(runs.first or ()), *runs.main, *(runs.full or ()), runs.test or ""]
    return runs, "\n".join(texts)
