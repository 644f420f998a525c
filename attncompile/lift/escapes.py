"""Values inside an attention that are read outside, and the one such value that is a result: the log-sum-exp."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from attncompile.frontends.graph import Cast, Graph, Indices, Move, Node, Pointwise, Reduce
from attncompile.ir import Expr, Index, RefusalError
from attncompile.ir.expr import ONE, SCORE, ZERO, Const, substitute, symbols
from attncompile.lift.interpret import Interpreter, Stop
from attncompile.lift.normaliser import one_sink
from attncompile.lift.quotient import log_sum
from attncompile.lift.rows import KEY, Rows
from attncompile.lift.statement import Statement


def escaping(graph: Graph, statement: Statement) -> Iterator[tuple[str, Node | None]]:
    """The inner values that are needed outside, each with a node that reads it, or ``None`` where the model gives it.

    A value that is a result of the attention is none of them.
    """
    inside = statement.inner | {statement.output, statement.lse}
    for value in sorted(statement.inner):
        if value == statement.lse:
            continue
        readers = [user for user in graph.users.get(value, ()) if user.output not in inside]
        outside = [user for user in readers if user.output in graph.live]
        if value in graph.outputs:
            yield value, None
        elif outside:
            yield value, outside[0]


def with_log_sum(graph: Graph, statement: Statement) -> Statement:
    """The statement with its log-sum-exp as a second result, where that is all that is needed of its inner values."""
    if statement.normalizer.kind != "softmax" or not statement.score or not any(escaping(graph, statement)):
        return statement
    made = graph.descendants(statement.score)
    for value in _candidates(graph, statement.score, made):
        indices = _log_sum_indices(graph, statement, value)
        if indices is None:
            continue
        inner = (statement.inner | graph.ancestors([value], made)) - {statement.output, value}
        found = replace(statement, lse=value, lse_indices=indices, inner=inner)
        if not any(escaping(graph, found)):
            return found
    return statement


def _candidates(graph: Graph, score: str, made: frozenset[str]) -> Iterator[str]:
    """What is made pointwise of sums over scores alone, in the order of the graph."""
    found: set[str] = set()
    stack = [name for name in made if isinstance(node := graph.producer[name], Reduce) and node.operator == "sum"]
    while stack:
        for user in graph.users.get(stack.pop(), ()):
            if isinstance(user, Move | Cast | Pointwise) and user.output in made and user.output not in found:
                found.add(user.output)
                stack.append(user.output)
    for node in graph.nodes:
        if node.output in found and graph.is_readable(node.output):
            yield node.output


def _log_sum_indices(graph: Graph, statement: Statement, value: str) -> Indices | None:
    """The element of a value that is the log-sum-exp of row ``b h i``; ``None`` where the value is something else."""
    behind = graph.descendants(statement.score, value)
    rows = Rows.before(graph, value, behind)
    shape = graph.infos[value].shape
    position = tuple(Index(f"y{n}") for n in range(len(shape)))
    extents = {**{y.name: size for y, size in zip(position, shape, strict=True)}, "j": statement.extents["j"]}
    scores = Stop(SCORE)
    interpreter = Interpreter(graph, {statement.score: scores, **rows.stops}, behind, extents)
    try:
        expr = interpreter.at(value, tuple(ZERO if s == ONE else y for y, s in zip(position, shape, strict=True)))
        if SCORE in symbols(expr) or not rows.of_one_row():
            return None
        found = log_sum(rows, interpreter, expr, statement.extents["j"])
    except RefusalError:
        return None
    if found is None or len(scores.indices) != 1:
        return None
    place = _solved(position, scores.indices[0], statement.score_indices)
    if place is None or any(y not in place and size != ONE for y, size in zip(position, shape, strict=True)):
        return None
    simplifier = graph.simplifier(statement.extents)

    def renamed(expr: Expr) -> Expr:
        return simplifier(substitute(expr, place))

    if renamed(found.logits) != statement.logits or renamed(one_sink(found.sinks)) != statement.sink:
        return None
    return tuple(place.get(y, ZERO) for y in position)


def _solved(position: Indices, reached: Indices, wanted: Indices) -> dict[Expr, Expr] | None:
    """What the positions must be for an element to be reached at the indices that are wanted."""
    place: dict[Expr, Expr] = {}
    for found, index in zip(reached, wanted, strict=True):
        if found in position:
            if place.setdefault(found, index) != index:
                return None
        elif found != index or not (found == KEY or isinstance(found, Const)):
            return None
    return place


__all__ = ["escaping", "with_log_sum"]
