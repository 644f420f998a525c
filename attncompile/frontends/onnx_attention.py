"""Attention as one ONNX call, stated where its meaning is fully given by its operands."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from attncompile.frontends import movement, onnx_contrib, onnx_group_query, onnx_multi_head
from attncompile.frontends.graph import (
    Concatenate,
    Fill,
    FusedAttention,
    IndexMap,
    Indices,
)
from attncompile.frontends.onnx_builder import AttentionRefused, Builder, Row
from attncompile.frontends.onnx_known import DTYPE_NAMES
from attncompile.frontends.onnx_projected import PROJECTED
from attncompile.frontends.onnx_recurrence import linear_attention
from attncompile.ir import Expr, Index, Kind, Load, simplify
from attncompile.ir.expr import ONE, ZERO, Const, apply


def _refuse_unless(condition: object, reason: str) -> None:
    if not condition:
        raise AttentionRefused(reason)


def _refuse_inputs(b: Builder, names: Mapping[int, str]) -> None:
    for number, what in names.items():
        _refuse_unless(b.input(number) is None, f"it takes {what}")


def _refuse_other_outputs(b: Builder) -> None:
    for output in b.node.outputs[1:]:
        read = output.uses() or output.is_graph_output()
        _refuse_unless(not read, f"its output {output.name} is read, too")


def _exact(size: Expr, parts: int) -> int:
    """A constant size divided into parts."""
    _refuse_unless(
        isinstance(size, Const) and parts > 0 and int(size.value) % parts == 0,
        f"its channels ({size}) are not a fixed multiple of its {parts} heads",
    )
    return int(size.value) // parts  # type: ignore[attr-defined]


@dataclass(frozen=True)
class _Heads:
    """One operand of a fused call: how many heads of how many channels, and where its element is."""

    heads: Expr
    length: Expr
    channels: int
    batch: Expr
    at: Callable[[Expr, Indices], Indices]


def _heads(b: Builder, tensor: str, heads: int | None) -> _Heads:
    """``[B, H, S, D]``, or ``[B, S, H·D]`` with a given number of heads."""
    shape = b.shape(tensor)
    if len(shape) == 4:
        return _Heads(
            shape[1],
            shape[2],
            _exact(shape[3], 1),
            shape[0],
            lambda head, indices: (indices[0], head, indices[2], indices[3]),
        )
    _refuse_unless(len(shape) == 3, f"{tensor} has {len(shape)} axes")
    _refuse_unless(heads, f"the number of heads of {tensor} is not given")
    channels = _exact(shape[2], heads or 1)
    return _Heads(
        Const(heads or 1),
        shape[1],
        channels,
        shape[0],
        lambda head, indices: (indices[0], indices[2], simplify(head * channels + indices[3])),
    )


def _fused(
    b: Builder,
    query: str,
    key: str,
    value: str,
    heads: tuple[int | None, int | None],
    *,
    mask: str | None,
    causal: Expr | None,
    scale: float | None,
    mask_fill: float,
    softcap: float,
    empty: str,
    dtype: str,
    reads: tuple[str, ...] = (),
) -> str:
    """Attention over operands in either layout, query heads sharing KV heads in blocks."""
    q, k, v = _heads(b, query, heads[0]), _heads(b, key, heads[1]), _heads(b, value, heads[1])
    kv_head: Expr = Index("h")
    if k.heads != q.heads:
        _refuse_unless(isinstance(q.heads, Const) and isinstance(k.heads, Const), "its numbers of heads are not fixed")
        kv_head = simplify(apply("floordiv", Index("h"), _exact(q.heads, int(k.heads.value))))  # type: ignore[attr-defined]
    full = (q.batch, q.heads, q.length, k.length)
    for one, other in ((q.batch, k.batch), (q.batch, v.batch), (k.length, v.length)):
        b.sizes.prove_equal(one, other)
    _refuse_unless(q.channels == k.channels, "query and key differ in their channels")
    if mask is not None:
        for size, wanted in zip(reversed(b.shape(mask)), reversed(full), strict=False):
            _refuse_unless(
                ONE in (size, wanted) or not (isinstance(size, Const) and isinstance(wanted, Const)) or size == wanted,
                f"its mask is shorter ({size}) than the keys ({wanted})",
            )
            b.sizes.meet(wanted, size)

    def at(operand: _Heads, shared: bool) -> IndexMap:
        def index_map(indices: Indices) -> Indices:
            head = _head_of(kv_head, indices[1]) if shared else indices[1]
            return operand.at(head, indices)

        return index_map

    flat = len(b.shape(query)) == 3
    shape = (
        (q.batch, q.length, simplify(q.heads * v.channels)) if flat else (q.batch, q.heads, q.length, Const(v.channels))
    )
    return b.emit(
        lambda name: FusedAttention(
            name,
            query,
            key,
            value,
            at(q, False),
            at(k, True),
            at(v, True),
            mask,
            movement.broadcast(b.shape(mask), full) if mask is not None else None,
            causal,
            scale if scale else 1.0 / math.sqrt(q.channels),
            (*full, Const(q.channels), Const(v.channels)),
            ("b", "i", "he") if flat else ("b", "h", "i", "e"),
            dtype,
            empty,  # type: ignore[arg-type]
            mask_fill,
            softcap,
            reads,
        ),
        shape,
        b.dtype(query),
    )


def _lengthened(b: Builder, mask: str, keys: Expr) -> str:
    """A mask that is shorter than the keys hides the rest; one of length 1 is no exception."""
    shape = b.shape(mask)
    if shape[-1] == keys:
        return mask
    b.sizes.meet(shape[-1], keys)
    hidden = Const(False) if b.dtype(mask) == "bool" else Const(-math.inf)
    rest = (*shape[:-1], simplify(keys - shape[-1]))
    filler = b.emit(lambda name: Fill(name, hidden), rest, b.dtype(mask))
    return b.emit(lambda name: Concatenate(name, (mask, filler), len(shape) - 1), (*shape[:-1], keys), b.dtype(mask))


def _head_of(kv_head: Expr, head: Expr) -> Expr:
    return apply("floordiv", head, kv_head.children[1]) if kv_head.children else head


def _attention(b: Builder) -> str:
    """``Attention`` of opset 23 and later, as its reference states it: soft cap before mask, empty rows give
    zero."""
    _refuse_inputs(b, {4: "a past key", 5: "a past value"})
    _refuse_other_outputs(b)
    position: Expr = Index("i")
    visible: list[Expr] = []
    valid = b.tensor(6) if b.input(6) is not None else None
    if valid is not None:
        # the queries are the last of the valid keys of their row
        count = Load(valid, (Index("b"),), Kind.INT)
        position = position + count - b.shape(b.tensor(0))[-2]
        visible.append(Index("j") < count)
    if b.attribute("is_causal", 0):
        visible.append(Index("j") <= position)
    before, after = b.attribute("left_window_size", -1), b.attribute("right_window_size", -1)
    if before >= 0:
        visible.append(position - Index("j") <= before)
    if after >= 0:
        visible.append(Index("j") - position <= after)
    heads = b.attribute("q_num_heads"), b.attribute("kv_num_heads")
    mask = b.tensor(3) if b.input(3) is not None else None
    if mask is not None:
        mask = _lengthened(b, mask, _heads(b, b.tensor(1), heads[1]).length)
    precision = b.attribute("softmax_precision")
    dtype = b.dtype(b.tensor()) if precision is None else DTYPE_NAMES.get(ir.DataType(precision), "float32")
    return _fused(
        b,
        b.tensor(0),
        b.tensor(1),
        b.tensor(2),
        heads,
        mask=mask,
        causal=simplify(apply("and", *visible)) if visible else None,
        scale=b.attribute("scale"),
        mask_fill=-math.inf,
        softcap=float(b.attribute("softcap", 0.0)),
        empty="zero",
        dtype=dtype,
        reads=(valid,) if valid is not None else (),
    )


def _multi_head_attention(b: Builder) -> str:
    """com.microsoft ``MultiHeadAttention``: a padded key gets ``mask_filter_value`` added, a later one the
    lowest number."""
    if not onnx_multi_head.is_plain(b.node, b.infos):
        return _defined(b)
    heads = int(b.attribute("num_heads"))
    if b.attribute("unidirectional", 0):
        queries, keys = (_heads(b, b.tensor(n), heads).length for n in (0, 1))
        # of other keys the kernel makes what it likes: one query sees all of them
        _refuse_unless(queries == keys, f"it is causal, and has {keys} keys for {queries} queries")
    bias = b.tensor(5) if b.input(5) is not None else None
    if b.input(4) is not None:
        padding = b.tensor(4)
        batch, length = b.shape(padding)
        lifted = b.move(padding, movement.unsqueeze([1, 2]), "unsqueeze", (batch, ONE, ONE, length))
        kept = b.pointwise("ne", lifted, ZERO, dtype="bool")
        filled = Const(float(b.attribute("mask_filter_value", -10000.0)))
        added = b.pointwise("where", kept, Const(0.0), filled, dtype=b.dtype(b.tensor()))
        bias = added if bias is None else b.pointwise("add", bias, added)
    return _fused(
        b,
        b.tensor(0),
        b.tensor(1),
        b.tensor(2),
        (heads, heads),
        mask=bias,
        causal=Index("j") <= Index("i") if b.attribute("unidirectional", 0) else None,
        scale=b.attribute("scale"),
        mask_fill=LOWEST,
        softcap=0.0,
        empty="nan",
        dtype=b.dtype(b.tensor()),
    )


LOWEST = -3.4028234663852886e38
"""The lowest float32, which ONNX Runtime gives a position that a causal call hides."""


def _refused(reason: str) -> Row:
    def row(b: Builder) -> str:
        raise AttentionRefused(reason)

    return row


def _defined(b: Builder) -> str:
    """A call whose definition has not come into its place, or cannot."""
    onnx_contrib.read(b.node, b.infos)
    lowest = onnx_contrib.lowest_opset(b.node.op_type)
    raise AttentionRefused(f"it does more than attend, and is defined for opset {lowest} and later")


CALLS: dict[str, Row] = {"Attention": _attention, "LinearAttention": linear_attention}
"""Calls of the standard operator set."""

# fmt: off
CONTRIB_CALLS: dict[str, Row] = {
    "MultiHeadAttention": _multi_head_attention,
    onnx_group_query.GROUP_QUERY: _defined,
    **dict.fromkeys(PROJECTED, _defined),
    "PackedAttention": _refused("it holds the projections, and rows of different length without padding"),
    "PackedMultiHeadAttention": _refused("it takes rows of different length without padding"),
    "DecoderMaskedMultiHeadAttention": _refused("it updates a cache"),
    "DecoderMaskedSelfAttention": _refused("it updates a cache"),
    "DecoderAttention": _refused("it updates a cache"),
    "LongformerAttention": _refused("it holds the projections of a windowed attention with global tokens"),
    "SparseAttention": _refused("its mask is a table of blocks"),
    "PagedAttention": _refused("its keys lie in pages"),
    "LinearAttention": linear_attention,
    "BiasSoftmax": _refused("its bias is added inside the normaliser"),
}
# fmt: on
"""Calls of ONNX Runtime's own set (com.microsoft)."""
