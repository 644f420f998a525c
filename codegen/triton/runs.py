"""The limits of key loops as text."""

from __future__ import annotations

import dataclasses
from collections import Counter

from attncompile.codegen.triton.expressions import Scope, print_triton
from attncompile.codegen.triton.visits import ROW_FIRST, ROW_LAST, KeyRange, Visits, visits
from attncompile.ir import simplify
from attncompile.ir.expr import TRUE, Expr, Index, substitute, symbols
from attncompile.kernels.dense import KeyRuns


def query_runs(mask: Expr, queries: Expr, keys: Expr, scope: Scope) -> tuple[KeyRuns, str, Visits]:
    """The queries that see a block of keys: limits and all their text as of :func:`key_runs`, with roles exchanged.

    Args:
        mask: what a query sees.
        queries, keys: how many there are.
        scope: of a kernel with a block of keys; its indices are replaced.
    """
    exchanged = simplify(substitute(mask, {Index("i"): Index("j"), Index("j"): Index("i")}))
    found = visits(exchanged, keys, queries)
    names = ("row_first", "row_last", "key_first", "key_last")
    turned = dict(zip(names, (*names[2:], *names[:2]), strict=True))
    return *key_runs(found, dataclasses.replace(scope, indices={"b": "b", "h": "h", **turned})), found


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


def grows(found: Visits) -> bool:
    """Whether later blocks visit more."""
    return ROW_LAST in symbols(found.main.stop) and ROW_FIRST not in symbols(found.main.start)
