"""Whether two ways to a Spec give the same one: up to the names of its sizes and captured tensors."""

from __future__ import annotations

import dataclasses

from attncompile.ir import Attend, Spec, simplify
from attncompile.ir.expr import Apply, Const, Expr, Index, Load, Size, loads, rewrite, substitute
from attncompile.ir.operators import Kind
from attncompile.ir.rows import extents


def same(stated: Spec, lifted: Spec, finite_fill: bool) -> tuple[str, str]:
    """Both Specs in one notation, for ``assert one == other``.

    Args:
        stated: from the interface; lifted: from the graph.
        finite_fill: the graph writes a large negative number for −∞, as transformers' spelled-out attention does: then
            what a row without any key gives is not compared.
    """
    sizes = _sizes(stated, lifted)
    return _notation(stated, sizes, finite_fill), _notation(lifted, {}, finite_fill)


def _sizes(stated: Spec, lifted: Spec) -> dict[Expr, Expr]:
    """What the graph calls the sizes of the operands: a constant, where its example fixed them."""
    found: dict[Expr, Expr] = {}
    for one, other in zip(stated.inputs[:3], lifted.inputs[:3], strict=True):
        for axis, beside in zip(one.type.axes, other.type.axes, strict=True):
            if isinstance(axis.size, Size):
                found.setdefault(axis.size, beside.size)
    return found


def _notation(spec: Spec, sizes: dict[Expr, Expr], finite_fill: bool) -> str:
    attend = spec.attend()
    assert attend is not None
    types = {v.name: tuple(simplify(substitute(s, sizes)) for s in v.type.sizes) for v in spec.inputs}
    known = {name: simplify(substitute(size, sizes)) for name, size in extents(attend, spec.types()).items()}
    names: dict[str, str] = {}

    def plain(expr: Expr) -> Expr:
        return simplify(rewrite(simplify(substitute(expr, sizes), known), _truth), known)

    def named(expr: Expr) -> Expr:
        for load in loads(expr):
            names.setdefault(load.tensor, f"x{len(names)}")
        return rewrite(expr, lambda n: Load(names[n.tensor], n.indices, n.element) if isinstance(n, Load) else None)

    fields = {name: named(plain(getattr(attend, name))) for name in ("score", "mask", "sink", "kv_head", "fill")}
    norm = attend.norm
    if finite_fill:
        fields["fill"], norm = Const(0.0), dataclasses.replace(norm, empty="nan")
    operands = [f"{v.name}{[str(s) for s in types[v.name]]}:{v.type.dtype}" for v in spec.inputs[:3]]
    captured = [f"{names[name]}{[str(s) for s in types[name]]}" for name in names]
    return "\n".join([*operands, *captured, *(f"{name}: {expr}" for name, expr in fields.items()), str(norm)])


def _truth(node: Expr) -> Expr | None:
    """An integer that is asked whether it is 0 only, as the truth value that it is."""
    match node:
        case Apply("ne", (Load(tensor, indices, Kind.INT), Const(0))):
            return Load(tensor, indices, Kind.BOOL)
    return None


__all__ = ["Attend", "Index", "same"]
