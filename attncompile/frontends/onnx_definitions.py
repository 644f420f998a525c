"""Attention calls spelled out by the body that defines them, first of all the one that ONNX itself gives.

``Attention`` with a cache, or with a second output that is read, and ``FlexAttention`` are more than one
product over tensors of the graph. The standard defines them by a function of plain operators; with that body
in their place they are lifted like any attention that is written out. A call whose attention nobody replaced can
be put back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from attncompile.frontends import onnx_contrib
from attncompile.frontends.graph import Info
from attncompile.frontends.onnx_bodies import nested_graphs, nested_nodes, nested_values
from attncompile.frontends.onnx_builder import AttentionRefused
from attncompile.frontends.onnx_inference import infer_types

DOMAIN = "attncompile.definition"
"""Where a body lives between being defined and being inlined."""

PREVIEW = "ai.onnx.preview"
LOWEST_OPSET = 18
"""The bodies are written in operators of this opset and later."""


_CALL = "attncompile.definition"
"""Marks the nodes of a definition with the number of their call while it is inlined, and a model with its calls."""


@dataclass(frozen=True)
class SpelledOut:
    """A call whose definition stands in its place.

    Attributes:
        domain, operator, version, name, attributes: of the call.
        nodes: of the definition, in order.
        inputs: what the call reads: where the definition reads it, or the value itself where it does not.
        outputs: what the definition makes in place of the outputs, ``None`` for one that the call left out.
    """

    domain: str
    operator: str
    version: int | None
    name: str | None
    attributes: Mapping[str, ir.Attr]
    nodes: tuple[ir.Node, ...]
    inputs: tuple[tuple[ir.Node, int] | ir.Value | None, ...]
    outputs: tuple[ir.Value | None, ...]


def spelled_out(model: ir.Model) -> tuple[SpelledOut, ...]:
    """The calls of a model that their definitions stand for."""
    return tuple(model.meta.get(_CALL, ()))


def keep_spelled_out(model: ir.Model, calls: Iterable[SpelledOut]) -> None:
    """Keep with a model what stands in it for calls."""
    model.meta[_CALL] = (*spelled_out(model), *calls)


def put_back(call: SpelledOut) -> ir.Node:
    """Let the call stand in front of its definition, which nobody reads any more; the call.

    What it reads is what the definition reads now, also where something else has been put there since.
    """
    inputs = [place[0].inputs[place[1]] if isinstance(place, tuple) else place for place in call.inputs]
    node = ir.Node(
        call.domain,
        call.operator,
        inputs,
        call.attributes.values(),
        num_outputs=len(call.outputs),
        version=call.version,
        name=call.name,
    )
    for made, old in zip(node.outputs, call.outputs, strict=True):
        made.name = ""
        if old is None:
            continue
        made.type, made.shape, name = old.type, old.shape, old.name
        old.replace_all_uses_with(made, replace_graph_outputs=True)
        made.name, old.name = name, f"{name}.defined"
    first = call.nodes[0]
    assert first.graph is not None  # it was inlined into one
    first.graph.insert_before(first, node)
    return node


def spell_out(model: ir.Model, needed: Callable[[ir.Node], bool] | None = None) -> None:
    """Replace the calls of a model that need it by the definitions of the standard, in place: what they compute.

    Args:
        model: the model.
        needed: which calls do; those that are lifted only like that, where it is left out.

    A call whose definition ONNX cannot give (a type or a rank that it needs is unknown) stays. The others are kept
    with the model, see :func:`spelled_out`.
    """
    calls = [node for graph in nested_graphs(model.graph) for node in graph if (needed or _needs_definition)(node)]
    if calls and model.opset_imports.get("", 0) >= LOWEST_OPSET:
        types = _types(model)
        inline_definitions(model, calls, lambda node: _definition(model, node, types))


def spell_out_contrib(model: ir.Model, infos: Mapping[str, Info]) -> bool:
    """Put definitions in the place of ONNX Runtime's calls that need one, as far as they have one; whether any has.

    Args:
        model: changed in place. infos: shapes of its values, as far as they are known.
    """
    calls = [node for node in nested_nodes(model.graph) if onnx_contrib.is_defined(node, infos)]
    opset = model.opset_imports.get("") or model.opset_imports.get("ai.onnx", 1)

    def define(call: ir.Node) -> ir.Function | None:
        try:
            return onnx_contrib.definition(call, opset, infos)
        except AttentionRefused:
            return None  # the view says why

    return bool(calls) and inline_definitions(model, calls, define)


def inline_definitions(
    model: ir.Model, calls: Sequence[ir.Node], define: Callable[[ir.Node], ir.Function | None]
) -> bool:
    """Put functions in the place of calls, in place; whether any was.

    Args:
        model: whose calls they are, and which keeps them (:func:`spelled_out`).
        calls: each reads what its function reads, and may leave the last inputs out.
        define: the function of a call; ``None`` for a call that stays.
    """
    inlined: dict[str, tuple[SpelledOut, ir.Function, ir.Node]] = {}
    for number, node in enumerate(calls):
        call = SpelledOut(
            node.domain, node.op_type, node.version, node.name, dict(node.attributes), (), tuple(node.inputs), ()
        )
        body = define(node)
        if body is None:
            continue
        node.attributes.clear()  # they are written into the body
        body.domain, body.name = DOMAIN, f"{node.op_type}_{number}"
        model.functions[body.identifier()] = body
        node.domain, node.op_type, node.version = DOMAIN, body.name, None
        while node.inputs and node.inputs[-1] is None:
            node.resize_inputs(len(node.inputs) - 1)
        node.metadata_props[_CALL] = str(number)
        inlined[str(number)] = call, body, node
    if inlined:
        model.opset_imports.setdefault(DOMAIN, 1)
        InlinePass(criteria=lambda function: function.domain == DOMAIN)(model)
        del model.opset_imports[DOMAIN]
        keep_spelled_out(model, _placed(model, inlined))
    return bool(inlined)


def _placed(model: ir.Model, inlined: Mapping[str, tuple[SpelledOut, ir.Function, ir.Node]]) -> Iterator[SpelledOut]:
    """The calls with the nodes that stand for them now; their marks are taken off."""
    nodes: dict[str, list[ir.Node]] = {number: [] for number in inlined}
    for node in nested_nodes(model.graph):
        if _CALL in node.metadata_props:
            nodes[node.metadata_props.pop(_CALL)].append(node)
    became: dict[ir.Value, ir.Value] = {}
    for number, (_, body, node) in inlined.items():
        clones = dict(zip(nested_nodes(body), nodes[number], strict=True))
        for old, made in zip(node.outputs, body.outputs, strict=True):
            source, position = made.producer(), made.index()
            assert source is not None and position is not None  # every output of a definition is made in it
            became[old] = clones[source].outputs[position]
    for number, (call, body, node) in inlined.items():
        clones = dict(zip(nested_nodes(body), nodes[number], strict=True))
        reads: dict[ir.Value, tuple[ir.Node, int]] = {}
        for inner in body:
            for position, value in enumerate(inner.inputs):
                if value is not None:
                    reads.setdefault(value, (clones[inner], position))
        given: list[tuple[ir.Node, int] | ir.Value | None] = []
        for position, read in enumerate(call.inputs):
            assert read is None or isinstance(read, ir.Value)  # the call has not been placed yet
            formal = body.inputs[position] if position < len(body.inputs) else None
            known = None if read is None else became.get(read, read)
            given.append(reads.get(formal, known) if formal is not None and known is not None else known)
        outputs = tuple(became[old] if old.name else None for old in node.outputs)
        placed = tuple(clones[inner] for inner in body)  # without those in bodies
        yield replace(call, nodes=placed, inputs=tuple(given), outputs=outputs)


def _needs_definition(node: ir.Node) -> bool:
    if (node.domain, node.op_type) == (PREVIEW, "FlexAttention"):
        return True
    if node.domain not in ("", "ai.onnx") or node.op_type != "Attention":
        return False
    cached = any(value is not None and value.name for value in node.inputs[4:6])
    return cached or any(output.uses() or output.is_graph_output() for output in node.outputs[1:])


def _types(model: ir.Model) -> dict[str, onnx.TypeProto]:
    """The type of every value, as declared or inferred."""
    declared = dict(_declared(model))
    return declared if all(v.name in declared for v in nested_values(model.graph)) else infer_types(model) | declared


def _declared(model: ir.Model) -> Iterator[tuple[str, onnx.TypeProto]]:
    for value in nested_values(model.graph):
        if value.name and value.type is not None and value.shape is not None:
            yield value.name, ir.serde.serialize_value(value).type


def _definition(model: ir.Model, node: ir.Node, types: dict[str, onnx.TypeProto]) -> ir.Function | None:
    """The function that stands for a call, made for the types of its inputs."""
    version = model.opset_imports.get(node.domain) or model.opset_imports.get("ai.onnx", 1)
    try:
        schema: Any = onnx.defs.get_schema(node.op_type, max_inclusive_version=version, domain=node.domain)
        versions = [v for v in schema.context_dependent_function_opset_versions if v <= version]
        given = [
            types.get(value.name or "", onnx.TypeProto()) if value is not None else onnx.TypeProto()
            for value in node.inputs
        ]
        written = schema.get_context_dependent_function_with_opset_version(
            max(versions), ir.to_proto(node).SerializeToString(), [kind.SerializeToString() for kind in given]
        )
        proto = onnx.FunctionProto.FromString(written)
        del proto.attribute[:]
        for position, inner in enumerate(proto.node):
            inner.name = f"{node.name or node.op_type}.{inner.op_type}_{position}"
        made = {name for inner in proto.node for name in inner.output}
        for name in proto.output[: len(node.outputs)]:
            if name not in made:
                # the call leaves this output out, and so does the body; something must have its name
                proto.node.append(onnx.helper.make_node("Identity", [proto.input[0]], [name]))
        del proto.output[len(node.outputs) :]
        function = ir.from_proto(proto)
    except (onnx.defs.SchemaError, RuntimeError, ValueError):
        return None
    if not isinstance(function, ir.Function) or not len(function):
        return None
    for name in function.opset_imports:
        function.opset_imports[name] = model.opset_imports.get(name, function.opset_imports[name])
    function.opset_imports.setdefault("", model.opset_imports[""])
    return function
