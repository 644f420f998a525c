"""Index expressions: the language in which a score, a mask or a tensor's layout is stated.

An :class:`Expr` is an immutable tree over index symbols (``b h g i j d``), symbolic sizes (``I J B``), the raw score
``s``, loads ``tensor[e0, e1]`` of captured tensors, constants and the pointwise operators of
:mod:`attncompile.ir.operators`. Integers are mathematical integers; real numbers are evaluated in whatever float dtype
the evaluator is given. A load outside its tensor reads the nearest element instead of failing, so that
``where(j < 4, a[j], b[j - 4])`` means what it says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from attncompile.ir.operators import OPERATORS, Kind

Number = bool | int | float


class Expr:
    """Base of the expression nodes; carries the arithmetic notation (``i - j``, ``~mask``, ``x & y``)."""

    __slots__ = ()

    @property
    def kind(self) -> Kind:
        """The type of the value: bool, int or float."""
        raise NotImplementedError

    @property
    def children(self) -> tuple[Expr, ...]:
        """The direct subexpressions."""
        return ()

    def with_children(self, children: tuple[Expr, ...]) -> Expr:
        """The same node over other subexpressions."""
        return self

    def __add__(self, other: Expr | Number) -> Expr:
        return apply("add", self, other)

    def __radd__(self, other: Number) -> Expr:
        return apply("add", other, self)

    def __sub__(self, other: Expr | Number) -> Expr:
        return apply("add", self, apply("mul", -1, other))

    def __rsub__(self, other: Number) -> Expr:
        return apply("add", other, apply("mul", -1, self))

    def __mul__(self, other: Expr | Number) -> Expr:
        return apply("mul", self, other)

    def __rmul__(self, other: Number) -> Expr:
        return apply("mul", other, self)

    def __truediv__(self, other: Expr | Number) -> Expr:
        return apply("div", self, other)

    def __floordiv__(self, other: Expr | Number) -> Expr:
        return apply("floordiv", self, other)

    def __mod__(self, other: Expr | Number) -> Expr:
        return apply("mod", self, other)

    def __neg__(self) -> Expr:
        return apply("mul", -1, self)

    def __lt__(self, other: Expr | Number) -> Expr:
        return apply("lt", self, other)

    def __le__(self, other: Expr | Number) -> Expr:
        return apply("le", self, other)

    def __gt__(self, other: Expr | Number) -> Expr:
        return apply("gt", self, other)

    def __ge__(self, other: Expr | Number) -> Expr:
        return apply("ge", self, other)

    def __and__(self, other: Expr | Number) -> Expr:
        return apply("and", self, other)

    def __or__(self, other: Expr | Number) -> Expr:
        return apply("or", self, other)

    def __invert__(self) -> Expr:
        return apply("not", self)

    def __str__(self) -> str:
        from attncompile.ir.text import print_expr  # the printer reads the tree, so it cannot be imported above

        return print_expr(self)


@dataclass(frozen=True, slots=True, repr=False)
class Const(Expr):
    """A literal. Equality tells ``1`` (an integer) from ``1.0`` (a real number) and from ``true``."""

    value: Number

    @property
    def kind(self) -> Kind:
        if isinstance(self.value, bool):
            return Kind.BOOL
        return Kind.INT if isinstance(self.value, int) else Kind.FLOAT

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Const) or type(self.value) is not type(other.value):
            return False
        both_nan = self.value != self.value and other.value != other.value
        return both_nan or self.value == other.value

    def __hash__(self) -> int:
        return hash((type(self.value), self.value if self.value == self.value else "nan"))

    def __repr__(self) -> str:
        return f"Const({self.value!r})"


@dataclass(frozen=True, slots=True)
class Index(Expr):
    """A position along a named axis, an integer from 0 to the axis' size; its name starts in lower case."""

    name: str

    @property
    def kind(self) -> Kind:
        return Kind.INT


@dataclass(frozen=True, slots=True)
class Size(Expr):
    """A symbolic axis size, an integer of at least 1; its name starts in upper case."""

    name: str

    @property
    def kind(self) -> Kind:
        return Kind.INT


@dataclass(frozen=True, slots=True)
class Score(Expr):
    """The raw score ``s[b, h, i, j]``: the inner product of query and key, before any scaling."""

    @property
    def kind(self) -> Kind:
        return Kind.FLOAT


@dataclass(frozen=True, slots=True)
class Weight(Expr):
    """The normalised weight ``w[b, h, i, j]``, for edits between normaliser and value product."""

    @property
    def kind(self) -> Kind:
        return Kind.FLOAT


