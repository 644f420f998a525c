"""One Attend as ONNX nodes: the plain decomposition, and the fused operators of ONNX Runtime.

A builder trusts its capability row (:mod:`attncompile.codegen.onnx.capabilities`), which has said that the
operator computes this Attend exactly. What the operators were measured to do with a query that sees no key
(1.31, CPU): ``Attention`` and ``GroupQueryAttention`` give zero where every logit is -inf or the lowest
float, and otherwise the plain softmax; ``MultiHeadAttention`` always gives the plain softmax (NaN for
-inf).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir

from attncompile.codegen.onnx.expressions import Shared, Writer, reads_score
from attncompile.codegen.onnx.layouts import (
    Groups,
    Operand,
    arrange,
    flat_groups,
    known_dimensions,
    single_groups,
    state_shape,
)
from attncompile.codegen.onnx.reading import (
    MASKED,
    CausalMask,
    GroupQueryForm,
    additive_fill,
    causal_mask,
    fixed,
    group_query_form,
    group_size,
    may_be_infinite,
    scaled,
)
from attncompile.codegen.onnx.values import MICROSOFT, NUMPY_TYPES, Builder
from attncompile.ir.affine import affine
from attncompile.ir.attend import DIVIDING, NO_SINK, Attend
from attncompile.ir.expr import TRUE, WEIGHT, Const, Expr
from attncompile.ir.operation import Types
from attncompile.ir.refusal import Refusal, RefusalError
from attncompile.ir.rows import extents, never_empty
from attncompile.ir.simplify import simplify

Made = dict[str, Operand]
"""Results of an operation by name, each with its layout."""

AXES = ("b", "h", "i", "j")


@dataclass(frozen=True)
class Place:
    """Where an operation is written.

    Attributes:
        build: collects the nodes.
        types: types of all tensors of the Spec.
        operands: the graph's tensors by Spec name, results of earlier operations too.
        shared: nodes that serve the whole model.
    """

    build: Builder
    types: Types
    operands: dict[str, Operand]
    shared: Shared


def writer_of(attend: Attend, place: Place) -> Writer:
    """Writes expressions over the attention map."""
    dtype = place.types[attend.query].dtype
    sizes = extents(attend, place.types)
    return Writer(
        place.build,
        place.types,
        place.operands,
        AXES,
        {name: sizes[name] for name in AXES},
        dtype,
        place.shared,
    )


def arranged(writer: Writer, place: Place, name: str, wanted: Callable[[tuple[str, ...]], Groups]) -> ir.Value:
    """A tensor of the Spec in the layout ``wanted`` makes of its axis names.

    Axes that the graph's tensor lacks, because it is the same for all heads, say, are repeated.
    """
    build, operand, kind = place.build, place.operands[name], place.types[name]
    axes = tuple(axis.name for axis in kind.axes)
    sizes = {axis.name: extent(writer, axis.size) for axis in kind.axes}
    held = {axis for group in operand.groups for axis in group}
    lacking = [n for n, axis in enumerate(axes) if axis not in held]
    if lacking:
        present = single_groups(axis for axis in axes if axis in held)
        value = build("Unsqueeze", arrange(build, operand, present, sizes), build.constant(lacking))
        if any(sizes[axes[n]] != 1 for n in lacking):
            one = build.constant([1])
            lengths = [writer.size(axis.size) if n in lacking else one for n, axis in enumerate(kind.axes)]
            value = build("Expand", value, build("Concat", *lengths, axis=0))
        operand = Operand(value, single_groups(axes))
    return arrange(build, operand, wanted(axes), sizes)


def result(place: Place, name: str, value: ir.Value, groups: Groups, *sources: str) -> Made:
    """A result in the given layout, with what the sources tell of its shape written on it."""
    kind = place.types[name]
    wanted = {axis.name: axis.size for axis in kind.axes}
    sizes = {axis: number for axis, size in wanted.items() if (number := fixed(size)) is not None}
    known: dict[str, int | str | None] = dict(sizes)
    for source in sources:
        extents_of = {axis.name: axis.size for axis in place.types[source].axes}
        for axis, size in known_dimensions([place.operands[source].behind_turn()], {}).items():
            if axis in wanted and known.get(axis) is None and extents_of.get(axis) == wanted[axis]:
                known[axis] = size
    state_shape(value, groups, known, NUMPY_TYPES[kind.dtype])
    return {name: Operand(value, groups)}


def extent(writer: Writer, size: Expr) -> int | Callable[[], ir.Value]:
    """A size as a number, or as what makes it an int64 tensor ``[1]``."""
    number = fixed(size)
    return number if number is not None else lambda: writer.size(size)


def head_count(place: Place, name: str) -> int:
    """Number of heads of a ``[b,h,...]`` tensor.

    Raises:
        ValueError: when it is not a fixed number; a capability row refuses that first.
    """
    number = fixed(place.types[name].sizes[1])
    if number is None:
        raise ValueError(f"{name} has a variable number of heads, {place.types[name].sizes[1]}")
    return number


# The mask as a tensor


def additive_mask(
    writer: Writer, mask: Expr, low: float, bias: Expr | None = None, *, square: bool = False
) -> ir.Value | None:
    """``bias + where(mask, 0, low)``, or ``None`` when there is neither; one value for all sites that agree.

    Args:
        square: expand it over queries and keys, which the fused operators demand.
    """
    if mask == TRUE and bias is None:
        return None

    def make() -> ir.Value:
        build = writer.build
        whole: ir.Value | None = writer.write(bias) if bias is not None else None
        if mask != TRUE:
            zero, lowest = build.constant(0.0, writer.dtype), build.constant(low, writer.dtype)
            masked = build("Where", writer.write(mask), zero, lowest)
            whole = masked if whole is None else build("Add", whole, masked)
        assert whole is not None  # one of the two is there
        return _expanded(writer, whole, mask, bias) if square else whole

    meaning = (writer.key(mask), repr(low), writer.key(bias) if bias is not None else None, writer.dtype)
    return writer.once(("additive mask", _map_size(writer) if square else None, *meaning), make)


def _map_size(writer: Writer) -> tuple[Hashable, Hashable]:
    """The meaning of the numbers of queries and keys: sites that agree in all else may differ in them."""
    return writer.key(writer.extents["i"]), writer.key(writer.extents["j"])


def _expanded(writer: Writer, value: ir.Value, *parts: Expr | None) -> ir.Value:
    """The value over all queries and keys, when its parts leave one of them out."""
    axes = frozenset[str]().union(*(writer.visible_axes(part) for part in parts if part is not None))
    if {"i", "j"} <= axes:
        return value
    one = writer.build.constant([1, 1])
    shape = writer.build("Concat", one, writer.size(writer.extents["i"]), writer.size(writer.extents["j"]), axis=0)
    return writer.build("Expand", value, shape)


def boolean_mask(writer: Writer, mask: Expr) -> ir.Value:
    """The mask over all queries and keys as truth values."""
    key = ("boolean mask", _map_size(writer), writer.key(mask))
    return writer.once(key, lambda: _expanded(writer, writer.write(mask), mask))


def _seeing_rows(writer: Writer, mask: Expr) -> ir.Value:
    """``[b,h,i,1]``: 1 for a query that sees a key, 0 for one that sees none."""

    def make() -> ir.Value:
        build = writer.build
        ones = build("Cast", boolean_mask(writer, mask), to=int(ir.DataType.INT32))
        some = build("ReduceMax", ones, build.constant([3]), keepdims=1)
        return build("Cast", some, to=int(NUMPY_TYPES[writer.dtype]))

    return writer.once(("seeing rows", _map_size(writer), writer.key(mask), writer.dtype), make)


def _rows(writer: Writer, mask: Expr, *, seen: bool) -> ir.Value:
    """``[b,i,1]``: 1 for a query that sees a key (``seen``) or for one that sees none, else 0."""

    def make() -> ir.Value:
        build = writer.build
        number = build("Squeeze", _seeing_rows(writer, mask), build.constant([1]))
        return number if seen else build("Sub", build.constant(1.0, writer.dtype), number)

    return writer.once(("rows", seen, _map_size(writer), writer.key(mask), writer.dtype), make)


# The plain decomposition


def decomposition(attend: Attend, place: Place) -> Made:
    """MatMul, score, mask, normaliser, MatMul: says what the Attend says, whatever it is."""
    writer, build = writer_of(attend, place), place.build
    query = arranged(writer, place, attend.query, single_groups)
    key = arranged(writer, place, attend.key, single_groups)
    value = arranged(writer, place, attend.value, single_groups)
    shares = group_size(attend, place.types)
    groups = fixed(place.types[attend.key].sizes[1])
    folded = shares is not None and shares > 1 and groups is not None
    if shares is None:
        heads = _kv_heads(attend, place)
        key, value = (build("Gather", side, build.constant(heads), axis=1) for side in (key, value))
    if folded:
        # query heads that share a KV head become more queries of that head: no key or value is copied
        query = build("Reshape", query, build.constant([0, groups, -1, fixed(place.types[attend.query].sizes[3]) or 0]))
    turned = build("Transpose", key, perm=[0, 1, 3, 2])
    raw = build("MatMul", query, turned)
    logits = _logits(attend, place, writer, raw, (lambda x: _unfold(build, x, attend, place)) if folded else None)
    weights = _weights(attend, writer, logits)
    if folded:
        weights = build("Reshape", weights, build.constant([0, groups, -1, 0]))
    product = build("MatMul", weights, value)
    if folded:
        product = _unfold(build, product, attend, place)
    product = _without_empty_rows(attend, place, writer, logits, product)
    axes = tuple(axis.name for axis in place.types[attend.out].axes)
    made = result(place, attend.out, product, single_groups(axes), attend.query)
    if attend.lse:
        counted = logits if attend.sink == NO_SINK else _with_sink(attend, writer, logits)
        sums = build("ReduceLogSumExp", counted, build.constant([3]), keepdims=0)
        made[attend.lse] = Operand(sums, single_groups(axes[:3]))
    if attend.taps:
        what = f"{', '.join(attend.taps)} of the weights"
        raise RefusalError(Refusal("no-onnx-form", f"{what} have no ONNX form", hint="leave them out of the Spec"))
    return made


def _unfold(build: Builder, value: ir.Value, attend: Attend, place: Place) -> ir.Value:
    return build("Reshape", value, build.constant([0, head_count(place, attend.query), -1, 0]))


def _kv_heads(attend: Attend, place: Place) -> list[int]:
    import torch  # the reference evaluates the head expression; nothing else here needs it

    numbers = attend.kv_heads(head_count(place, attend.query), torch.device("cpu"), {})
    return [int(number) for number in numbers]


def _logits(
    attend: Attend,
    place: Place,
    writer: Writer,
    raw: ir.Value,
    unfold: Callable[[ir.Value], ir.Value] | None,
) -> ir.Value:
    """The normaliser's argument ``[b,h,i,j]``."""
    build, mask = place.build, simplify(attend.mask)
    score, low = scaled(attend), additive_fill(attend)
    if score is not None:
        product = raw
        if score.scale != 1.0:
            # next to the MatMul, where ONNX Runtime folds it into the product
            product = build("Mul", raw, build.constant(score.scale, writer.dtype))
        if unfold is not None:
            product = unfold(product)
        if low is not None and not reads_score(mask):
            fill = MASKED if math.isinf(low) and _zero_rows_follow(attend, place) else low
            added = additive_mask(writer, mask, fill, score.bias)
            return product if added is None else build("Add", product, added)
        logits = product if score.bias is None else build("Add", product, writer.write(score.bias))
        writer = replace(writer, score=unfold(raw) if unfold is not None and reads_score(attend.fill) else raw)
    else:
        writer = replace(writer, score=unfold(raw) if unfold is not None else raw)
        logits = writer.write(simplify(attend.score))
    if mask == TRUE:
        return logits
    return build("Where", writer.write(mask), logits, writer.write(simplify(attend.fill)))


