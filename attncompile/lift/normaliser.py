"""From an anchor and the weights behind it to logits, sink and normaliser, everything over the score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from attncompile.frontends.graph import Graph, Indices
from attncompile.ir import Expr, Kind, Load, Refusal, RefusalError, simplify
from attncompile.ir.attend import NO_SINK
from attncompile.ir.expr import SCORE, TOTAL, WEIGHT, Const, apply, substitute, symbols
from attncompile.lift.anchors import Anchor
from attncompile.lift.exponentials import minus, plus, without_row_terms
from attncompile.lift.interpret import Interpreter
from attncompile.lift.quotient import Quotient, read_quotient, read_softmax
from attncompile.lift.rows import KEY, LOG_SUM, MOST_SINKS, Rows, free_of_map

WHOLE = Load("row_sum_of_softmax", (), Kind.FLOAT)
"""Stands for the sum of exponentials that a native softmax divides by."""


@dataclass(frozen=True)
class Normalised:
    """How scores become weights.

    Attributes:
        kind: as in :class:`attncompile.ir.Normalizer`.
        logits: over the score and loads.
        sink: logit of what the normaliser counts beside the keys, −∞ where there is nothing.
        divisor: over the total, of ``sum`` and ``l1``.
        logarithm: whether the anchor holds the logarithm of the weights.
    """

    kind: Literal["softmax", "sigmoid", "relu", "none", "sum", "l1"]
    logits: Expr
    sink: Expr = NO_SINK
    divisor: Expr = TOTAL
    logarithm: bool = False


def refuse(graph: Graph, kind: str, reason: str, value: str, hint: str = "") -> RefusalError:
    """The refusal to raise, with the native node and the source line of a value."""
    native = graph.describe(value)
    return RefusalError(Refusal(kind, reason, native.name, native.source, hint))


def of_anchor(
    graph: Graph, anchor: Anchor, at_anchor: Indices, interpreter: Interpreter, rows: Rows, keys: Expr
) -> Normalised:
    """The normaliser of an anchor whose weights a product reads at ``at_anchor``.

    Args:
        graph: the graph.
        anchor: the normaliser.
        at_anchor: the indices of the weight of key ``j``.
        interpreter: that stops at the score and at the rows.
        rows: the sums and maxima that the anchor is made of.
        keys: how many keys there are.

    Raises:
        RefusalError: where it normalises something else, or over other positions than the keys.
    """
    assert anchor.kind != "quotient"
    logits, shift = _logits(graph, anchor, rows, interpreter.at(anchor.source, at_anchor))
    beside = [plus(x, minus(shift)) for x in _beside(graph, anchor, at_anchor, interpreter, keys)]
    if not rows.of_one_row():
        raise refuse(graph, "unknown-normaliser", "the maximum that is subtracted is not that of a row", anchor.output)
    return Normalised(anchor.kind, logits, _sink(graph, anchor, rows, beside))


def of_softmax(
    graph: Graph,
    anchor: Anchor,
    at_anchor: Indices,
    interpreter: Interpreter,
    rows: Rows,
    keys: Expr,
    factor: Expr,
) -> Normalised:
    """The softmax that an anchor is with all its weights times a factor over the sums and maxima of the row.

    Raises:
        RefusalError: where the two are no softmax together.
    """
    if anchor.kind == "softmax":
        base = interpreter.at(anchor.source, at_anchor)
        whole = (LOG_SUM, *_beside(graph, anchor, at_anchor, interpreter, keys))
        weight = apply("mul", apply("div", apply("exp", base), WHOLE), factor)
        found = read_softmax(rows, interpreter, weight, keys, base, {WHOLE: whole}) if rows.of_one_row() else None
        if found is not None:
            return _of(graph, anchor, rows, found)
    raise refuse(graph, "unknown-normaliser", f"the result is multiplied by {factor}", anchor.output)


def _beside(graph: Graph, anchor: Anchor, at_anchor: Indices, interpreter: Interpreter, keys: Expr) -> list[Expr]:
    """What the normaliser reads beside the keys."""
    found = []
    for position in _beside_keys(graph, anchor, at_anchor, keys):
        assert anchor.axis is not None
        place = (*at_anchor[: anchor.axis], position, *at_anchor[anchor.axis + 1 :])
        found.append(interpreter.at(anchor.source, place))
    return found


def of_quotient(
    graph: Graph, anchor: Anchor, interpreter: Interpreter, rows: Rows, weight: Expr, keys: Expr
) -> Normalised:
    """The normaliser of weights that are divided by a sum.

    Raises:
        RefusalError: where the sum is not one over the keys, or the quotient is no known normaliser.
    """
    if any(KEY in symbols(x) for stop in rows.totals.values() for indices in stop.indices for x in indices):
        raise refuse(
            graph,
            "wrong-axis",
            "the sum that scores are divided by runs over another axis than the product with the values",
            anchor.output,
            "normalise over the keys",
        )
    found = read_quotient(rows, interpreter, weight, keys) if rows.of_one_row() else None
    if found is None:
        raise refuse(
            graph,
            "unknown-normaliser",
            f"the weights are {weight}, which is no softmax, and no quotient of scores by their own sum",
            anchor.output,
            "a small number added to the sum is understood where no maximum is subtracted first",
        )
    return _of(graph, anchor, rows, found)


def _of(graph: Graph, anchor: Anchor, rows: Rows, found: Quotient) -> Normalised:
    sink = _sink(graph, anchor, rows, found.sinks)
    return Normalised(found.kind, found.logits, sink, found.divisor, found.logarithm)


def edited(weight: Expr, normalised: Normalised) -> tuple[Expr, Literal["nan", "zero"]]:
    """The edit of the weights, and what a row without a visible key gives.

    ``where(w ≠ w, 0, w)`` says that such rows give zero: of finite scores, softmax makes NaN in them only. The edit
    must read the weight through that choice alone.
    """
    if normalised.logarithm:
        weight = substitute(weight, {WEIGHT: apply("log", WEIGHT)})
    weight = substitute(weight, {apply("exp", apply("log", WEIGHT)): WEIGHT})  # a weight is never negative
    unequal = apply("ne", WEIGHT, WEIGHT)
    zeroed = [apply("where", unequal, 0.0, WEIGHT), apply("where", apply("eq", WEIGHT, WEIGHT), WEIGHT, 0.0)]
    without = substitute(weight, {choice: Const(1.0) for choice in zeroed})
    if without == weight or WEIGHT in symbols(without):
        return weight, "nan"
    return substitute(weight, {choice: WEIGHT for choice in zeroed}), "zero"


def _beside_keys(graph: Graph, anchor: Anchor, at_anchor: Indices, keys: Expr) -> tuple[Expr, ...]:
    """The positions of the normaliser that are no keys; it must run over all the keys.

    Raises:
        RefusalError: when it runs over another axis, or over more than a fixed number of other positions.
    """
    if anchor.axis is None:
        return ()
    along = at_anchor[anchor.axis]
    if KEY not in symbols(along) or any(KEY in symbols(x) for n, x in enumerate(at_anchor) if n != anchor.axis):
        raise refuse(
            graph,
            "wrong-axis",
            f"the normaliser runs over axis {anchor.axis}, but the product with the values sums over another axis",
            anchor.output,
            "normalise over the keys",
        )
    normalised = graph.infos[anchor.output].shape[anchor.axis]
    first, others = simplify(along - KEY), simplify(normalised - keys)
    if not (isinstance(first, Const) and isinstance(others, Const) and 0 <= first.value <= others.value <= MOST_SINKS):
        raise refuse(
            graph,
            "partial-normaliser",
            f"the normaliser runs over {normalised} positions, the product with the values over {keys}",
            anchor.output,
            "only a fixed number of further positions (sink columns) may be normalised with the keys",
        )
    leading = int(first.value)
    return (
        *(Const(n) for n in range(leading)),
        *(simplify(keys + n) for n in range(leading, int(others.value))),
    )


def _sink(graph: Graph, anchor: Anchor, rows: Rows, found: Sequence[Expr]) -> Expr:
    """One logit for all that is normalised with the keys; it must be the same for a whole row."""
    for logit in found:
        if SCORE in symbols(logit) or KEY in symbols(logit):
            raise refuse(
                graph,
                "partial-normaliser",
                f"beside the keys the normaliser counts {logit}, a score too, to which no value belongs",
                anchor.output,
                "normalise over the keys that have values",
            )
        if rows.reads(logit):
            raise refuse(
                graph,
                "unknown-normaliser",
                f"beside the keys the normaliser counts {logit}, which depends on the row's scores",
                anchor.output,
                "subtract the maximum from all that is normalised, or from nothing",
            )
    return one_sink(found)


def one_sink(logits: Sequence[Expr]) -> Expr:
    """One logit for several: the log of the sum of their exponentials; −∞ for none."""
    real = [logit if logit.kind is Kind.FLOAT else apply("float", logit) for logit in logits]
    if not real:
        return NO_SINK
    return real[0] if len(real) == 1 else apply("log", apply("add", *(apply("exp", logit) for logit in real)))


def _logits(graph: Graph, anchor: Anchor, rows: Rows, source: Expr) -> tuple[Expr, Expr]:
    """The logit, from the element that the normaliser reads, and what a softmax does not see: what moves the row."""
    source = simplify(source)

    def of_row(term: Expr) -> bool:
        return rows.is_maximum(term) and free_of_map(term)

    split = without_row_terms(source, of_row) if rows.is_maximum(source) else (source, Const(0.0))
    if split is None or rows.reads(split[0]):
        raise refuse(
            graph,
            "unknown-normaliser",
            f"the weights are made of {source}, which is no softmax",
            anchor.output,
        )
    return simplify(split[0]), split[1]


__all__ = ["Normalised", "edited", "of_anchor", "of_quotient", "of_softmax", "one_sink", "refuse"]
