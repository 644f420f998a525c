"""The Graph view of a pre-dispatch ATen graph (from ``torch.export`` or from Dynamo): one row of
:mod:`attncompile.frontends.aten_rows` per native operation.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from attncompile.frontends.aten_attention import is_attention
from attncompile.frontends.aten_builder import Builder, Unstated, is_number, positional
from attncompile.frontends.aten_evaluate import AtenEvaluator
from attncompile.frontends.aten_rows import ROWS
from attncompile.frontends.aten_sizes import note_hints, size_expr, unified
from attncompile.frontends.capture import Captured, module_path, module_type, source_line
from attncompile.frontends.collection import without_collection
from attncompile.frontends.graph import Graph, GraphInput, Info, NativeNode, Node, Opaque, RefusedAttention
from attncompile.frontends.memory import (
    Change,
    Versions,
    entangled_results,
    lasting_writes,
    memory_versions,
    written_arguments,
)
from attncompile.frontends.torch_internals import is_batched
from attncompile.frontends.view_writes import ViewWrites, common_view
from attncompile.frontends.whole_calls import is_put_back
from attncompile.ir import Expr
from attncompile.ir.types import NAMES


@without_collection()
def aten_graph(captured: Captured) -> Graph:
    """The Graph view of a captured model."""
    equal: dict[Expr, Expr] = {}
    while True:
        known = len(equal)
        graph = _read(captured, equal)
        if len(equal) == known:
            return graph
        # an operation needs two sizes to be equal: read everything again with one symbol for both


def _read(captured: Captured, equal: dict[Expr, Expr]) -> Graph:
    assumed = dict(equal)
    versions = memory_versions(captured.graph_module.graph)
    infos: dict[str, Info] = {}
    nodes: list[Node] = []
    producer: dict[str, Node] = {}
    inputs: dict[str, GraphInput] = {}
    natives: dict[str, NativeNode] = {}
    owner: dict[str, str] = {}
    hints: dict[str, int] = {}
    outputs: tuple[str, ...] = ()
    roles = {entry.placeholder: entry for entry in captured.inputs}
    native = {node.name: node for node in captured.graph_module.graph.nodes}
    writes = ViewWrites(native, versions, producer, infos)
    for node in captured.graph_module.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            infos[node.name] = _info(value, assumed)
            for name in _versions_of(node.name, versions):
                infos[name] = infos[node.name]
                owner[name] = node.name
            for size in value.shape:
                note_hints(size, hints)
        elif isinstance(value, torch.SymInt):
            note_hints(value, hints)
        if node.op == "placeholder" or node.op == "get_attr":
            if node.name not in infos:
                continue
            entry = roles.get(node.name)
            held = getattr(captured.graph_module, node.target, None) if node.op == "get_attr" else None
            given = GraphInput(
                entry.name if entry else str(node.target),
                entry.role if entry else "constant",
                entry.value if entry and isinstance(entry.value, torch.Tensor) else held,
            )
            inputs[versions.made(node.name)] = given
            if node.name in versions.changed:
                inputs[node.name] = replace(given, value=None)  # what it holds is what the writes left
        elif node.op == "output":
            leaves = torch.utils._pytree.tree_leaves(node.args)
            reads = versions.reads[node.name]
            outputs = tuple(reads[leaf.name] for leaf in leaves if isinstance(leaf, torch.fx.Node))
        elif node.op == "call_function" and isinstance(value, torch.Tensor):
            source = source_line(node)
            natives[node.name] = NativeNode(
                node.name,
                _named(node),
                module_path(node),
                str(source) if source else "",
                module_type(node),
            )
            stated = _state(Builder(infos, node, versions, equal, producer))
            stated[-1] = replace(stated[-1], output=versions.made(node.name))
            nodes += stated
            producer.update({made.output: made for made in stated})
            owner.update({made.output: node.name for made in stated})
        for change in versions.by_writer.get(node.name, ()):
            producer[change.after] = writes.after(change.after.split("#")[0], change)
            nodes.append(producer[change.after])
    display = {name[0].upper() + name[1:]: shown for name, shown in captured.size_names.items()}
    signature: dict[str, str] = {}
    for node in native.values():
        if node.op == "call_function":
            signature[versions.made(node.name)] = _signature(node)
        for change in versions.by_writer.get(node.name, ()):
            signature[change.after] = _signature_of_write(native, versions, change)
    numbers = {n.name for n in captured.graph_module.graph.nodes if is_number(n)}
    read = {
        versions.made(name): tuple(value for other, value in found.items() if other not in numbers)
        for name, found in versions.reads.items()
    }
    made_of = {after: producer[after].inputs for after in versions.changes}
    read |= made_of
    evaluator = AtenEvaluator(captured.graph_module, inputs, versions, made_of, assumed)
    return Graph(
        infos,
        tuple(nodes),
        inputs,
        outputs,
        natives,
        owner,
        evaluator,
        hints,
        signature,
        read,
        display,
        versions.overwritten,
        entangled=entangled_results(captured.graph_module.graph, versions),
        effects=lasting_writes(captured.graph_module.graph, versions),
    )


def _versions_of(name: str, versions: Versions) -> tuple[str, ...]:
    """The further names that a node has before the last change of its memory."""
    return tuple(change.before for change in versions.changed.get(name, ()))


def _state(builder: Builder) -> list[Node]:
    """The statement of one native node; the last one's output carries the native name."""
    node, infos = builder.node, builder.infos
    out = infos[node.name]
    name = _operation(node.target)
    row = ROWS.get(name.removesuffix("_") if written_arguments(node) else name)
    reason = ""
    if is_batched(node.meta.get("val")):
        row = None  # inside vmap an axis more is there than the shape says
    if is_put_back(node):
        row, reason = None, "a type of tensor that holds others says what it does"
    if row is not None:
        try:
            last = row(builder, *positional(node))
            if builder.made and builder.made[-1].output == last:
                builder.made[-1] = replace(builder.made[-1], output=node.name)
                infos.pop(last, None)
                infos[node.name] = out
                return builder.made
        except (Unstated, ValueError, KeyError) as error:
            reason = str(error)
    infos[node.name] = out
    reads = tuple(dict.fromkeys(_tensors_read(node, builder)))
    call = _called(node)
    whole = _operation(call.target)
    # of a call with several results, the first that is read stands for it
    if is_attention(whole) and (call is node or next(iter(call.users)) is node):
        return [RefusedAttention(node.name, reads, whole, reason or "this operator has no statement here")]
    return [Opaque(node.name, reads, whole)]