def _weights(attend: Attend, writer: Writer, logits: ir.Value) -> ir.Value:
    build = writer.build
    if attend.norm.weights:
        raise RefusalError(Refusal("no-onnx-form", f"the normaliser {attend.norm} has no ONNX form"))
    if attend.sink != NO_SINK:
        weights = build("Softmax", _with_sink(attend, writer, logits), axis=-1)
        weights = build("Slice", weights, build.constant([0]), build.constant([-1]), build.constant([3]))
    elif attend.norm.kind == "softmax":
        weights = build("Softmax", logits, axis=-1)
    elif attend.norm.kind in DIVIDING:
        parts = build("Abs", logits) if attend.norm.kind == "l1" else logits
        total = build("ReduceSum", parts, build.constant([3]), keepdims=1)
        weights = build("Div", logits, replace(writer, total=total).write(simplify(attend.divisor)))
    else:
        pointwise = {"sigmoid": "Sigmoid", "relu": "Relu"}.get(attend.norm.kind)
        weights = build(pointwise, logits) if pointwise else logits
    edit = simplify(attend.weight)
    return weights if edit == WEIGHT else replace(writer, weight=weights).write(edit)


def _with_sink(attend: Attend, writer: Writer, logits: ir.Value) -> ir.Value:
    """The logits with the sink as one more column."""
    build = writer.build
    rows = build("Concat", build("Shape", logits, start=0, end=3), build.constant([1]), axis=0)
    return build("Concat", logits, build("Expand", writer.write(simplify(attend.sink)), rows), axis=-1)


