"""The sizes of an FX graph as index expressions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch

from attncompile.frontends.graph import Indices
from attncompile.frontends.torch_internals import size_hint
from attncompile.ir import Expr, Size, simplify
from attncompile.ir.expr import ONE, Const, apply, substitute


def size_expr(size: int | torch.SymInt) -> Expr:
    """A torch size as an expression; a symbol ``s53`` becomes the size ``S53``."""
    return _from_sympy(size.node.expr) if isinstance(size, torch.SymInt) else Const(int(size))


def _from_sympy(expr: Any) -> Expr:
    if isinstance(expr, sympy.Symbol):
        name = str(expr)
        return Size(name[0].upper() + name[1:])
    if isinstance(expr, sympy.Integer) or (isinstance(expr, sympy.Number) and int(expr) == expr):
        return Const(int(expr))
    parts = [_from_sympy(part) for part in expr.args]
    if isinstance(expr, sympy.Add):
        return simplify(apply("add", *parts))
    if isinstance(expr, sympy.Mul):
        return simplify(apply("mul", *parts))
    if isinstance(expr, sympy.Pow) and isinstance(parts[1], Const):
        return simplify(apply("mul", *[parts[0]] * int(parts[1].value), 1))
    names = {
        "FloorDiv": "floordiv",
        "CleanDiv": "floordiv",
        "IntTrueDiv": "floordiv",
        "Mod": "mod",
        "PythonMod": "mod",
        "Max": "max",
        "Min": "min",
    }
    found = names.get(type(expr).__name__)
    if found is None:
        raise ValueError(f"cannot state the size {expr} ({type(expr).__name__}) as an index expression")
    return simplify(apply(found, *parts))


def unified(size: Expr, equal: Mapping[Expr, Expr]) -> Expr:
    """A size with one symbol for all sizes that must be equal."""
    return simplify(substitute(size, dict(equal))) if equal else size


def broadcast_shapes(shapes: Sequence[Indices]) -> Indices:
    """The broadcast of shapes; of two sizes that are not the constant 1, the first is taken."""
    rank = max((len(shape) for shape in shapes), default=0)
    result: list[Expr] = []
    for axis in range(rank):
        sizes = [shape[axis - rank + len(shape)] for shape in shapes if axis - rank + len(shape) >= 0]
        larger = [size for size in sizes if size != ONE]
        # a constant is the safer statement of two sizes that must agree
        fixed = [size for size in larger if isinstance(size, Const)]
        result.append((fixed or larger or [ONE])[0])
    return tuple(result)


def note_hints(size: Any, hints: dict[str, int]) -> None:
    """Add what a symbol was in the example inputs, by the name of its size."""
    if isinstance(size, torch.SymInt) and isinstance(size.node.expr, sympy.Symbol):
        hint = size_hint(size)
        if hint is not None:
            name = str(size.node.expr)
            hints[name[0].upper() + name[1:]] = hint
