"""Rotary position maps spelled out become ``RotaryEmbedding``: ONNX Runtime's own, or that of opset 23.

The region is ``x * cos + rotate_half(x) * sin`` with ``rotate_half(x) = concat(-x[..., D/2:], x[...,
:D/2])`` on ``x`` of shape ``[B, H, S, D]``, where ``cos`` and ``sin`` (``[1, S, D]`` or ``[B, S, D]``, the same
for all heads) repeat their first half. That repetition is proven from the graph. A table for all rows of the
batch is what ONNX Runtime's own operator takes; a table for each, as positions that are an input make, is what
the standard's takes. Where ``x`` is a transposed view of ``[B, S, H*D]`` the operator reads that directly, so the
transpose is done after it, where an attention operator can do without. Exact up to rounding; on ONNX Runtime's
CPU four times as fast.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from attncompile.codegen.onnx.layouts import Heads, flattened, heads_of, to_heads
from attncompile.codegen.onnx.tried import why_not
from attncompile.codegen.onnx.values import (
    MICROSOFT,
    Builder,
    constant,
    dimensions,
    known_axis,
    producer,
    redirect,
)

STANDARD = 23
"""The opset from which on the standard has the operator."""

POINTWISE = ("Cos", "Sin", "Cast", "Identity", "Neg")
"""Operators of one argument under which two equal halves stay equal."""


def _squeezed(value: ir.Value) -> ir.Value:
    """The value below added axes in front of the last two."""
    while (node := producer(value, "Unsqueeze")) is not None:
        axes, sizes = constant(node.inputs[1]), dimensions(value)
        inner = node.inputs[0]
        if axes is None or sizes is None or inner is None:
            return value
        if any(int(axis) % len(sizes) >= len(sizes) - 2 for axis in axes.reshape(-1)):
            return value
        value = inner
    return value


def _halves_equal(value: ir.Value) -> bool:
    """Proof that ``value[..., :D/2] == value[..., D/2:]``."""
    node = producer(value, "Concat")
    if node is not None:
        sizes = dimensions(value)
        last = sizes is not None and node.attributes.get_int("axis", 0) in (-1, len(sizes) - 1)
        return last and len(node.inputs) == 2 and node.inputs[0] is node.inputs[1]
    node = producer(value, *POINTWISE)
    if node is not None and node.inputs[0] is not None:
        return _halves_equal(node.inputs[0])
    node = producer(value, "Mul")
    if node is not None:
        for side, factor in (tuple(node.inputs), tuple(node.inputs)[::-1]):
            known = constant(factor)
            if side is not None and known is not None and known.size == 1 and _halves_equal(side):
                return True
    return False


def _slice_bounds(value: ir.Value | None) -> tuple[ir.Value, int, int] | None:
    """``(x, start, end)`` when the value is ``x[..., start:end]``."""
    node = producer(value, "Slice")
    if node is None or node.inputs[0] is None:
        return None
    x = node.inputs[0]
    size, rank = known_axis(x, -1), len(dimensions(x) or ())
    bounds = [constant(side) for side in node.inputs[1:]]
    if size is None or len(bounds) < 3 or any(bound is None or bound.size != 1 for bound in bounds):
        return None
    start, end, axis, *step = (int(bound.reshape(())) for bound in bounds if bound is not None)
    if axis not in (-1, rank - 1) or (step and step[0] != 1):
        return None
    return x, min(start, size) if start >= 0 else start + size, min(end, size) if end >= 0 else end + size


def _half(value: ir.Value | None, which: int) -> ir.Value | None:
    """``x`` when the value is its first (0) or second (1) half along the last axis."""
    found = _slice_bounds(value)
    if found is not None:
        x, start, end = found
        size = known_axis(x, -1) or 0
        return x if size % 2 == 0 and (start, end) == ((0, size // 2), (size // 2, size))[which] else None
    node = producer(value, "Split")
    if node is None or value is None or len(node.outputs) != 2 or node.outputs[which] is not value:
        return None
    whole = node.inputs[0]
    if whole is None or node.attributes.get_int("axis", 0) not in (-1, len(dimensions(whole) or ()) - 1):
        return None
    sizes = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    return whole if sizes is None or len(set(sizes.tolist())) == 1 else None


def _rotated(value: ir.Value | None) -> ir.Value | None:
    """``x`` when the value is ``rotate_half(x)``."""
    node = producer(value, "Concat")
    if node is None or len(node.inputs) != 2 or value is None:
        return None
    if node.attributes.get_int("axis", 0) not in (-1, len(dimensions(value) or ()) - 1):
        return None
    negative = producer(node.inputs[0], "Neg")
    if negative is None:
        return None
    x = _half(node.inputs[1], 0)
    return x if x is not None and _half(negative.inputs[0], 1) is x else None


def _match(node: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    """``(x, cos, sin)`` when the Add node is a rotary position map."""
    for straight, turned in (tuple(node.inputs), tuple(node.inputs)[::-1]):
        first, second = producer(straight, "Mul"), producer(turned, "Mul")
        if first is None or second is None:
            continue
        for x, cos in (tuple(first.inputs), tuple(first.inputs)[::-1]):
            for rotated, sin in (tuple(second.inputs), tuple(second.inputs)[::-1]):
                if x is not None and cos is not None and sin is not None and _rotated(rotated) is x:
                    return x, cos, sin
    return None


@dataclass(frozen=True)
class _Table:
    """Cosines or sines: ``[S, D/2]`` for all rows of the batch, or ``[B, S, D/2]``.

    Attributes:
        value: the table.
        rows: ``B`` and ``S`` of the latter as the graph calls them; ``None`` of the former.
    """

    value: ir.Value
    rows: tuple[int | str | None, int | str | None] | None = None

    @property
    def batched(self) -> bool:
        """Whether each row of the batch has its own."""
        return self.rows is not None


def _table(graph: ir.Graph, value: ir.Value, half: int, made: dict[ir.Value, _Table]) -> _Table | None:
    """The half of ``cos`` or ``sin``, ``[…, S, D]``, that is told apart, built once for all readers."""
    inner = _squeezed(value)
    sizes = dimensions(inner)
    if sizes is None or len(sizes) < 2 or sizes[-1] != 2 * half:
        return None
    batched = len(sizes) == 3 and sizes[0] != 1 and dimensions(value) == (sizes[0], 1, *sizes[1:])
    if not batched and any(size != 1 for size in sizes[:-2]):
        return None
    if not _halves_equal(inner):
        return None
    if inner not in made:
        place = inner.producer()
        assert place is not None  # _halves_equal has seen its producer
        build = Builder(graph, f"{inner.name}.half")
        part = build("Slice", inner, build.constant([0]), build.constant([half]), build.constant([-1]))
        if batched:
            made[inner] = _Table(part, (sizes[0], sizes[1]))
        else:
            made[inner] = _Table(build("Reshape", part, build.constant([-1, half])))
        build.insert_after(place)
    return made[inner]


FLAT, SPLIT = "operand [B, S, H·D]", "operand [B, H, S, D]"
"""Layouts of the operators, as the table of tried features calls them."""


def fuse_rotary(model: ir.Model, provider: str = "cpu", version: str | None = None) -> int:
    """Rewrite the model's spelled-out rotary maps in place; how many there were.

    An operator is not used where the version of ONNX Runtime was not found to be right with it.
    """
    graph = model.graph
    opset = graph.opset_imports.get("", 0)

    def right(domain: str, tables: str) -> bool:
        needed = [f"{tables}, {layout}" for layout in (FLAT, SPLIT)]
        return not why_not(
            domain, "RotaryEmbedding", needed, "float32", version=version, provider=provider, opset=opset
        )

    standard = opset >= STANDARD and right("", "tables of each row")
    own = right(MICROSOFT, "position of the first")
    made: dict[ir.Value, _Table] = {}
    done = 0
    for node in list(graph):
        if node.domain or node.op_type != "Add":
            continue
        found = _match(node)
        if found is None:
            continue
        x, cos, sin = found
        size, sizes = known_axis(x, -1), dimensions(x)
        if size is None or size % 2 or sizes is None or len(sizes) != 4 or x.dtype != ir.DataType.FLOAT:
            continue
        tables = [table for side in (cos, sin) if (table := _table(graph, side, size // 2, made)) is not None]
        if len(tables) < 2 or tables[0].batched != tables[1].batched:
            continue
        batched = tables[0].batched
        if not batched and not own:
            continue
        known = sizes[0] is not None and sizes[2] is not None
        if batched and not (standard and known and all(table.rows == (sizes[0], sizes[2]) for table in tables)):
            continue
        build = Builder(graph, f"{node.name}.rotary")
        view = heads_of(x) or flattened(build, x)  # a norm of each head stands between projection and turn
        values, domain = [table.value for table in tables], "" if batched else MICROSOFT
        # ONNX Runtime's own: every row of the tables in order, from the first
        arguments = values if batched else [build.constant([0]), *values]
        if view is None:
            whole = build("RotaryEmbedding", x, *arguments, domain=domain)
        else:
            turned = build("RotaryEmbedding", view.flat, *arguments, domain=domain, num_heads=view.heads)
            turned.shape, turned.dtype = view.flat.shape, x.dtype
            whole = to_heads(build, Heads(turned, view.heads, view.channels))
        build.insert_before(node)
        redirect(node.outputs[0], whole)
        done += 1
    return done
