"""How far two ways of computing an expression in float64 may be apart."""

from __future__ import annotations

import torch

from attncompile.ir.expr import Apply, Expr, walk
from attncompile.verify.tolerance import derive_tolerance


def operations(*exprs: Expr) -> int:
    """How many results are rounded on the way: each distinct operation once for every argument that it joins."""
    nodes = {node for expr in exprs for node in walk(expr) if isinstance(node, Apply)}
    return sum(max(1, len(node.arguments) - 1) for node in nodes)


def within_rounding(found: torch.Tensor, expected: torch.Tensor, narrow: torch.Tensor, count: int) -> bool:
    """Whether two results in float64 differ by rounding alone; a NaN does not, equal infinities do.

    Args:
        found, expected: by either way.
        narrow: one of them in float32. Its error, scaled down by the ratio of both epsilons, is what rounding does to
            this expression at these points.
        count: of the roundings, each of which may fall otherwise.
    """
    limit = derive_tolerance(expected, narrow, count, torch.float64).bound
    difference = torch.where(found == expected, 0.0, (found - expected).abs())
    return float(difference.max()) <= limit
