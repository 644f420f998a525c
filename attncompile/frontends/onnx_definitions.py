"""Attention calls spelled out by the body that ONNX itself defines for them.

``Attention`` with a cache, or with a second output that is read, and ``FlexAttention`` are more than one
product over tensors of the graph. The standard defines them by a function of plain operators; with that body
in their place they are lifted like any attention that is written out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from attncompile.frontends.onnx_bodies import nested_graphs, nested_values
from attncompile.frontends.onnx_inference import infer_types

DOMAIN = "attncompile.definition"
"""Where a body lives between being defined and being inlined."""

PREVIEW = "ai.onnx.preview"
LOWEST_OPSET = 18
"""The bodies are written in operators of this opset and later."""


def spell_out(model: ir.Model) -> None:
    """Replace the calls of a model that need it by their definitions, in place; exactly what they compute.

    A call whose definition ONNX cannot give (a type or a rank that it needs is unknown) stays.
    """
    calls = [node for graph in nested_graphs(model.graph) for node in graph if _needs_definition(node)]
    if not calls or model.opset_imports.get("", 0) < LOWEST_OPSET:
        return
    types = _types(model)
    inlined = False
    for number, node in enumerate(calls):
        body = _definition(model, node, types)
        if body is None:
            continue
        body.domain, body.name = DOMAIN, f"{node.op_type}_{number}"
        model.functions[body.identifier()] = body
        node.domain, node.op_type, node.version = DOMAIN, body.name, None
        while node.inputs and node.inputs[-1] is None:
            node.resize_inputs(len(node.inputs) - 1)
        inlined = True
    if inlined:
        model.opset_imports.setdefault(DOMAIN, 1)
        InlinePass(criteria=lambda function: function.domain == DOMAIN)(model)
        del model.opset_imports[DOMAIN]


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
        del proto.attribute[:]  # they are written into the body already
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
    node.attributes.clear()
    return function