def _named(node: torch.fx.Node) -> str:
    """What an operation is called: of one that is among the results of an attention call, the call."""
    whole = _operation(_called(node).target)
    return whole if is_attention(whole) else _operation(node.target)


def _called(node: torch.fx.Node) -> torch.fx.Node:
    """The call whose result a node is: itself, or the one of whose several results it is one."""
    source = node.args[0] if node.target is operator.getitem else node
    return source if isinstance(source, torch.fx.Node) else node


def _info(value: torch.Tensor, equal: Mapping[Expr, Expr]) -> Info:
    return Info(tuple(unified(size_expr(size), equal) for size in value.shape), NAMES.get(value.dtype, "float32"))


def _operation(target: Any) -> str:
    if target is operator.getitem:
        return "getitem"
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[-1]
    return getattr(target, "__name__", str(target))


def _signature(node: torch.fx.Node) -> str:
    def show(argument: torch.fx.Node) -> str:
        return str(argument.meta["val"]) if is_number(argument) else "·"

    args = torch.fx.node.map_arg((node.args, dict(node.kwargs)), show)
    return f"{node.target} {args}"


def _signature_of_write(nodes: Mapping[str, torch.fx.Node], versions: Versions, change: Change) -> str:
    """Which part of a value a write changed."""
    value, target = (nodes[versions.root(name)] for name in (change.after, change.writer))
    ways = common_view(value, target) or ((value,), (target,))
    return " into ".join(" ".join(_signature(node) for node in way[1:]) for way in reversed(ways))


def _tensors_read(node: torch.fx.Node, builder: Builder) -> Iterator[str]:
    """The tensor values that a node depends on, looking through tuples and numbers, but not through sizes."""
    for argument in node.all_input_nodes:
        if isinstance(argument.meta.get("val"), torch.Tensor):
            yield builder.value(argument, node)
        elif argument.op == "call_function" and not _operation(argument.target).startswith("sym_"):
            yield from _tensors_read(argument, builder)
