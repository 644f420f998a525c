"""The laws of the simplifier, by family."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from attncompile.ir.expr import Apply, Expr

if TYPE_CHECKING:
    from attncompile.ir.simplify import Simplifier

Law = Callable[["Simplifier", Apply], Expr]
"""Rewrites a node whose arguments are canonical; gives the node itself where it says nothing."""
