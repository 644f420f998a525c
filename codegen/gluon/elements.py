"""Loads whose element belongs to a key, as in ``document[b, j]`` or a padding mask, or to a query: ``document[b, i]``.

A thread of a WGMMA accumulator holds a quarter of a block's columns, so that it would load the element of each of them
by itself, and so would seven other lanes and three other warps. Loaded once for a block, an element a thread, they
reach the columns through shared memory. Elements of queries are the same for all blocks of a tile. Neither depends on
products, so both are asked for long before they are read.
"""

from __future__ import annotations

from dataclasses import dataclass

from attncompile.codegen.gluon.columns import FAR, NEAR
from attncompile.codegen.triton.expressions import Scope
from attncompile.codegen.triton.module import function_of
from attncompile.ir.expr import SCORE, Apply, Expr, Index, Load, substitute, symbols, walk
from attncompile.ir.operators import Kind
from attncompile.ir.types import DTYPES
from attncompile.kernels.hopper import HopperTile
from attncompile.kernels.hopper_elements import (
    MOST,
    OWN_KEYS,
    Elements,
    KeyLoad,
    RowLoad,
    key_element,
    loading,
    row_element,
)

OWN_KEY = Index(OWN_KEYS)
"""The key whose element a thread loads for all."""

_PAIRS: frozenset[Expr] = frozenset({NEAR, FAR, SCORE})
_OF_QUERIES: frozenset[Expr] = frozenset({Index("j"), *_PAIRS})
_OF_KEYS: frozenset[Expr] = frozenset({Index("i"), *_PAIRS})


@dataclass(frozen=True)
class Early:
    """Such parts of a score and a mask: loads, and what is computed of them alone.

    Attributes:
        score, mask: by key, in each, in the order in which they are written.
        rows: by query, in the mask. A score reads its own in every block: kept from block to block they take
            registers that the exponentials need (6 % slower at 128 channels, H200).
    """

    score: tuple[Expr, ...]
    mask: tuple[Expr, ...]
    rows: tuple[Expr, ...]

    @classmethod
    def of(cls, score: Expr, mask: Expr, scope: Scope, tile: HopperTile, room: int) -> Early:
        """Those that there are names and shared memory for.

        Args:
            score, mask: over ``b h i j`` and ``s``.
            scope: of the kernel's names.
            tile: how the work is divided.
            room: bytes of shared memory that are left.
        """
        keys = [_largest(expr, Index("j"), _OF_KEYS) for expr in (score, mask)]
        rows = [each for each in _largest(mask, Index("i"), _OF_QUERIES) if each not in walk(score)]
        found = list(dict.fromkeys((*keys[0], *keys[1])))[:MOST]
        fitting = {each for each in found if tile.groups * tile.keys * 4 * _words(each, scope) <= room}
        of_score, of_mask = (tuple(each for each in some if each in fitting) for some in keys)
        return cls(of_score, of_mask, tuple(rows)[:MOST])

    @property
    def names(self) -> dict[Expr, str]:
        """What they are called in the rows and columns of the scores."""
        keys = {expr: key_element(number) for number, expr in enumerate(self._keys)}
        return keys | {expr: row_element(number) for number, expr in enumerate(self.rows)}

    def functions(self, scope: Scope) -> Elements:
        """The functions that load them.

        Args:
            scope: of the kernel's names, with :data:`OWN_KEY` among its indices.
        """
        own: dict[Expr, Expr] = {Index("j"): OWN_KEY}
        names = self.names
        keys = tuple(
            KeyLoad(
                function_of(loading(names[expr]), substitute(expr, own), scope),
                names[expr],
                expr not in self.score,
                _words(expr, scope),
            )
            for expr in self._keys
        )
        rows = tuple(RowLoad(function_of(loading(names[expr]), expr, scope), names[expr]) for expr in self.rows)
        return Elements(keys, rows)

    @property
    def _keys(self) -> tuple[Expr, ...]:
        return tuple(dict.fromkeys((*self.score, *self.mask)))


def _largest(expr: Expr, index: Index, others: frozenset[Expr]) -> tuple[Expr, ...]:
    """The largest parts that loads by ``index`` decide, without those by ``others``; each once.

    ``index`` itself stands in their loads alone: behind the last key or query it is limited, in comparisons it is not.
    """
    found: dict[Expr, None] = {}

    def decided(node: Expr) -> bool:
        if isinstance(node, Load):
            return index in symbols(node) and not others & symbols(node)
        fixed = [child for child in node.children if not ({index} | others) & symbols(child)]
        rest = [child for child in node.children if child not in fixed]
        return isinstance(node, Apply) and bool(rest) and all(decided(child) for child in rest)

    def visit(node: Expr) -> None:
        if decided(node):
            found[node] = None
            return
        for child in node.children:
            visit(child)

    visit(expr)
    return tuple(found)


def _words(expr: Expr, scope: Scope) -> int:
    """Registers of 4 bytes that an element takes."""
    if isinstance(expr, Apply) and expr.kind is not Kind.INT:
        return 1
    sizes = [DTYPES[scope.types[node.tensor].dtype].itemsize for node in walk(expr) if isinstance(node, Load)]
    return max(1, *(size // 4 for size in sizes))


__all__ = ["OWN_KEY", "Early"]
