"""Attention for some of its queries, stated as a Spec: how maps too large to compute are compared, and how others are
computed a piece at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from attncompile.ir.attend import Attend
from attncompile.ir.expr import Const, Expr, Index, Load, Size, substitute
from attncompile.ir.operators import Kind
from attncompile.ir.spec import Spec
from attncompile.ir.types import Axis, TensorType, Value, bind_sizes, concrete

FEWEST, MOST = 4, 64
"""Queries of a map too large to be evaluated that are evaluated in its place."""

PIECE = 1 << 19
"""Elements of an attention map that are computed together: four megabytes in float64, which caches hold."""

ROWS = "rows"
"""The captured tensor that holds the places of the queries."""


def some_rows(spec: Spec, count: int) -> Spec | None:
    """The Spec for ``count`` of its queries, whose places in the whole are the captured tensor ``rows[i]``.

    Expressions see a query's place in the whole, so at fixed sizes they have the values that they have there. ``None``
    where a Spec is more than one attention operation, reads its queries as something else too, or has a tensor called
    ``rows``.
    """
    attend = spec.attend()
    names = {value.name for value in spec.inputs}
    if attend is None or len(spec.operations) != 1 or attend.query not in names or ROWS in spec.types():
        return None
    if attend.query in {attend.key, attend.value, *(load.tensor for load in attend.captured())}:
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


def interpret_in_pieces(
    spec: Spec,
    tensors: Mapping[str, torch.Tensor],
    dtype: torch.dtype = torch.float64,
    piece: int = PIECE,
    least: int = MOST,
) -> tuple[torch.Tensor, ...]:
    """What ``spec.interpret`` gives, computed for some queries after the others where an attention map is large.

    Each operation on a whole map would take memory anew from the system, which for large blocks costs more than the
    arithmetic. A Spec that has no form for some of its queries, or a result of all of them, is computed as a whole.

    Args:
        spec: the Spec; tensors: its inputs, by name.
        dtype: float dtype of the arithmetic.
        piece: elements of a map that are computed together.
        least: queries that are, though their part of the map has more: keys and values are read for each piece.

    Raises:
        ValueError: when a tensor is missing or does not fit its type.
    """
    attend, types = spec.attend(), spec.types()
    sizes = bind_sizes({value.name: value.type for value in spec.inputs}, tensors)
    elements = attend.map_elements(types, sizes) if attend is not None and len(spec.operations) == 1 else 0
    if attend is None or elements <= piece or not all(_of_queries(types[name]) for name in spec.outputs):
        return spec.interpret(tensors, dtype)
    query = tensors[attend.query]
    count, fixed = max(least, piece * query.shape[2] // elements), _at_sizes(spec, sizes)
    # widened once, not in each piece
    wide = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    places = torch.split(torch.arange(query.shape[2], device=query.device), count)
    forms = {len(rows): some_rows(fixed, len(rows)) for rows in places}
    found = [
        form.interpret({**wide, attend.query: wide[attend.query][:, :, rows], ROWS: rows}, dtype)
        for rows in places
        if (form := forms[len(rows)]) is not None
    ]
    if len(found) < len(places):
        return spec.interpret(tensors, dtype)
    return tuple(torch.cat(parts, dim=2) for parts in zip(*found, strict=True))


def _of_queries(kind: TensorType) -> bool:
    """Whether a result has a part for each query."""
    return len(kind.axes) > 2 and kind.axes[2].name == "i"


def _at_sizes(spec: Spec, sizes: Mapping[str, int]) -> Spec:
    """A Spec of one operation with numbers in the place of its symbolic sizes."""
    numbers: dict[Expr, Expr] = {Size(name): Const(number) for name, number in sizes.items()}

    def fixed(kind: TensorType) -> TensorType:
        axes = (dataclasses.replace(axis, size=Const(concrete(axis.size, sizes))) for axis in kind.axes)
        return dataclasses.replace(kind, axes=tuple(axes))

    inputs = tuple(dataclasses.replace(value, type=fixed(value.type)) for value in spec.inputs)
    (operation,) = spec.operations
    inside = operation.with_expressions(lambda expr: substitute(expr, numbers))
    return dataclasses.replace(spec, inputs=inputs, operations=(inside,))


__all__ = ["PIECE", "ROWS", "chosen_rows", "interpret_in_pieces", "of_rows", "rows_that_fit", "some_rows"]
