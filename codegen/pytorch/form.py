"""The part of ``Attend`` that ``scaled_dot_product_attention`` can hold, recognised in its expressions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from attncompile.ir import NO_SINK, Attend, Refusal, TensorType, grouped, simplify
from attncompile.ir.affine import affine
from attncompile.ir.expr import TRUE, WEIGHT, Const, Expr, Index, Size, substitute, symbols
from attncompile.ir.rows import absorbing, extents, never_empty

CAUSAL = simplify(Index("j") <= Index("i"))

# exp(−10⁴ − m) is 0 in float32 for every row maximum m above −9896
NEGLIGIBLE = -1e4

Fill = Literal["infinite", "absorbing", "constant", "shifted"]


@dataclass(frozen=True)
class AdditiveForm:
    """``softmax_j(scale · factor·s + bias where visible, else fill) · v``, times ``edit``.

    Attributes:
        scale: factor of the scores, at least 0.
        query_factor: further factor of the scores over ``b h i``, or ``None``.
        bias: what is added to the scores, over ``b h i j``, or ``None``.
        mask: truth value over ``b h i j``; true is visible.
        mask_if_same_length, mask_if_one_query: what it simplifies to when there are as many queries as keys,
            and when there is one query.
        causal: the mask for equal lengths is SDPA's own, and nothing else is added.
        fill: ``infinite`` (−∞), ``absorbing`` (finite, and so low that adding a score changes nothing),
            ``constant`` (finite, replaces the score) or ``shifted`` (added to the score).
        replaces: the fill stands for the score, so that no gradient flows through a masked position.
        masked: the value of a masked position, over ``b h i j``; for ``shifted`` without the score.
        edit: factor of the output over ``b h i``, or ``None``.
        proven: every query is proven to see a key.
        query_length, key_length: sizes of the axes ``i`` and ``j``.
        shared_heads: ``one`` (each query head has its own), ``grouped`` (``h // n``) or ``listed`` (any other
            map).
    """

    scale: float
    query_factor: Expr | None
    bias: Expr | None
    mask: Expr
    mask_if_same_length: Expr
    mask_if_one_query: Expr
    causal: bool
    fill: Fill
    replaces: bool
    masked: Expr
    edit: Expr | None
    proven: bool
    query_length: Expr
    key_length: Expr
    shared_heads: Literal["one", "grouped", "listed"]

    def mask_at(self, queries: Any, keys: Any) -> Expr:
        """The mask as it is for these numbers of queries and keys (integers, or symbolic ones)."""
        if queries == 1:
            return self.mask_if_one_query
        return self.mask_if_same_length if queries == keys else self.mask

    def causal_at(self, queries: Any, keys: Any) -> bool:
        """Whether SDPA's own causal mask is all there is for these numbers of queries and keys."""
        return self.causal and bool(queries == keys) and not bool(queries == 1)


def _with_lengths(mask: Expr, sizes: Mapping[str, Expr], values: Mapping[Expr, Expr]) -> Expr:
    """The mask with some symbols replaced, simplified with the lengths that follow."""
    return simplify(substitute(mask, values), {name: substitute(sizes[name], values) for name in "ij"})


def _mask_if_same_length(mask: Expr, sizes: Mapping[str, Expr]) -> Expr:
    queries, keys = simplify(sizes["i"]), simplify(sizes["j"])
    return _with_lengths(mask, sizes, {keys: queries} if isinstance(keys, Size) else {})


def _mask_if_one_query(mask: Expr, sizes: Mapping[str, Expr]) -> Expr:
    queries = simplify(sizes["i"])
    length: dict[Expr, Expr] = {queries: Const(1)} if isinstance(queries, Size) else {}
    return _with_lengths(mask, sizes, {Index("i"): Const(0), **length})


def additive_form(attend: Attend, types: Mapping[str, TensorType]) -> AdditiveForm | Refusal:
    """Recognise the form, or say which part of the ``Attend`` has no place in it."""

    def refuse(what: str) -> Refusal:
        return Refusal("no-sdpa", f"scaled_dot_product_attention has no place for {what}")

    if not attend.norm.plain_softmax:
        return refuse(f"the normaliser {attend.norm}")
    if attend.sink != NO_SINK:
        return refuse(f"the sink {attend.sink}")
    if attend.lse:
        return refuse("the log-sum-exp as a result")
    if attend.taps:
        return refuse(f"what tells of the weights ({', '.join(attend.taps)})")
    score, weight, fill = affine(attend.score), affine(attend.weight, WEIGHT), affine(attend.fill)
    if score is None or Index("j") in symbols(score.slope) or score.slope == Const(0.0):
        return refuse(f"a score that is not linear in s: {attend.score}")
    if weight is None or weight.offset != Const(0.0) or Index("j") in symbols(weight.slope):
        return refuse(f"the edit {attend.weight} of each weight")
    kind = _fill_kind(attend, fill is not None and fill.slope == score.slope)
    if kind is None or fill is None:
        return refuse(f"the fill {attend.fill}")
    constant = isinstance(score.slope, Const) and score.slope.value > 0
    sizes = extents(attend, types)
    kv_head = simplify(attend.kv_head, sizes)
    heads = simplify(types[attend.key].sizes[1])
    usual = grouped(sizes["h"], heads) if _divides(heads, sizes["h"]) else None
    mask, bias = simplify(attend.mask, sizes), None if score.offset == Const(0.0) else score.offset
    same_length = _mask_if_same_length(mask, sizes)
    return AdditiveForm(
        scale=float(score.slope.value) if isinstance(score.slope, Const) and constant else 1.0,
        query_factor=None if constant else score.slope,
        bias=bias,
        mask=mask,
        mask_if_same_length=same_length,
        mask_if_one_query=_mask_if_one_query(mask, sizes),
        causal=same_length == CAUSAL and bias is None,
        fill=kind,
        replaces=fill.slope == Const(0.0),
        masked=fill.offset,
        edit=None if weight.slope == Const(1.0) else weight.slope,
        proven=never_empty(attend, types),
        query_length=simplify(sizes["i"]),
        key_length=simplify(sizes["j"]),
        shared_heads="one" if kv_head == Index("h") else
        "grouped" if usual is not None and kv_head == simplify(usual, sizes) else "listed",
    )


def _divides(groups: Expr, heads: Expr) -> bool:
    total = simplify(heads)
    return (isinstance(groups, Const) and isinstance(total, Const) and groups.value > 0
            and total.value % groups.value == 0)


def _fill_kind(attend: Attend, same_slope: bool) -> Fill | None:
    fill = simplify(attend.fill)
    if attend.mask == TRUE or fill == Const(-math.inf):
        return "infinite"
    if absorbing(fill):
        return "absorbing"
    if isinstance(fill, Const):
        return "constant" if fill.value <= NEGLIGIBLE else None
    return "shifted" if same_slope else None
