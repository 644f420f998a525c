"""Operators over a cache: past keys and values go in, all of them come out.

``com.microsoft.MultiHeadAttention`` is the simple one. It takes new keys ``[B, I, H·D]`` beside past ones ``[B, H, P,
D]``, gives the concatenation as further results, is causal with the last query at the last key where it is told so, and
takes any other mask as a bias: for all numbers of rows, queries and cached keys (ONNX Runtime 1.31).

``com.microsoft.GroupQueryAttention`` has heads that share keys.

Its kernel takes new keys ``[B, I, G·D]`` beside past ones ``[B, G, P, D]``, is causal with the last query at
the last key, and gives the concatenation as further results (``seqlens_k`` is the number of keys less one). What it
cannot do was tried on ONNX Runtime's CPU (1.31, 1.32): keys that are hidden for another reason than causality take a
bias over the whole map, and several rows of several queries behind a past are refused. It is also slow where few
queries meet a cache: it reads the keys once for each query head, where the decomposition folds the heads that share
them into one product. An ``If`` therefore holds it beside the decomposition, which gets every call that has padding,
such rows, or few queries; both give the same results. The condition is computed once for a model.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Hashable
from dataclasses import dataclass, replace

import onnx_ir as ir

from attncompile.codegen.onnx.attend import (
    Made,
    Place,
    additive_mask,
    arranged,
    decomposition,
    equal_channels,
    extent,
    group_query_attributes,
    multi_head,
    multi_head_attention,
    result,
    sink_of_heads,
    writer_of,
)
from attncompile.codegen.onnx.deferred import deferred, known_behind
from attncompile.codegen.onnx.expressions import Writer
from attncompile.codegen.onnx.layouts import Operand, arrange, flat_groups, single_groups
from attncompile.codegen.onnx.reading import CausalMask, group_query_form, scaled
from attncompile.codegen.onnx.values import MICROSOFT, NUMPY_TYPES, Builder, dimensions, producer
from attncompile.ir.attend import Attend
from attncompile.ir.expr import TRUE, Expr
from attncompile.ir.refusal import RefusalError
from attncompile.ir.rows import extents
from attncompile.ir.simplify import simplify

CONCATENATED = "attncompile.concatenated"
"""In the ``meta`` of a node: the values of the graph that its second and third result are equal to."""


@dataclass(frozen=True)
class Cached:
    """Keys or values in two parts.

    Attributes:
        past, new: ``[B, G, P, D]`` and ``[B, G, I, D]``.
        whole: ``[B, G, P + I, D]``, where the graph has it as their concatenation already.
    """

    past: ir.Value
    new: ir.Value
    whole: ir.Value | None


def cached_group_query(attend: Attend, causal: CausalMask, place: Place, least: int = 1) -> Made:
    """The operator where it is exact, else the decomposition, picked at run time by an ``If`` node.

    Args:
        attend: what to compute; causal: its mask, as the operator splits it.
        place: where to write it.
        least: queries from which on the operator is taken.
    """
    writer, build, sizes = writer_of(attend, place), place.build, extents(attend, place.types)
    split = {name: parts_of_cache(attend, name, writer, place) for name in (attend.key, attend.value)}
    query = arranged(writer, place, attend.query, flat_groups)
    new = [flat_keys(writer, place, name, split[name].new, sizes["i"]) for name in (attend.key, attend.value)]
    past = [split[name].past for name in (attend.key, attend.value)]
    exact = _exact(writer, causal.rest, sizes, split[attend.key], place, least)
    form = group_query_form(attend)
    assert form is not None  # the capability row has looked
    bias = additive_mask(writer, TRUE, 0.0, form.bias, square=True)
    sink = sink_of_heads(attend, place, writer)
    last, total = lengths(writer, key_count(writer, sizes, split[attend.key], place), writer.size(sizes["b"]))

    fused = Builder(build.graph, "fused")
    found = fused(
        "GroupQueryAttention",
        query,
        *new,
        *past,
        last,
        total,
        None,
        None,
        None,
        bias,
        sink,
        domain=MICROSOFT,
        outputs=3,
        **group_query_attributes(attend, place, form, causal),
    )
    graphs = [_graph(build, fused, found, "fused", place, attend), _plain(attend, place, split, exact)]
    out, *present = build("If", exact, outputs=3, then_branch=graphs[0], else_branch=graphs[1])
    wholes = [split[name].whole for name in (attend.key, attend.value)]
    build.nodes[-1].meta[CONCATENATED] = tuple(wholes)
    for value, whole in zip(present, wholes, strict=True):
        value.dtype = NUMPY_TYPES[place.types[attend.key].dtype]
        value.shape = whole.shape if whole is not None else None
    axes = tuple(axis.name for axis in place.types[attend.out].axes)
    return result(place, attend.out, out, flat_groups(axes), attend.query)


def cached_multi_head(attend: Attend, causal: CausalMask, place: Place) -> Made:
    """``MultiHeadAttention`` on past and new keys; on all of them, where the graph does not have them apart.

    Args:
        attend: what to compute; causal: its mask, split; place: where to write it.
    """
    sides = (attend.key, attend.value)
    joins = [concatenated(attend, name, place) for name in sides]
    split = [join for join in joins if join is not None]
    if len(split) < len(joins) or not equal_channels(attend, place):
        return multi_head_attention(attend, place)
    writer, score = writer_of(attend, place), scaled(attend)
    assert score is not None  # the capability row has looked
    count = extents(attend, place.types)["i"]
    new = [flat_keys(writer, place, name, parts.new, count) for name, parts in zip(sides, split, strict=True)]
    alone = causal.window is None and simplify(causal.rest) == TRUE and score.bias is None
    query = arranged(writer, place, attend.query, flat_groups)
    past = [parts.past for parts in split]
    made, node = multi_head(attend, place, writer, [query, *new], past, causal=alone)
    node.meta[CONCATENATED] = tuple(parts.whole for parts in split)
    for value, parts in zip(node.outputs[1:], split, strict=True):
        value.dtype = NUMPY_TYPES[place.types[attend.key].dtype]
        value.shape = parts.whole.shape if parts.whole is not None else None
    return made


def parts_of_cache(attend: Attend, name: str, writer: Writer, place: Place) -> Cached:
    """What was cached and what is new: as the graph has them, or cut where as many are new as there are queries."""
    found = concatenated(attend, name, place)
    if found is not None:
        return found
    build = place.build
    whole = arranged(writer, place, name, single_groups)
    count, keys = writer.size(writer.extents["i"]), writer.size(writer.extents["j"])
    first = build("Max", build("Sub", keys, count), build.constant([0]))
    cut = [build.constant([axis]) for axis in (0, 2)]
    parts = Cached(build("Slice", whole, cut[0], first, cut[1]), build("Slice", whole, first, keys, cut[1]), None)
    for part in (parts.past, parts.new):
        part.dtype = NUMPY_TYPES[place.types[name].dtype]
    return parts


def concatenated(attend: Attend, name: str, place: Place) -> Cached | None:
    """Keys or values that the graph concatenates of cached ones and as many new ones as there are queries."""
    operand = place.operands[name]
    axes = tuple(axis.name for axis in place.types[name].axes)
    node = producer(operand.value, "Concat")
    if node is None or operand.groups != single_groups(axes) or len(node.inputs) != 2:
        return None
    past, new = node.inputs
    if past is None or new is None or node.attributes.get_int("axis", 0) not in (2, -2):
        return None
    rows, position = dimensions(new), place.types[attend.query].axes[2].name
    asked = _dimension(place.operands[attend.query], position)
    return Cached(past, new, operand.value) if rows is not None and rows[2] is not None and rows[2] == asked else None


def _dimension(operand: Operand, axis: str) -> int | str | None:
    """What the graph says of the size of one axis of a tensor."""
    found = operand.behind_turn()
    sizes = dimensions(found.value)
    places = [place for place, group in enumerate(found.groups) if group == (axis,)]
    return sizes[places[0]] if sizes is not None and places else None


def flat_keys(writer: Writer, place: Place, name: str, new: ir.Value, count: Expr) -> ir.Value:
    """The new keys or values as ``[B, I, G·D]``."""
    kind = place.types[name]
    axes = tuple(axis.name for axis in kind.axes)
    lengths = {axis.name: extent(writer, axis.size) for axis in kind.axes} | {axes[2]: extent(writer, count)}
    return arrange(place.build, Operand(new, single_groups(axes)), flat_groups(axes), lengths)


def key_count(writer: Writer, sizes: dict[str, Expr], parts: Cached, place: Place) -> ir.Value:
    """The number of keys, int64 ``[1]``, without a look at their concatenation, which nobody else may need."""
    if parts.whole is None:
        return writer.size(sizes["j"])
    try:
        lean = {name: operand for name, operand in place.operands.items() if operand.value is not parts.whole}
        return replace(writer, operands=lean).size(sizes["j"])
    except RefusalError:
        build = place.build
        return writer.once(
            ("keys of", parts.past.name, parts.new.name),
            lambda: build("Add", *(build("Shape", part, start=2, end=3) for part in (parts.past, parts.new))),
        )


def lengths(writer: Writer, keys: ir.Value, rows: ir.Value) -> tuple[ir.Value, ir.Value]:
    """``seqlens_k``, the last key of every row, int32 ``[B]``, and the number of keys, an int32 scalar.

    Args:
        writer: writes them; keys, rows: how many there are, int64 ``[1]``.
    """
    build = writer.build
    total = writer.once(("int32", keys.name), lambda: build("Cast", keys, to=int(ir.DataType.INT32)))
    last = writer.once(
        ("last keys", keys.name, rows.name),
        lambda: build("Expand", build("Sub", total, build.constant(1, "int32")), rows),
    )
    scalar = writer.once(("int32 scalar", keys.name), lambda: build("Squeeze", total, build.constant([0])))
    return last, scalar


def _exact(writer: Writer, rest: Expr, sizes: dict[str, Expr], parts: Cached, place: Place, least: int) -> ir.Value:
    """Whether the operator gets this call: a truth value, for all sites with one mask."""
    build, rest = place.build, simplify(rest)
    keys, one = key_count(writer, sizes, parts, place), build.constant([1])

    def make() -> ir.Value:
        rows, queries = writer.size(sizes["b"]), writer.size(sizes["i"])
        single = build("Or", build("LessOrEqual", rows, one), build("LessOrEqual", queries, one))
        whole = build("Or", single, build("Equal", queries, keys))
        if parts.whole is None:
            whole = build("And", whole, build("LessOrEqual", queries, keys))
        if least > 1:
            whole = build("And", whole, build("GreaterOrEqual", queries, build.constant([least])))
        whole = build("Squeeze", whole, build.constant([0]))
        if rest == TRUE:
            return whole
        seen = build("ReduceMin", build("Cast", writer.write(rest), to=int(ir.DataType.INT32)), keepdims=0)
        return build("And", whole, build("Cast", seen, to=int(ir.DataType.BOOL)))

    meaning = (writer.key(rest), writer.key(sizes["b"]), writer.key(sizes["i"]), keys.name, parts.whole is None)
    return writer.once(("exact over a cache", least, *meaning), make)


def _plain(attend: Attend, place: Place, split: dict[str, Cached], exact: ir.Value) -> ir.Graph:
    """The decomposition as a graph of its own, with the concatenations as further results.

    What it needs of the mask is made once for all sites (:func:`attncompile.codegen.onnx.deferred.deferred`).
    """
    inner = Builder(place.build.graph, "plain")
    operands = dict(place.operands)
    present = []
    for name, parts in split.items():
        whole = inner("Concat", parts.past, parts.new, axis=2)
        whole.dtype = NUMPY_TYPES[place.types[name].dtype]
        present.append(whole)
        operands[name] = Operand(whole, single_groups(axis.name for axis in place.types[name].axes))
    # what is built outside may be read here, and what is built here stays here, or is for other such graphs
    own: dict[Hashable, ir.Value] = {}
    here = Place(inner, place.types, operands, ChainMap(own, known_behind(exact, place.shared), place.shared))
    made = decomposition(attend, here)
    here = replace(here, operands={**operands, **made})
    out = arranged(writer_of(attend, here), here, attend.out, flat_groups)
    place.shared.update(deferred(place.build, inner, own, exact))
    return _graph(place.build, inner, (out, *present), "plain", place, attend)


def _graph(
    build: Builder, inner: Builder, outputs: tuple[ir.Value, ...], name: str, place: Place, attend: Attend
) -> ir.Graph:
    for node in inner.nodes:
        for output in node.outputs:
            output.shape = None  # the two branches know their shapes in different words
    for output in outputs:
        output.dtype = NUMPY_TYPES[place.types[attend.out].dtype]
    return ir.Graph([], list(outputs), nodes=inner.nodes, name=build.fresh(name))


def hand_over(model: ir.Model) -> int:
    """Let the graph's outputs that are a concatenation of cached and new keys, or values, be the operator's; how many.

    The concatenation itself then goes, where nobody else reads it.
    """
    done = 0
    for node in model.graph:
        for whole, present in zip(node.meta.get(CONCATENATED, ()), node.outputs[1:], strict=False):
            if whole is None or not whole.is_graph_output():
                continue
            for place, output in enumerate(model.graph.outputs):
                if output is whole:
                    model.graph.outputs[place] = present
            whole.name, present.name = f"{whole.name}.before", whole.name
            done += 1
    return done


__all__ = [
    "CONCATENATED",
    "Cached",
    "cached_group_query",
    "cached_multi_head",
    "concatenated",
    "flat_keys",
    "hand_over",
    "key_count",
    "lengths",
    "parts_of_cache",
]
