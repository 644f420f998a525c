"""What the branches of many ``If`` nodes with one condition need of a mask, made once and only where it is needed.

A mask in a branch is written again for every site. Outside it would be made for every call, also of the size of a whole
prompt for those that never read it. So it is a branch itself: ``mask = If(condition, nothing, mask)``.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping

import onnx_ir as ir

from attncompile.codegen.onnx.values import Builder

_BEHIND = "behind"

TRUTHS = ("LessOrEqual", "Less", "GreaterOrEqual", "Greater", "Equal", "And", "Or", "Not")
COUNTS = ("Shape", "Range", "Size")
"""Operators whose results are truth values, and int64, whatever they read."""

PRODUCTS = ("MatMul",)


def known_behind(condition: ir.Value, shared: Mapping[Hashable, ir.Value]) -> dict[Hashable, ir.Value]:
    """What was deferred behind this condition before, by meaning."""
    marked = ((key, value) for key, value in shared.items() if isinstance(key, tuple) and key[:1] == (_BEHIND,))
    return {key[2]: value for key, value in marked if key[1] == condition.name}


def deferred(
    build: Builder, inner: Builder, known: Mapping[Hashable, ir.Value], condition: ir.Value
) -> dict[Hashable, ir.Value]:
    """Move what a branch made of positions and captured tensors alone into an ``If`` in front of it.

    Args:
        build: where the ``If`` is written; it gives what was moved where the condition is false, else zeros.
        inner: the nodes of a branch that runs where the condition is false; they lose what is moved.
        known: what is shared of these nodes, by meaning.
        condition: a truth value.

    Returns:
        What :func:`known_behind` finds for the next branch.
    """
    moved = _free_of_products(inner.nodes, known.values())
    kept = [node for node in inner.nodes if node not in moved]
    rest = set(kept)
    made = [output for node in inner.nodes if node in moved for output in node.outputs]
    read = [value for value in made if any(use.node in rest for use in value.uses())]
    kinds = [kind for value in read if (kind := _dtype(value)) is not None]
    if not read or len(kinds) < len(read):
        return {}
    nothing = [ir.node("Identity", [build.constant(0, kind.numpy().name)]) for kind in kinds]
    for node in nothing:
        node.name = build.fresh("Identity")
        node.outputs[0].name = build.fresh("nothing")
    for value, node, kind in zip(read, nothing, kinds, strict=True):
        value.dtype = node.outputs[0].dtype = kind
    then = ir.Graph([], [node.outputs[0] for node in nothing], nodes=nothing, name=build.fresh("nothing"))
    nodes = [node for node in inner.nodes if node in moved]
    for node in nodes:
        for output in node.outputs:
            output.shape = None
    otherwise = ir.Graph([], read, nodes=nodes, name=build.fresh("mask"))
    found = build("If", condition, outputs=len(read), then_branch=then, else_branch=otherwise)
    results = list(found) if isinstance(found, tuple) else [found]
    inner.nodes = kept
    for value, result in zip(read, results, strict=True):
        result.dtype = value.dtype
        for use in list(value.uses()):
            if use.node in rest:
                use.node.replace_input_with(use.idx, result)
    place = {value: result for value, result in zip(read, results, strict=True)}
    return {(_BEHIND, condition.name, key): place[value] for key, value in known.items() if value in place}


def _free_of_products(nodes: list[ir.Node], values: Iterable[ir.Value]) -> set[ir.Node]:
    """The nodes behind these values, as far as none of them reads a product or the keys and values themselves."""
    own = set(nodes)
    bound: set[ir.Node] = set()
    for node in nodes:  # in order: what a node reads comes first
        joins = node.op_type == "Concat" and node.attributes.get_int("axis", 0) == 2
        if node.op_type in PRODUCTS or joins or any(made in bound for made in _makers(node)):
            bound.add(node)
    found: set[ir.Node] = set()
    makers = (value.producer() for value in values)
    waiting = [node for node in makers if node is not None and node in own - bound]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += [made for made in _makers(node) if made in own]
    return found


def _makers(node: ir.Node) -> list[ir.Node]:
    """The nodes that make what a node reads."""
    return [made for value in node.inputs if value is not None and (made := value.producer()) is not None]


def _dtype(value: ir.Value) -> ir.DataType | None:
    """The dtype of a value that the builders made, read off the operators."""
    node = value.producer()
    if value.dtype is not None or node is None:
        return value.dtype
    if node.op_type in TRUTHS:
        return ir.DataType.BOOL
    if node.op_type in COUNTS:
        return ir.DataType.INT64
    if node.op_type == "Cast":
        return ir.DataType(node.attributes.get_int("to", 0))
    sources = node.inputs[1:] if node.op_type == "Where" else node.inputs[:1]
    return next((kind for source in sources if source is not None and (kind := _dtype(source)) is not None), None)


__all__ = ["deferred", "known_behind"]
