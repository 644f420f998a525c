"""``quantize``: products in narrow types."""

from __future__ import annotations

import dataclasses
import math

from pydantic import Field

from attncompile.ir import Attend, Quantize, Spec, simplify
from attncompile.ir.affine import affine
from attncompile.ir.expr import TRUE, Const, Index, symbols
from attncompile.ir.rows import absorbing
from attncompile.passes.frame import Options, Pass, with_operation


class Int8Options(Options):
    """Options of ``quantize.int8``."""

    block: int = Field(64, ge=1, description="positions that share one scale")
    smooth: bool = Field(True, description="subtract the mean key first, which a softmax does not notice")
    projections: bool = Field(True, description="also quantise the linear layers (ONNX only)")


def why_not(spec: Spec, options: Int8Options) -> str | None:
    """One softmax attention, not yet rounded, whose weights do not change when the mean key is subtracted."""
    attend = spec.attend()
    if attend is None:
        return "it has not exactly one attention operation"
    if attend.norm.kind != "softmax":
        return f"rounding is studied for softmax, its normaliser is {attend.norm.kind}"
    rounded = {operation.out for operation in spec.operations if isinstance(operation, Quantize)}
    if {attend.query, attend.key} & rounded:
        return "its queries or keys are rounded already"
    return _why_not_smooth(attend) if options.smooth else None


def _why_not_smooth(attend: Attend) -> str | None:
    """Subtracting the mean key moves all scores of a row by one number; the softmax must not notice."""
    hint = "smooth=false would do"
    split = affine(attend.score)
    if split is None or Index("j") in symbols(split.slope):
        return f"smoothing moves the scores of a row together, which {attend.score} does not pass on; {hint}"
    if attend.lse:
        return f"smoothing moves the log-sum-exp, which it also gives; {hint}"
    fill = affine(attend.fill)
    moves_too = fill is not None and fill.slope == split.slope
    unmoved = attend.mask == TRUE or simplify(attend.fill) == Const(-math.inf) or absorbing(attend.fill)
    if not (unmoved or moves_too):
        return f"smoothing moves the visible logits, but not the fill {attend.fill}; {hint}"
    return None


def apply(spec: Spec, options: Int8Options) -> Spec:
    """Round query and key to INT8 with one scale per block, before the scores are made.

    ``s = Q(q) · Q(k − mean_j k)`` with ``Q`` as :class:`attncompile.ir.Quantize` defines it.

    Follows: Zhang et al. 2024 (SageAttention, arXiv:2410.02367).
    """
    attend = spec.attend()
    if attend is None:
        raise ValueError(f"{spec.name} has not exactly one attention operation")
    known = set(spec.types())
    query, key = _fresh(f"{attend.query}_int8", known), _fresh(f"{attend.key}_int8", known)
    changed = dataclasses.replace(attend, query=query, key=key)
    return with_operation(spec, attend,
                          Quantize(attend.query, block=options.block, out=query),
                          Quantize(attend.key, block=options.block, smooth=options.smooth, out=key), changed)


def _fresh(name: str, known: set[str]) -> str:
    while name in known:
        name += "_"
    return name


INT8 = Pass(
    name="quantize.int8",
    summary="Multiply queries and keys in INT8, with one scale per block and smoothed keys.",
    contract="calibrated",
    phases=("prefill", "decode"),
    options=Int8Options,
    why_not=why_not,
    apply=apply,
)
