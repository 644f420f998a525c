"""What a mask function says, read off by calling it: with terms for positions instead of tensors of numbers.

transformers states a mask as a function of ``(batch, head, query, key)`` positions, put together from smaller ones by
``and_masks`` and ``or_masks``. Called with :class:`Term` objects, such a function does not compute: every operator and
every element of a captured tensor that it reads becomes text, in the notation of :mod:`attncompile.ir.text`. Nothing is
traced and no map is built. A function that does anything else raises :class:`Unstated`, and its mask is computed.

Terms are text and lists, not expressions, so that Dynamo can follow the same code inside a compiled model.
"""

from __future__ import annotations

import builtins
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from attncompile.ir.operators import Kind
from attncompile.ir.text import parse_expr
from attncompile.ir.types import NAMES, element_kind

_READABLE = (torch.bool, torch.int64, torch.int32)


class Unstated(Exception):
    """A mask function does something that has no term; says what."""


class Captured:
    """The tensors that a mask function reads, each once, and how far each position runs.

    Attributes:
        tensors: in the order of their first use; the text calls them ``t0``, ``t1`` and so on.
        reaches: text of a position to the number of elements an axis must have that it indexes; ``None`` where only a
            tensor knows.
    """

    def __init__(self, reaches: dict[str, Any]) -> None:
        self.tensors: list[torch.Tensor] = []
        self.reaches = reaches

    def name(self, tensor: torch.Tensor) -> str:
        """What the text calls a tensor."""
        for number, known in enumerate(self.tensors):
            if known is tensor:
                return f"t{number}"
        self.tensors.append(tensor)
        return f"t{len(self.tensors) - 1}"


class Term:
    """A value that depends on positions: its text, and what is needed to write larger ones.

    Attributes:
        text: an expression in the notation of :func:`attncompile.ir.text.parse_expr`.
        captured: the tensors read so far, shared by all terms of a mask function.
        truth: whether it is a truth value.
    """

    def __init__(self, text: str, captured: Captured, truth: builtins.bool = False) -> None:
        self.text, self.captured, self.truth = text, captured, truth

    # what mask functions ask of a tensor beside arithmetic
    device = None
    ndim = 0

    def new_ones(self, size: Any, dtype: Any = None, **options: Any) -> Term:
        """True everywhere, as ``and_masks`` begins."""
        return _constant(True, size, dtype, self.captured)

    def new_zeros(self, size: Any, dtype: Any = None, **options: Any) -> Term:
        """False everywhere, as ``or_masks`` begins."""
        return _constant(False, size, dtype, self.captured)

    def to(self, *targets: Any, **options: Any) -> Term:
        """Itself on any device; another dtype is no term, except truth values and integers as they are."""
        for target in (*targets, *options.values()):
            if isinstance(target, torch.dtype):
                if target is torch.bool:
                    return self.bool()
                if self.truth or target is not torch.int64:
                    raise Unstated("it casts a value to another dtype")
        return self

    def bool(self) -> Term:
        """Whether it is not zero."""
        return self if self.truth else _binary(self, "≠", 0, True)

    def abs(self) -> Term:
        """Its absolute value."""
        return Term(f"abs({self.text})", self.captured)

    def __abs__(self) -> Term:
        return self.abs()

    def __neg__(self) -> Term:
        return Term(f"(0 − {self.text})", self.captured)

    def __invert__(self) -> Term:
        if not self.truth:
            raise Unstated("it inverts the bits of an integer")
        return Term(f"(not {self.text})", self.captured, True)

    def logical_not(self) -> Term:
        """Whether it is zero."""
        return self.bool().__invert__()

    def __add__(self, other: Any) -> Term:
        return _binary(self, "+", other)

    def __radd__(self, other: Any) -> Term:
        return _binary(other, "+", self)

    def __sub__(self, other: Any) -> Term:
        return _binary(self, "−", other)

    def __rsub__(self, other: Any) -> Term:
        return _binary(other, "−", self)

    def __mul__(self, other: Any) -> Term:
        return _binary(self, "·", other)

    def __rmul__(self, other: Any) -> Term:
        return _binary(other, "·", self)

    def __floordiv__(self, other: Any) -> Term:
        return _binary(self, "//", other)

    def __mod__(self, other: Any) -> Term:
        return _binary(self, "%", other)

    def __lt__(self, other: Any) -> Term:
        return _binary(self, "<", other, True)

    def __le__(self, other: Any) -> Term:
        return _binary(self, "≤", other, True)

    def __gt__(self, other: Any) -> Term:
        return _binary(self, ">", other, True)

    def __ge__(self, other: Any) -> Term:
        return _binary(self, "≥", other, True)

    def __eq__(self, other: object) -> Term:  # type: ignore[override]  # a term, as a tensor gives a tensor
        return _binary(self, "=", other, True)

    def __ne__(self, other: object) -> Term:  # type: ignore[override]
        return _binary(self, "≠", other, True)

    __hash__ = None  # type: ignore[assignment]

    def __and__(self, other: Any) -> Term:
        return _logic(self, "and", other)

    def __rand__(self, other: Any) -> Term:
        return _logic(self, "and", other)

    def __or__(self, other: Any) -> Term:
        return _logic(self, "or", other)

    def __ror__(self, other: Any) -> Term:
        return _logic(self, "or", other)

    def __bool__(self) -> builtins.bool:
        raise Unstated("it decides by a position")

    def __index__(self) -> int:
        raise Unstated("it takes a position for a number")

    def __getattr__(self, name: str) -> Any:
        raise Unstated(f"it asks a position for {name}")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _called(func, args, kwargs or {})


