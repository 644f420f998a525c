"""Nodes whose numbers ONNX Runtime has no kernel for: float32 in their place, rounded where the model rounds.

A product or sum of numbers of 16 bits, computed in float32 and rounded, is what PyTorch's CPU makes of it and what
the standard asks for. ONNX Runtime casts so by itself around nodes in float16 on a CPU; a model with a node in bfloat16
that has no kernel is not loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import onnx_ir as ir
import onnxruntime.capi.onnxruntime_pybind11_state as runtime

from attncompile.codegen.onnx.narrow import FLOAT, TYPES, Narrow
from attncompile.codegen.onnx.values import Builder

_NAMES = {kind: name for name, kind in TYPES.items()} | {FLOAT: "float"}


def without_kernels(model: ir.Model, narrow: Narrow, providers: Sequence[str]) -> list[str]:
    """Operators that compute in the narrow type in a model, and have no kernel for it on ONNX Runtime's providers."""
    return sorted({node.op_type for node in _missing(model, narrow, providers)})


def widened(model: ir.Model, narrow: Narrow, providers: Sequence[str]) -> int:
    """Let nodes without a kernel for the narrow type compute in float32, with casts around them; how many those are.

    Args:
        model: changed in place; values have types.
        narrow: the type.
        providers: of ONNX Runtime; nodes that have no kernel in float32 either stay as they are.
    """
    kernels, kind, count = _kernels(providers), TYPES[narrow], 0
    for node in list(_missing(model, narrow, providers)):
        if not _has_kernel(node, model, FLOAT, kernels):
            continue
        for place, value in enumerate(node.inputs):
            if value is not None and value.dtype is kind:
                build = Builder(model.graph, node.name or node.op_type)
                node.replace_input_with(place, _cast(build, value, FLOAT))
                build.insert_before(node)
        for output in node.outputs:
            if output.dtype is kind:
                _round(model, node, output, kind)
        count += 1
    return count


def _cast(build: Builder, value: ir.Value, kind: ir.DataType) -> ir.Value:
    made: ir.Value = build("Cast", value, to=int(kind))
    made.dtype, made.shape = kind, value.shape
    return made


def _round(model: ir.Model, node: ir.Node, output: ir.Value, kind: ir.DataType) -> None:
    """Let an output be in float32, and all who read it read it rounded."""
    readers, graph = tuple(output.uses()), node.graph
    build = Builder(model.graph, node.name or node.op_type)
    rounded = _cast(build, output, kind)
    output.dtype = FLOAT
    build.insert_after(node)
    for reader, place in readers:
        reader.replace_input_with(place, rounded)
    if output.is_graph_output() and graph is not None:
        for place, value in enumerate(graph.outputs):
            if value is output:
                graph.outputs[place] = rounded
        output.name, rounded.name = f"{output.name}.before", output.name


def _missing(model: ir.Model, narrow: Narrow, providers: Sequence[str]) -> Iterator[ir.Node]:
    """Nodes that compute in a type that they have no kernel for."""
    kind, kernels = TYPES[narrow], _kernels(providers)
    for node in model.graph.all_nodes():
        if node.op_type == "Cast" or not any(value is not None and value.dtype is kind for value in node.inputs):
            continue
        if not _has_kernel(node, model, kind, kernels):
            yield node


Kernels = dict[tuple[str, str], list[Any]]


def _kernels(providers: Sequence[str]) -> Kernels:
    found: Kernels = {}
    for kernel in runtime.get_all_opkernel_def():
        if kernel.provider in providers:
            found.setdefault((kernel.domain, kernel.op_name), []).append(kernel)
    return found


def _has_kernel(node: ir.Node, model: ir.Model, kind: ir.DataType, kernels: Kernels) -> bool:
    domain, version = node.domain.replace("ai.onnx", "", 1), model.opset_imports.get(node.domain, 1)
    wanted = f"tensor({_NAMES[kind]})"
    return any(
        low <= version <= high and any(wanted in allowed for allowed in kernel.type_constraints.values())
        for kernel in kernels.get((domain, node.op_type), ())
        for low, high in [kernel.version_range]
    )


__all__ = ["widened", "without_kernels"]
