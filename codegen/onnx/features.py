"""Which features of an operator a Spec needs, by the names that the table of tried features has.

What a builder in :mod:`attncompile.codegen.onnx.attend` writes for an Attend is put here in the words of
``benchmarks/onnx_capabilities``; a test holds that the table knows every one of them.
"""

from __future__ import annotations

import math

from attncompile.codegen.onnx.reading import (
    additive_fill,
    causal_mask,
    fixed,
    group_query_form,
    group_size,
    may_be_infinite,
    may_swallow,
    scaled,
    update_rule,
)
from attncompile.ir.attend import NO_SINK, Attend
from attncompile.ir.expr import TRUE, Expr, Index, symbols
from attncompile.ir.operation import Types
from attncompile.ir.rows import extents, never_empty
from attncompile.ir.scan import Scan
from attncompile.ir.simplify import simplify

FLAT, SPLIT = "operands [B, S, H·D]", "operands [B, H, S, D]"
"""The layouts of the standard ``Attention``: which of them is written depends on the graph, so both must be right."""


def map_shape(*parts: Expr | None) -> str:
    """The shape of what these parts of a score or mask add up to: the axes of rows and heads where one reads them."""
    read = {node.name for part in parts if part is not None for node in symbols(part) if isinstance(node, Index)}
    return f"[{'B' if 'b' in read else '1'}, {'H' if 'h' in read else '1'}, I, J]"


def may_be_empty(attend: Attend, types: Types) -> bool:
    """Whether the mask may leave a query without a key."""
    return simplify(attend.mask) != TRUE and not never_empty(attend, types)


def _more_keys(attend: Attend, types: Types) -> bool:
    sizes = extents(attend, types)
    return simplify(sizes["i"]) != simplify(sizes["j"])


def _other_values(attend: Attend, types: Types) -> bool:
    return fixed(types[attend.query].sizes[3]) != fixed(types[attend.value].sizes[3])


def _of_sizes(attend: Attend, types: Types) -> list[str]:
    found = ["more keys than queries"] if _more_keys(attend, types) else []
    return [*found, "other value than key channels"] if _other_values(attend, types) else found


def attention_features(attend: Attend, types: Types) -> tuple[str, ...]:
    """Of the standard ``Attention``."""
    mask, score, low = simplify(attend.mask), group_query_form(attend), additive_fill(attend)
    bias = score.bias if score is not None else None
    found = [FLAT, SPLIT, "scale"]
    capped = score is not None and score.cap is not None
    found += ["softcap"] if capped else []
    shared = group_size(attend, types) != 1
    if shared:
        found += ["fewer KV heads", f"fewer KV heads, {SPLIT}"]
    found += _of_sizes(attend, types)
    if mask == TRUE and bias is None:
        return tuple(found)
    infinite = low is not None and math.isinf(low)
    boolean = bias is None and infinite
    kind = "boolean mask" if boolean else "additive mask"
    found.append(f"{kind} {map_shape(mask, bias)}")
    found += [f"{kind} and softcap"] if capped else []
    if _more_keys(attend, types):
        found.append(f"{kind} with more keys than queries")
    if shared:
        found.append(f"{kind} and fewer KV heads")
    if may_swallow(bias):
        found.append("additive mask of the number above the lowest for a whole row: the mean")
    if not boolean and (may_be_infinite(bias) or (mask != TRUE and infinite)):
        found.append("additive mask of -inf for some keys")
    empty = may_be_empty(attend, types)
    if capped and empty:
        nothing = "-2^100 for a whole row: the mean" if not boolean else "nothing seen in a row: zero"
        found.append(f"{kind} and softcap, {nothing}")
    elif boolean and empty:
        found.append("boolean mask, nothing seen in a row: zero")
    elif may_be_infinite(bias) or (empty and infinite):
        found.append("additive mask of -inf for a whole row: zero")
    elif empty:
        found.append("additive mask of -2^100 for a whole row: the mean")
    return tuple(found)


