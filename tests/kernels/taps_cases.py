"""Attention that also tells of its weights: peaks and entropies of rows, what each key gets from all queries."""

from __future__ import annotations

from typing import Any

from tests.cases import Case


def _row(name: str, *lines: str, heads: str = "q[B,4,I,24]  k[B,2,J,24]  v[B,2,J,16]", **more: Any) -> Case:
    given = [line for line in lines if line.startswith("given")]
    others = [line for line in lines if not line.startswith("given")]
    taps = [] if any(line.startswith(("peak", "mass")) for line in lines) else [
        "peak   highest", "entropy spread", "mass   got"
    ]  # fmt: skip
    gives = [] if any(line.startswith("gives") for line in lines) else ["gives  out, highest, spread, got"]
    text = [f"{name}   attend  {heads}  float32", *others, "norm   softmax (float32)", *taps, *given, *gives]
    order = sorted(text, key=lambda line: line.startswith("gives"))
    return Case(name, "\n  ".join(order), {"B": 2, "I": 37, "J": 53}, **more)


SHARED = "kv_head h // 2"
TAPS = (
    _row("taps-full", "score  0.2·s", SHARED),
    _row("taps-causal", "score  0.2·s", "mask   j ≤ i + J − I", SHARED),
    _row("taps-window", "score  0.2·s", "mask   j ≤ i and j > i − 9", SHARED),
    _row("taps-late", "score  0.2·s", "mask   j ≤ i − 20", SHARED),
    _row("taps-sinks", "score  0.2·s", "mask   j ≤ i", "sink   sinks[h]", SHARED, "given  sinks[4]:float32"),
    _row("taps-edited", "score  0.2·s", "mask   j ≤ i", "weight w·keep[h]", SHARED, "given  keep[4]:float32"),
    _row("taps-softcap", "score  5.0·tanh(0.1·s) + exp2(−0.5·h − 0.5)·float(j − i)", "mask   j ≤ i + 3", SHARED),
    _row("taps-documents", "score  0.2·s", "mask   document[b, j] = document[b, min(i, J − 1)]", SHARED,
         "given  document[B,J]:int64", ranges={"document": (0, 4)}),
    _row("taps-large", "score  20.0·s", "mask   j ≤ i", SHARED),
    _row("taps-mass-alone", "score  0.2·s", "mask   j ≤ i", "mass   got", "gives  got", SHARED),
    _row("taps-with-lse", "score  0.2·s", "mask   j ≤ i", "lse    lse", "peak   highest", "entropy spread",
         "gives  out, lse, spread", SHARED),
    _row("taps-heads-apart", "score  0.2·s", "mask   j ≤ i", "kv_head h % 2"),
)  # fmt: skip
TAPS_BY_NAME = {row.name: row for row in TAPS}
