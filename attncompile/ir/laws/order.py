"""Orders that canonical forms use beside the structural one."""

from __future__ import annotations

from attncompile.ir.expr import Apply, Expr, Index, Load, Order, walk
from attncompile.ir.polynomial import Monomial

_SOLVE_ORDER = ("j", "i", "h", "g", "b", "d", "e")


def lead_key(mono: Monomial) -> tuple[bool, int, list[tuple[int, Order]]]:
    """Order in which comparisons are solved: an index before products, ``j`` first, the constant never."""

    def rank(atom: Expr) -> tuple[int, Order]:
        inside = [
            _SOLVE_ORDER.index(n.name) for n in walk(atom) if isinstance(n, Index) and n.name in _SOLVE_ORDER
        ]
        compound = 0 if isinstance(atom, Index) else len(_SOLVE_ORDER) + 1
        return compound + min(inside, default=len(_SOLVE_ORDER)), atom.order

    return not mono, len(mono), [rank(atom) for atom in mono]


def mask_key(part: Expr) -> tuple[bool, bool, Order]:
    loads = any(isinstance(node, Load) for node in walk(part))
    return loads, isinstance(part, Apply) and part.operator != "le", part.order