def multi_head_features(attend: Attend, types: Types) -> tuple[str, ...]:
    """Of ``MultiHeadAttention``, behind a cache too."""
    mask, score, low = simplify(attend.mask), scaled(attend), additive_fill(attend)
    bias = score.bias if score is not None else None
    # keys and values of a cache, and of cross-attention, come as heads
    found = ["queries, keys and values", "scale", "keys and values [B, H, J, D]"]
    causal = causal_mask(attend, types)
    cached = causal is not None and causal.cached
    if cached:
        found += ["a step behind a cache", "several queries behind a cache"]
        found += ["unidirectional", "unidirectional behind a cache"]
    found += _of_sizes(attend, types)
    if mask == TRUE and bias is None:
        return tuple(found)
    found.append(f"attention_bias {map_shape(mask, bias)}")
    found += ["attention_bias behind a cache"] if cached else []
    if _more_keys(attend, types):
        found.append("attention_bias with more keys than queries")
    infinite = low is not None and math.isinf(low)
    zeroed = attend.norm.empty == "zero" and infinite and may_be_empty(attend, types)
    if (infinite and mask != TRUE and not zeroed) or may_be_infinite(bias):
        found.append("attention_bias of -inf for some keys")
    if may_swallow(bias):
        found.append("attention_bias of -3.4e38 for a whole row: the mean")
    if may_be_empty(attend, types):
        if zeroed:
            found.append("attention_bias of -2^100 for a whole row: the mean")
        elif infinite:
            found.append("attention_bias of -inf for a whole row: NaN")
        else:
            found += [f"attention_bias of {number} for a whole row: the mean" for number in ("-3.4e38", "-2^100")]
    return tuple(found)


def group_query_features(attend: Attend, types: Types) -> tuple[str, ...]:
    """Of ``GroupQueryAttention``, for a whole prompt or behind a cache."""
    form, causal = group_query_form(attend), causal_mask(attend, types)
    if form is None or causal is None:
        return ("a prompt",)  # its objection says more
    found = ["a prompt", "scale"]
    cached = [""] if not causal.cached else ["", " behind a cache"]
    if causal.cached:
        found += ["a prompt with an empty cache", "a step behind a cache", "several queries behind a cache, one row"]
    if group_size(attend, types) == 1:
        found.append("as many KV heads as query heads")
    window, sink = causal.window is not None, attend.sink != NO_SINK
    if window:
        found += [f"window{where}" for where in cached]
        found += ["window, several queries behind a cache"] if causal.cached else []
    if form.cap is not None:
        found += [f"softcap{where}" for where in cached] + (["softcap and window"] if window else [])
    if sink:
        found += [f"sink of each head{where}" for where in cached]
        found += ["sink of each head and window"] if window else []
    hidden = causal.rest != TRUE and not causal.cached  # behind a cache such calls are not the operator's
    if form.bias is None and not hidden:
        return tuple(found)
    shape = map_shape(simplify(attend.mask) if hidden else None, form.bias)
    found += [f"attention_bias {shape}{where}" for where in cached]
    found += ["attention_bias and window"] if window else []
    found += ["attention_bias and sink"] if sink else []
    found += ["attention_bias and softcap"] if form.cap is not None else []
    if hidden and form.cap is not None:
        found.append("attention_bias of -2^100 for some keys, and softcap")
    elif hidden:
        found.append("attention_bias of -inf for some keys")
        if may_be_empty(attend, types):
            found.append("attention_bias of -inf for a whole row: zero")
            found += ["attention_bias of -inf for a whole row, and sink: zero"] if sink else []
    return tuple(found)


def linear_features(scan: Scan, types: Types) -> tuple[str, ...]:
    """Of ``LinearAttention``."""
    by_channel = bool(scan.gate) and fixed(types[scan.gate].sizes[3]) != 1
    found = [update_rule(scan), "scale"]
    found += ["gated, a decay of each channel"] if by_channel else []
    found += ["fewer KV heads"] if types[scan.key].sizes[1] != types[scan.query].sizes[1] else []
    found += ["past_state"] if scan.past else []
    found += ["other value than key channels"] if types[scan.key].sizes[3] != types[scan.value].sizes[3] else []
    return tuple(found)


__all__ = [
    "FLAT",
    "SPLIT",
    "attention_features",
    "group_query_features",
    "linear_features",
    "map_shape",
    "may_be_empty",
    "multi_head_features",
]
