"""Symbolic sizes of an ONNX graph, and arithmetic on shapes."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from attncompile.frontends.graph import (
    Indices,
)
from attncompile.ir import Expr, Size, simplify
from attncompile.ir.expr import ONE, Const, apply
from attncompile.ir.simplify import Simplifier

TO_THE_END = 2**31 - 1
"""A slice end at or beyond this means the end of the axis (exporters write the largest int32 or int64)."""


@dataclass
class SizeNames:
    """The symbolic sizes of one model, and what is known of which of them are equal.

    Attributes:
        display: size name to the name that the model gives it.
    """

    display: dict[str, str] = field(default_factory=dict)
    _by_text: dict[str, Size] = field(default_factory=dict)
    _proven: dict[Size, Size] = field(default_factory=dict)
    _meets: list[tuple[Expr, Expr]] = field(default_factory=list)
    _declared: set[str] = field(default_factory=set)

    def declare(self, text: str) -> None:
        """Note a name that stands for itself in expressions such as ``past + new``."""
        self._declared.add(text)

    def symbol(self, text: str) -> Size:
        """The size of a name; one that is proven equal to an earlier one is that one."""
        if text not in self._by_text:
            plain = re.sub(r"\W", "_", text).strip("_") or "size"
            name = plain[0].upper() + plain[1:] if plain[0].isalpha() else f"Size_{plain}"
            while name in self.display:
                name += "_"
            self.display[name] = text
            self._by_text[text] = Size(name)
        return self._representative(self._by_text[text])

    def _representative(self, size: Size) -> Size:
        while size in self._proven:
            size = self._proven[size]
        return size

    def expression(self, text: str, declared_only: bool = False) -> Expr:
        """A dimension as models and shape inference write it: ``batch``, ``2*s0 + 1``, ``floor(seq/2)``.

        Text that is no such expression is one symbol, and so is, with ``declared_only``, one over names that
        the model does not declare by themselves (``batch-size`` is a name, not a difference).
        """
        if text in self._declared:
            return self.symbol(text)
        try:
            tree = ast.parse(text.strip(), mode="eval").body
            names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
            if declared_only and not isinstance(tree, ast.Name) and not names - _FUNCTIONS <= self._declared:
                return self.symbol(text)
            return simplify(self._read(tree))
        except (SyntaxError, _Unreadable):
            return self.symbol(text)

    def stated(self, text: str) -> Expr | None:
        """A dimension over names that the model declares by themselves; ``None`` for any other."""
        try:
            names = {node.id for node in ast.walk(ast.parse(text.strip(), mode="eval")) if isinstance(node, ast.Name)}
        except SyntaxError:
            return None
        return self.expression(text) if names and names - _FUNCTIONS <= self._declared else None

    def _read(self, tree: ast.expr) -> Expr:
        match tree:
            case ast.Name(name):
                return self.symbol(name)
            case ast.Constant(int() as value) if not isinstance(value, bool):
                return Const(value)
            case ast.UnaryOp(ast.USub(), operand):
                return -self._read(operand)
            case ast.BinOp(left, ast.Pow(), ast.Constant(int() as power)) if 0 < power < 5:
                return apply("mul", *[self._read(left)] * power, 1)
            case ast.BinOp(left, operator, right) if type(operator) in _ARITHMETIC:
                return _ARITHMETIC[type(operator)](self._read(left), self._read(right))
            case ast.Call(ast.Name("floor" | "int"), [inner]):
                return self._read(inner)
            case ast.Call(ast.Name("ceiling"), [ast.BinOp(left, ast.Div(), right)]):
                return -((-self._read(left)) // self._read(right))
            case ast.Call(ast.Name(name), arguments) if name in _CALLS:
                return apply(_CALLS[name], *(self._read(a) for a in arguments))
        raise _Unreadable

    def prove_equal(self, left: Expr, right: Expr) -> None:
        """Note two sizes that the graph cannot run without being equal; the earlier name stays."""
        if isinstance(left, Size) and isinstance(right, Size):
            first, second = self._representative(left), self._representative(right)
            if first != second:
                order = list(self.display)
                first, second = sorted((first, second), key=lambda size: order.index(size.name))
                self._proven[second] = first
        self.meet(left, right)

    @property
    def merged(self) -> int:
        """How many names turned out to be other names."""
        return len(self._proven)

    def meet(self, left: Expr, right: Expr) -> None:
        """Note two sizes that are broadcast against each other: equal when the model runs, unless one is
        1."""
        if left != right and ONE not in (left, right):
            self._meets.append((left, right))

    def hints(self) -> dict[str, int]:
        """A small size for every symbol: distinct, but one for symbols that meet, and that of a constant they
        meet."""
        group = {name: name for name in self.display}

        def root(name: str) -> str:
            while group[name] != name:
                name = group[name]
            return name

        fixed: dict[str, int] = {}
        for left, right in self._meets:
            if isinstance(left, Size) and isinstance(right, Size):
                group[root(right.name)] = root(left.name)
        for pair in self._meets:
            for one, other in (pair, pair[::-1]):
                if isinstance(one, Size) and isinstance(other, Const):
                    fixed[root(one.name)] = int(other.value)
        roots = list(dict.fromkeys(root(name) for name in group))
        chosen = {
            name: fixed.get(name, number)
            for name, number in zip(roots, _hint_numbers(len(roots)), strict=True)
        }
        return {name: chosen[root(name)] for name in group}


def _hint_numbers(count: int) -> list[int]:
    """The first odd primes, so that products of sizes do not coincide either."""
    found: list[int] = []
    number = 3
    while len(found) < count:
        if all(number % prime for prime in found):
            found.append(number)
        number += 2
    return found


class _Unreadable(Exception):
    """The text is no arithmetic over sizes."""


# fmt: off
_ARITHMETIC: dict[type[ast.operator], Callable[[Expr, Expr], Expr]] = {
    ast.Add: lambda x, y: x + y, ast.Sub: lambda x, y: x - y, ast.Mult: lambda x, y: x * y,
    ast.FloorDiv: lambda x, y: x // y, ast.Div: lambda x, y: x // y, ast.Mod: lambda x, y: x % y,
}
# fmt: on
_CALLS = {"Max": "max", "max": "max", "Min": "min", "min": "min", "Mod": "mod", "FloorDiv": "floordiv"}
_FUNCTIONS = {*_CALLS, "floor", "int", "ceiling"}


def broadcast_shapes(shapes: Sequence[Indices], sizes: SizeNames | None = None) -> Indices:
    """The broadcast of shapes. Of several sizes that are not the constant 1 (they agree when the model runs)
    the
    simplest is taken: a constant, then a symbol, then the rest; ``sizes`` takes note of them."""
    rank = max((len(shape) for shape in shapes), default=0)
    result: list[Expr] = []
    for axis in range(rank):
        found = [shape[axis - rank + len(shape)] for shape in shapes if axis - rank + len(shape) >= 0]
        larger = list(dict.fromkeys(size for size in found if size != ONE)) or [ONE]
        for other in larger[1:]:
            if sizes is not None:
                sizes.meet(larger[0], other)
        result.append(
            min(larger, key=lambda size: 0 if isinstance(size, Const) else 1 if isinstance(size, Size) else 2)
        )
    return tuple(result)


def product(shape: Sequence[Expr]) -> Expr:
    """Number of elements."""
    return simplify(apply("mul", ONE, *shape)) if shape else ONE


def quotient(whole: Sequence[Expr], parts: Sequence[Expr]) -> Expr:
    """``∏ whole / ∏ parts``, which is exact in a valid reshape; equal factors cancel before the division."""
    above, below = list(whole), []
    for part in parts:
        if part in above:
            above.remove(part)
        else:
            below.append(part)
    return simplify(product(above) // product(below)) if below else product(above)


_PROVER = Simplifier({})


def nonnegative(expr: Expr) -> bool:
    """Whether an integer expression over sizes (each at least 1) is proven to be at least zero."""
    return _PROVER.nonnegative(expr)


def slice_range(size: Expr, start: Expr, end: Expr, step: int) -> tuple[Expr, Expr]:
    """First position and length of a slice, after ONNX's clamping into the axis.

    Raises:
        ValueError: for a step other than a positive number or −1 over the whole axis.
    """
    if step == -1:
        whole = _number(start) in (-1, None) or _number(start) >= TO_THE_END
        if (
            not whole
            or _number(end) is None
            or _number(end) > -TO_THE_END
            or (_number(start) is None and simplify(start) != simplify(size - 1))
        ):
            raise ValueError("only a slice with step −1 over the whole axis is stated")
        return simplify(size - 1), size
    if step < 1:
        raise ValueError(f"a slice with step {step} is not stated")
    first, last = _clamped(size, start), _clamped(size, end)
    length = simplify(last - first) if step == 1 else simplify((last - first + (step - 1)) // step)
    return first, length if nonnegative(length) else simplify(apply("max", length, 0))


def _number(expr: Expr) -> float:
    return float(expr.value) if isinstance(expr, Const) else math.nan


def _clamped(size: Expr, position: Expr) -> Expr:
    """A slice bound inside ``0 … size``, counted from the end when it is negative."""
    if isinstance(position, Const):
        if position.value >= TO_THE_END:
            return size
        if position.value < 0:
            position = simplify(size + position)
    elif nonnegative(-1 - position):
        position = simplify(size + position)
    if not nonnegative(position):
        position = apply("max", position, 0)
    return simplify(position if nonnegative(size - position) else apply("min", position, size))
