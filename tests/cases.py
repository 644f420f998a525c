"""One table of Specs that every room is tested on: simplifier, passes, PyTorch, Triton, ONNX, plan.

The hard rows are here on purpose: lengths that divide nothing, rows without a visible key, fewer keys than
queries, value channels that differ from key channels. A row's text prints back as written.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from attncompile.ir import Spec, parse_spec
from attncompile.ir.ops import OPERATIONS
from attncompile.ir.sample import random_tensors

FLOAT32_LOWEST = "−3.4028234663852886e+38"


@dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
        name: what it shows; the test id.
        text: the Spec, readable by :func:`attncompile.ir.parse_spec`.
        sizes: values of the symbolic sizes.
        note: why the row is here.
        ranges: values ``low ≤ x < high`` of captured integer tensors that are no 0/1 masks.
        empty_rows: whether some query sees no key at all (seed 0).
    """

    name: str
    text: str
    sizes: Mapping[str, int]
    note: str = ""
    ranges: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    empty_rows: bool = False

    @property
    def spec(self) -> Spec:
        """The Spec, parsed and verified."""
        return parse_spec(self.text)

    def tensors(self, seed: int = 0, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        """Random inputs by name, see :func:`random_tensors`."""
        return random_tensors(self.spec, self.sizes, seed, dtype, self.ranges)


def _case(name: str, text: str, sizes: Mapping[str, int], note: str = "", *, empty_rows: bool = False,
          **ranges: tuple[int, int]) -> Case:
    head, _, rest = textwrap.dedent(text).strip().partition("\n")
    lines = [line for line in rest.splitlines() if line.strip()]
    single = not any(line.split(" ")[0] in OPERATIONS for line in lines)
    body = [f"{name}   {head}"] if single else [name, f"  {head}"]
    return Case(name, "\n".join([*body, *(f"  {line}" for line in lines)]), sizes, note, ranges, empty_rows)


SELF = {"B": 2, "I": 13}
LONG = {"B": 1, "I": 301}
CROSS = {"B": 2, "I": 7, "J": 19}
HEAD = "attend  q,k,v[B,4,I,16]  float32"
WIDE = "attend  q[B,4,I,16]  k,v[B,4,J,16]  float32"
SOFTMAX = "norm   softmax (float32)"


def _padded(name: str, fill: str = "", norm: str = SOFTMAX, note: str = "") -> Case:
    """Causal with padding anywhere: where position 0 is padding, query 0 sees nothing."""
    return _case(name, f"""
        {HEAD}
        score  0.25·s
        mask   j ≤ i and attention_mask[b, j] ≠ 0
        {f'fill   {fill}' if fill else ''}
        {norm}
        given  attention_mask[B,I]:int64
        """, {"B": 6, "I": 13}, note, empty_rows=True)


CASES: tuple[Case, ...] = (
    _case("full", f"{HEAD}\nscore  0.25·s\nmask   true\n{SOFTMAX}", SELF),
    _case("unscaled", f"{HEAD}\nscore  s\nmask   true\n{SOFTMAX}", SELF, "scale 1, not 1/√d"),
    _case("causal", f"{HEAD}\nscore  0.25·s\nmask   j ≤ i\n{SOFTMAX}", SELF),
    _case("causal-long", f"{HEAD}\nscore  0.25·s\nmask   j ≤ i\n{SOFTMAX}", LONG, "several blocks"),
    _case("one-token", f"{HEAD}\nscore  0.25·s\nmask   j ≤ i\n{SOFTMAX}", {"B": 1, "I": 1}, "smallest sizes"),
    _case("causal-last-rows", f"{WIDE}\nscore  0.25·s\nmask   j ≤ i + J − I\n{SOFTMAX}", CROSS,
          "queries are the last rows of the map, as with a cache"),
    _case("causal-first-rows", f"{WIDE}\nscore  0.25·s\nmask   j ≤ i\n{SOFTMAX}", CROSS,
          "more keys than queries, aligned at the start"),
    _padded("causal-padding", norm=f"{SOFTMAX}, empty rows zero", note="as in SDPA"),
    _case("padding", """
        attend  q,k,v[B,4,I,16]  float32
        score  0.25·s
        mask   attention_mask[b, j] ≠ 0
        norm   softmax (float32)
        given  attention_mask[B,I]:int64
        """, SELF, "a mask without i"),
    _case("padding-bool", """
        attend  q[B,4,I,16]  k,v[B,4,J,16]  float32
        score  0.25·s
        mask   visible[b, 0, i, j]
        norm   softmax (float32)
        given  visible[B,1,I,J]:bool
        """, CROSS, "an opaque mask"),
    _case("window", f"{HEAD}\nscore  0.25·s\nmask   j ≤ i and j > i − 4\n{SOFTMAX}", SELF),
    _case("window-long", f"{HEAD}\nscore  0.25·s\nmask   j ≤ i and j > i − 40\n{SOFTMAX}", LONG),
    _case("window-symmetric", f"{HEAD}\nscore  0.25·s\nmask   j ≤ i + 3 and j > i − 4\n{SOFTMAX}", SELF),
    _case("sink-window", f"{HEAD}\nscore  0.25·s\nmask   j ≤ i and (j > i − 4 or j < 2)\n{SOFTMAX}", SELF),
    _case("sink-window-long", f"{HEAD}\nscore  0.25·s\nmask   j ≤ i and (j > i − 40 or j < 3)\n{SOFTMAX}",
          LONG),
    _case("sink-logits", """
        attend  q[B,4,I,16]  k,v[B,2,J,16]  float32
        score  0.25·s
        mask   j ≤ i and j > i − 4
        sink   sinks[h]
        kv_head h // 2
        norm   softmax (float32)
        given  sinks[4]:float32
        """, {"B": 2, "I": 9, "J": 13}, "gpt-oss: a learned logit per head"),
    _case("softmax-plus-one", """
        attend  q,k,v[B,4,I,16]  float32
        score  0.25·s
        mask   j ≤ i and attention_mask[b, j] ≠ 0
        sink   0.0
        norm   softmax (float32)
        given  attention_mask[B,I]:int64
        """, {"B": 6, "I": 13}, "rows without a key give zero, whatever the normaliser says", empty_rows=True),
    _case("sink-lse", """
        attend  q,k,v[B,4,I,16]  float32
        score  0.25·s + bias[h, i, j]
        mask   true
        weight 0.5·w
        sink   sinks[b, i] − 0.25·float(h)
        norm   softmax (float32)
        lse    lse
        given  bias[4,I,I]:float32
        given  sinks[B,I]:float32
        gives  out, lse
        """, {"B": 2, "I": 70}, "a sink that differs by row, and the log-sum-exp with it"),
    _case("prefix", f"{HEAD}\nscore  0.25·s\nmask   j ≤ i or j < 5\n{SOFTMAX}", SELF),
    _case("dilated", f"{HEAD}\nscore  0.25·s\nmask   j ≤ i and (i + j) % 3 = 0\n{SOFTMAX}", SELF,
          "some rows empty", empty_rows=True),
    _case("documents", """
        attend  q,k,v[B,4,I,16]  float32
        score  0.25·s
        mask   j ≤ i and document[b, j] = document[b, i]
        norm   softmax (float32)
        given  document[B,I]:int64
        """, SELF, document=(0, 3)),
    _case("additive-bias", """
        attend  q[B,4,I,16]  k,v[B,4,J,16]  float32
        score  0.25·s + bias[b, 0, i, j]
        mask   true
        norm   softmax (float32)
        given  bias[B,1,I,J]:float32
        """, CROSS),
    _case("learned-bias", """
        attend  q,k,v[B,4,I,16]  float32
        score  s + table[h, max(0, min(8, i − j))]
        mask   j ≤ i
        norm   softmax (float32)
        given  table[4,9]:float32
        """, SELF, "relative positions, clipped"),
    _case("alibi", f"{HEAD}\nscore  0.25·s + exp2(−2·h − 2)·(j − i)\nmask   j ≤ i\n{SOFTMAX}", SELF),
    _case("softcap", f"{HEAD}\nscore  30.0·tanh(0.0083·s)\nmask   j ≤ i\n{SOFTMAX}", SELF),
    _case("temperature", """
        attend  q,k,v[B,4,I,16]  float32
        score  s·temperature[h]
        mask   j ≤ i
        norm   softmax (float32)
        given  temperature[4]:float32
        """, SELF, "a scale that is read from a tensor"),
    _case("gqa", """
        attend  q[B,6,I,16]  k,v[B,2,I,16]  float32
        score  0.25·s
        mask   j ≤ i
        kv_head h // 3
        norm   softmax (float32)
        """, SELF),
    _case("gqa-strided", """
        attend  q[B,6,I,16]  k,v[B,2,I,16]  float32
        score  0.25·s
        mask   j ≤ i
        kv_head h % 2
        norm   softmax (float32)
        """, SELF, "heads shared in the other order"),
    _case("mqa", """
        attend  q[B,4,I,16]  k,v[B,1,J,16]  float32
        score  0.25·s
        mask   true
        kv_head 0
        norm   softmax (float32)
        """, CROSS),
    _case("cross", f"{WIDE}\nscore  0.25·s\nmask   true\n{SOFTMAX}", CROSS),
    _case("value-channels", """
        attend  q,k[B,4,I,16]  v[B,4,I,24]  float32
        score  0.25·s
        mask   j ≤ i
        norm   softmax (float32)
        """, SELF, "D ≠ E"),
    _case("value-channels-odd", """
        attend  q[B,2,I,20]  k[B,2,J,20]  v[B,2,J,12]  float32
        score  0.2·s
        mask   true
        norm   softmax (float32)
        """, CROSS, "no power of two"),
    _padded("empty-rows-nan", note="fill −∞: such a row is NaN"),
    _padded("empty-rows-lowest", FLOAT32_LOWEST, note="a finite fill: such a row is the mean over all keys"),
    _padded("empty-rows-lowest-zero", FLOAT32_LOWEST, f"{SOFTMAX}, empty rows zero",
            "a finite fill leaves no row empty, whatever the norm says of empty rows"),
    _padded("empty-rows-constant", "−10000.0", note="a finite fill too near to absorb scores"),
    _padded("empty-rows-shifted", "0.25·s − 10000.0", note="a fill that reads the score: an additive mask"),
    _case("log-sum-exp", f"{HEAD}\nscore  0.25·s\nmask   j ≤ i\n{SOFTMAX}\nlse    lse\ngives  out, lse",
          SELF),
    _case("sigmoid", f"{HEAD}\nscore  0.25·s − 2.0\nmask   j ≤ i\nnorm   sigmoid (float32)", SELF),
    _case("relu", f"{HEAD}\nscore  0.25·s\nmask   j ≤ i\nnorm   relu (float32)", SELF),
    _case("no-normaliser", f"{HEAD}\nscore  0.25·s\nmask   j ≤ i\nfill   0.0\nnorm   none (float32)", SELF,
          "linear attention in parallel form"),
    _case("divided-by-sum", f"{HEAD}\nscore  max(0.0, 0.25·s)\nmask   j ≤ i and j > i − 4\nfill   0.0\n"
          "norm   sum (float32)\ndivisor max(1e-06, t)", SELF, "a row of zeros is divided by the least divisor"),
    _case("divided-by-absolute-sum", """
        attend  q[B,4,I,16]  k,v[B,2,J,16]  float32
        score  0.25·s·decay[h]
        mask   j ≤ i and attention_mask[b, j] ≠ 0
        fill   0.0
        kv_head h // 2
        norm   l1 (float32)
        divisor max(1.0, t)
        given  decay[4]:float32
        given  attention_mask[B,J]:int64
        """, {"B": 2, "I": 7, "J": 9}, "retention: signed weights, a divisor of at least 1"),
    _case("head-mask", """
        attend  q,k,v[B,4,I,16]  float32
        score  0.25·s
        mask   true
        weight w·head_mask[h]
        norm   softmax (float32)
        given  head_mask[4]:float32
        """, SELF, "an edit of the weights that leaves the sum over keys"),
    _case("weight-edit", """
        attend  q,k,v[B,4,I,16]  float32
        score  0.25·s
        mask   j ≤ i
        weight where(w > 0.1, w, 0.0)
        norm   softmax (float32)
        """, SELF, "an edit that reads each weight"),
    _case("int8", """
        quantize  q[B,4,I,16]  float32
          out    q_rounded
        quantize  k[B,4,I,16]  float32
          smooth true
          out    k_rounded
        attend  q_rounded  k_rounded  v[B,4,I,16]  float32
          score  0.25·s
          mask   j ≤ i
          norm   softmax (float32)
        """, {"B": 2, "I": 77}),
    _case("rotary", """
        position  q[B,4,I,16]  float32
          cos    cos[b, i, d]
          sin    sin[b, i, d]
          channels 16
          out    q_turned
        position  k[B,2,I,16]  float32
          cos    cos[b, i, d]
          sin    sin[b, i, d]
          channels 16
          out    k_turned
        attend  q_turned  k_turned  v[B,2,I,16]  float32
          score  0.25·s
          mask   j ≤ i
          kv_head h // 2
          norm   softmax (float32)
        given  cos[B,I,16]:float32
        given  sin[B,I,16]:float32
        """, SELF),
    _case("cache", """
        cache  past_k[B,2,P,16]  k[B,2,I,16]  float32
          out    all_k
        cache  past_v[B,2,P,16]  v[B,2,I,16]  float32
          out    all_v
        attend  q[B,4,I,16]  all_k  all_v  float32
          score  0.25·s
          mask   j ≤ i + P
          kv_head h // 2
          norm   softmax (float32)
        """, {"B": 2, "I": 3, "P": 8}),
    _case("scan", """
        scan  q,k,v[B,4,I,16]  float32
        decay  −exp2(−h − 5) + 1.0
        scale  0.25
        """, {"B": 2, "I": 150}),
    _case("scan-grouped", """
        scan  q[B,4,I,16]  k[B,2,I,16]  v[B,2,I,24]  float32
        decay  0.9
        scale  0.25
        feature elu1
        normalize true
        kv_head h // 2
        """, {"B": 2, "I": 21}),
    _case("scan-padding", """
        scan  q,k,v[B,4,I,16]  float32
        mask   attention_mask[b, j] ≠ 0
        decay  −exp2(−h − 5) + 1.0
        scale  0.25
        feature elu1
        given  attention_mask[B,I]:int64
        """, {"B": 2, "I": 150}, "hidden keys, whose features would not be zero"),
    _case("scan-lengths", """
        scan  q[B,4,I,16]  k[B,2,I,16]  v[B,2,I,24]  float32
        mask   j < lengths[b]
        decay  0.9
        scale  0.25
        feature elu1
        normalize true
        kv_head h // 2
        given  lengths[B]:int32
        """, {"B": 2, "I": 21}, lengths=(1, 20)),
    _case("scan-gated", """
        scan  q[B,4,I,16]  k[B,2,I,16]  v[B,2,I,24]  gate[B,2,I,16]  past=past[B,2,16,24]  float32
        scale  0.25
        kv_head h // 2
        state  state
        gives  out, state
        """, {"B": 2, "I": 21}, "a decay of each channel at each step, from a state to a state"),
    _case("scan-delta", """
        scan  q,k,v[B,4,I,16]  rate=rate[B,4,I]  float32
        mask   attention_mask[b, j] ≠ 0
        scale  0.25
        given  attention_mask[B,I]:int64
        """, {"B": 2, "I": 21}),
    _case("scan-gated-delta", """
        scan  q,k,v[B,4,I,16]  gate[B,4,I,1]  rate[B,4,I]  float32
        decay  −exp2(−h − 5) + 1.0
        scale  0.25
        feature elu1
        """, {"B": 2, "I": 21}),
)

BY_NAME: dict[str, Case] = {case.name: case for case in CASES}

__all__ = ["BY_NAME", "CASES", "Case", "random_tensors"]
