"""Attention calls of ONNX Runtime that do more than attend: the function of standard operators that stands for each."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from attncompile.frontends import onnx_group_query, onnx_multi_head, onnx_projected
from attncompile.frontends.graph import Info
from attncompile.frontends.onnx_builder import AttentionRefused
from attncompile.frontends.onnx_scores import LOWEST_OPSET, Body

CONTRIB = "com.microsoft"
INPUTS: Mapping[str, tuple[str, ...]] = {
    **onnx_projected.INPUTS,
    onnx_multi_head.MULTI_HEAD: onnx_multi_head.INPUTS,
    onnx_group_query.GROUP_QUERY: onnx_group_query.INPUTS,
}
"""The calls that have a definition, with the names of their inputs."""

Call = onnx_projected.Call | onnx_multi_head.Call | onnx_group_query.Call
"""What any of them says."""

_READERS: Mapping[str, type[Call]] = {
    **dict.fromkeys(onnx_projected.INPUTS, onnx_projected.Call),
    onnx_multi_head.MULTI_HEAD: onnx_multi_head.Call,
    onnx_group_query.GROUP_QUERY: onnx_group_query.Call,
}


def is_defined(node: ir.Node, infos: Mapping[str, Info]) -> bool:
    """Whether a node is a call that its definition should stand for."""
    if node.domain != CONTRIB or node.op_type not in INPUTS:
        return False
    return node.op_type != onnx_multi_head.MULTI_HEAD or not onnx_multi_head.is_plain(node, infos)


def lowest_opset(operator: str) -> int:
    """The first operator set in which the definition of a call can be written."""
    return onnx_group_query.OPSET if operator == onnx_group_query.GROUP_QUERY else LOWEST_OPSET


def read(call: ir.Node, infos: Mapping[str, Info]) -> Call:
    """What a call says. Raises AttentionRefused for one that is not defined, with the reason."""
    if not 1 <= len(call.outputs) <= 4:
        raise AttentionRefused(f"it has {len(call.inputs)} inputs and {len(call.outputs)} outputs")
    return _READERS[call.op_type].of(call, infos)


def definition(call: ir.Node, opset: int, infos: Mapping[str, Info]) -> ir.Function:
    """The function that stands for a call, with its inputs and outputs.

    Args:
        call: the call. opset: what the body is written in. infos: shapes of its inputs.

    Raises:
        AttentionRefused: for a call that is not defined, with the reason.
    """
    given = read(call, infos)
    lowest = lowest_opset(call.op_type)
    if opset < lowest:
        raise AttentionRefused(f"its definition needs opset {lowest}, and the model is at {opset}")
    body = Body(opset, _path(call))
    formal = {name: ir.Value(name=name) for name in INPUTS[call.op_type][: len(call.inputs)]}
    present = (name for name, value in zip(formal, call.inputs, strict=True) if value is not None and value.name)
    outputs = given.written(body, {name: formal[name] for name in present})
    graph = ir.Graph(list(formal.values()), outputs, nodes=body.nodes, opset_imports={"": opset})
    return ir.Function("", call.op_type, graph=graph, attributes=())


def _path(call: ir.Node) -> str:
    """The name of a call, in the module that its result says where its name says none."""
    name, (module, slash, _) = call.name or call.op_type, (call.outputs[0].name or "").rpartition("/")
    return name if "/" in name else f"{module}{slash}{name}"


__all__ = ["CONTRIB", "INPUTS", "Call", "definition", "is_defined", "lowest_opset", "read"]
