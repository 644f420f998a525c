"""Attention for some of its queries, stated as a Spec: how maps too large to compute are compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from attncompile.ir.attend import Attend
from attncompile.ir.expr import Const, Expr, Index, Load, substitute
from attncompile.ir.operators import Kind
from attncompile.ir.spec import Spec
from attncompile.ir.types import Axis, TensorType, Value, concrete

FEWEST, MOST = 4, 64
"""Queries of a map too large to be evaluated that are evaluated in its place."""

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


def rows_that_fit(spec: Spec, sizes: Mapping[str, int], largest: int) -> int | None:
    """How many queries of a Spec to evaluate: ``None`` is all of them, 0 none, since it has no form for some.

    Args:
        spec: the Spec; sizes: values of its symbolic sizes.
        largest: elements of an attention map up to which all of it is evaluated.
    """
    types = spec.types()
    maps = [(op.map_elements(types, sizes), op) for op in spec.operations if isinstance(op, Attend)]
    elements, attend = max(maps, key=lambda entry: entry[0], default=(0, None))
    if attend is None or elements <= largest:
        return None
    count = min(MOST, largest * concrete(types[attend.query].sizes[2], sizes) // elements)
    return count if count >= FEWEST and some_rows(spec, count) is not None else 0


def of_rows(
    spec: Spec, tensors: Mapping[str, torch.Tensor], count: int, seed: int = 0
) -> tuple[Spec, dict[str, torch.Tensor], torch.Tensor]:
    """The Spec for some queries, its inputs, and the places of those queries.

    Args:
        spec: a Spec that has such a form; tensors: its inputs.
        count: how many queries; seed: of the random ones among them.

    Raises:
        ValueError: when it has none.
    """
    fewer, attend = some_rows(spec, count), spec.attend()
    if fewer is None or attend is None:
        raise ValueError(f"{spec.name} cannot be stated for some of its queries")
    rows = chosen_rows(tensors[attend.query].shape[2], count, seed)
    return fewer, {**tensors, attend.query: tensors[attend.query][:, :, rows], ROWS: rows}, rows


def chosen_rows(queries: int, count: int, seed: int = 0) -> torch.Tensor:
    """Places of ``count`` of some queries: the first, the last and others at random, int64."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, queries, [count], generator=generator)
    rows[0], rows[-1] = 0, queries - 1
    return rows


__all__ = ["ROWS", "chosen_rows", "of_rows", "rows_that_fit", "some_rows"]
