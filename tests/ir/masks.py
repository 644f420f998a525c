"""Masks by name, for the tests of intervals and block maps."""

from __future__ import annotations

import torch

from attncompile.ir.evaluate import Environment, evaluate, index_grid
from attncompile.ir.expr import Expr
from attncompile.ir.text import parse_expr

MASKS = {
    "all": "true",
    "none": "false",
    "causal": "j ≤ i",
    "strictly causal": "j < i",
    "from the end": "j ≤ i + J − I",
    "window": "j ≤ i and j > i − 5",
    "symmetric window": "j ≤ i + 3 and j ≥ i − 3",
    "sinks and window": "j ≤ i and (j > i − 6 or j < 2)",
    "prefix": "j < 7 or j ≤ i",
    "dilated": "j % 4 = i % 4",
    "dilated causal": "j ≤ i and (i − j) % 3 = 0",
    "chunked": "i // 5 = j // 5",
    "chunked causal": "i // 8 = j // 8 and j ≤ i",
    "neighbourhood": "abs(i // 6 − j // 6) ≤ 1 and abs(i % 6 − j % 6) ≤ 1",
    "wide neighbourhood": "j // 6 ≤ i // 6 + 1 and j // 6 ≥ i // 6 − 1 and abs(j % 6 − i % 6) ≤ 2",
    "diagonal": "j = i",
    "off the diagonal": "j ≠ i",
    "antidiagonal": "j + i ≤ 11",
    "steps": "j ≤ 2·i − 4",
    "striped": "where(i % 2 = 0, j ≤ i, j = 0)",
    "logarithmic": "i − j ≤ exp2(i % 5) + 0.5",
}


def dense(mask: Expr, queries: int, keys: int) -> torch.Tensor:
    """The mask at every position ``[i, j]``."""
    grid = index_grid({"i": queries, "j": keys})
    values = evaluate(mask, Environment(grid, sizes={"I": queries, "J": keys}))
    return values.expand(queries, keys)


def named(name: str) -> Expr:
    """The mask of a name."""
    return parse_expr(MASKS[name])
