"""What each ONNX operator can express exactly: one row each.

A row says why an operator cannot compute a Spec, in words for the person who asked for it. That has two parts: what
the operator's definition cannot express, which is said here, and what a version of ONNX Runtime does not do right,
which was tried (:mod:`attncompile.codegen.onnx.tried`). A row without an objection says that the builder's nodes
compute the Spec up to rounding. The tests hold every row to that on the table of Specs, and a conversion each site on
random inputs; for other Specs and inputs it is what these definitions say, and no proof. A tensor of floats that is
added to scores beside a mask written as a sum is taken for a bias, small beside it: were it a mask of lowest numbers
too, rows that see no key would differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from attncompile.codegen.onnx.attend import (
    Made,
    Place,
    attention,
    decomposition,
    group_query_attention,
    multi_head_attention,
)
from attncompile.codegen.onnx.cached import cached_group_query, cached_multi_head
from attncompile.codegen.onnx.expressions import reads_score
from attncompile.codegen.onnx.features import (
    attention_features,
    group_query_features,
    linear_features,
    may_be_empty,
    multi_head_features,
)
from attncompile.codegen.onnx.in_place import group_query_in_place
from attncompile.codegen.onnx.normalisation import OPSET
from attncompile.codegen.onnx.reading import (
    CausalMask,
    additive_fill,
    capped,
    causal_mask,
    fixed,
    group_query_form,
    group_size,
    hides_twice,
    may_be_infinite,
    may_swallow,
    scaled,
    unweighted,
)
from attncompile.codegen.onnx.recurrence import recurrent_scan
from attncompile.codegen.onnx.scan import linear_attention, parallel_scan
from attncompile.codegen.onnx.tried import why_not
from attncompile.codegen.onnx.values import MICROSOFT
from attncompile.ir.attend import NO_SINK, Attend, grouped
from attncompile.ir.expr import TRUE, WEIGHT, Const, Expr, Index, symbols
from attncompile.ir.operation import Types
from attncompile.ir.refusal import RefusalError
from attncompile.ir.rows import ABSORBING, extents
from attncompile.ir.scan import Scan
from attncompile.ir.simplify import simplify
from attncompile.ir.spec import Spec

Provider = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Capability:
    """One operator that can stand for an Attend or a Scan.

    Attributes:
        operator: ONNX name, or ``decomposition``.
        domain: ``""`` for the standard, ``com.microsoft`` for ONNX Runtime's own.
        opset: lowest standard opset it needs.
        objection: why an operation is beyond its definition, or ``None``.
        build: makes the nodes.
        operation: what it stands for.
        features: what of the table a Spec needs; ``None`` for plain operators, which every version has.
        parts: rows of the operators that it writes, where these are several or have another name.
        alone_or_first: it is for calls of one row, of one query, or with an empty cache; others are refused by it.
    """

    operator: str
    domain: str
    opset: int
    objection: Callable[[Attend, Types], str | None] | Callable[[Scan, Types], str | None]
    build: Callable[[Attend, Place], Made] | Callable[[Scan, Place], Made]
    operation: type[Attend] | type[Scan] = Attend
    features: Callable[[Attend, Types], tuple[str, ...]] | Callable[[Scan, Types], tuple[str, ...]] | None = None
    parts: tuple[Capability, ...] = ()
    alone_or_first: bool = False

    def why_not(
        self,
        spec: Spec,
        provider: Provider = "cpu",
        version: str | None = None,
        opset: int = OPSET,
        dtype: str | None = None,
    ) -> str | None:
        """Why this operator cannot be relied on for the Spec's Attend (or Scan); ``None`` when it can.

        Args:
            spec: what to compute; provider: where.
            version: of ONNX Runtime, such as ``1.24``; the installed one where it is left out.
            opset: of the model, which says which version of a standard operator runs.
            dtype: of queries in the model that is written in the end, where that is not the Spec's.
        """
        reason = self.beyond(spec)
        if reason is not None:
            return reason
        found, types = self._operation(spec), spec.types()
        assert found is not None  # as beyond has seen
        reasons = (row._untried(found, types, provider, version, opset, dtype) for row in self.parts or (self,))
        return next((why for why in reasons if why), None)

    def beyond(self, spec: Spec) -> str | None:
        """Why its definition does not hold this Spec, whatever the version of ONNX Runtime; ``None`` when it does."""
        found = self._operation(spec)
        if found is None:
            return f"{self.operator} stands for one {self.operation.keyword}, which this Spec does not hold"
        try:
            return self.objection(found, spec.types())  # type: ignore[arg-type]
        except RefusalError as refused:
            return str(refused.refusal)

    def _operation(self, spec: Spec) -> Attend | Scan | None:
        if self.operation is Scan:
            return spec.scan()
        attend = spec.attend()
        return None if attend is None else unweighted(attend)[0]

    def _untried(
        self,
        found: Attend | Scan,
        types: Types,
        provider: Provider,
        version: str | None,
        opset: int,
        dtype: str | None,
    ) -> str | None:
        if self.features is None:
            return None
        dtype = dtype or types[found.query].dtype
        needed = self.features(found, types)  # type: ignore[arg-type]
        return why_not(
            self.domain, self.operator, needed, dtype, version=version, provider=provider, opset=max(opset, self.opset)
        )


def _fused(name: str, attend: Attend, types: Types, *, caps: bool = False) -> str | None:
    """What no fused operator but GroupQueryAttention can do, except for soft caps."""
    if attend.sink != NO_SINK:
        return f"{name} is not given sinks ({attend.sink})"
    if scaled(attend) is None and not (caps and capped(attend) is not None):
        more = " or a soft cap" if caps else ""
        return f"{name} takes a constant scale with an additive bias{more}, the score is {attend.score}"
    score = scaled(attend)
    if score is not None and hides_twice(score.bias, attend.mask):
        return (
            f"{name} adds one number to a hidden key, and here a mask written as a sum stands beside another "
            f"(score {attend.score}, mask {attend.mask}), whose keys weigh differently in rows that see none"
        )
    return _any_fused(name, attend, types)


def _any_fused(name: str, attend: Attend, types: Types) -> str | None:
    """What no fused operator can do."""
    if not attend.norm.plain_softmax:
        return f"{name} normalises by softmax only, this is {attend.norm}"
    if attend.lse:
        return f"{name} does not give the log-sum-exp"
    if attend.taps:
        return f"{name} does not give {', '.join(attend.taps)}"
    if simplify(attend.weight) != WEIGHT:
        return f"{name} cannot edit the weights ({attend.weight})"
    if additive_fill(attend) is None:
        return f"{name} masks by adding a number, the fill is {attend.fill}"
    if any(fixed(types[side].sizes[axis]) is None for side in (attend.query, attend.key) for axis in (1, 3)):
        return f"{name} needs fixed numbers of heads and channels"
    if types[attend.query].dtype != types[attend.value].dtype:
        return f"{name} needs one dtype for query, key and value"
    mask, score = simplify(attend.mask), scaled(attend)
    tensor = mask != TRUE or (score is not None and score.bias is not None)
    if tensor and attend.norm.empty == "zero" and score is not None and may_be_infinite(score.bias):
        return f"{name}: the bias may hold -inf, and rows of nothing else must be zero"
    return None


def _reads_head(attend: Attend) -> bool:
    return Index("h") in symbols(simplify(attend.mask))


def _shares_out_of_order(name: str, attend: Attend, types: Types) -> str | None:
    if group_size(attend, types) is not None:
        return None
    return f"{name} shares KV heads in order, here query head h reads KV head {attend.kv_head}"


def _attention(attend: Attend, types: Types) -> str | None:
    reason = _fused("Attention", attend, types, caps=True) or _shares_out_of_order("Attention", attend, types)
    if reason:
        return reason
    low, score = additive_fill(attend), scaled(attend)
    empty = may_be_empty(attend, types) or (score is not None and may_be_infinite(score.bias))
    if empty and low is not None and math.isinf(low) and attend.norm.empty == "nan":
        return "Attention gives zero for a query that sees no key, here it is NaN"
    return None


def _multi_head(attend: Attend, types: Types) -> str | None:
    reason = _fused("MultiHeadAttention", attend, types)
    if reason:
        return reason
    if group_size(attend, types) != 1:
        return f"MultiHeadAttention has one KV head per query head, here query head h reads {attend.kv_head}"
    if may_be_empty(attend, types):
        zeroed = attend.norm.empty == "zero" and math.isinf(additive_fill(attend) or 0)
        if zeroed and _reads_head(attend):
            return "MultiHeadAttention: rows without a key must be zero, and the mask differs by head"
    return None


def _group_query(attend: Attend, types: Types) -> str | None:
    reason, causal = _group_query_form(attend, types), causal_mask(attend, types)
    if reason or causal is None:
        return reason
    if causal.cached:
        return _over_a_cache(attend, causal)
    if may_be_empty(attend, types):
        if attend.sink == NO_SINK and math.isinf(additive_fill(attend) or 0) and attend.norm.empty == "nan":
            return "GroupQueryAttention gives zero for a query that sees no key, here it is NaN"
        if _reads_head(attend):
            return "GroupQueryAttention: some queries may see no key, and the mask differs by head"
    return None


def _group_query_form(attend: Attend, types: Types) -> str | None:
    """What its definition cannot express, with a cache or without."""
    name = "GroupQueryAttention"
    score = group_query_form(attend)
    if score is None:
        return f"{name} takes a constant scale with a bias or a soft cap, the score is {attend.score}"
    sink = simplify(attend.sink)
    if sink != NO_SINK and any(node != Index("h") for node in symbols(sink) if isinstance(node, Index)):
        return f"{name} has one sink per head, here it is {attend.sink}"
    reason = _any_fused(name, attend, types) or _shares_out_of_order(name, attend, types)
    if reason:
        return reason
    channels, values = fixed(types[attend.query].sizes[3]) or 0, fixed(types[attend.value].sizes[3])
    if channels % 8 or channels != values:
        return f"GroupQueryAttention needs as many value as key channels, a multiple of 8; here {channels} and {values}"
    causal = causal_mask(attend, types)
    if causal is None:
        sizes = extents(attend, types)
        return (
            "GroupQueryAttention is causal with the last query at the last key; the mask is "
            f"{attend.mask} on {sizes['i']} queries and {sizes['j']} keys"
        )
    low = additive_fill(attend)
    if low is not None and low > ABSORBING:
        return f"GroupQueryAttention never visits masked keys, but a fill of {low:g} leaves them a weight"
    if score.bias is not None and may_be_infinite(score.bias):
        return "GroupQueryAttention: the bias may hold -inf, and rows of nothing else are not defined"
    if may_swallow(score.bias):
        return "GroupQueryAttention: the bias may swallow every score of a row, and it gives zero for such rows"
    return None


def _over_a_cache(attend: Attend, causal: CausalMask) -> str | None:
    """What stands against a switch between the operator and the decomposition."""
    if reads_score(simplify(causal.rest)):
        return f"GroupQueryAttention: which keys are hidden is only known from the scores ({attend.mask})"
    return None


def _build_multi_head(attend: Attend, place: Place) -> Made:
    causal = causal_mask(attend, place.types)
    if causal is not None and causal.cached:
        return cached_multi_head(attend, causal, place)
    return multi_head_attention(attend, place)


def _build_group_query(attend: Attend, place: Place) -> Made:
    causal = causal_mask(attend, place.types)
    if causal is not None and causal.cached:
        return cached_group_query(attend, causal, place)
    return group_query_attention(attend, place)


def _linear(scan: Scan, types: Types) -> str | None:
    if scan.normalize:
        return "LinearAttention does not divide by the sum of the weights"
    if scan.scale == 0:
        return "LinearAttention takes a scale of 0 for one that was not given"
    if any(fixed(types[side].sizes[axis]) is None for side in (scan.query, scan.key, scan.value) for axis in (1, 3)):
        return "LinearAttention needs fixed numbers of heads and channels"
    heads, groups = fixed(types[scan.query].sizes[1]) or 0, fixed(types[scan.key].sizes[1]) or 0
    if heads != groups and Index("h") in symbols(scan.decay):
        return f"LinearAttention has a decay per KV head, here it is per query head ({heads} on {groups})"
    known: dict[str, Expr] = {"h": Const(heads)}
    if heads % groups or simplify(scan.kv_head, known) != simplify(grouped(heads, groups), known):
        return f"LinearAttention pairs query and KV heads in order, here query head h reads {scan.kv_head}"
    apart = next((name for name in (scan.key, scan.value, scan.gate, scan.rate, scan.past)
                  if name and types[name].dtype != types[scan.query].dtype), None)  # fmt: skip
    if apart is not None:
        return f"LinearAttention was tried in one dtype alone, here {apart} is {types[apart].dtype}"
    return None


def _build_plain_scan(scan: Scan, place: Place) -> Made:
    return parallel_scan(scan, place) if scan.fixed else recurrent_scan(scan, place)


def _never(_: object, __: Types) -> str | None:
    return None


def from_queries(least: int) -> Capability:
    """The row that takes GroupQueryAttention behind a cache for calls of at least so many queries."""
    row = next(row for row in ATTEND_ROWS if row.operator == "GroupQueryAttention")

    def objection(attend: Attend, types: Types) -> str | None:
        causal = causal_mask(attend, types)
        if causal is not None and not causal.cached:
            return "there are as many keys as queries, so nothing is cached"
        return _group_query(attend, types)

    def build(attend: Attend, place: Place) -> Made:
        causal = causal_mask(attend, place.types)
        assert causal is not None  # the objection has looked
        return cached_group_query(attend, causal, place, least)

    name = FROM_QUERIES.format(least=least)
    return replace(row, operator=name, objection=objection, build=build, parts=(row,))


def in_place() -> Capability:
    """The row that takes past and present keys in one buffer, which it writes."""
    row = next(row for row in ATTEND_ROWS if row.operator == "GroupQueryAttention")

    def objection(attend: Attend, types: Types) -> str | None:
        reason, causal = _group_query_form(attend, types), causal_mask(attend, types)
        if reason or causal is None:
            return reason
        if not causal.cached:
            return "there are as many keys as queries, so nothing is cached"
        if simplify(causal.rest) != TRUE:
            return f"GroupQueryAttention in place is causal and hides nothing else, the mask is {attend.mask}"
        return None

    def features(attend: Attend, types: Types) -> tuple[str, ...]:
        return (*group_query_features(attend, types), "a cache with room behind it", "a cache written in place")

    def build(attend: Attend, place: Place) -> Made:
        causal = causal_mask(attend, place.types)
        assert causal is not None  # the objection has looked
        return group_query_in_place(attend, causal, place)

    tried = replace(row, features=features)
    return replace(row, operator=IN_PLACE, objection=objection, build=build, parts=(tried,), alone_or_first=True)


IN_PLACE = "GroupQueryAttention in place"
"""How plans and reports call the operator on a buffer."""

FROM_QUERIES = "GroupQueryAttention from {least} queries on, else decomposition"
"""How plans and reports call the operator behind a cache."""

ATTEND_ROWS: tuple[Capability, ...] = (
    Capability(
        operator="Attention",
        domain="",
        opset=OPSET,
        objection=_attention,
        build=attention,
        features=attention_features,
    ),
    Capability(
        operator="MultiHeadAttention",
        domain=MICROSOFT,
        opset=17,
        objection=_multi_head,
        build=_build_multi_head,
        features=multi_head_features,
    ),
    Capability(
        operator="GroupQueryAttention",
        domain=MICROSOFT,
        opset=17,
        objection=_group_query,
        build=_build_group_query,
        features=group_query_features,
    ),
    Capability(operator="decomposition", domain="", opset=18, objection=_never, build=decomposition),
)

SCAN_ROWS: tuple[Capability, ...] = (
    Capability(
        operator="LinearAttention",
        domain=MICROSOFT,
        opset=17,
        objection=_linear,
        build=linear_attention,
        operation=Scan,
        features=linear_features,
    ),
    Capability(
        operator="decomposition", domain="", opset=18, objection=_never, build=_build_plain_scan, operation=Scan
    ),
)


def rows_for(spec: Spec) -> tuple[Capability, ...]:
    """The rows for the Spec's Attend or Scan; none when it has neither, or several."""
    if spec.attend() is not None:
        return ATTEND_ROWS
    return SCAN_ROWS if spec.scan() is not None else ()