def _zero_rows_follow(attend: Attend, place: Place) -> bool:
    """Whether empty rows are made zero after the product, from the mask alone."""
    score = scaled(attend)
    return (
        attend.norm.kind == "softmax"
        and attend.norm.empty == "zero"
        and attend.sink == NO_SINK
        and not attend.lse
        and additive_fill(attend) == -math.inf
        and score is not None
        and not may_be_infinite(score.bias)
        and not never_empty(attend, place.types)
    )


def _without_empty_rows(attend: Attend, place: Place, writer: Writer, logits: ir.Value, product: ir.Value) -> ir.Value:
    """Zero where no key is visible, when the Attend asks for that."""
    build = place.build
    if attend.norm.kind != "softmax" or attend.norm.empty != "zero" or attend.sink != NO_SINK:
        return product
    if _zero_rows_follow(attend, place):
        return build("Mul", product, _seeing_rows(writer, simplify(attend.mask)))
    low = additive_fill(attend)
    finite = low is not None and math.isfinite(low)
    if (finite or never_empty(attend, place.types)) and not may_be_infinite(simplify(attend.score)):
        return product
    added = _infinite_part(attend, writer)
    largest = build("ReduceMax", logits if added is None else added, build.constant([3]), keepdims=1)
    empty = build("Equal", largest, build.constant(-math.inf, writer.dtype))
    return build("Where", empty, build.constant(0.0, writer.dtype), product)


