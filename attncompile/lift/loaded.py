"""Loaded numbers that may be a mask: a tensor that is added to the scores hides positions by what it holds."""

from __future__ import annotations

from collections.abc import Iterator

from attncompile.frontends.graph import Graph
from attncompile.ir import Expr, Kind, Load
from attncompile.ir.expr import SCORE, Apply, Const, symbols
from attncompile.lift.masks import HIDDEN


def loaded_numbers(graph: Graph, logits: Expr) -> frozenset[str]:
    """Tensors of numbers that logits add to the score and that may hide positions: real ones, and any that a factor
    makes so large.

    A mask comes from the caller, or from a buffer. What parameters alone make (a table of relative positions) is a
    bias: it is no number that swallows others.
    """
    return frozenset(name for name in _added(logits, False) if not _learned(graph, name))


def _added(expr: Expr, magnified: bool) -> Iterator[str]:
    """Tensors whose elements are added; neither those of a condition, nor those that scale the score."""
    match expr:
        case Load(tensor, _, element):
            if element is Kind.FLOAT or magnified:
                yield tensor
            return
        case Apply("mul", factors):
            if SCORE in symbols(expr):
                return
            magnified = magnified or any(isinstance(f, Const) and abs(f.value) >= -HIDDEN for f in factors)
    for child in expr.children:
        if child.kind is not Kind.BOOL:
            yield from _added(child, magnified)


def _learned(graph: Graph, value: str) -> bool:
    """Whether a value depends on parameters, and on nothing that the caller gives."""
    if value in graph.varying:
        return False
    return any(name in graph.inputs and graph.inputs[name].role == "parameter" for name in graph.ancestors([value]))


__all__ = ["loaded_numbers"]
