"""``GroupQueryAttention`` on a buffer that is past and present at once.

A graph with such a buffer ``[B, G, C, D]`` slices off the ``P`` cached positions, puts the new ones behind them,
attends to both, and gives the buffer with the new ones in it as a result: four copies of a cache. The operator takes
the buffer as it is, with the number of keys, and gives it back with ``I`` positions written; where a runtime has bound
one piece of memory to both, nothing else moves. There is no other form beside it, and no ``If``: it is for calls that
it computes, one row, one query or an empty cache (ONNX Runtime 1.22 to 1.32 refuse others), under a mask that is causal
and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from attncompile.codegen.onnx.attend import (
    Made,
    Place,
    additive_mask,
    arranged,
    group_query_attributes,
    result,
    sink_of_heads,
    writer_of,
)
from attncompile.codegen.onnx.cached import (
    CONCATENATED,
    Cached,
    concatenated,
    flat_keys,
    key_count,
    lengths,
    parts_of_cache,
)
from attncompile.codegen.onnx.layouts import flat_groups
from attncompile.codegen.onnx.reading import CausalMask, group_query_form
from attncompile.codegen.onnx.values import MICROSOFT, NUMPY_TYPES, constant, dimensions, producer
from attncompile.ir.attend import Attend
from attncompile.ir.expr import TRUE
from attncompile.ir.rows import extents

IN_PLACE = "attncompile.in_place"
"""In the ``meta`` of a node that was written here: a :class:`Counted`, or ``None`` where the graph has no buffer."""


@dataclass(frozen=True)
class Buffer:
    """Keys or values in one buffer.

    Attributes:
        before: the buffer that goes in, ``[B, G, C, D]``.
        keys: how many keys there are with the new ones, int64 ``[1]``.
        after: the graph's own form of the buffer with the new ones behind them, a result of the graph.
    """

    before: ir.Value
    keys: ir.Value
    after: ir.Value


@dataclass(frozen=True)
class Counted:
    """What the operator counts positions by.

    Attributes:
        keys: how many keys there are with the new ones; new: the new keys ``[B, G, I, D]``, before any layout.
    """

    keys: ir.Value
    new: ir.Value


def group_query_in_place(attend: Attend, causal: CausalMask, place: Place) -> Made:
    """The operator on the buffer; on past and new keys where the graph has no buffer for both, as in a site alone.

    Args:
        attend: what to compute; causal: its mask, split; place: where to write it.
    """
    writer, build, sizes = writer_of(attend, place), place.build, extents(attend, place.types)
    sides = (attend.key, attend.value)
    split = {name: parts_of_cache(attend, name, writer, place) for name in sides}
    buffers = [_buffer(concatenated(attend, name, place)) for name in sides]
    held = [buffer for buffer in buffers if buffer is not None] if None not in buffers else []
    if held:  # sizes are read off the buffer: a look at an operand would keep its layout alive
        keys = held[0].keys
        meaning = ("rows of buffers", writer.key(sizes["b"]))
        rows = writer.once(meaning, lambda: build("Shape", held[0].before, start=0, end=1))
    else:
        keys, rows = key_count(writer, sizes, split[attend.key], place), writer.size(sizes["b"])
    form = group_query_form(attend)
    assert form is not None  # the capability row has looked
    last, total = lengths(writer, keys, rows)
    out, *present = build(
        "GroupQueryAttention",
        arranged(writer, place, attend.query, flat_groups),
        *(flat_keys(writer, place, name, split[name].new, sizes["i"]) for name in sides),
        *([buffer.before for buffer in held] or [split[name].past for name in sides]),
        last,
        total,
        None,
        None,
        None,
        additive_mask(writer, TRUE, 0.0, form.bias, square=True),
        sink_of_heads(attend, place, writer),
        domain=MICROSOFT,
        outputs=3,
        **group_query_attributes(attend, place, form, causal),
    )
    known: list[ir.Value | None] = [buffer.after for buffer in held]
    known = known or [split[name].whole for name in sides]
    build.nodes[-1].meta[CONCATENATED] = tuple(known)
    build.nodes[-1].meta[IN_PLACE] = Counted(held[0].keys, split[attend.key].new) if held else None
    for value, same in zip(present, known, strict=True):
        value.dtype = NUMPY_TYPES[place.types[attend.key].dtype]
        value.shape = same.shape if same is not None else None
    axes = tuple(axis.name for axis in place.types[attend.out].axes)
    return result(place, attend.out, out, flat_groups(axes), attend.query)


def _buffer(joined: Cached | None) -> Buffer | None:
    """The buffer of keys or values that the graph concatenates of the first positions of one, and new ones."""
    if joined is None or joined.whole is None:
        return None
    found = _sliced(joined.past)
    if found is None:
        return None
    before, start = found
    known, sizes = constant(start), dimensions(before)
    if known is None or known.reshape(-1).tolist() != [0] or sizes is None:
        return None
    for use in joined.whole.uses():
        node, after = use.node, use.node.outputs[0]
        if producer(after, "Concat") is not node or len(node.inputs) != 2 or use.idx or not after.is_graph_output():
            continue
        rest = _sliced(node.inputs[1]) if node.attributes.get_int("axis", 0) in (2, -2) else None
        # the rest is a part of the same buffer, and fills it up to its size: it begins where the keys end
        if rest is not None and rest[0] is before and dimensions(after) == sizes and None not in sizes:
            return Buffer(before, rest[1], after)
    return None


def _sliced(value: ir.Value | None) -> tuple[ir.Value, ir.Value] | None:
    """``(x, start)`` of ``x[:, :, start:end]``."""
    node = producer(value, "Slice")
    if node is None or len(node.inputs) < 4:
        return None
    data, start, _, axes, *steps = node.inputs
    along = constant(axes)
    if data is None or start is None or along is None or along.reshape(-1).tolist() not in ([2], [-2]):
        return None
    step = constant(steps[0]) if steps and steps[0] is not None else None
    if steps and steps[0] is not None and (step is None or step.reshape(-1).tolist() != [1]):
        return None
    return data, start


__all__ = ["IN_PLACE", "Counted", "group_query_in_place"]