def _infinite_part(attend: Attend, writer: Writer) -> ir.Value | None:
    """``[b,h,i,j]``, -inf exactly where the logit is, without the scores; ``None`` when that takes the scores.

    It serves every site with the same mask and bias, and leaves the logits to the softmax alone.
    """
    mask, split = simplify(attend.mask), affine(attend.score)
    bias: Expr | None = None
    if may_be_infinite(simplify(attend.score)):
        if split is None or may_be_infinite(split.slope):
            return None
        bias = split.offset
    hidden = mask == TRUE or (simplify(attend.fill) == Const(-math.inf) and not reads_score(mask))
    read = [part for part in (mask, bias) if part is not None]
    if not hidden or not any(writer.visible_axes(part) for part in read):
        return None
    return additive_mask(writer, mask, -math.inf, bias)


# Fused operators


def attention(attend: Attend, place: Place) -> Made:
    """``Attention`` of opset 23."""
    writer, build = writer_of(attend, place), place.build
    names = (attend.query, attend.key, attend.value)
    # one flat projection among them: what makes the others 4-D (rotary) can usually be done flat as well
    flat = any(place.operands[n].behind_turn().groups == flat_groups(_axes(place, n)) for n in names)
    flat = flat and not _given_in_heads(attend, place)
    wanted = flat_groups if flat else single_groups
    parts = [arranged(writer, place, name, wanted) for name in names]
    score, mask, low = scaled(attend), simplify(attend.mask), additive_fill(attend)
    assert score is not None and low is not None  # the capability row has looked
    if score.bias is None and mask != TRUE and math.isinf(low):
        extra: ir.Value | None = boolean_mask(writer, mask)
    else:
        extra = additive_mask(writer, mask, low if math.isinf(low) else max(low, MASKED), score.bias, square=True)
    heads: dict[str, Any] = {}
    if flat:
        heads = {"q_num_heads": head_count(place, attend.query), "kv_num_heads": head_count(place, attend.key)}
    out = build("Attention", *parts, extra, scale=score.scale, **heads)
    return result(place, attend.out, out, wanted(_axes(place, attend.out)), attend.query)


