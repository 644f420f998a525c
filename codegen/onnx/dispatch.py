"""Two operators for one site, picked at run time by the number of keys.

On ONNX Runtime's CPU ``Attention`` wins on short prompts and ``GroupQueryAttention``, which skips the
masked half of the map, on long ones. An ``If`` node holds both. Masks and layouts are built outside, once
for all sites.
"""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir

from attncompile.codegen.onnx.attend import Made, Place, arranged, result, writer_of
from attncompile.codegen.onnx.capabilities import Capability
from attncompile.codegen.onnx.layouts import flat_groups
from attncompile.codegen.onnx.values import Builder
from attncompile.ir.attend import Attend
from attncompile.ir.operation import Types

LAYOUT = ("Transpose", "Reshape")
"""Nodes that stay outside the branches, where :mod:`attncompile.codegen.onnx.layouts` can cancel them."""


NAME = "{short} up to {limit} keys, else {long}"
"""How plans and reports call two operators switched by length."""


def by_length(short: Capability, long: Capability, limit: int) -> Capability:
    """A row that runs ``short`` up to ``limit`` keys and ``long`` beyond: both fused."""

    def objection(attend: Attend, types: Types) -> str | None:
        for row in (short, long):
            reason = row.objection(attend, types)  # type: ignore[arg-type]
            if reason is not None:
                return reason
        return None

    def build(attend: Attend, place: Place) -> Made:
        return _branches(attend, place, short, long, limit)

    return replace(
        short,
        operator=NAME.format(short=short.operator, limit=limit, long=long.operator),
        opset=max(short.opset, long.opset),
        objection=objection,
        build=build,
        parts=(short, long),
    )


def _branches(attend: Attend, place: Place, short: Capability, long: Capability, limit: int) -> Made:
    build = place.build
    writer = writer_of(attend, place)
    keys = place.types[attend.key].sizes[2]
    few = writer.once(
        ("few keys", limit, writer.key(keys)),
        lambda: build("Squeeze", build("LessOrEqual", writer.size(keys), build.constant([limit]))),
    )
    graphs = [_branch(attend, place, row) for row in (short, long)]
    out = build("If", few, then_branch=graphs[0], else_branch=graphs[1])
    axes = tuple(axis.name for axis in place.types[attend.out].axes)
    return result(place, attend.out, out, flat_groups(axes), attend.query)


def _branch(attend: Attend, place: Place, row: Capability) -> ir.Graph:
    """The operator of the row and what follows it, moved into a graph of its own."""
    build = place.build
    first = len(build.nodes)
    made = row.build(attend, place)  # type: ignore[arg-type]
    inner = replace(place, operands={**place.operands, **made})
    out = arranged(writer_of(attend, inner), inner, attend.out, flat_groups)
    kept, moved = _split(build, first, row.operator, set(place.shared.values()))
    build.nodes[first:] = kept
    for node in moved:
        for output in node.outputs:
            output.shape = None  # the two branches know their shapes in different words
    out.dtype = place.operands[attend.query].value.dtype or ir.DataType.FLOAT
    return ir.Graph([], [out], nodes=moved, name=build.fresh(row.operator))


def _split(
    build: Builder, first: int, operator: str, shared: set[ir.Value]
) -> tuple[list[ir.Node], list[ir.Node]]:
    """Nodes that stay and nodes that move: the operator, what reads it, and what only these read."""
    nodes = build.nodes[first:]
    moved = {node for node in nodes if node.op_type == operator}
    for node in nodes:
        if any(value is not None and value.producer() in moved for value in node.inputs):
            moved.add(node)
    for node in reversed(nodes):
        readers = {use.node for output in node.outputs for use in output.uses()}
        local = readers and readers <= moved and not any(output in shared for output in node.outputs)
        if local and node.op_type not in LAYOUT:
            moved.add(node)
    return [node for node in nodes if node not in moved], [node for node in nodes if node in moved]
