"""``linearize``: attention whose cost grows linearly with the length."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from attncompile.ir import NO_SINK, Scan, Spec, simplify
from attncompile.ir.affine import affine
from attncompile.ir.expr import WEIGHT, Const, Index
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


def why_not(spec: Spec, options: DecayOptions) -> str | None:
    """One softmax attention with a plain scale and the mask ``j ≤ i`` over as many keys as queries."""
    attend = spec.attend()
    if attend is None:
        return "it has not exactly one attention operation"
    if attend.norm.kind != "softmax":
        return f"it replaces a softmax, the normaliser is {attend.norm.kind}"
    types = spec.types()
    sizes = extents(attend, types)
    if simplify(sizes["i"]) != simplify(sizes["j"]):
        return f"a scan has one key per query, here {sizes['i']} queries read {sizes['j']} keys"
    if simplify(attend.mask, sizes) != CAUSAL:
        return f"a scan sees exactly the keys j ≤ i, the mask is {attend.mask}"
    split = affine(attend.score)
    if split is None or not isinstance(split.slope, Const) or split.offset != Const(0.0):
        return f"a scan has a constant scale and no bias, the score is {attend.score}"
    if attend.sink != NO_SINK:
        return f"a scan has no place for the sink {attend.sink}"
    if attend.lse or attend.weight != WEIGHT:
        return "a scan has no normalised weights to edit or sum"
    return None


def apply(spec: Spec, options: DecayOptions) -> Spec:
    """Replace the softmax by ``out_i = scale · Σ_{j ≤ i} decay(h)^(i−j) (φ(q_i)·φ(k_j)) v_j``.

    ``decay(h) = 1 − 2^(−first − step·h)``; the scale is that of the softmax' scores.

    Follows: Sun et al. 2023 (RetNet, arXiv:2307.08621).
    """
    attend = spec.attend()
    split = affine(attend.score) if attend is not None else None
    if attend is None or split is None or not isinstance(split.slope, Const):
        raise ValueError(f"{spec.name}: {why_not(spec, options)}")
    exponent = operator_on("mul", -options.step, operator_on("float", Index("h"))) - options.first
    scan = Scan(
        attend.query, attend.key, attend.value,
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
