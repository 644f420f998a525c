"""The sizes of an FX graph as index expressions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import sympy
import torch

from attncompile.frontends.graph import Indices
from attncompile.frontends.torch_internals import decided, size_hint
from attncompile.ir import Expr, Size, simplify
from attncompile.ir.expr import ONE, Apply, Const, apply, substitute, symbols
from attncompile.ir.polynomial import from_polynomial, negated, plus, polynomial


def size_expr(size: int | torch.SymInt) -> Expr:
    """A torch size as an expression; a symbol ``s53`` becomes the size ``S53``."""
    return _from_sympy(decided(size)) if isinstance(size, torch.SymInt) else Const(int(size))


def _from_sympy(expr: Any) -> Expr:
    if isinstance(expr, sympy.Symbol):
        name = str(expr)
        return Size(name[0].upper() + name[1:])
    if isinstance(expr, sympy.Integer) or (isinstance(expr, sympy.Number) and float(expr).is_integer()):
        return Const(int(expr))
    if type(expr).__name__ in ("CeilToInt", "FloorToInt"):
        return _rounded(expr.args[0], upwards=type(expr).__name__ == "CeilToInt")
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
    if type(expr).__name__ == "ToFloat":
        return parts[0]
    found = names.get(type(expr).__name__)
    if found is None:
        raise ValueError(f"cannot state the size {expr} ({type(expr).__name__}) as an index expression")
    return simplify(apply(found, *parts))


def _rounded(expr: Any, *, upwards: bool) -> Expr:
    """The integer next to a real number: to one that is an integer, or to a quotient by a positive integer."""
    if type(expr).__name__ != "FloatTrueDiv":
        return _from_sympy(expr)
    number, divisor = (_from_sympy(part) for part in expr.args)
    if not isinstance(divisor, Const) or divisor.value <= 0:
        raise ValueError(f"cannot state the size {expr} as an index expression: it divides by {expr.args[1]}")
    return simplify(apply("floordiv", number + (divisor.value - 1 if upwards else 0), divisor))


def unified(size: Expr, equal: Mapping[Expr, Expr]) -> Expr:
    """A size with one symbol for all sizes that must be equal."""
    return simplify(substitute(size, dict(equal))) if equal else size


def product(sizes: Iterable[Expr]) -> Expr:
    """The number of elements of a shape."""
    return simplify(apply("mul", *sizes, ONE, ONE))


def solved(one: Expr, other: Expr) -> tuple[Size, Expr] | None:
    """A symbol and what it must be for two sizes to be equal; ``None`` where they are, or say nothing of one symbol.

    Factors and terms of both sides are cancelled: ``6·S37 = 6·S18`` and ``S37 + 1 = S18 + 1`` give ``S18 = S37``. A
    factor that is 0 would leave nothing to compute, so this holds wherever there is an element.
    """
    left, right = _factors(one), _factors(other)
    for factor in tuple(left):
        if factor in right and not isinstance(factor, Const):
            left.remove(factor)
            right.remove(factor)
    numbers = [math.prod(int(f.value) for f in side if isinstance(f, Const)) for side in (left, right)]
    common = math.gcd(*numbers) or 1
    sides = [
        product([Const(number // common), *(f for f in side if not isinstance(f, Const))])
        for number, side in zip(numbers, (left, right), strict=True)
    ]
    for symbol, stays in (reversed(sides), sides):
        if isinstance(symbol, Size) and symbol not in symbols(stays):
            return symbol, stays
    return _solved_sum(*sides)


def _solved_sum(one: Expr, other: Expr) -> tuple[Size, Expr] | None:
    """A symbol that is a term of its own in ``one - other``, and what it must be; the other side's symbols first."""
    difference = plus(polynomial(one), negated(polynomial(other)))
    for product_of, factor in sorted(difference.items(), key=lambda term: term[1]):
        if len(product_of) != 1 or not isinstance(product_of[0], Size) or abs(factor) != 1:
            continue
        symbol = product_of[0]
        rest = {mono: -factor * value for mono, value in difference.items() if mono != product_of}
        if all(symbol not in symbols(atom) for mono in rest for atom in mono):
            return symbol, simplify(from_polynomial(rest))
    return None


def solved_by_data(one: Expr, other: Expr) -> tuple[Expr, Expr] | None:
    """A compound of sizes that only data decide (``U0·U1``, torch's unbacked symbols) and what it must be equal to."""
    for compound, stays in ((one, other), (other, one)):
        found = [symbol for symbol in symbols(compound) if isinstance(symbol, Size)]
        if found and all(symbol.name.startswith("U") for symbol in found) and not set(found) & set(symbols(stays)):
            return compound, stays
    return None


def _factors(size: Expr) -> list[Expr]:
    if isinstance(size, Apply) and size.operator == "mul":
        return [factor for argument in size.arguments for factor in _factors(argument)]
    return [size]


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
