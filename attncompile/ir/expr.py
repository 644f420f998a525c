"""Index expressions: the language in which a score, a mask or a tensor's layout is stated.

An :class:`Expr` is an immutable tree over index symbols (``b h g i j d``), symbolic sizes (``I J B``), the
raw score ``s``, loads ``tensor[e0, e1]`` of captured tensors, constants and the pointwise operators of
:mod:`attncompile.ir.operators`. Integers are mathematical integers; real numbers are evaluated in whatever
float dtype the evaluator is given. A load outside its tensor reads the nearest element instead of failing, so
that ``where(j < 4, a[j], b[j - 4])`` means what it says.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from attncompile.ir.operators import OPERATORS, Kind

Number = bool | int | float
Order = tuple[Any, ...]
"""A sortable description of an expression: rank of its class, name, number, then those of its children."""


class Expr:
    """Base of the expression nodes; carries the arithmetic notation (``i - j``, ``~mask``, ``x & y``).

    Nodes are compared by structure. Hash and order are computed once per node and kept, so that dictionaries
    of expressions and sorted sums cost the same for deep trees as for leaves.
    """

    __slots__ = ("_hash", "_order")
    _hash: int
    _order: Order
    __match_args__: ClassVar[tuple[str, ...]] = ()
    rank: ClassVar[int] = 0

    def _identity(self) -> tuple[Any, ...]:
        """What tells this node from others of its class."""
        return tuple(getattr(self, name) for name in type(self).__match_args__)

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if type(self) is not type(other) or hash(self) != hash(other):
            return False
        return self._identity() == other._identity()

    def __hash__(self) -> int:
        try:
            return self._hash
        except AttributeError:
            object.__setattr__(self, "_hash", hash((self.rank, self._identity())))
            return self._hash

    @property
    def order(self) -> Order:
        """Key of a total order in which equal expressions are equal: simple before compound, then by name."""
        try:
            return self._order
        except AttributeError:
            object.__setattr__(self, "_order", self._make_order())
            return self._order

    def _make_order(self) -> Order:
        return self.rank, getattr(self, "name", ""), 0, ()

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
        from attncompile.ir.text import (
            print_expr,  # the printer reads the tree, so it cannot be imported above
        )

        return print_expr(self)


_NAME = re.compile(r"[A-Za-z_]\w*")
_RESERVED = frozenset({"s", "w", "t", "true", "false", "inf", "nan", "and", "or", "not"})


def _check_name(name: str, what: str, right_case: bool) -> None:
    if not _NAME.fullmatch(name) or name in _RESERVED or not right_case:
        first = "an upper-case" if what == "a size" else "a lower-case"
        raise ValueError(
            f"{name!r} cannot name {what}: it takes letters, digits and _, {first} letter first, and none "
            f"of the words {', '.join(sorted(_RESERVED))}"
        )


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Const(Expr):
    """A literal. Equality tells ``1`` from ``1.0`` and from ``true``, and 0.0 from −0.0."""

    value: Number

    @property
    def kind(self) -> Kind:
        if isinstance(self.value, bool):
            return Kind.BOOL
        return Kind.INT if isinstance(self.value, int) else Kind.FLOAT

    def _identity(self) -> tuple[Any, ...]:
        # the text of a float tells the zeros apart and makes NaN equal to itself
        return type(self.value).__name__, repr(self.value) if isinstance(self.value, float) else self.value

    def _make_order(self) -> Order:
        number = 0 if self.value != self.value else self.value
        return self.rank, *self._identity()[:1], number, (repr(self.value),)

    def __repr__(self) -> str:
        return f"Const({self.value!r})"


@dataclass(frozen=True, slots=True, eq=False)
class Index(Expr):
    """A position along a named axis: an integer from 0 to below the axis' size. Its name starts in lower
    case.

    Raises:
        ValueError: for a name that would not read back as an index.
    """

    name: str
    rank: ClassVar[int] = 1

    def __post_init__(self) -> None:
        _check_name(self.name, "an index", not self.name[:1].isupper())

    @property
    def kind(self) -> Kind:
        return Kind.INT


@dataclass(frozen=True, slots=True, eq=False)
class Size(Expr):
    """A symbolic size, an integer of at least 0 (a cache may be empty). Its name starts in upper case.

    Raises:
        ValueError: for a name that would not read back as a size.
    """

    name: str
    rank: ClassVar[int] = 2

    def __post_init__(self) -> None:
        _check_name(self.name, "a size", self.name[:1].isupper())

    @property
    def kind(self) -> Kind:
        return Kind.INT


@dataclass(frozen=True, slots=True, eq=False)
class Score(Expr):
    """The raw score ``s[b, h, i, j]``: the inner product of query and key, before any scaling."""

    rank: ClassVar[int] = 3

    @property
    def kind(self) -> Kind:
        return Kind.FLOAT


@dataclass(frozen=True, slots=True, eq=False)
class Weight(Expr):
    """The normalised weight ``w[b, h, i, j]``, for edits between normaliser and value product."""

    rank: ClassVar[int] = 4

    @property
    def kind(self) -> Kind:
        return Kind.FLOAT


@dataclass(frozen=True, slots=True, eq=False)
class Total(Expr):
    """The sum over the keys ``t[b, h, i]`` that a normaliser divides by, for edits of that sum."""

    rank: ClassVar[int] = 5

    @property
    def kind(self) -> Kind:
        return Kind.FLOAT


@dataclass(frozen=True, slots=True, eq=False)
class Load(Expr):
    """``tensor[e0, e1, ...]``: one element of a captured tensor; an index out of range is clamped into it."""

    tensor: str
    indices: tuple[Expr, ...]
    element: Kind
    rank: ClassVar[int] = 6

    def __post_init__(self) -> None:
        hash(self)  # the children's are known: no recursion later

    def _identity(self) -> tuple[Any, ...]:
        return self.tensor, self.indices, self.element

    @property
    def kind(self) -> Kind:
        return self.element

    @property
    def children(self) -> tuple[Expr, ...]:
        return self.indices

    def with_children(self, children: tuple[Expr, ...]) -> Expr:
        return Load(self.tensor, children, self.element)

    def _make_order(self) -> Order:
        return self.rank, self.tensor, 0, tuple(index.order for index in self.indices), self.element.value


@dataclass(frozen=True, slots=True, eq=False)
class Apply(Expr):
    """A pointwise operator on subexpressions; build it with :func:`apply`, which checks the types."""

    operator: str
    arguments: tuple[Expr, ...]
    result: Kind
    rank: ClassVar[int] = 7

    def __post_init__(self) -> None:
        hash(self)  # the children's are known: no recursion later

    def _identity(self) -> tuple[Any, ...]:
        return self.operator, self.arguments, self.result

    @property
    def kind(self) -> Kind:
        return self.result

    @property
    def children(self) -> tuple[Expr, ...]:
        return self.arguments

    def with_children(self, children: tuple[Expr, ...]) -> Expr:
        return apply(self.operator, *children)

    def _make_order(self) -> Order:
        return self.rank, self.operator, 0, tuple(argument.order for argument in self.arguments)


TRUE, FALSE = Const(True), Const(False)
ZERO, ONE = Const(0), Const(1)
INFINITY = Const(math.inf)
SCORE, WEIGHT, TOTAL = Score(), Weight(), Total()


def lift_number(value: Expr | Number) -> Expr:
    """A Python number as a :class:`Const`; an expression as it is."""
    return value if isinstance(value, Expr) else Const(value)


def apply(operator: str, *arguments: Expr | Number) -> Expr:
    """The operator on the arguments, typed; associative operators are flattened, nothing else is rewritten.

    An integer sum inside a real one stays a node of its own: it is exact, and its terms need not be.

    Raises:
        ValueError: for an unknown operator, a wrong number of arguments, or arguments of kinds it does not
            take.
    """
    row = OPERATORS.get(operator)
    if row is None:
        raise ValueError(f"unknown operator {operator!r}; the known ones are {', '.join(sorted(OPERATORS))}")
    children = tuple(lift_number(argument) for argument in arguments)
    if not children or (row.arity is not None and len(children) != row.arity):
        count = (
            "one or more arguments" if row.arity is None else f"{row.arity} argument{'s' * (row.arity > 1)}"
        )
        raise ValueError(f"operator {operator!r} takes {count}, got {len(children)}")
    kind = row.result([child.kind for child in children])
    if kind is None:
        kinds = ", ".join(f"{child} : {child.kind}" for child in children)
        raise ValueError(f"operator {operator!r} does not take arguments of these kinds: {kinds}")
    if row.arity is None:
        children = tuple(_flattened(operator, kind, children))
        if len(children) == 1:
            return children[0]
    return Apply(operator, children, kind)


def _flattened(operator: str, kind: Kind, children: Iterable[Expr]) -> Iterator[Expr]:
    for child in children:
        if isinstance(child, Apply) and child.operator == operator and child.result is kind:
            yield from child.arguments
        else:
            yield child


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

    return rewrite(expr, values.get)


def symbols(expr: Expr) -> frozenset[Expr]:
    """The index symbols, sizes, score, weight and total that the expression reads."""
    return frozenset(node for node in walk(expr) if isinstance(node, Index | Size | Score | Weight | Total))


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
