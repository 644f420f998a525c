"""Attention calls of ONNX Runtime that do more than attend: the function of standard operators that stands for each."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from attncompile.frontends import onnx_multi_head, onnx_projected
from attncompile.frontends.graph import Info
from attncompile.frontends.onnx_builder import AttentionRefused
from attncompile.frontends.onnx_scores import LOWEST_OPSET, Body

CONTRIB = "com.microsoft"
INPUTS: Mapping[str, tuple[str, ...]] = {**onnx_projected.INPUTS, onnx_multi_head.MULTI_HEAD: onnx_multi_head.INPUTS}
"""The calls that have a definition, with the names of their inputs."""


def is_defined(node: ir.Node, infos: Mapping[str, Info]) -> bool:
    """Whether a node is a call that its definition should stand for."""
    if node.domain != CONTRIB or node.op_type not in INPUTS:
        return False
    return node.op_type != onnx_multi_head.MULTI_HEAD or not onnx_multi_head.is_plain(node, infos)


def read(call: ir.Node, infos: Mapping[str, Info]) -> onnx_projected.Call | onnx_multi_head.Call:
    """What a call says. Raises AttentionRefused for one that is not defined, with the reason."""
    if not 1 <= len(call.outputs) <= 4:
        raise AttentionRefused(f"it has {len(call.inputs)} inputs and {len(call.outputs)} outputs")
    reader = onnx_multi_head.Call if call.op_type == onnx_multi_head.MULTI_HEAD else onnx_projected.Call
    return reader.of(call, infos)


def definition(call: ir.Node, opset: int, infos: Mapping[str, Info]) -> ir.Function:
    """The function that stands for a call, with its inputs and outputs.

    Args:
        call: the call. opset: what the body is written in. infos: shapes of its inputs.

    Raises:
        AttentionRefused: for a call that is not defined, with the reason.
    """
    given = read(call, infos)
    if opset < LOWEST_OPSET:
        raise AttentionRefused(f"its definition needs opset {LOWEST_OPSET}, and the model is at {opset}")
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


__all__ = ["CONTRIB", "INPUTS", "definition", "is_defined", "read"]
