"""Expressions as Triton source: the table :data:`attncompile.ir.operators.OPERATORS` says how each operator
is written. Languages that differ from Triton in some rows are a :class:`Dialect`.

Indices are int32 scalars or tiles that broadcast against each other (``b`` and ``h`` scalars, ``i`` a column,
``j`` a row), real numbers are float32. A load outside its tensor is clamped into it, unless the index is
proven to be inside.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from attncompile.ir.evaluate import largest_first
from attncompile.ir.expr import Apply, Const, Expr, Index, Load, Score, Size, Total, Weight, loads, symbols, walk
from attncompile.ir.intervals import bounds
from attncompile.ir.operators import OPERATORS, Kind
from attncompile.ir.simplify import Simplifier
from attncompile.ir.types import TensorType

LONGEST = 72
"""A subexpression whose text is longer than this gets a line of its own."""
LONGEST_INDEX = 24
"""The same for an index of a load."""

_COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")
_SYMBOLS = {"add": " + ", "mul": " * ", "and": " & ", "or": " | "}
DEVICE_FUNCTIONS = ("tanh", "round_half_even", "floor_divide", "floor_modulo")
"""Functions of :mod:`attncompile.kernels.device` that expressions call."""


@dataclass(frozen=True)
class Dialect:
    """How a language other than Triton's writes expressions.

    Attributes:
        prefix: stands where Triton's source has ``tl.``.
        forms: format strings of the operators that are written differently.
    """

    prefix: str = "tl."
    forms: Mapping[str, str] = field(default_factory=dict)

    def form(self, operator: str) -> str:
        """Format string over the printed arguments of an operator."""
        return self.forms.get(operator) or self.call(OPERATORS[operator].triton)

    def call(self, text: str) -> str:
        """Triton source in this language."""
        return text.replace("tl.", self.prefix)


TRITON = Dialect()


@dataclass(frozen=True)
class Scope:
    """What the names of an expression are called in the generated code.

    Attributes:
        indices: index name to identifier.
        sizes: size name to identifier.
        tensors: tensor name to the identifier of its pointer; strides are ``{identifier}_stride_{axis}``.
        types: types of the tensors.
        extents: index name to the size of its axis, for indices that are known to lie inside.
        dialect: the language.
        given: parts whose values have names already.
    """

    indices: Mapping[str, str]
    sizes: Mapping[str, str]
    tensors: Mapping[str, str]
    types: Mapping[str, TensorType]
    extents: Mapping[str, Expr] = field(default_factory=dict)
    dialect: Dialect = TRITON
    given: Mapping[Expr, str] = field(default_factory=dict)

    def read(self, expr: Expr) -> list[Expr]:
        """The nodes of an expression, parents first, without what lies inside of values that are given."""
        if expr in self.given:
            return []
        return [expr, *(node for child in expr.children for node in self.read(child))]


@dataclass(frozen=True)
class Printed:
    """Source of an expression: lines to run first, then the text of the value."""

    lines: tuple[str, ...]
    value: str


def stride_name(pointer: str, axis: int) -> str:
    """Identifier of a captured tensor's stride along an axis."""
    return f"{pointer}_stride_{axis}"


def refusal(expr: Expr) -> str | None:
    """Why the expression cannot be written in Triton, or ``None``."""
    for node in walk(expr):
        if isinstance(node, Apply) and not OPERATORS[node.operator].triton:
            return f"the operator {node.operator!r} in {expr} has no Triton form"
        if isinstance(node, Apply) and node.operator == "pow" and not _positive(node.arguments[0]):
            return f"{node} in {expr}: a power needs a base that is proven positive"
    return None


def _positive(expr: Expr) -> bool:
    low = bounds(expr, {}).low
    return bool(low > 0)


def print_triton(expr: Expr, scope: Scope, numbers: Counter[str] | None = None) -> Printed:
    """Source of an expression.

    Args:
        expr: what to write.
        scope: names.
        numbers: how often each name is taken by lines that run before; share it between expressions whose lines
            stand together.

    Raises:
        ValueError: for an operator without a Triton form, or a name that the scope lacks.
    """
    return _print(expr, scope, Counter() if numbers is None else numbers, address=False)


def print_address(node: Load, scope: Scope) -> Printed:
    """Source of the address that a load reads.

    Args:
        node: the load.
        scope: names; the tensor's identifier may stand for another tensor of the same axes, or for 0: the source is
            then the element's offset in int64.

    Raises:
        ValueError: as :func:`print_triton`.
    """
    return _print(node, scope, Counter(), address=True)


