"""``linearize``: attention whose cost grows linearly with the length."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from attncompile.ir import NO_SINK, Scan, Spec, simplify
from attncompile.ir.affine import affine
from attncompile.ir.expr import WEIGHT, Const, Expr, Index, conjunction, conjuncts, symbols
from attncompile.ir.expr import apply as operator_on
from attncompile.ir.rows import extents
from attncompile.passes.frame import Options, Pass, with_operation

CAUSAL = simplify(Index("j") <= Index("i"))


class DecayOptions(Options):
    """Options of ``linearize.decay``."""

    first: float = Field(5.0, gt=0.0, description="head h keeps 1 − 2^(−first − step·h) of its state")
    step: float = Field(1.0, ge=0.0, description="how much slower each further head forgets")
    feature: Literal["identity", "elu1", "relu"] = Field("identity", description="map of queries and keys")
    normalize: bool = Field(False, description="divide by max(|sum of the weights|, 1)")


def _objection(mask: Expr) -> str | None:
    """Why a mask is not ``j ≤ i`` with parts that hide keys from all queries and heads alike."""
    parts = conjuncts(mask)
    if CAUSAL not in parts:
        return f"a scan sees keys j ≤ i, the mask is {mask}"
    for part in parts:
        read = symbols(part)
        if part == CAUSAL or not read & {Index("i"), Index("h")}:
            continue
        if Index("h") in read:
            return f"a scan hides a key from all heads or from none; the mask part {part} reads the head"
        if Index("j") in read:
            return f"a scan hides a key from all queries or from none; the mask part {part} couples queries and keys"
        return f"a scan hides keys, not queries; the mask part {part} reads the query's position"
    return None


def _hidden_keys(mask: Expr) -> Expr:
    """What is left of a mask without ``j ≤ i``."""
    return simplify(conjunction([part for part in conjuncts(mask) if part != CAUSAL]))


def why_not(spec: Spec, options: DecayOptions) -> str | None:
    """One softmax attention with a plain scale, over as many keys as queries, causal and perhaps padded."""
    attend = spec.attend()
    if attend is None:
        return "it has not exactly one attention operation"
    if attend.norm.kind != "softmax":
        return f"it replaces a softmax, the normaliser is {attend.norm.kind}"
    types = spec.types()
    sizes = extents(attend, types)
    if simplify(sizes["i"]) != simplify(sizes["j"]):
        return f"a scan has one key per query, here {sizes['i']} queries read {sizes['j']} keys"
    objection = _objection(simplify(attend.mask, sizes))
    if objection is not None:
        return objection
    split = affine(attend.score)
    if split is None or not isinstance(split.slope, Const) or split.offset != Const(0.0):
        return f"a scan has a constant scale and no bias, the score is {attend.score}"
    if attend.sink != NO_SINK:
        return f"a scan has no place for the sink {attend.sink}"
    if attend.lse or attend.taps or attend.weight != WEIGHT:
        return "a scan has no normalised weights to edit, sum or tell of"
    return None


def apply(spec: Spec, options: DecayOptions) -> Spec:
    """Replace the softmax by ``out_i = scale · Σ_{j ≤ i} decay(h)^(i−j) m_j (φ(q_i)·φ(k_j)) v_j``.

    ``decay(h) = 1 − 2^(−first − step·h)``; the scale is that of the softmax' scores, and ``m_j`` is 0 for keys
    that the rest of the mask hides (padding). A query that sees no key gets zero.

    Follows: Sun et al. 2023 (RetNet, arXiv:2307.08621).
    """
    attend = spec.attend()
    split = affine(attend.score) if attend is not None else None
    if attend is None or split is None or not isinstance(split.slope, Const):
        raise ValueError(f"{spec.name}: {why_not(spec, options)}")
    exponent = operator_on("mul", -options.step, operator_on("float", Index("h"))) - options.first
    scan = Scan(
        attend.query,
        attend.key,
        attend.value,
        mask=_hidden_keys(simplify(attend.mask, extents(attend, spec.types()))),
        decay=simplify(1.0 - operator_on("exp2", exponent)),
        scale=float(split.slope.value),
        feature=options.feature,
        normalize=options.normalize,
        kv_head=attend.kv_head,
        out=attend.out,
    )
    return with_operation(spec, attend, scan)


DECAY = Pass(
    name="linearize.decay",
    summary="Replace softmax attention by a scan with a fixed decay per head; needs training.",
    contract="calibrated",
    phases=("prefill", "decode", "training"),
    options=DecayOptions,
    why_not=why_not,
    apply=apply,
    untrained="a scan with decay is another function than softmax attention, and would ruin a softmax "
    "checkpoint that was not retrained for it",
)
