"""Values over time: what in-place operations do to the values of an FX graph.

A graph from ``torch.export`` or Dynamo is not functional: ``scores.add_(mask)`` changes ``scores``, and every
later read of that node, or of a view of it, sees the change. A reading of the graph as equations must
therefore say which version of a value each node reads. What the versions hold is said by
:mod:`attncompile.frontends.view_writes`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from attncompile.frontends.torch_internals import is_batched

EARLY, AFTER = "#early", "#after_"
"""Suffixes of the values that a node had before its memory was changed through another view of it, and after the
change by the operation whose name follows.
"""

_MAY_RETURN_THEIR_INPUT = frozenset({"dropout", "type_as"})
"""Operations whose schema does not say that the result can be the input itself."""


@dataclass(frozen=True)
class Change:
    """One change of a value's memory through another view of it.

    Attributes:
        writer: the operation that made it.
        before: the version of the value that it found.
        after: the version that it left.
        written: what it left in the view that it wrote through, which is its own result; empty where it gives none.
    """

    writer: str
    before: str
    after: str
    written: str

    @property
    def read(self) -> tuple[str, str]:
        """The values that the version it left is made of."""
        return self.before, self.written or self.writer


@dataclass(frozen=True)
class Versions:
    """Which version of a value is read where.

    Attributes:
        reads: per node, the value that each of the nodes it reads stands for at that time, by name.
        overwritten: values that can not be read any more once the graph has run: their memory holds something else
            then.
        changed: values that are read after their memory was changed through another view, with these changes in
            order. The plain name is the value after the last of them.
        written: per operation that works in place on one tensor and gives it back, the node whose memory it changes.
    """

    reads: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    overwritten: frozenset[str] = frozenset()
    changed: Mapping[str, tuple[Change, ...]] = field(default_factory=dict)
    written: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def changes(self) -> Mapping[str, Change]:
        """The change that left a version, by the name of the version."""
        return {change.after: change for changes in self.changed.values() for change in changes}

    @cached_property
    def by_writer(self) -> Mapping[str, tuple[Change, ...]]:
        """The changes that an operation makes."""
        found: dict[str, list[Change]] = {}
        for change in self.changes.values():
            found.setdefault(change.writer, []).append(change)
        return {writer: tuple(changes) for writer, changes in found.items()}

    def made(self, node: str) -> str:
        """The value that a node makes, before anything changes it."""
        return node + EARLY if node in self.changed else node

    def root(self, value: str) -> str:
        """The node whose memory a version of a value, or an operation's result, is."""
        node = value.split("#")[0]
        return self.written.get(node, node)


def written_arguments(node: torch.fx.Node) -> tuple[torch.fx.Node, ...]:
    """The nodes whose elements an operation changes."""
    altered = altered_arguments(node)
    return () if altered and str(node.target).split(".")[1:2] == ["detach_"] else altered


