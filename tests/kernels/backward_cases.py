"""Rows for backward kernels: every row that has them, and rows whose captured tensors are summed in other ways."""

from __future__ import annotations

import textwrap

from attncompile.codegen.triton.backward import why_not_backward
from tests.cases import Case
from tests.kernels.cases import ALL_CASES


def _row(name: str, text: str, sizes: dict[str, int], note: str = "", **ranges: tuple[int, int]) -> Case:
    head, _, rest = textwrap.dedent(text).strip().partition("\n")
    return Case(name, f"{name}   {head}\n" + textwrap.indent(rest, "  "), sizes, note, ranges)


def _biased(
    name: str, score: str, given: str, sizes: dict[str, int], note: str = "", mask: str = "j ≤ i + J − I"
) -> Case:
    return _row(
        name,
        f"""
        attend  q[B,4,I,16]  k,v[B,2,J,16]  float32
        score  {score}
        mask   {mask}
        kv_head h // 2
        norm   softmax (float32)
        given  {given}
        """,
        sizes,
        note,
    )


RECTANGLE = {"B": 2, "I": 21, "J": 37}

OWN_CASES: tuple[Case, ...] = (
    _biased("slopes", "0.25·s + slopes[h]·(j − i)·0.1", "slopes[4]:float32", RECTANGLE, "ALiBi with learned slopes"),
    _biased(
        "slopes-by-group",
        "0.25·s + slopes[h // 2]·(j − i)·0.1",
        "slopes[2]:float32",
        RECTANGLE,
        "a table by rows: places are noted beside the sums",
    ),
    _biased("key-bias", "0.25·s + bias[b, 0, 0, j]", "bias[B,1,1,J]:float32", RECTANGLE, "summed over the queries"),
    _biased("key-bias-heads", "0.25·s + bias[j, h]", "bias[J,4]:float32", RECTANGLE, "axes in another order"),
    _biased("key-table", "0.25·s + bias[b, j // 3]", "bias[B,J]:float32", RECTANGLE, "several keys load one element"),
    _biased("query-temperature", "s·temperature[b, i]", "temperature[B,I]:float32", RECTANGLE),
    _biased("bias-transposed", "0.25·s + bias[j, i, h]", "bias[J,I,4]:float32", RECTANGLE),
    _biased("bias-scalar", "0.25·s + 0.1·weight[0]·float(abs(i − j))", "weight[1]:float32", RECTANGLE),
    _biased(
        "bias-twice",
        "0.25·s + bias[h, i, j] + bias[h, 0, j]",
        "bias[4,I,J]:float32",
        RECTANGLE,
        "two loads of one tensor",
    ),
    _biased(
        "bias-inside",
        "10.0·tanh(0.025·s + 0.1·bias[h, i, j])",
        "bias[4,I,J]:float32",
        RECTANGLE,
        "a softcap around the bias",
    ),
    _biased("bias-everything", "0.25·s + bias[b, h, i, j]", "bias[B,4,I,J]:float32", RECTANGLE),
    _row(
        "edit-by-pair",
        """
        attend  q,k,v[B,2,I,16]  float32
        score  0.25·s
        mask   j ≤ i
        weight w·gate[i, j]
        norm   softmax (float32)
        given  gate[I,I]:float32
        """,
        {"B": 2, "I": 21},
        "a factor of the weights",
    ),
    _row(
        "window-documents",
        """
        attend  q[B,8,I,72]  k[B,2,J,72]  v[B,2,J,40]  float32
        score  0.1·s
        mask   j ≤ i and j > i − 40 and document[b, j] = document[b, i]
        kv_head h // 4
        norm   softmax (float32)
        given  document[B,J]:int64
        """,
        {"B": 1, "I": 60, "J": 60},
        document=(0, 3),
    ),
    *(
        _row(
            f"tail-{length}",
            """
            attend  q[B,8,I,24]  k,v[B,1,I,24]  float32
            score  0.2·s
            mask   j ≤ i
            kv_head 0
            norm   softmax (float32)
            """,
            {"B": 1, "I": length},
            "one KV head for eight",
        )
        for length in (1, 5, 33)
    ),
    _row(
        "one-tensor",
        """
        attend  x[B,2,I,16]  x  x  float32
        score  0.25·s
        mask   j ≤ i
        norm   softmax (float32)
        """,
        {"B": 1, "I": 20},
        "query, key and value are one tensor",
    ),
)

BACKWARD_CASES: tuple[Case, ...] = (
    *(case for case in ALL_CASES if why_not_backward(case.spec) is None),
    *OWN_CASES,
)
BACKWARD_BY_NAME: dict[str, Case] = {case.name: case for case in (*ALL_CASES, *OWN_CASES)}

__all__ = ["BACKWARD_BY_NAME", "BACKWARD_CASES", "OWN_CASES"]