def multi_head_attention(attend: Attend, place: Place) -> Made:
    """``com.microsoft.MultiHeadAttention``; without a mask its CPU kernel never stores the attention map."""
    writer = writer_of(attend, place)
    wanted = single_groups if _given_in_heads(attend, place) and equal_channels(attend, place) else flat_groups
    query = arranged(writer, place, attend.query, flat_groups)
    parts = [query, *(arranged(writer, place, name, wanted) for name in (attend.key, attend.value))]
    return multi_head(attend, place, writer, parts)[0]


def multi_head(
    attend: Attend,
    place: Place,
    writer: Writer,
    parts: Sequence[ir.Value],
    past: Sequence[ir.Value] = (),
    *,
    causal: bool = False,
) -> tuple[Made, ir.Node]:
    """The nodes of ``MultiHeadAttention``, and the operator's own.

    Args:
        attend: what to compute; place: where to write it; writer: for its expressions.
        parts: query, and keys and values of the call, as the operator takes them.
        past: keys and values before them, ``[B, H, P, D]``; all of them are then further results.
        causal: whether the operator hides by itself what lies behind a query, and that is the whole mask.
    """
    build, score, low = place.build, scaled(attend), additive_fill(attend)
    assert score is not None and low is not None  # the capability row has looked
    mask = TRUE if causal else simplify(attend.mask)
    zeroed = attend.norm.empty == "zero" and math.isinf(low)
    patched = mask != TRUE and zeroed and not never_empty(attend, place.types)
    extra = additive_mask(writer, mask, MASKED if patched else low, score.bias, square=True)
    found = build(
        "MultiHeadAttention",
        *parts,
        *(None, None, extra, *past),
        domain=MICROSOFT,
        outputs=3 if past else 1,
        num_heads=head_count(place, attend.query),
        scale=score.scale,
        unidirectional=1 if causal else None,
        # what is added to a hidden score; every query sees at least itself
        mask_filter_value=max(low, MASKED) if causal else None,
    )
    out = found[0] if isinstance(found, tuple) else found
    node = out.producer()
    if patched:
        out = build("Mul", out, _rows(writer, mask, seen=True))
    assert node is not None  # it was just made
    return result(place, attend.out, out, flat_groups(_axes(place, attend.out)), attend.query), node


def equal_channels(attend: Attend, place: Place) -> bool:
    """Whether keys and values have as many channels: ``MultiHeadAttention`` takes others flat, and no past."""
    return place.types[attend.key].sizes[3] == place.types[attend.value].sizes[3]


def _given_in_heads(attend: Attend, place: Place) -> bool:
    """Whether keys and values come from outside the graph as ``[B, G, J, D]``, as those of a cross-attention's cache.

    Both operators take them so; flat ones would be copied in every call, which for one query behind 1500 keys takes
    four times as long as the attention (ONNX Runtime 1.31 on a CPU).
    """
    sides = [place.operands[name] for name in (attend.key, attend.value)]
    wanted = [single_groups(_axes(place, name)) for name in (attend.key, attend.value)]
    return all(
        side.groups == groups and side.value.producer() is None for side, groups in zip(sides, wanted, strict=True)
    )