class _ReadsElements(TorchFunctionMode):
    """Lets a plain tensor be indexed by terms; everything else is left alone."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _called(func, args, kwargs or {})


def state(function: Callable[..., Any], query: str, key: str, reaches: dict[str, Any]) -> Term:
    """What a mask function says of a pair of positions.

    Args:
        function: of batch, head, query and key position.
        query: text of the query's position, such as ``(i + O)``; key: that of the key's.
        reaches: as in :class:`Captured`.

    Raises:
        Unstated: when it does something that has no term.
    """
    captured = Captured(reaches)
    # transformers makes one mask for all heads
    places = (Term("b", captured), Term("0", captured), Term(query, captured), Term(key, captured))
    with _ReadsElements():
        found = function(*places)
    found = _term(found, captured).bool()
    if not _reads_back(found.text, tuple(tensor.dtype for tensor in captured.tensors)):
        raise Unstated(f"no expression says {found.text}")
    return found


@torch.compiler.assume_constant_result
def _reads_back(text: str, dtypes: tuple[torch.dtype, ...]) -> bool:
    """Whether a text is a truth value in the notation of expressions. Dynamo takes the answer as a constant."""
    return _parses(text, dtypes)


@functools.lru_cache(maxsize=1024)
def _parses(text: str, dtypes: tuple[torch.dtype, ...]) -> bool:
    kinds = {f"t{number}": element_kind(NAMES[dtype]) for number, dtype in enumerate(dtypes)}
    try:
        return parse_expr(text, kinds).kind is Kind.BOOL
    except ValueError:
        return False


def _constant(value: bool, size: Any, dtype: Any, captured: Captured) -> Term:
    if dtype is not torch.bool or size != ():
        raise Unstated("it makes a tensor that is no single truth value")
    return Term("true" if value else "false", captured, True)


def _term(value: Any, captured: Captured) -> Term:
    """Any operand as a term.

    Raises:
        Unstated: for something that is no number, truth value or tensor of one element.
    """
    if isinstance(value, Term):
        return value
    if isinstance(value, bool):
        return Term("true" if value else "false", captured, True)
    if isinstance(value, int):
        return Term(f"{value}" if value >= 0 else f"(0 − {-value})", captured)
    if isinstance(value, torch.Tensor) and value.ndim == 0 and value.dtype in _READABLE:
        # a copy: a number that is counted on in place would move the mask
        return Term(f"{captured.name(value.clone().reshape(1))}[0]", captured, value.dtype is torch.bool)
    raise Unstated(f"it puts a position together with a value of type {type(value).__name__}")


def _binary(left: Any, symbol: str, right: Any, truth: bool = False) -> Term:
    captured = left.captured if isinstance(left, Term) else right.captured
    left, right = _term(left, captured), _term(right, captured)
    if left.truth != right.truth or (left.truth and not truth):
        raise Unstated("it computes with truth values")
    return Term(f"({left.text} {symbol} {right.text})", captured, truth)


def _logic(left: Term, word: str, right: Any) -> Term:
    right = _term(right, left.captured)
    if not (left.truth and right.truth):
        raise Unstated("it joins the bits of integers")
    return Term(f"({left.text} {word} {right.text})", left.captured, True)


def _element(tensor: torch.Tensor, places: Any) -> Term:
    """An element of a captured tensor; out of range there is no term, since an expression reads the nearest one."""
    indices = places if isinstance(places, tuple) else (places,)
    captured = next(place.captured for place in indices if isinstance(place, Term))
    if len(indices) != tensor.ndim:
        raise Unstated(f"it reads a tensor of {tensor.ndim} axes with {len(indices)} indices")
    texts = []
    for place, extent in zip(indices, tensor.shape, strict=True):
        if isinstance(place, Term) and place.text in captured.reaches:
            reach = captured.reaches[place.text]
            if reach is not None and extent < reach:
                raise Unstated("it reads behind the end of a tensor")
            texts.append(place.text)
        else:
            raise Unstated("it reads a tensor at something else than a position")
    if tensor.dtype not in _READABLE:
        raise Unstated("it reads a tensor that holds neither integers nor truth values")
    return Term(f"{captured.name(tensor)}[{', '.join(texts)}]", captured, tensor.dtype is torch.bool)


def _where(condition: Any, then: Any, otherwise: Any) -> Term:
    captured = next(part.captured for part in (condition, then, otherwise) if isinstance(part, Term))
    condition, then, otherwise = (_term(part, captured) for part in (condition, then, otherwise))
    if not condition.truth or then.truth != otherwise.truth:
        raise Unstated("it chooses between values of two kinds")
    if then.truth:
        return (condition & then) | (~condition & otherwise)
    return Term(f"where({condition.text}, {then.text}, {otherwise.text})", captured)


def _divided(left: Any, right: Any, rounding_mode: Any = None) -> Term:
    """Positions are not negative, so both ways of rounding a quotient agree for them."""
    position = isinstance(left, Term) and left.text in left.captured.reaches
    if rounding_mode == "floor" or (rounding_mode == "trunc" and position and isinstance(right, int) and right > 0):
        return _binary(left, "//", right)
    raise Unstated("it divides without rounding down")


_FUNCTIONS: dict[str, Callable[..., Term]] = {
    "__getitem__": _element,
    "where": _where,
    "div": _divided,
    "abs": lambda value: value.abs(),
    "logical_not": lambda value: value.logical_not(),
    "logical_and": lambda left, right: _logic(left, "and", right) if isinstance(left, Term) else right & left,
    "logical_or": lambda left, right: _logic(left, "or", right) if isinstance(left, Term) else right | left,
    "__add__": lambda left, right: _binary(left, "+", right),
    "__sub__": lambda left, right: _binary(left, "−", right),
    "__mul__": lambda left, right: _binary(left, "·", right),
    "__lt__": lambda left, right: _binary(left, "<", right, True),
    "__le__": lambda left, right: _binary(left, "≤", right, True),
    "__gt__": lambda left, right: _binary(left, ">", right, True),
    "__ge__": lambda left, right: _binary(left, "≥", right, True),
    "__eq__": lambda left, right: _binary(left, "=", right, True),
    "__ne__": lambda left, right: _binary(left, "≠", right, True),
    "__and__": lambda left, right: _logic(right, "and", left),
    "__or__": lambda left, right: _logic(right, "or", left),
}
"""What a function of torch is in terms, by its name: also a method of a tensor, where a term stands at its right."""


def _called(func: Any, args: Any, kwargs: Any) -> Any:
    if not _has_term(args):
        return func(*args, **kwargs)
    name = getattr(func, "__name__", "")
    if name in _FUNCTIONS:
        return _FUNCTIONS[name](*args, **kwargs)
    raise Unstated(f"it calls {name or 'a function'} on a position")


def _has_term(values: Any) -> bool:
    return any(isinstance(value, Term) or (isinstance(value, tuple) and _has_term(value)) for value in values)
