"""What a rotary map rotates to make a value of a graph, and where its cosines and sines come from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from attncompile.frontends.graph import Cast, Concatenate, Graph, Indices, Move, Pointwise
from attncompile.ir import Expr, Kind, Load, Position, RefusalError
from attncompile.ir.expr import loads, rewrite, walk
from attncompile.ir.types import element_kind
from attncompile.lift.interpret import LARGEST, Interpreter
from attncompile.lift.rotary import SOURCE, rotary_map

_LONGEST = 64
"""Values that are looked at behind one."""


@dataclass(frozen=True)
class Rotation:
    """A rotary map that makes a value.

    Attributes:
        position: the map of :data:`attncompile.lift.rotary.SOURCE`; its expressions load values of the graph.
        source: the value that it rotates.
        indices: of the source's element at the same place.
    """

    position: Position
    source: str
    indices: Indices


def rotations(
    graph: Graph, value: str, indices: Indices, extents: Mapping[str, Expr], *, tables: bool = False
) -> Iterator[Rotation]:
    """The rotary maps that make a value, each from another source, nearest first.

    Args:
        graph: the graph.
        value: what is made.
        indices: of its element at ``b h i d``.
        extents: sizes of those.
        tables: load cosines and sines where the graph has them ready, instead of stating how they are computed.
    """
    for source in _sources(graph, value):
        loaded = frozenset([source, *(_tables(graph, source, value) if tables else ())])
        interpreter = Interpreter(graph, extents=extents, loaded=loaded)
        try:
            element = interpreter.at(value, indices)
        except RefusalError:
            continue
        read = [load for load in loads(element) if load.tensor == source]
        if len(read) < 3 or sum(1 for _ in walk(element)) > LARGEST:
            continue
        found = rotary_map(_anonymous(element, source), tuple(extents.items()))
        if found is not None:
            yield Rotation(found[0], source, found[1])


def _sources(graph: Graph, value: str) -> list[str]:
    """What could be rotated to make a value: what is read more than once on the way, nearest first."""
    seen, readers = {value}, dict[str, int]()
    stack = [value]
    while stack and len(seen) < _LONGEST:
        node = graph.producer.get(stack.pop())
        if not isinstance(node, Pointwise | Concatenate | Move | Cast):
            continue
        for name in node.inputs:
            readers[name] = readers.get(name, 0) + 1
            if name not in seen and name in graph.varying:
                seen.add(name)
                stack.append(name)
    wide = [name for name in seen - {value} if readers[name] > 1 and graph.is_readable(name)]
    return sorted(wide, key=lambda name: -graph.position.get(name, -1))[:8]


def _tables(graph: Graph, source: str, value: str) -> Iterator[str]:
    """The real tensors that join a source on its way to a value, before they are moved into its shape."""
    dependent = graph.descendants(source, value)
    for name in sorted(graph.ancestors([value], dependent) - {source}):
        for read in graph.producer[name].inputs:
            if read in dependent or element_kind(graph.infos[read].dtype) is not Kind.FLOAT:
                continue
            while isinstance(node := graph.producer.get(read), Move) and graph.is_readable(node.source):
                read = node.source
            if graph.is_readable(read):
                yield read


def _anonymous(element: Expr, tensor: str) -> Expr:
    """An element with one of its tensors under the name that stands for all: layers of a model then look alike."""
    return rewrite(
        element, lambda node: replace(node, tensor=SOURCE) if isinstance(node, Load) and node.tensor == tensor else None
    )


__all__ = ["Rotation", "rotations"]