def altered_arguments(node: torch.fx.Node) -> tuple[torch.fx.Node, ...]:
    """The nodes that an operation works on in place; ``detach_`` changes their gradient's history alone."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
        return ()
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
    memory = Memory()
    same: dict[torch.fx.Node, torch.fx.Node] = {}
    current: dict[torch.fx.Node, str] = {}
    read: list[tuple[int, str, str, str]] = []
    overwritten: set[str] = set()
    changes: dict[str, dict[int, torch.fx.Node]] = {}
    for time, node in enumerate(nodes):
        for argument in node.all_input_nodes:
            read.append((time, node.name, argument.name, current[same[argument]]))
        memory.place(node)
        targets = written.get(node, ())
        same[node] = same[targets[0]] if _gives_target(node, targets) else node
        for target in targets:
            for other in {same[seen] for seen in same if memory.shared(seen, target)}:
                if other is not same[node]:
                    changes.setdefault(current.get(other, other.name), {})[time] = node
        if same[node] is not node:
            overwritten.add(current[same[node]])
        current[same[node]] = node.name
    seen = {value: 0 for value in changes}
    for time, _, _, value in read:
        if value in changes:
            seen[value] = max(seen[value], sum(1 for changed in changes[value] if changed < time))
    # what is never read again after a change needs no name for it
    overwritten |= {value for value, found in changes.items() if seen[value] < len(found)}
    kept = {value: list(found.items())[: seen[value]] for value, found in changes.items() if seen[value]}
    reads: dict[str, dict[str, str]] = {node.name: {} for node in nodes}
    for time, reader, name, value in read:
        before = [node.name for changed, node in kept.get(value, ()) if changed < time]
        reads[reader][name] = _version(value, before, len(kept.get(value, ())))
    gives = {node.name: root.name for node, root in same.items() if root is not node}
    changed = {
        value: tuple(
            Change(
                node.name,
                _version(value, names[:number], len(names)),
                _version(value, names[: number + 1], len(names)),
                (node.name + EARLY if node.name in kept else node.name) if node.name in gives else "",
            )
            for number, (_, node) in enumerate(found)
        )
        for value, found in kept.items()
        if (names := [node.name for _, node in found])
    }
    return Versions(reads, frozenset(overwritten), changed, gives)


def _version(value: str, writers: Sequence[str], last: int) -> str:
    """The name of a value after the first of its ``last`` changes."""
    if len(writers) == last:
        return value
    return value + AFTER + writers[-1] if writers else value + EARLY


def _gives_target(node: torch.fx.Node, targets: Sequence[torch.fx.Node]) -> bool:
    """Whether what an operation gives is the one tensor that it changed."""
    return len(targets) == 1 and isinstance(node.meta.get("val"), torch.Tensor)


class Memory:
    """Which nodes share memory: by the schema, and by the storage that tracing saw."""

    def __init__(self) -> None:
        self._parent: dict[object, object] = {}

    @classmethod
    def of(cls, graph: torch.fx.Graph) -> Memory:
        """The memory of all nodes of a graph."""
        memory = cls()
        for node in graph.nodes:
            memory.place(node)
        return memory

    def _root(self, item: object) -> object:
        while self._parent.setdefault(item, item) is not item:
            item = self._parent[item]
        return item

    def _join(self, one: object, other: object) -> None:
        self._parent[self._root(one)] = self._root(other)

    def place(self, node: torch.fx.Node) -> None:
        """Note what memory a node's value lies in; nodes must come in the order of the graph."""
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

    def place_of(self, node: torch.fx.Node) -> object:
        """What stands for the memory of a node, and is the same for all nodes that may share it."""
        return self._root(node)

    def shared(self, one: torch.fx.Node, other: torch.fx.Node) -> bool:
        """Whether two nodes may share memory."""
        return self._root(one) is self._root(other)


def entangled_results(graph: torch.fx.Graph, versions: Versions) -> dict[str, str]:
    """The values in whose place no other tensor can be put, with the reason.

    What is put in place of a value has memory of its own, and so have the views that are taken of it. That must not be
    told apart from the value's own memory by what is written and read later.
    """
    time = {node: number for number, node in enumerate(graph.nodes)}
    writers = [(node, target) for node in graph.nodes for target in written_arguments(node)]
    if not writers:
        return {}
    memory = Memory.of(graph)
    written: dict[object, list[tuple[torch.fx.Node, torch.fx.Node]]] = {}
    for node, target in writers:
        written.setdefault(memory.place_of(target), []).append((node, target))
    members: dict[object, list[torch.fx.Node]] = {}
    for node in graph.nodes:
        members.setdefault(memory.place_of(node), []).append(node)
    found: dict[str, str] = {}
    for place, writes in written.items():
        for node in members[place]:
            later = [(writer, target) for writer, target in writes if time[writer] > time[node]]
            if not later or node.op != "call_function":
                continue
            derived = {node}
            for other in members[place]:
                if not derived.isdisjoint(other.all_input_nodes):
                    derived.add(other)
            first = later[0][0]
            if node.name in versions.changed:
                found[node.name] = f"{first.name} changes its memory before it is read"
            elif any(target not in derived for _, target in later):
                found[node.name] = f"{first.name} writes to its memory through another tensor"
            elif any(_seen_after(other, time, time[first]) for other in members[place] if other not in derived):
                found[node.name] = f"another tensor shows what {first.name} writes to its memory"
    return found


def lasting_writes(graph: torch.fx.Graph, versions: Versions) -> frozenset[str]:
    """The values that operations leave in memory that the caller may hold: that of an input, parameter or constant."""
    writers = [(node, target) for node in graph.nodes for target in written_arguments(node)]
    if not writers:
        return frozenset()
    memory = Memory.of(graph)
    held = {memory.place_of(node) for node in graph.nodes if node.op in ("placeholder", "get_attr")}
    return frozenset(versions.made(node.name) for node, target in writers if memory.place_of(target) in held)


def _seen_after(node: torch.fx.Node, time: Mapping[torch.fx.Node, int], moment: int) -> bool:
    """Whether anything reads a node after a moment; what the caller holds it may always read."""
    return node.op in ("placeholder", "get_attr") or any(time[user] > moment for user in node.users)
