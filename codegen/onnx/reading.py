"""What an operator's attributes can hold, read off an Attend: scale, bias, causality, window, rows without keys."""

from __future__ import annotations

import math
from dataclasses import dataclass

from attncompile.ir.blocks import key_bounds
from attncompile.ir.expr import (
    SCORE,
    TRUE,
    Apply,
    Const,
    Expr,
    Index,
    Load,
    apply,
    conjunction,
    substitute,
    walk,
)
from attncompile.ir.operators import Kind
from attncompile.ir.ops import Attend, Types, grouped
from attncompile.ir.simplify import simplify

ABSORBING = 2.0**60
"""A float32 sum of a number this large and a score below 2^36 is the number: adding it is the same as replacing."""

MASKED = -(2.0**100)
"""The finite number that stands for "masked" where an operator gives -inf or the lowest float a meaning of its own."""


@dataclass(frozen=True)
class Affine:
    """A score ``scale * s + bias``; the bias is zero when it is ``None``."""

    scale: float
    bias: Expr | None


def affine(score: Expr) -> Affine | None:
    """The score as ``scale * s + bias`` with a constant scale, when it is that."""
    terms = score.arguments if isinstance(score, Apply) and score.operator == "add" else (score,)
    reading = [term for term in terms if any(node == SCORE for node in walk(term))]
    if len(reading) != 1:
        return None
    scale = _coefficient(reading[0])
    others = [term for term in terms if term is not reading[0]]
    if scale is None:
        return None
    bias = None if not others else others[0] if len(others) == 1 else apply("add", *others)
    if bias is not None and bias.kind is Kind.INT:
        bias = apply("float", bias)
    return Affine(scale, bias)


def _coefficient(term: Expr) -> float | None:
    """``c`` when the term is ``c * s``."""
    if term == SCORE:
        return 1.0
    match term:
        case Apply("mul", arguments):
            rest = [a for a in arguments if not isinstance(a, Const)]
            factor = math.prod(float(a.value) for a in arguments if isinstance(a, Const))
            inner = _coefficient(rest[0]) if len(rest) == 1 else None
            return None if inner is None else factor * inner
        case Apply("div", (numerator, Const(divisor))) if divisor:
            inner = _coefficient(numerator)
            return None if inner is None else inner / float(divisor)
    return None


def additive_fill(attend: Attend) -> float | None:
    """``c`` when a masked logit may be had as ``score + c``: exactly, or up to rounding because ``c`` absorbs the score."""
    fill = simplify(attend.fill)
    if isinstance(fill, Const):
        return float(fill.value) if float(fill.value) <= -ABSORBING else None
    score, shifted = simplify(attend.score), fill
    if isinstance(shifted, Apply) and shifted.operator == "add":
        constants = [a for a in shifted.arguments if isinstance(a, Const)]
        rest = [a for a in shifted.arguments if not isinstance(a, Const)]
        whole = rest[0] if len(rest) == 1 else apply("add", *rest) if rest else None
        if len(constants) == 1 and whole is not None and simplify(whole) == score:
            return float(constants[0].value)
    return None


def extents(attend: Attend, types: Types) -> dict[str, Expr]:
    """Size of each axis of the attention map, and of the KV heads."""
    query, key = types[attend.query], types[attend.key]
    return {
        "b": query.sizes[0],
        "h": query.sizes[1],
        "i": query.sizes[2],
        "j": key.sizes[2],
        "g": key.sizes[1],
    }


def rows_never_empty(attend: Attend, types: Types) -> bool:
    """Proof that every query sees a key: some key that the indices name is visible whatever the tensors hold."""
    sizes = {name: simplify(size) for name, size in extents(attend, types).items()}
    i, j = Index("i"), Index("j")
    queries, keys = sizes["i"], sizes["j"]
    candidates: list[Expr] = [Const(0)]
    if queries == keys:
        candidates.append(i)
    # the last key, and the diagonal that ends there: with at least as many keys as queries these are positions
    length = simplify(keys - queries)
    candidates.append(simplify(keys - 1))
    if simplify(length >= 0, sizes) == TRUE:
        candidates.append(simplify(i + length))
    mask = simplify(attend.mask, sizes)
    return any(simplify(substitute(mask, {j: key}), sizes) == TRUE for key in candidates)


def may_be_infinite(expr: Expr | None) -> bool:
    """Whether a real expression can be -inf: it loads real numbers, or names an infinity."""
    return expr is not None and any(
        (isinstance(node, Load) and node.element is Kind.FLOAT)
        or (isinstance(node, Const) and isinstance(node.value, float) and math.isinf(node.value))
        for node in walk(expr)
    )


@dataclass(frozen=True)
class CausalMask:
    """A mask ``j <= i and j > i - window and rest``; no window: ``None``."""

    window: int | None
    rest: Expr


def causal_mask(attend: Attend, types: Types) -> CausalMask | None:
    """The mask split into what GroupQueryAttention does itself and the rest, when it is causal on a square map."""
    sizes = extents(attend, types)
    if simplify(sizes["i"]) != simplify(sizes["j"]):
        return None
    limits = key_bounds(attend.mask)
    i, j = Index("i"), Index("j")
    after = simplify(i + 1)
    if after not in limits.upper:
        return None
    rest = [*limits.rest, *(simplify(j < limit) for limit in limits.upper if limit != after)]
    window: int | None = None
    for limit in limits.lower:
        distance = simplify(after - limit)  # keys i - distance + 1 ... i
        if window is None and isinstance(distance, Const) and int(distance.value) >= 1:
            window = int(distance.value)
        else:
            rest.append(simplify(j >= limit))
    return CausalMask(window, conjunction(rest))


def group_size(attend: Attend, types: Types) -> int | None:
    """Query heads per KV head in the usual order ``g = h // size``; ``None`` when heads are shared otherwise."""
    sizes = extents(attend, types)
    heads, groups = simplify(sizes["h"]), simplify(sizes["g"])
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


__all__ = [
    "ABSORBING",
    "MASKED",
    "Affine",
    "CausalMask",
    "additive_fill",
    "affine",
    "causal_mask",
    "extents",
    "fixed",
    "group_size",
    "may_be_infinite",
    "rows_never_empty",
]
