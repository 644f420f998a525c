"""What an operator's attributes can hold, read off an Attend: scale, bias, causality, window, heads."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from attncompile.ir.affine import affine
from attncompile.ir.attend import Attend, grouped
from attncompile.ir.blocks import key_bounds
from attncompile.ir.expr import TRUE, WEIGHT, Apply, Const, Expr, Index, Load, conjunction, walk
from attncompile.ir.operation import Types
from attncompile.ir.operators import Kind
from attncompile.ir.rows import ABSORBING, extents
from attncompile.ir.scan import Scan
from attncompile.ir.simplify import simplify

MASKED = -(2.0**100)
"""The finite number that stands for "masked" where an operator gives -inf or the lowest float a meaning
of its own."""

ABOVE_LOWEST = -3.4028232635611926e38
"""The float32 next to the lowest, which is that of a mask written as ``3.4e38·(mask − 1)``."""


@dataclass(frozen=True)
class Scaled:
    """A score ``scale * s + bias``; no bias: ``None``."""

    scale: float
    bias: Expr | None


def scaled(attend: Attend) -> Scaled | None:
    """The score as a constant times the raw score plus a bias, when it is that."""
    found = affine(attend.score)
    if found is None or not isinstance(found.slope, Const) or float(found.slope.value) == 0.0:
        return None
    return Scaled(float(found.slope.value), None if found.offset == Const(0.0) else found.offset)


def unweighted(attend: Attend) -> tuple[Attend, float]:
    """An Attend whose weights are multiplied by a constant without that, and the constant; as it is, and 1, if not.

    The product with the values is linear, so the constant may as well stand behind it.
    """
    found = affine(attend.weight, WEIGHT)
    if found is None or not isinstance(found.slope, Const) or found.offset != Const(0.0):
        return attend, 1.0
    return replace(attend, weight=WEIGHT), float(found.slope.value)


def additive_fill(attend: Attend) -> float | None:
    """``c`` when a masked logit may be had as ``score + c``.

    That is so exactly when the fill is the score with a constant added, and up to rounding when the fill is a
    constant that swallows the score.
    """
    fill = simplify(attend.fill)
    if isinstance(fill, Const):
        return float(fill.value) if float(fill.value) <= ABSORBING else None
    masked, score = affine(fill), affine(attend.score)
    if masked is None or score is None or masked.slope != score.slope:
        return None
    constant, rest = _constant_part(masked.offset)
    known, other = _constant_part(score.offset)
    return constant - known if rest == other else None


def _constant_part(offset: Expr) -> tuple[float, tuple[Expr, ...]]:
    """The constant among the terms of a sum, and the other terms."""
    terms = tuple(offset.children) if getattr(offset, "operator", "") == "add" else (offset,)
    constant = math.fsum(float(term.value) for term in terms if isinstance(term, Const))
    return constant, tuple(term for term in terms if not isinstance(term, Const))


def may_be_infinite(expr: Expr | None) -> bool:
    """Whether a real expression can be -inf: it loads real numbers, or names an infinity."""
    return expr is not None and any(
        (isinstance(node, Load) and node.element is Kind.FLOAT)
        or (isinstance(node, Const) and isinstance(node.value, float) and math.isinf(node.value))
        for node in walk(expr)
    )


def may_swallow(expr: Expr | None) -> bool:
    """Whether a finite number is so large that a score added to it is lost: a mask written as a sum."""
    return expr is not None and any(map(_swallows, walk(expr)))


def hides_twice(bias: Expr | None, mask: Expr) -> bool:
    """Whether a mask written as a sum stands beside another mask: a key that both hide is then lower than one that one
    of them hides, which shows in rows that see no key, and is lost where sums are held above the lowest number.

    A single one is a term with one number that swallows scores, as a condition chooses it or one tensor scales it.
    """
    if bias is None or not may_swallow(bias):
        return False
    terms = bias.children if isinstance(bias, Apply) and bias.operator == "add" else (bias,)
    swallowing = [number for term in terms for number in walk(term) if _swallows(number)]
    read = {load for term in terms if may_swallow(term) for load in _scaling(term)}
    return simplify(mask) != TRUE or len(swallowing) > 1 or len(read) > 1


def _swallows(node: Expr) -> bool:
    """Whether a node itself is a number of which a score does not change anything; see :func:`may_swallow`."""
    return isinstance(node, Const) and -ABSORBING <= abs(node.value) < math.inf


def _scaling(term: Expr) -> Iterator[Load]:
    """The loads in a term but for those that only decide a condition."""
    if term.kind is Kind.BOOL:
        return
    if isinstance(term, Load):
        yield term
        return
    for child in term.children:
        yield from _scaling(child)


@dataclass(frozen=True)
class Capped:
    """A score ``cap * tanh(scale * s / cap)``."""

    scale: float
    cap: float


def capped(attend: Attend) -> Capped | None:
    """The score as a soft cap of the scaled raw score, when it is that."""
    score = simplify(attend.score)
    caps = [node for node in walk(score) if isinstance(node, Apply) and node.operator == "tanh"]
    if len(caps) != 1:
        return None
    outer, inner = affine(score, caps[0]), affine(caps[0].arguments[0])
    numbers = [side and (side.slope, side.offset) for side in (outer, inner)]
    match numbers:
        case [(Const(cap), Const(0.0)), (Const(slope), Const(0.0))] if cap > 0:
            return Capped(float(slope) * float(cap), float(cap))
    return None


@dataclass(frozen=True)
class GroupQueryForm:
    """A score as GroupQueryAttention takes it: ``scale * s + bias``, or ``cap * tanh(scale * s / cap)``."""

    scale: float
    cap: float | None = None
    bias: Expr | None = None


def group_query_form(attend: Attend) -> GroupQueryForm | None:
    """The score in that form, when it is one of the two."""
    plain = scaled(attend)
    if plain is not None:
        return GroupQueryForm(plain.scale, bias=plain.bias)
    soft = capped(attend)
    return None if soft is None else GroupQueryForm(soft.scale, soft.cap)


@dataclass(frozen=True)
class CausalMask:
    """A mask ``j <= i + past and j > i + past - window and rest``; no window: ``None``.

    Attributes:
        window: keys that a query sees, itself among them.
        rest: the other conditions.
        cached: whether there may be more keys than queries: ``past = J - I`` keys lie before the first query.
    """

    window: int | None
    rest: Expr
    cached: bool = False


def causal_mask(attend: Attend, types: Types) -> CausalMask | None:
    """The mask as GroupQueryAttention splits it, when it is causal with the last query at the last key."""
    sizes = extents(attend, types)
    past = simplify(sizes["j"] - sizes["i"])
    limits = key_bounds(attend.mask)
    i, j = Index("i"), Index("j")
    after = simplify(i + past + 1)
    if after not in limits.upper:
        return None
    rest = [*limits.rest, *(simplify(j < limit) for limit in limits.upper if limit != after)]
    window: int | None = None
    for limit in limits.lower:
        distance = simplify(after - limit)  # keys i + past - distance + 1 ... i + past
        if window is None and isinstance(distance, Const) and int(distance.value) >= 1:
            window = int(distance.value)
        else:
            rest.append(simplify(j >= limit))
    return CausalMask(window, conjunction(rest), past != Const(0))


def group_size(attend: Attend, types: Types) -> int | None:
    """Query heads per KV head in the usual order ``g = h // size``; ``None`` for any other order."""
    heads, groups = simplify(types[attend.query].sizes[1]), simplify(types[attend.key].sizes[1])
    if not isinstance(heads, Const) or not isinstance(groups, Const):
        return 1 if heads == groups and attend.kv_head == Index("h") else None
    total, count = int(heads.value), int(groups.value)
    if count < 1 or total % count:
        return None
    known = {"h": heads}
    usual = simplify(grouped(total, count), known)
    return total // count if simplify(attend.kv_head, known) == usual else None


def fixed(size: Expr) -> int | None:
    """The size as a number, when it is one."""
    size = simplify(size)
    return int(size.value) if isinstance(size, Const) else None


def update_rule(scan: Scan) -> str:
    """What ``LinearAttention`` calls the step of a scan."""
    gated = bool(scan.gate) or simplify(scan.decay) != Const(1.0)
    return "_".join([*(["gated"] if gated else []), *(["delta"] if scan.rate else [])]) or "linear"
