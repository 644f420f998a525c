"""Relative biases whose distance is limited: far from the diagonal they are one number for all pairs.

``table[h, max(0, min(255, i − j))]`` loads another element for each pair only where query and key are fewer than 255
apart. A key block that lies farther away reads one element, so it needs none of the addresses that make loads for each
pair slow: it counts as a block inside the mask, with a score of its own, and the others as blocks on an edge.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from attncompile.codegen.triton.expressions import is_pair
from attncompile.codegen.triton.visits import Visits, visits
from attncompile.ir import simplify
from attncompile.ir.blocks import density
from attncompile.ir.expr import Apply, Const, Expr, Index, Load, Size, apply, loads, substitute, symbols, walk
from attncompile.ir.operators import Kind

LENGTH = 4096
"""Tokens for which the share of far blocks is judged."""
LEAST = 0.4
"""Share of the visible pairs that has to lie in far blocks: with fewer, another loop is not worth its code."""
CORNER = 64
"""From the middle of a block to its corners, in queries and in keys."""

_PAIR: frozenset[Expr] = frozenset({Index("i"), Index("j")})


@dataclass(frozen=True)
class Saturated:
    """A score far from the diagonal.

    Attributes:
        score: it there; loads nothing for a pair.
        found: what is visited under the mask; ``full`` are the blocks that lie inside it and far.
    """

    score: Expr
    found: Visits

    @classmethod
    def of(cls, score: Expr, mask: Expr, queries: Expr, keys: Expr) -> Saturated | None:
        """That of a score that loads an element for each pair, near the diagonal alone; ``None`` for any other.

        Args:
            score, mask: over ``b h i j``.
            queries, keys: sizes of the map.
        """
        if not any(is_pair(load) for load in loads(score)) or any(isinstance(node, Load) for node in walk(mask)):
            return None
        lengths = {size.name: LENGTH for size in symbols(queries) | symbols(keys) if isinstance(size, Size)}
        if any(not (isinstance(each, Size) and each.name in lengths) for each in symbols(mask) - _PAIR):
            return None  # heads or other sizes, for which a length says nothing
        whole = density(mask, LENGTH, LENGTH, sizes=lengths)
        for limited in _choices(score):
            far = simplify(substitute(score, {each.node: each.limit for each in limited}))
            if any(is_pair(load) for load in loads(far)):
                continue
            apart = simplify(apply("and", mask, *(each.condition for each in limited)))
            full = visits(apart, queries, keys).full
            share = density(_blocks(apart), LENGTH, LENGTH, sizes=lengths)
            if full is not None and share >= LEAST * whole:
                return cls(far, dataclasses.replace(visits(mask, queries, keys), full=full))
        return None


def _blocks(mask: Expr) -> Expr:
    """Whether the block around a pair is visible, by its corners: what limits a range of keys is convex."""
    moved = [
        substitute(mask, {Index("i"): Index("i") + up, Index("j"): Index("j") + along})
        for up in (-CORNER, CORNER)
        for along in (-CORNER, CORNER)
    ]
    return simplify(apply("and", *moved))


@dataclass(frozen=True)
class _Limited:
    """A minimum or maximum that is its constant wherever a condition holds."""

    node: Apply
    limit: Expr
    condition: Expr


def _limited(expr: Expr) -> Iterator[_Limited]:
    for node in walk(expr):
        if not (isinstance(node, Apply) and node.operator in ("min", "max") and node.kind is Kind.INT):
            continue
        varying = [each for each in node.arguments if symbols(each) & _PAIR]
        limits = [each for each in node.arguments if isinstance(each, Const)]
        if len(varying) == 1 and len(limits) == 1 and len(node.arguments) == 2:
            operator = "ge" if node.operator == "min" else "le"
            yield _Limited(node, limits[0], apply(operator, varying[0], limits[0]))


def _choices(score: Expr) -> Iterable[tuple[_Limited, ...]]:
    """Which limits may be reached together: all upper ones, or all lower ones; of nested ones the inner."""
    found = list(dict.fromkeys(each for load in loads(score) if is_pair(load) for each in _limited(load)))
    for operator in ("min", "max"):
        same = [each for each in found if each.node.operator == operator]
        inner = [each for each in same if not any(o is not each and o.node in set(walk(each.node)) for o in same)]
        if inner:
            yield tuple(inner)


__all__ = ["Saturated"]
