"""Values over time: what in-place operations do to the values of an FX graph.

A graph from ``torch.export`` or Dynamo is not functional: ``scores.add_(mask)`` changes ``scores``, and every
later read of that node, or of a view of it, sees the change. A reading of the graph as equations must
therefore say which version of a value each node reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from attncompile.frontends.torch_internals import is_batched

EARLY, BETWEEN = "#early", "#between"
"""Suffixes of the values that a node had before its memory was changed through another view of it, and
between the first such change and the last.
"""

_MAY_RETURN_THEIR_INPUT = frozenset({"dropout", "type_as"})
"""Operations whose schema does not say that the result can be the input itself."""


@dataclass(frozen=True)
class Versions:
    """Which version of a value is read where.

    Attributes:
        reads: per node, the value that each of the nodes it reads stands for at that time, by name.
        overwritten: values that can not be read any more once the graph has run: an in-place operation
            changed them, and its own result is what their memory holds.
        changed: values whose memory was changed through another view, with the operations that did it. The
            plain name is the value after the last change; earlier reads have the suffix :data:`EARLY` or
            :data:`BETWEEN`.
    """

    reads: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    overwritten: frozenset[str] = frozenset()
    changed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def written_arguments(node: torch.fx.Node) -> tuple[torch.fx.Node, ...]:
    """The nodes whose elements an operation changes."""
    return () if str(node.target).split(".")[1:2] == ["detach_"] else altered_arguments(node)


def altered_arguments(node: torch.fx.Node) -> tuple[torch.fx.Node, ...]:
    """The nodes that an operation works on in place; ``detach_`` changes their gradient's history alone."""
    return tuple(argument for argument, alias in _arguments(node) if alias is not None and alias.is_write)


def _arguments(node: torch.fx.Node) -> Iterator[tuple[torch.fx.Node, Any]]:
    """Every node among the arguments, with the alias information of the schema."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return
    for number, declared in enumerate(node.target._schema.arguments):
        given = node.args[number] if number < len(node.args) else node.kwargs.get(declared.name)
        for leaf in torch.utils._pytree.tree_leaves(given):
            if isinstance(leaf, torch.fx.Node):
                yield leaf, declared.alias_info


def memory_versions(graph: torch.fx.Graph) -> Versions:
    """Follow all writes of a graph, in order."""
    nodes = list(graph.nodes)
    written = {node: found for node in nodes if (found := written_arguments(node))}
    if not written:
        return Versions({node.name: {n.name: n.name for n in node.all_input_nodes} for node in nodes})
    memory = _Memory()
    same: dict[torch.fx.Node, torch.fx.Node] = {}
    current: dict[torch.fx.Node, str] = {}
    read: list[tuple[int, str, str, str]] = []
    overwritten: set[str] = set()
    changed: dict[str, list[str]] = {}
    first_change: dict[str, int] = {}
    last_change: dict[str, int] = {}
    for time, node in enumerate(nodes):
        for argument in node.all_input_nodes:
            read.append((time, node.name, argument.name, current[same[argument]]))
        memory.place(node)
        targets = written.get(node, ())
        returns_target = len(targets) == 1 and isinstance(node.meta.get("val"), torch.Tensor)
        same[node] = same[targets[0]] if returns_target else node
        for target in targets:
            for other in {same[seen] for seen in same if memory.shared(seen, target)}:
                if other is same[target] and returns_target:
                    continue
                changed.setdefault(current[other], []).append(node.name)
                first_change.setdefault(current[other], time)
                last_change[current[other]] = time
        if returns_target:
            overwritten.add(current[same[node]])
        current[same[node]] = node.name
    reads: dict[str, dict[str, str]] = {node.name: {} for node in nodes}
    for time, reader, name, version in read:
        suffix = ""
        if time <= last_change.get(version, -1):
            suffix = EARLY if time <= first_change[version] else BETWEEN
        reads[reader][name] = version + suffix
    return Versions(reads, frozenset(overwritten), {name: tuple(dict.fromkeys(by)) for name, by in changed.items()})


class _Memory:
    """Which nodes share memory: by the schema, and by the storage that tracing saw."""

    def __init__(self) -> None:
        self._parent: dict[object, object] = {}

    def _root(self, item: object) -> object:
        while self._parent.setdefault(item, item) is not item:
            item = self._parent[item]
        return item

    def _join(self, one: object, other: object) -> None:
        self._parent[self._root(one)] = self._root(other)

    def place(self, node: torch.fx.Node) -> None:
        for value in torch.utils._pytree.tree_leaves(node.meta.get("val")):
            if isinstance(value, torch.Tensor) and value.layout is torch.strided and not is_batched(value):
                self._join(node, ("storage", value.untyped_storage()._cdata))
            elif is_batched(value):
                for argument in node.all_input_nodes:  # whose memory it may be
                    self._join(node, argument)
        if not isinstance(node.target, torch._ops.OpOverload):
            for argument in node.all_input_nodes if node.op == "call_function" else ():
                self._join(node, argument)  # getitem, and calls that say nothing of their memory
            return
        name = node.target._schema.name.split("::")[-1]
        for argument, alias in _arguments(node):
            if alias is not None or name in _MAY_RETURN_THEIR_INPUT:
                self._join(node, argument)

    def shared(self, one: torch.fx.Node, other: torch.fx.Node) -> bool:
        return self._root(one) is self._root(other)
