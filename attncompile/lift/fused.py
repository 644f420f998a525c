"""The statement of a native attention call."""

from __future__ import annotations

from collections.abc import Mapping

from attncompile.frontends.graph import FusedAttention, Graph
from attncompile.ir import Expr, Index, Kind, Normalizer, simplify
from attncompile.ir.expr import ONE, SCORE, WEIGHT, ZERO, apply, substitute
from attncompile.lift.axes import BATCH, CHANNEL, HEAD, KEY, QUERY, VALUE_CHANNEL, batch_and_heads
from attncompile.lift.interpret import Interpreter
from attncompile.lift.operands import Operand, trace_operand
from attncompile.lift.statement import Statement


def state_fused(graph: Graph, node: FusedAttention) -> Statement:
    """The statement of one native attention call.

    Raises:
        RefusalError: when the mask can not be interpreted.
    """
    batch, heads, queries, keys, channels, value_channels = node.sizes
    extents: dict[str, Expr] = {
        "b": batch,
        "h": heads,
        "i": queries,
        "j": keys,
        "d": channels,
        "e": value_channels,
    }
    interpreter = Interpreter(graph, {}, frozenset(), extents)
    query = trace_operand(
        interpreter, node.query, node.query_indices((BATCH, HEAD, QUERY, CHANNEL)), frozenset([CHANNEL])
    )
    key = trace_operand(interpreter, node.key, node.key_indices((BATCH, HEAD, KEY, CHANNEL)), frozenset([CHANNEL]))
    value = trace_operand(
        interpreter, node.value, node.value_indices((BATCH, HEAD, KEY, VALUE_CHANNEL)), frozenset([KEY])
    )
    logits: Expr = apply("mul", node.scale, SCORE)
    if node.softcap:
        logits = apply("mul", node.softcap, apply("tanh", apply("div", logits, node.softcap)))
    visible: list[Expr] = [node.causal] if node.causal is not None else []
    if node.mask is not None and node.mask_indices is not None:
        mask = interpreter.at(node.mask, node.mask_indices((BATCH, HEAD, QUERY, KEY)))
        if mask.kind is Kind.BOOL:
            visible.append(mask)
        else:
            logits = apply("add", logits, mask)
    for condition in visible:
        logits = apply("where", condition, logits, node.mask_fill)
    output = node.output_indices or tuple(_joined(axes, extents) for axes in node.output_order)
    renaming: dict[Expr, Expr] = {}
    if heads == ONE:
        renaming, outer = batch_and_heads([BATCH], extents, [*query, *key, *value])
        extents = {**extents, **outer}
    simplifier = graph.simplifier(extents)

    def renamed(expr: Expr) -> Expr:
        return simplifier(substitute(expr, renaming))

    def operands(found: list[Operand]) -> tuple[Operand, ...]:
        return tuple(Operand(o.value, tuple(renamed(x) for x in o.indices), renamed(o.factor)) for o in found)

    return Statement(
        renamed(logits),
        WEIGHT,
        operands(query),
        operands(key),
        operands(value),
        extents,
        node.output,
        tuple(renamed(x) for x in output),
        Normalizer("softmax", node.dtype, node.empty),
        node.output,
        frozenset(),
    )


def _joined(axes: str, extents: Mapping[str, Expr]) -> Expr:
    """The position on a native axis that is made of Spec axes, outermost first."""
    position: Expr = ZERO
    for axis in axes:
        position = apply("add", apply("mul", position, extents[axis]), Index(axis))
    return simplify(position)
