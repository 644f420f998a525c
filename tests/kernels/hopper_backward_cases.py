"""Rows for the backward kernel for Hopper GPUs; a test fills in the sizes."""

from __future__ import annotations

from tests.cases import Case


def _row(
    name: str,
    mask: str = "true",
    score: str = "0.09·s",
    channels: int = 128,
    groups: int = 1,
    heads: int = 8,
    features: int = 0,
    dtype: str = "bfloat16",
    kv_head: str = "",
    lse: bool = False,
) -> Case:
    """A row in which ``groups`` query heads share a key head."""
    shared = heads // groups
    lines = [
        f"{name}   attend  q[B,{heads},I,{channels}]  k[B,{shared},J,{channels}]  "
        f"v[B,{shared},J,{features or channels}]  {dtype}",
        f"score  {score}",
        f"mask   {mask}",
        *([f"kv_head {kv_head or f'h // {groups}'}"] if groups > 1 else []),
        "norm   softmax (float32)",
        *(["lse    lse", "gives  out, lse"] if lse else []),
    ]
    return Case(name, "\n  ".join(lines), {})


ROWS = (
    _row("full", groups=4),
    _row("causal", "j ≤ i", groups=8),
    _row("causal-half", "j ≤ i", dtype="float16"),
    _row("causal-tail", "j ≤ i + J − I", groups=2),
    _row("window", "j ≤ i and j > i − 100", groups=2),
    _row("symmetric", "j ≤ i + 50 and j > i − 50"),
    _row("future", "j ≥ i + 70"),
    _row("alibi", "j ≤ i", "0.09·s + exp2(−0.5·h − 0.5)·float(j − i)", groups=4),
    _row("distance", "true", "0.09·s − 0.03·abs(float(i − j))"),
    _row("softcap", "j ≤ i", "30.0·tanh(0.003·s)", groups=2),
    _row("narrower", "j ≤ i", channels=96, groups=8),
    _row("values-of-their-own", "j ≤ i", channels=128, features=72),
    _row("heads-in-turn", "j ≤ i", groups=4, kv_head="h % 2"),
    _row("log-sum-exp", "j ≤ i", lse=True),
    _row("full-64", channels=64, groups=4),
    _row("causal-64", "j ≤ i", channels=64, groups=2),
    _row("window-56", "j ≤ i and j > i − 100", channels=56, features=64, dtype="float16"),
    _row("softcap-64", "j ≤ i + J − I", "30.0·tanh(0.003·s)", channels=64),
)
SIZES = ((1, 1, 1), (1, 7, 13), (2, 64, 64), (1, 129, 128), (1, 130, 257), (1, 333, 300), (2, 700, 777))
"""Batch rows, queries, keys."""
