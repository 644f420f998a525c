"""Loads whose element depends on the key and not on the query: ``document[b, j]``, a padding mask, a bias of each key.

A thread of a WGMMA accumulator holds a quarter of a block's columns, so that it would load each of them by itself, and
so would seven other lanes and three other warps. Loaded once for a block, an element a thread, they reach the columns
through shared memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from attncompile.codegen.gluon.columns import FAR, NEAR
from attncompile.codegen.triton.expressions import Scope
from attncompile.codegen.triton.module import function_of
from attncompile.ir.expr import SCORE, Expr, Index, Load, substitute, symbols
from attncompile.ir.types import DTYPES
from attncompile.kernels.hopper import HopperTile
from attncompile.kernels.hopper_by_key import MOST, OWN_KEYS, KeyLoad, loaded, loading

OWN_KEY = Index(OWN_KEYS)
"""The key whose element a thread loads for all."""

_OF_PAIRS = frozenset({Index("i"), NEAR, FAR, SCORE})


@dataclass(frozen=True)
class LoadsByKey:
    """Such loads of a score and a mask.

    Attributes:
        score, mask: in each, in the order in which they are written.
    """

    score: tuple[Load, ...]
    mask: tuple[Load, ...]

    @classmethod
    def of(cls, score: Expr, mask: Expr, scope: Scope, tile: HopperTile, room: int) -> LoadsByKey:
        """Those that there are names and shared memory for.

        Args:
            score, mask: over ``b h i j`` and ``s``.
            scope: of the kernel's names.
            tile: how the work is divided.
            room: bytes of shared memory that are left.
        """
        found = list(dict.fromkeys((*_largest(score), *_largest(mask))))[:MOST]
        fitting = {load for load in found if tile.groups * tile.keys * _bytes(load, scope) <= room}
        return cls(
            tuple(load for load in _largest(score) if load in fitting),
            tuple(load for load in _largest(mask) if load in fitting),
        )

    @property
    def names(self) -> dict[Expr, str]:
        """What the elements are called in the columns."""
        return {load: loaded(number) for number, load in enumerate(dict.fromkeys((*self.score, *self.mask)))}

    def functions(self, scope: Scope) -> tuple[KeyLoad, ...]:
        """The functions that load them.

        Args:
            scope: of the kernel's names, with :data:`OWN_KEY` among its indices.
        """
        own: dict[Expr, Expr] = {Index("j"): OWN_KEY}
        return tuple(
            KeyLoad(function_of(loading(number), substitute(load, own), scope), name, load not in self.score)
            for number, (load, name) in enumerate(self.names.items())
            if isinstance(load, Load)
        )


def _largest(expr: Expr) -> Iterable[Load]:
    """Loads by key that are no index of another one, each once."""
    found: dict[Load, None] = {}

    def visit(node: Expr) -> None:
        if isinstance(node, Load) and Index("j") in symbols(node) and not _OF_PAIRS & symbols(node):
            found[node] = None
            return
        for child in node.children:
            visit(child)

    visit(expr)
    return tuple(found)


def _bytes(load: Load, scope: Scope) -> int:
    return max(DTYPES[scope.types[load.tensor].dtype].itemsize, 4)


__all__ = ["OWN_KEY", "LoadsByKey"]
