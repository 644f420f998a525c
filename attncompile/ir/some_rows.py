"""Attention for some of its queries, stated as a Spec: how maps too large to compute are compared."""

from __future__ import annotations

import dataclasses

import torch

from attncompile.ir.expr import Const, Expr, Index, Load, substitute
from attncompile.ir.operators import Kind
from attncompile.ir.spec import Spec
from attncompile.ir.types import Axis, TensorType, Value

ROWS = "rows"
"""The captured tensor that holds the places of the queries."""


def some_rows(spec: Spec, count: int) -> Spec | None:
    """The Spec for ``count`` of its queries, whose places in the whole are the captured tensor ``rows[i]``.

    Expressions see a query's place in the whole, so at fixed sizes they have the values that they have there. ``None``
    where a Spec is more than one attention operation, or has a tensor called ``rows``.
    """
    attend = spec.attend()
    names = {value.name for value in spec.inputs}
    if attend is None or len(spec.operations) != 1 or attend.query not in names or ROWS in spec.types():
        return None
    place: dict[Expr, Expr] = {Index("i"): Load(ROWS, (Index("i"),), Kind.INT)}
    inputs = [dataclasses.replace(v, type=_with_queries(v.type, count)) if v.name == attend.query else v
              for v in spec.inputs]  # fmt: skip
    rows = Value(ROWS, TensorType((Axis("i", Const(count)),), "int64"))
    inside = attend.with_expressions(lambda expr: substitute(expr, place))
    return dataclasses.replace(spec, inputs=(*inputs, rows), operations=(inside,))


def _with_queries(kind: TensorType, count: int) -> TensorType:
    axes = (dataclasses.replace(axis, size=Const(count)) if axis.name == "i" else axis for axis in kind.axes)
    return dataclasses.replace(kind, axes=tuple(axes))


def chosen_rows(queries: int, count: int, seed: int = 0) -> torch.Tensor:
    """Places of ``count`` of some queries: the first, the last and others at random, int64."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, queries, [count], generator=generator)
    rows[0], rows[-1] = 0, queries - 1
    return rows


__all__ = ["ROWS", "chosen_rows", "some_rows"]