def _print(expr: Expr, scope: Scope, numbers: Counter[str], *, address: bool) -> Printed:
    reason = refusal(expr)
    if reason:
        raise ValueError(reason)
    uses = Counter(child for node in dict.fromkeys(walk(expr)) for child in node.children)
    simplifier = Simplifier(scope.extents)
    lines: list[str] = []
    known: dict[Expr, str] = dict(scope.given)
    dialect = scope.dialect

    def bind(text: str, name: str) -> str:
        numbers[name] += 1
        name = name if numbers[name] == 1 else f"{name}_{numbers[name]}"
        lines.append(f"{name} = {_bare(text)}")
        return name

    def go(node: Expr) -> str:
        if node not in known:
            text = _text(node)
            if isinstance(node, Load):
                text = bind(text, f"{scope.tensors[node.tensor]}_value")
            elif isinstance(node, Apply) and node != expr and (uses[node] > 1 or len(text) > LONGEST):
                text = bind(text, "part")
            known[node] = text
        return known[node]

    def as_real(node: Expr) -> str:
        if isinstance(node, Const):
            return number(float(node.value))
        return go(node) if node.kind is Kind.FLOAT else dialect.call(f"tl.cast({go(node)}, tl.float32)")

    def nonnegative(node: Expr) -> bool:
        return simplifier.nonnegative(node) or bool(bounds(simplifier(node), {}).low >= 0)

    def located(node: Load) -> str:
        pointer = scope.tensors[node.tensor]
        place = pointer  # grows by one axis a line
        axes = scope.types[node.tensor].axes
        for position, (index, axis) in enumerate(zip(node.indices, axes, strict=True)):
            if index == Const(0):
                continue
            text = _bare(go(index))
            if not nonnegative(index):
                text = dialect.call(f"tl.maximum({text}, 0)")
            if not nonnegative(axis.size - 1 - index):
                text = dialect.call(f"tl.minimum({text}, {_bare(go(simplifier(axis.size - 1)))})")
            if len(text) > LONGEST_INDEX:
                text = bind(text, "index")
            step = f" + {dialect.call(f'tl.cast({text}, tl.int64)')} * {stride_name(pointer, position)}"
            if len(place) + len(step) > LONGEST and place != pointer:
                place = bind(place, f"{pointer}_at")
            place += step
        return bind(place, f"{pointer}_at") if len(place) > LONGEST else place

    def load(node: Load) -> str:
        dtype = scope.types[node.tensor].dtype
        read = dialect.call(f"tl.load({located(node)})")
        if node.element is Kind.FLOAT:
            return dialect.call(f"{read}.to(tl.float32)")
        return dialect.call(f"{read}.to(tl.int32)") if dtype in ("int8", "uint8") else read

    def written_in_lines(operator: str, texts: list[str]) -> str:
        """A sum or product of many terms: so many a line, the line before as its first term."""
        group: list[str] = []
        for text in texts:
            if len(group) > 1 and sum(len(t) + 3 for t in (*group, text)) > LONGEST:
                group = [bind(_written(operator, group, dialect), "part")]
            group.append(text)
        return _written(operator, group, dialect) if len(group) > 1 else group[0]

    def _text(node: Expr) -> str:
        match node:
            case Const(value):
                return number(value)
            case Index(name):
                return _named(scope.indices, name, "index")
            case Size(name):
                return _named(scope.sizes, name, "size")
            case Score():
                return "s"
            case Weight():
                return "w"
            case Total():
                return "t"
            case Load():
                return load(node)
            case Apply(operator, arguments, result):
                arguments = largest_first(arguments) if operator == "add" else arguments
                real = takes_reals(operator, arguments, result)
                texts = [as_real(a) if real and a.kind is not Kind.BOOL else go(a) for a in arguments]
                if operator in ("floordiv", "mod") and all(
                    nonnegative(a - least) for a, least in zip(arguments, (0, 1), strict=True)
                ):
                    return f"({texts[0]} {'//' if operator == 'floordiv' else '%'} {texts[1]})"
                if operator in _SYMBOLS and operator not in dialect.forms:
                    return written_in_lines(operator, texts)
                return _written(operator, texts, dialect)
        raise ValueError(f"cannot write {node!r} in Triton")

    value = located(expr) if address and isinstance(expr, Load) else go(expr)
    return Printed(tuple(lines), _bare(value))


def takes_reals(operator: str, arguments: Sequence[Expr], result: Kind) -> bool:
    """Whether an operator's integer arguments are converted to real numbers first."""
    if operator in _COMPARISONS or (operator == "where" and result is Kind.FLOAT):
        return any(argument.kind is Kind.FLOAT for argument in arguments)
    return result is Kind.FLOAT and operator not in ("where", "float")


def _named(names: Mapping[str, str], name: str, what: str) -> str:
    if name not in names:
        raise ValueError(f"no {what} {name!r} here; there are {sorted(names)}")
    return names[name]


def _written(operator: str, texts: list[str], dialect: Dialect) -> str:
    form = dialect.form(operator)
    if not form.startswith("("):
        texts = [_bare(text) for text in texts]  # a call's own parentheses are enough
    if OPERATORS[operator].arity is not None:
        return form.format(*texts)
    if operator == "add":
        return f"({texts[0]}{''.join(_term(t) for t in texts[1:])})"
    symbol = None if operator in dialect.forms else _SYMBOLS.get(operator)
    if symbol:
        return f"({symbol.join(texts)})"
    text = texts[0]
    for other in texts[1:]:
        text = form.format(text, other)
    return text


def _term(text: str) -> str:
    """A further term of a sum: ``- x`` reads better than ``+ -x`` and ``+ (-1 * x)``."""
    for negation in ("(-1 * ", "(-1.0 * "):
        if text.startswith(negation) and _closes_at_end(text):
            factors = text[len(negation) : -1]
            return f" - ({factors})" if " * " in factors else f" - {factors}"
    return f" - {text[1:]}" if text.startswith("-") else f" + {text}"


def _closes_at_end(text: str) -> bool:
    depth = 0
    for position, character in enumerate(text):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth == 0:
            return position == len(text) - 1
    return False


def _bare(text: str) -> str:
    """Without the parentheses around the whole."""
    return text[1:-1] if text.startswith("(") and _closes_at_end(text) else text


def number(value: bool | int | float) -> str:
    """A literal, such that Triton reads the same value."""
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    return repr(value)


def captured_tensors(*expressions: Expr) -> tuple[str, ...]:
    """Names of the tensors that the expressions load, each once, in order."""
    return tuple(dict.fromkeys(load.tensor for expr in expressions for load in loads(expr)))


def is_pair(load: Load) -> bool:
    """Whether the element depends on query and key."""
    return {Index("i"), Index("j")} <= symbols(load)
