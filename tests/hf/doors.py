"""Whether two ways to a Spec give the same one: up to the names of its sizes and captured tensors."""

from __future__ import annotations

import dataclasses

from attncompile.ir import Attend, Spec, simplify
from attncompile.ir.expr import ONE, ZERO, Apply, Const, Expr, Index, Load, Size, loads, rewrite, substitute
from attncompile.ir.operators import Kind
from attncompile.ir.rows import extents


def notations(stated: Spec, lifted: Spec, *, spelled_out: bool = False) -> tuple[str, str]:
    """Both Specs in one notation, to be compared.

    Sizes are called as the graph calls those of the same axes; captured tensors are numbered as they are read; an
    integer that is only asked whether it is 0 is a truth value.

    Args:
        stated: from the interface; lifted: from the graph.
        spelled_out: the graph is transformers' own attention, which hides a position by the lowest number of its dtype
            and not by −∞: what a row without any key gives is not compared.
    """
    sizes: dict[Expr, Expr] = {}
    for one, other in zip(stated.inputs[:3], lifted.inputs[:3], strict=True):
        for axis, beside in zip(one.type.axes, other.type.axes, strict=True):
            if isinstance(axis.size, Size):
                sizes.setdefault(axis.size, beside.size)
    return _notation(stated, sizes, spelled_out), _notation(lifted, {}, spelled_out)


def _notation(spec: Spec, sizes: dict[Expr, Expr], spelled_out: bool) -> str:
    attend = spec.attend()
    assert isinstance(attend, Attend)
    known = {name: simplify(substitute(size, sizes)) for name, size in extents(attend, spec.types()).items()}
    single: dict[Expr, Expr] = {Index(name): ZERO for name, size in known.items() if size == ONE}
    names: dict[str, str] = {}

    def plain(expr: Expr) -> Expr:
        expr = simplify(substitute(expr, {**sizes, **single}), known)
        expr = simplify(rewrite(expr, _truth), known)
        for load in loads(expr):
            names.setdefault(load.tensor, f"x{len(names)}")
        return rewrite(expr, lambda n: Load(names[n.tensor], n.indices, n.element) if isinstance(n, Load) else None)

    fields = {name: plain(getattr(attend, name)) for name in ("score", "mask", "sink", "kv_head", "fill")}
    norm = attend.norm
    if spelled_out:
        fields["fill"], norm = Const(0.0), dataclasses.replace(norm, empty="nan")
    operands = [
        f"{value.name}{[str(simplify(substitute(size, sizes))) for size in value.type.sizes]} {value.type.dtype}"
        for value in spec.inputs[:3]
    ]
    return "\n".join([*operands, *(f"{name}: {expr}" for name, expr in fields.items()), str(norm)])


def _truth(node: Expr) -> Expr | None:
    match node:
        case Apply("ne", (Load(tensor, indices, Kind.INT), Const(0))):
            return Load(tensor, indices, Kind.BOOL)
    return None
