"""A softmax of scores whose shape nobody knows: said aloud, for without a rank there is no axis to speak of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from attncompile.frontends.graph import Info, NativeNode, Node, Opaque, RefusedAttention
from attncompile.frontends.onnx_bodies import NORMALISERS, PRODUCTS


def refuse_unranked(
    nodes: Sequence[Node], infos: Mapping[str, Info], natives: Mapping[str, NativeNode], owner: Mapping[str, str]
) -> tuple[Node, ...]:
    """The nodes, with a refusal for each normaliser of unknown rank between two products.

    Args:
        nodes: of the view, in order.
        infos: shapes and dtypes of the values that have one.
        natives, owner: the native nodes, and the one that each value belongs to.
    """
    producer = {node.output: node for node in nodes}
    users: dict[str, list[Node]] = {}
    for node in nodes:
        for name in node.inputs:
            users.setdefault(name, []).append(node)

    def kind(value: str) -> str:
        return natives[owner[value]].what if value in owner else ""

    def reaches_product(value: str, forward: bool) -> bool:
        """Whether a product lies that way, with no other normaliser before it."""
        seen, stack = {value}, [value]
        while stack:
            name = stack.pop()
            near = [user.output for user in users.get(name, ())] if forward else list(producer[name].inputs)
            for other in near:
                if other in seen or other not in producer:
                    continue
                seen.add(other)
                if kind(other) in PRODUCTS:
                    return True
                if kind(other) not in NORMALISERS:
                    stack.append(other)
        return False

    def origin(value: str) -> str:
        """The first value on the way here that has no known rank."""
        while True:
            unknown = [name for name in producer[value].inputs if name in producer and name not in infos]
            if not unknown:
                return value
            value = unknown[0]

    result: list[Node] = []
    for node in nodes:
        unranked = type(node) is Opaque and node.output not in infos and kind(node.output) in ("Softmax", "LogSoftmax")
        if unranked and reaches_product(node.output, False) and reaches_product(node.output, True):
            first = origin(node.output)
            reason = f"the rank of what it normalises is not known: nothing says what shape {first} ({kind(first)}) has"
            node = RefusedAttention(node.output, node.inputs, kind(node.output), reason)
        result.append(node)
    return tuple(result)