def group_query_attention(attend: Attend, place: Place) -> Made:
    """``com.microsoft.GroupQueryAttention`` on a whole prompt: causal by itself, the rest as a bias."""
    writer, build = writer_of(attend, place), place.build
    parts = [arranged(writer, place, n, flat_groups) for n in (attend.query, attend.key, attend.value)]
    score, causal, low = group_query_form(attend), causal_mask(attend, place.types), additive_fill(attend)
    assert score is not None and causal is not None and low is not None
    sizes = extents(attend, place.types)
    rest = simplify(causal.rest)
    if rest == TRUE:
        bias = additive_mask(writer, TRUE, low, score.bias, square=True)
    else:
        # the whole mask, not only the rest: rows that see no key must look empty to the operator
        bias = additive_mask(writer, simplify(attend.mask), -math.inf, score.bias, square=True)

    def total() -> ir.Value:
        return build("Cast", writer.size(sizes["j"]), to=int(ir.DataType.INT32))

    def lengths() -> ir.Value:
        last = build("Sub", writer.once(("int32", writer.key(sizes["j"])), total), build.constant(1, "int32"))
        return build("Expand", last, writer.size(sizes["b"]))

    key_lengths = writer.once(("last keys", writer.key(sizes["j"]), writer.key(sizes["b"])), lengths)
    length = writer.once(("int32", writer.key(sizes["j"])), total)
    whole = writer.once(("int32 scalar", writer.key(sizes["j"])), lambda: build("Squeeze", length, build.constant([0])))
    out, *_ = build(
        "GroupQueryAttention",
        *parts,
        None,
        None,
        key_lengths,
        whole,
        None,
        None,
        None,
        bias,
        sink_of_heads(attend, place, writer),
        domain=MICROSOFT,
        outputs=3,
        **group_query_attributes(attend, place, score, causal),
    )
    if rest != TRUE and not math.isinf(low) and not never_empty(attend, place.types):
        # a finite fill: such a row weighs all keys alike, where the operator gives zero
        out = build(
            "Add",
            out,
            build("Mul", _rows(writer, simplify(attend.mask), seen=False), _mean(attend, place, parts[2])),
        )
    return result(place, attend.out, out, flat_groups(_axes(place, attend.out)), attend.query)


def group_query_attributes(
    attend: Attend, place: Place, form: GroupQueryForm, causal: CausalMask
) -> dict[str, int | float | None]:
    """Attributes of ``GroupQueryAttention``: of its heads, its score and its window."""
    return {
        "num_heads": head_count(place, attend.query),
        "kv_num_heads": head_count(place, attend.key),
        "scale": form.scale,
        "softcap": form.cap,
        "local_window_size": causal.window,
    }


def sink_of_heads(attend: Attend, place: Place, writer: Writer) -> ir.Value | None:
    """The sink's logit of each query head, ``[H]``; ``None`` without a sink. It reads no other index than ``h``."""
    if attend.sink == NO_SINK:
        return None
    build, sink = place.build, simplify(attend.sink)

    def make() -> ir.Value:
        heads = build.constant([head_count(place, attend.query)])
        return build("Expand", build("Reshape", writer.write(sink), build.constant([-1])), heads)

    return writer.once(("sink of heads", writer.key(sink), writer.key(writer.extents["h"])), make)


def _mean(attend: Attend, place: Place, value: ir.Value) -> ir.Value:
    """Mean of the values over all keys, for each query head: ``[b, 1, h*e]`` from ``[b, j, g*e]``."""
    build, shares = place.build, group_size(attend, place.types) or 1
    mean = build("ReduceMean", value, build.constant([1]), keepdims=1)
    if shares == 1:
        return mean
    groups, channels = head_count(place, attend.key), fixed(place.types[attend.value].sizes[3]) or 0
    apart = build("Reshape", mean, build.constant([0, 1, groups, 1, channels]))
    spread = build("Expand", apart, build.constant([1, 1, 1, shares, 1]))
    return build("Reshape", spread, build.constant([0, 1, groups * shares * channels]))


def _axes(place: Place, name: str) -> tuple[str, ...]:
    return tuple(axis.name for axis in place.types[name].axes)


__all__ = [
    "Made",
    "Place",
    "additive_mask",
    "arranged",
    "attention",
    "boolean_mask",
    "decomposition",
    "equal_channels",
    "extent",
    "group_query_attention",
    "group_query_attributes",
    "head_count",
    "multi_head",
    "multi_head_attention",
    "result",
    "sink_of_heads",
    "writer_of",
]