@dataclass(frozen=True, slots=True)
class Load(Expr):
    """``tensor[e0, e1, ...]``: one element of a captured tensor; an index out of range is clamped into it."""

    tensor: str
    indices: tuple[Expr, ...]
    element: Kind

    @property
    def kind(self) -> Kind:
        return self.element

    @property
    def children(self) -> tuple[Expr, ...]:
        return self.indices

    def with_children(self, children: tuple[Expr, ...]) -> Expr:
        return Load(self.tensor, children, self.element)


@dataclass(frozen=True, slots=True)
class Apply(Expr):
    """A pointwise operator on subexpressions; build it with :func:`apply`, which checks the types."""

    operator: str
    arguments: tuple[Expr, ...]
    result: Kind

    @property
    def kind(self) -> Kind:
        return self.result

    @property
    def children(self) -> tuple[Expr, ...]:
        return self.arguments

    def with_children(self, children: tuple[Expr, ...]) -> Expr:
        return apply(self.operator, *children)


TRUE, FALSE = Const(True), Const(False)
ZERO, ONE = Const(0), Const(1)
INFINITY = Const(math.inf)
SCORE, WEIGHT = Score(), Weight()


def lift_number(value: Expr | Number) -> Expr:
    """A Python number as a :class:`Const`; an expression as it is."""
    return value if isinstance(value, Expr) else Const(value)


def apply(operator: str, *arguments: Expr | Number) -> Expr:
    """The operator on the arguments, typed; associative operators are flattened, nothing else is rewritten.

    Raises:
        ValueError: for an unknown operator, a wrong number of arguments, or arguments of kinds it does not take.
    """
    row = OPERATORS.get(operator)
    if row is None:
        raise ValueError(f"unknown operator {operator!r}; the known ones are {', '.join(sorted(OPERATORS))}")
    children = tuple(lift_number(argument) for argument in arguments)
    if row.arity is None:
        children = tuple(
            grandchild
            for child in children
            for grandchild in (child.children if isinstance(child, Apply) and child.operator == operator else (child,))
        )
        if len(children) == 1:
            return children[0]
    if not children or (row.arity is not None and len(children) != row.arity):
        raise ValueError(f"operator {operator!r} takes {row.arity or 'two or more'} arguments, got {len(children)}")
    kind = row.result([child.kind for child in children])
    if kind is None:
        kinds = ", ".join(f"{child} : {child.kind}" for child in children)
        raise ValueError(f"operator {operator!r} does not take arguments of these kinds: {kinds}")
    return Apply(operator, children, kind)


def where(condition: Expr, then: Expr | Number, otherwise: Expr | Number) -> Expr:
    """``then`` where the condition holds, else ``otherwise``."""
    return apply("where", condition, then, otherwise)


def walk(expr: Expr) -> Iterator[Expr]:
    """Every node of the tree, parents before children."""
    stack = [expr]
    while stack:
        node = stack.pop()
        yield node
        stack.extend(reversed(node.children))


def rewrite(expr: Expr, visit: Callable[[Expr], Expr | None]) -> Expr:
    """Rebuild the tree bottom up; ``visit`` may replace a node whose children are already rebuilt."""
    known: dict[Expr, Expr] = {}

    def go(node: Expr) -> Expr:
        if node in known:
            return known[node]
        children = node.children
        rebuilt = tuple(go(child) for child in children)
        result = node if rebuilt == children else node.with_children(rebuilt)
        replaced = visit(result)
        known[node] = result if replaced is None else replaced
        return known[node]

    return go(expr)


def substitute(expr: Expr, values: Mapping[Expr, Expr]) -> Expr:
    """Replace whole subexpressions (usually symbols) by others, everywhere at once."""

    def visit(node: Expr) -> Expr | None:
        return values.get(node)

    return rewrite(expr, visit)


def symbols(expr: Expr) -> frozenset[Expr]:
    """The index symbols, sizes, score and weight that the expression reads."""
    return frozenset(node for node in walk(expr) if isinstance(node, Index | Size | Score | Weight))


def loads(expr: Expr) -> tuple[Load, ...]:
    """The loads of the expression, in the order they are written, each once."""
    return tuple(dict.fromkeys(node for node in walk(expr) if isinstance(node, Load)))


def conjuncts(mask: Expr) -> tuple[Expr, ...]:
    """The parts of a mask that must all hold."""
    if mask == TRUE:
        return ()
    if isinstance(mask, Apply) and mask.operator == "and":
        return mask.arguments
    return (mask,)


def conjunction(parts: tuple[Expr, ...] | list[Expr]) -> Expr:
    """The mask that holds where all parts hold; no parts: always."""
    return apply("and", *parts) if parts else TRUE
