"""Values of an ONNX graph that are rounded to a narrow type and read back, and the graph without that.

Such a pair is ``QuantizeLinear`` and ``DequantizeLinear`` by one scale and zero point, or ``DynamicQuantizeLinear`` and
``DequantizeLinear`` by what it found. What stands in a graph as codes alone, parameters above all, is no rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import onnx_ir as ir

from attncompile.frontends import movement
from attncompile.frontends.graph import Cast, Graph, Move, Node, Rounding
from attncompile.frontends.onnx_bodies import nested_nodes
from attncompile.frontends.onnx_codes import same_numbers, same_zeros
from attncompile.frontends.onnx_evaluate import OnnxEvaluator
from attncompile.frontends.onnx_quantised import STANDARD

PASSED_ON = "Identity"
"""The operation of a value that is another one as it is, in signatures: one that is no longer rounded, for example."""


def roundings_of(model: ir.Model) -> Iterator[Rounding]:
    """The roundings of a model in the QDQ form, in graph order."""
    for node in nested_nodes(model.graph):
        if node.op_type != "DequantizeLinear" or node.domain not in STANDARD or len(node.inputs) < 2:
            continue
        codes, scale, zero = [*node.inputs, None][:3]
        before = codes.producer() if codes is not None else None
        if codes is None or before is None or before.domain not in STANDARD:
            continue
        output, source = node.outputs[0].name, before.inputs[0].name if before.inputs and before.inputs[0] else None
        if not output or not source:
            continue
        if before.op_type == "QuantizeLinear" and _is_undone(before, node):
            yield Rounding(output, source, _narrow(before), _step(scale))
        elif before.op_type == "DynamicQuantizeLinear" and (codes, scale, zero) == tuple(before.outputs):
            yield Rounding(output, source, "uint8", dynamic=True)


def _is_undone(rounds: ir.Node, reads: ir.Node) -> bool:
    """Whether codes are read by what they were made by."""
    (_, scale, zero), (_, read_scale, read_zero) = ([*node.inputs, None][:3] for node in (rounds, reads))
    grain = [_grain(node) for node in (rounds, reads)]
    return same_numbers(scale, read_scale) and same_zeros(zero, read_zero) and grain[0] == grain[1]


def _grain(node: ir.Node) -> tuple[int, int]:
    """The axis of several scales, and how many elements share one."""
    axis, block = node.attributes.get("axis"), node.attributes.get("block_size")
    return (1 if axis is None else int(axis.value)), (0 if block is None else int(block.value))


def _narrow(node: ir.Node) -> str:
    """The type that a node rounds to."""
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    written = node.attributes.get("output_dtype")
    if zero is not None and zero.dtype is not None:
        return zero.dtype.name.lower()
    return ir.DataType(int(written.value)).name.lower() if written is not None and written.value else "uint8"


def _step(scale: ir.Value | None) -> float | None:
    constant = scale.const_value if scale is not None else None
    return float(constant.numpy().reshape(-1)[0]) if constant is not None and constant.size == 1 else None


def with_roundings(graph: Graph, evaluator: OnnxEvaluator) -> Graph:
    """A graph that knows its roundings, and itself without them."""
    known = {one.output: one for one in roundings_of(evaluator.model) if _is_stated(graph, one)}
    return replace(graph, roundings=known, unrounded=_unrounded(graph, known, evaluator)) if known else graph


def _is_stated(graph: Graph, rounding: Rounding) -> bool:
    """Whether shape and type are known on both sides, of something that the model computes from its inputs."""
    return {rounding.source, rounding.output} <= graph.infos.keys() and rounding.source in graph.varying


def _unrounded(graph: Graph, roundings: Mapping[str, Rounding], evaluator: OnnxEvaluator) -> Graph:
    """The graph with every rounded value passed on as it is.

    What is read back is no value that the graph without roundings has: nothing may read it there (``overwritten``).
    """
    nodes = tuple(_passed_on(graph, node, roundings) for node in graph.nodes)
    passed = {one.output: one.source for one in roundings.values()}
    evaluate = replace(evaluator, passed={**evaluator.passed, **passed}, _producers={})
    found = replace(
        graph,
        nodes=nodes,
        evaluate=evaluate,
        precision=evaluate.precision,
        signature={**graph.signature, **dict.fromkeys(passed, PASSED_ON)},
        native_inputs={**graph.native_inputs, **{output: (source,) for output, source in passed.items()}},
        overwritten=graph.overwritten | passed.keys(),
    )
    # what only rounded is read by nobody any more
    return replace(found, nodes=tuple(n for n in nodes if n.output in found.live or n.output not in graph.live))


def _passed_on(graph: Graph, node: Node, roundings: Mapping[str, Rounding]) -> Node:
    rounding = roundings.get(node.output)
    if rounding is None:
        return node
    before, after = graph.infos[rounding.source], graph.infos[rounding.output]
    if before.dtype != after.dtype:
        return Cast(node.output, rounding.source, after.dtype)
    return Move(node.output, rounding.source, movement.identity, "unrounded")


__all__ = ["roundings_of", "with_roundings"]
