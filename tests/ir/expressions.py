"""Hypothesis strategies: random well-typed expressions, and random values for what they read."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from attncompile.ir.evaluate import Environment, evaluate
from attncompile.ir.expr import SCORE, WEIGHT, Apply, Const, Expr, Index, Load, Size, apply, walk
from attncompile.ir.operators import OPERATORS, ROWS, Kind

INDICES = ("b", "h", "i", "j", "d")
SIZES = ("B", "H", "I", "J", "P")
TENSORS = {
    "keep": (Kind.BOOL, (3, 5)),
    "documents": (Kind.INT, (3, 6)),
    "bias": (Kind.FLOAT, (4, 5)),
    "layer.0.slopes": (Kind.FLOAT, (4,)),
    "offset": (Kind.INT, ()),
}
KINDS = {name: kind for name, (kind, _) in TENSORS.items()}
EXTENTS = {"b": Size("B"), "h": Size("H"), "i": Size("I"), "j": Size("J"), "d": Const(8)}

EXACT = ("add", "mul", "min", "max", "abs", "where", "float", "floor", "ceil", "round")
"""Operators whose real results are exact on small dyadic numbers, so that reordering them changes nothing."""
SMOOTH = (
    "add",
    "mul",
    "div",
    "exp",
    "exp2",
    "log",
    "log2",
    "tanh",
    "sigmoid",
    "erf",
    "sqrt",
    "rsqrt",
    "sin",
    "cos",
    "pow",
    "abs",
    "where",
    "min",
    "max",
    "float",
)
"""Operators without jumps, so that a rounding difference stays one."""

DYADIC = st.integers(-24, 24).map(lambda quarter: quarter / 4)
SPECIAL = st.sampled_from([math.inf, -math.inf, math.nan, 0.0, -0.0, 1.0, -1.0])
ANY_FLOAT = st.floats(allow_nan=True, allow_infinity=True)


@dataclass(frozen=True)
class Language:
    """Which expressions to draw.

    Attributes:
        real: operators that make a real number.
        constants: real literals.
        fractions: whether real numbers may be rounded to integers and compared, which turns rounding into
            jumps.
    """

    real: tuple[str, ...]
    constants: st.SearchStrategy[float]
    fractions: bool


EXACT_LANGUAGE = Language(EXACT, DYADIC | SPECIAL, True)
SMOOTH_LANGUAGE = Language(SMOOTH, DYADIC, False)
WHOLE_LANGUAGE = Language(
    ("where", *(row.name for row in ROWS if row.result([Kind.FLOAT] * (row.arity or 2)) is Kind.FLOAT)),
    ANY_FLOAT,
    True,
)


@st.composite
def expressions(draw: st.DrawFn, kind: Kind, language: Language = EXACT_LANGUAGE, depth: int = 4) -> Expr:
    """A random expression of a kind."""

    def some(kind: Kind, less: int = 1) -> Expr:
        return draw(expressions(kind, language, depth - less))

    def arguments(kind: Kind, operator: str) -> list[Expr]:
        return (
            [some(kind, 2) for _ in range(draw(st.integers(2, 3)))]
            if OPERATORS[operator].arity is None
            else [some(kind) for _ in range(OPERATORS[operator].arity or 0)]
        )

    def load(kind: Kind) -> Expr:
        name = draw(st.sampled_from([name for name, found in KINDS.items() if found is kind]))
        return Load(name, tuple(some(Kind.INT, 2) for _ in TENSORS[name][1]), kind)

    def chosen(options: list[Callable[[], Expr]]) -> Expr:
        return draw(st.sampled_from(options))()

    def number() -> Expr:
        return some(draw(st.sampled_from([Kind.INT, Kind.FLOAT, Kind.FLOAT])))

    if kind is Kind.INT:
        leaves: list[Callable[[], Expr]] = [
            lambda: Index(draw(st.sampled_from(INDICES))),
            lambda: Index(draw(st.sampled_from(("i", "j")))),
            lambda: Size(draw(st.sampled_from(SIZES))),
            lambda: Const(draw(st.integers(-3, 12))),
        ]
        if depth <= 0:
            return chosen(leaves)
        divisor = draw(
            st.sampled_from(
                [
                    Const(2),
                    Const(3),
                    Const(4),
                    Const(12),
                    Const(-3),
                    Size("H"),
                    Size("I"),
                    Size("H") * Size("I"),
                    4 * Size("H"),
                    Index("i"),
                    Const(1),
                ]
            )
        )
        return chosen(
            [
                *leaves,
                *[lambda: apply("add", *arguments(Kind.INT, "add"))] * 3,
                lambda: apply("mul", *arguments(Kind.INT, "mul")),
                *[lambda: some(Kind.INT) // divisor, lambda: some(Kind.INT) % divisor] * 2,
                lambda: apply(draw(st.sampled_from(["min", "max"])), *arguments(Kind.INT, "min")),
                lambda: apply("abs", some(Kind.INT)),
                lambda: apply("where", some(Kind.BOOL), some(Kind.INT), some(Kind.INT)),
                lambda: apply("int", some(Kind.BOOL)),
                lambda: apply(
                    "int", some(Kind.FLOAT) if language.fractions else apply("float", some(Kind.INT))
                ),
                lambda: load(Kind.INT),
            ]
        )
    if kind is Kind.FLOAT:
        real_leaves: list[Callable[[], Expr]] = [
            lambda: SCORE,
            lambda: WEIGHT,
            lambda: Const(draw(language.constants)),
            lambda: load(Kind.FLOAT),
        ]
        if depth <= 0:
            return chosen(real_leaves)

        def operation() -> Expr:
            operator = draw(st.sampled_from(language.real))
            if operator == "where":
                return apply("where", some(Kind.BOOL), some(Kind.FLOAT), number())
            if operator == "float":
                return apply("float", some(draw(st.sampled_from(list(Kind)))))
            row = OPERATORS[operator]
            values = [
                some(Kind.FLOAT),
                *(number() for _ in range((row.arity or draw(st.integers(2, 3))) - 1)),
            ]
            return apply(operator, *draw(st.permutations(values)))

        options = [*real_leaves, *[operation] * 8]
        if language.fractions:
            options.append(lambda: apply("div", some(Kind.FLOAT), draw(st.sampled_from([0.5, 2.0, -4.0, 8]))))
        return chosen(options)
    if depth <= 0:
        return draw(st.sampled_from([Const(True), Const(False), Index("j") <= Index("i"), Index("i") < 3]))
    numbers = [Kind.INT, Kind.INT, Kind.FLOAT] if language.fractions else [Kind.INT]

    def compare() -> Expr:
        return apply(
            draw(st.sampled_from(["lt", "le", "gt", "ge", "eq", "ne"])),
            some(draw(st.sampled_from(numbers))),
            some(draw(st.sampled_from(numbers))),
        )

    return chosen(
        [
            compare,
            compare,
            compare,
            *[lambda: apply(draw(st.sampled_from(["and", "or"])), *arguments(Kind.BOOL, "and"))] * 2,
            lambda: apply("not", some(Kind.BOOL)),
            lambda: apply(draw(st.sampled_from(["eq", "ne"])), some(Kind.BOOL), some(Kind.BOOL)),
            lambda: apply("where", some(Kind.BOOL), some(Kind.BOOL), some(Kind.BOOL)),
            lambda: load(Kind.BOOL),
        ]
    )


def any_expressions(language: Language = EXACT_LANGUAGE, depth: int = 4) -> st.SearchStrategy[Expr]:
    """A random expression of any kind."""
    return st.sampled_from(list(Kind)).flatmap(lambda kind: expressions(kind, language, depth))


def environment(seed: int, *, points: int = 40, inside: bool = False, special: bool = True) -> Environment:
    """Random values for everything the expressions read, at some points.

    Args:
        seed: of the random numbers.
        points: number of index tuples.
        inside: whether the indices stay inside :data:`EXTENTS`.
        special: whether real values may be infinite or NaN.
    """
    random = torch.Generator().manual_seed(seed)

    def whole(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high + 1, shape, generator=random)

    def real(*shape: int) -> torch.Tensor:
        values = whole(-24, 24, *shape).double() / 4
        if special:
            odd = torch.tensor([math.inf, -math.inf, math.nan], dtype=torch.float64)[whole(0, 2, *shape)]
            values = torch.where(whole(0, 6, *shape) == 0, odd, values)
        return values

    sizes = {name: int(whole(1 if inside and name != "P" else 0, 6)) for name in SIZES}
    limits = {"b": sizes["B"], "h": sizes["H"], "i": sizes["I"], "j": sizes["J"], "d": 8}
    makers: dict[Kind, Callable[..., torch.Tensor]] = {
        Kind.BOOL: lambda *shape: whole(0, 1, *shape) == 1,
        Kind.INT: lambda *shape: whole(-5, 9, *shape),
        Kind.FLOAT: real,
    }
    return Environment(
        indices={name: whole(0, limits[name] - 1 if inside else 9, points) for name in INDICES},
        sizes=sizes,
        tensors={name: makers[kind](*shape) for name, (kind, shape) in TENSORS.items()},
        score=real(points),
        weight=real(points),
    )


def defined(expr: Expr, values: Environment) -> bool:
    """Whether the expression has a value everywhere: no integer is divided by 0 or made of NaN."""
    for node in reversed(list(walk(expr))):  # children before parents
        match node:
            case Apply("floordiv" | "mod", (_, divisor)) if not evaluate(divisor, values).all():
                return False
            case Apply("int", (argument,)) if argument.kind is Kind.FLOAT:
                if not (evaluate(argument, values).abs() < 2.0**53).all():
                    return False
    return True
