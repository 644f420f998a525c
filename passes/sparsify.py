"""``sparsify``: fewer visible keys per query."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from pydantic import Field

from attncompile.ir import Attend, Expr, Spec, TensorType, simplify
from attncompile.ir.attend import HIDING_NOTHING
from attncompile.ir.expr import TRUE, Apply, Const, Index, Load, conjuncts, symbols, walk
from attncompile.ir.expr import apply as applied
from attncompile.ir.operators import Kind
from attncompile.ir.rows import extents, never_empty
from attncompile.passes.frame import Options, Pass, with_operation
from attncompile.passes.fuse import without_implied

QUERY, KEY = Index("i"), Index("j")


class WindowOptions(Options):
    """Options of ``sparsify.window``."""

    size: int = Field(1024, ge=1, description="keys kept per query on one side, its own position included")
    sinks: int = Field(4, ge=0, description="leading positions that stay visible to every query")
    symmetric: bool | None = Field(
        None, description="keep keys on both sides, |p − j| < size; none: where the mask is not causal")


def own_position(attend: Attend, types: Mapping[str, TensorType]) -> tuple[Expr, bool] | None:
    """Where a query stands among the keys, and whether its mask is causal; ``None`` when nothing tells.

    - A part ``j ≤ t[…]`` of the mask, with a captured integer per query, puts the query at that number; and ``j ≤ i +
    e`` at ``i + e``, where ``e`` is made of a captured integer per row: how many keys are cached, for instance.
    - With as many keys as queries, query ``i`` is at ``i``; the mask is causal where a part implies ``j ≤
    i``. - Otherwise a part ``j ≤ i`` or ``j ≤ i + (J − I)`` puts it at ``i``, or counts it from the end of
    the keys, of which ``max(0, J − I)`` come before the queries where there may be fewer.
    """
    sizes = extents(attend, types)
    limits = [_upper(part) for part in conjuncts(simplify(attend.mask, sizes))]
    for limit in limits:
        if limit is not None and _is_counted(limit):
            return limit, True
    if simplify(sizes["i"]) == simplify(sizes["j"]):
        causal = any(limit is not None and simplify(limit <= QUERY, sizes) == TRUE for limit in limits)
        return QUERY, causal
    before = simplify(sizes["j"] - sizes["i"])
    for position in (QUERY, simplify(QUERY + before), simplify(QUERY + applied("max", before, 0))):
        if position in limits:
            return position, True
    return None


def _is_counted(limit: Expr) -> bool:
    """Whether a limit is a captured integer per query, or the query's number behind a captured one per row."""
    if isinstance(limit, Load):
        return QUERY in symbols(limit)
    start = simplify(limit - QUERY)
    return QUERY not in symbols(start) and any(isinstance(node, Load) for node in walk(start))


def _upper(part: Expr) -> Expr | None:
    """``e`` of a part ``j ≤ e``."""
    match part:
        case Apply("le" | "lt" as operator, (Index("j"), limit)) if (
            limit.kind is Kind.INT and KEY not in symbols(limit)
        ):
            return simplify(limit - 1) if operator == "lt" else limit
    return None


def windowed(attend: Attend, types: Mapping[str, TensorType], options: WindowOptions) -> Expr | None:
    """The mask with the window, or ``None`` where queries have no position among the keys."""
    found = own_position(attend, types)
    if found is None:
        return None
    position, causal = found
    inside: Expr = position - options.size < KEY
    if options.symmetric or (options.symmetric is None and not causal):
        inside = inside & (position + options.size > KEY)
    if options.sinks:
        inside = inside | (Const(options.sinks) > KEY)
    return without_implied(attend.mask & inside, extents(attend, types))


def why_not(spec: Spec, options: WindowOptions) -> str | None:
    """One attention operation, whose queries have a position among the keys, and a mask that the window
    changes.
    """
    attend = spec.attend()
    if attend is None:
        return "it has not exactly one attention operation"
    types = spec.types()
    mask = windowed(attend, types, options)
    if mask is None:
        sizes = extents(attend, types)
        return (f"its {sizes['i']} queries have no position among its {sizes['j']} keys: this is "
                "cross-attention, or a mask that aligns them is missing")
    if mask == without_implied(attend.mask, extents(attend, types)):
        return f"its mask {attend.mask} already hides every key outside the window"
    return None


def apply(spec: Spec, options: WindowOptions) -> Spec:
    """Hide the keys outside the window.

    With ``p`` the query's position (see :func:`own_position`), key ``j`` stays visible where it was and

    - ``j > p − size``, for a causal mask;
    - ``p − size < j < p + size``, for a symmetric window;

    or where it was and ``j < sinks``. A query that loses its last key gives 0, not NaN, so that padding does
    not spread through later layers.

    Follows: Beltagy et al. 2020 (arXiv:2004.05150); sinks as in Xiao et al. 2023 (arXiv:2309.17453).
    """
    attend, types = spec.attend(), spec.types()
    if attend is None:
        raise ValueError(f"{spec.name} has not exactly one attention operation")
    mask = windowed(attend, types, options)
    if mask is None:
        raise ValueError(f"{spec.name}: the queries have no position among the keys")
    changed = dataclasses.replace(attend, mask=mask)
    if attend.norm.kind == "softmax" and not never_empty(changed, types):
        changed = dataclasses.replace(changed, norm=dataclasses.replace(attend.norm, empty="zero"))
    if attend.norm.kind in HIDING_NOTHING and attend.mask == TRUE:
        changed = dataclasses.replace(changed, fill=Const(0.0))  # until now nothing was hidden, and nothing filled
    return with_operation(spec, attend, changed)


WINDOW = Pass(
    name="sparsify.window",
    summary="Let each query see its window and the first positions only; skipped blocks cost nothing.",
    contract="calibrated",
    phases=("prefill", "decode", "training"),
    options=WindowOptions,
    why_not=why_not,
    apply=apply,
)
