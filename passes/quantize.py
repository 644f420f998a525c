"""``quantize``: products in narrow types."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Literal

from pydantic import Field

from attncompile.ir import Attend, Quantize, Spec, simplify
from attncompile.ir.affine import affine
from attncompile.ir.expr import TRUE, WEIGHT, Const, Index, symbols
from attncompile.ir.rows import absorbing
from attncompile.passes.frame import Options, Pass, with_operation

VALUE_BLOCK = 128
"""Values that share one scale: as many as a tile of the Hopper kernel has keys."""


class RoundingOptions(Options):
    """Options of ``quantize.int8`` and ``quantize.fp8``."""

    block: int = Field(128, ge=1, description="keys that share one scale")
    query_block: int = Field(32, ge=1, description="queries that share one scale")
    smooth: bool = Field(True, description="subtract the mean key first, which a softmax does not notice")
    values: bool = Field(False, description="also multiply weights and values in float8 e4m3")


class Int8Options(RoundingOptions):
    """Options of ``quantize.int8``."""

    projections: bool = Field(True, description="also quantise the linear layers (ONNX only)")


class Fp8Options(RoundingOptions):
    """Options of ``quantize.fp8``."""

    values: bool = Field(True, description="also multiply weights and values in float8 e4m3")


def why_not(spec: Spec, options: RoundingOptions) -> str | None:
    """One softmax attention, not yet rounded, whose weights do not change when the mean key is subtracted."""
    attend = spec.attend()
    if attend is None:
        return "it has not exactly one attention operation"
    if attend.norm.kind != "softmax":
        return f"rounding is studied for softmax, its normaliser is {attend.norm.kind}"
    rounded = {operation.out for operation in spec.operations if isinstance(operation, Quantize)}
    if {attend.query, attend.key, attend.value} & rounded or attend.norm.weights:
        return "its queries, keys or values are rounded already"
    if options.values and attend.weight != WEIGHT:
        return f"weights are rounded before the edit {attend.weight} is known; values=false would do"
    return _why_not_smooth(attend) if options.smooth else None


def _why_not_smooth(attend: Attend) -> str | None:
    """Subtracting the mean key moves all scores of a row by one number; the softmax must not notice.

    The law: where ``score(s) = a·s + c`` with ``a`` free of ``j``, and what is masked has no weight or moves along,
    ``softmax(score(q·(k − m))) = softmax(score(q·k))``. A sink and the log-sum-exp do not move along.
    """
    hint = "smooth=false would do"
    split = affine(attend.score)
    if split is None or Index("j") in symbols(split.slope):
        return f"smoothing moves the scores of a row together, which {attend.score} does not pass on; {hint}"
    if attend.lse or attend.peak:
        return f"smoothing moves the {'log-sum-exp' if attend.lse else 'peak'}, which it also gives; {hint}"
    if attend.sink != Const(-math.inf):
        return f"smoothing moves the logits of all keys, but not the sink {attend.sink}; {hint}"
    fill = affine(attend.fill)
    moves_too = fill is not None and fill.slope == split.slope
    unmoved = attend.mask == TRUE or simplify(attend.fill) == Const(-math.inf) or absorbing(attend.fill)
    if not (unmoved or moves_too):
        return f"smoothing moves the visible logits, but not the fill {attend.fill}; {hint}"
    return None


def apply(dtype: Literal["int8", "float8_e4m3"], spec: Spec, options: RoundingOptions) -> Spec:
    """Round query and key with one scale per block, before the scores are made; also the values, when asked for.

    ``s = Q(q) · Q(k − mean_j k)`` and ``out = Σ_j R(w_j) · Q(v_j)`` with ``Q`` as :class:`attncompile.ir.Quantize`
    defines it, and ``R`` as :func:`attncompile.ir.e4m3.weight_rounding` does.

    Args:
        dtype: of queries and keys; values are rounded to e4m3.
        spec: with one softmax attention.
        options: of the pass.

    Raises:
        ValueError: when there is not exactly one attention.

    Follows: Zhang et al. 2024 (SageAttention, arXiv:2410.02367; SageAttention2, arXiv:2411.10958).
    """
    attend = spec.attend()
    if attend is None:
        raise ValueError(f"{spec.name} has not exactly one attention operation")
    known = set(spec.types())
    short = {"int8": "int8", "float8_e4m3": "fp8"}[dtype]
    query, key = (_fresh(f"{name}_{short}", known) for name in (attend.query, attend.key))
    steps = [
        Quantize(attend.query, dtype, options.query_block, out=query),
        Quantize(attend.key, dtype, options.block, options.smooth, key),
    ]
    changed = dataclasses.replace(attend, query=query, key=key)
    if options.values:
        value = _fresh(f"{attend.value}_fp8", known)
        steps.append(Quantize(attend.value, "float8_e4m3", VALUE_BLOCK, out=value))
        norm = dataclasses.replace(attend.norm, weights="float8_e4m3")
        changed = dataclasses.replace(changed, value=value, norm=norm)
    return with_operation(spec, attend, *steps, changed)


def _fresh(name: str, known: set[str]) -> str:
    while name in known:
        name += "_"
    known.add(name)
    return name


INT8 = Pass(
    name="quantize.int8",
    summary="Multiply queries and keys in INT8, with one scale per block and smoothed keys.",
    contract="calibrated",
    phases=("prefill", "decode"),
    options=Int8Options,
    why_not=why_not,
    apply=functools.partial(apply, "int8"),
)

FP8 = Pass(
    name="quantize.fp8",
    summary="Multiply in float8 e4m3, with one scale per block and smoothed keys.",
    contract="calibrated",
    phases=("prefill", "decode"),
    options=Fp8Options,
    why_not=why_not,
    apply=functools.partial(apply, "float8_e4m3"),
)
