"""The statement of a native call of linear attention: its operands are what the call is given."""

from __future__ import annotations

from attncompile.frontends.graph import FusedScan, Graph
from attncompile.ir import Index, Scan, Spec, Value, simplify
from attncompile.ir.attend import grouped
from attncompile.ir.expr import ONE
from attncompile.lift.naming import Naming
from attncompile.lift.program import Binding, Layout, Region, Site


def scan_site(graph: Graph, node: FusedScan) -> Site:
    """The site of one call. Nothing of it is inside: both results are the call's, and both are replaced."""
    native = graph.describe(node.output)
    name = native.module or native.name
    batch, heads, groups, steps, channels, wide = node.sizes
    naming = Naming(graph, [("B", batch), ("I", steps)], {"b": batch, "h": heads, "j": steps})
    sizes = {"b": batch, "h": heads, "g": groups, "i": steps, "j": steps, "d": channels, "e": wide}
    packed = Layout((("b",), ("i",), ("h", "d")))
    keys = Layout((("b",), ("j",), ("g", "d")))
    values = Layout((("b",), ("j",), ("g", "e")))
    each = Layout((("b",), ("j",), ("g",)))
    given = [
        ("q", "bhid", node.query, packed),
        ("k", "bgjd", node.key, keys),
        ("v", "bgje", node.value, values),
        ("gate", "bgjd", node.gate, keys),
        ("rate", "bgj", node.rate, Layout((("b",), ("j",), ())) if node.one_rate else each),
        ("past", "bgde", node.past, Layout((("b",), ("g",), ("d",), ("e",)))),
    ]
    operands: list[tuple[Value, Binding]] = []
    for operand, letters, native_value, layout in given:
        if native_value is None:
            continue
        own = {**sizes, "d": ONE} if operand == "gate" and node.gate_by_head else sizes
        kind = naming.type(letters, [own[letter] for letter in letters], native_value)
        operands.append((Value(operand, kind), Binding(operand, native_value, layout)))
    outputs = [Binding("out", node.output, Layout((("b",), ("i",), ("h", "e"))))]
    if node.state:
        outputs.append(Binding("state", node.state, Layout((("b",), ("g",), ("d",), ("e",)))))
    scan = Scan(
        "q",
        "k",
        "v",
        scale=node.scale,
        kv_head=Index("h") if heads == groups else simplify(grouped(heads, groups), {"h": heads}),
        gate="gate" if node.gate is not None else "",
        rate="rate" if node.rate is not None else "",
        past="past" if node.past is not None else "",
        state="state" if node.state else "",
    )
    spec = Spec(name, tuple(value for value, _ in operands), (scan,), tuple(binding.name for binding in outputs))
    region = Region(
        tuple(binding for _, binding in operands), tuple(outputs), (graph.owner.get(node.output, node.output),)
    )
    return Site(name, "lifted", spec.verify(), None, native.source, (), region, None, native.name)


__all__ = ["scan_site"]
