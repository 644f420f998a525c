"""Operations: types, what does not fit, and cost."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import pytest
import torch

from attncompile.ir import (
    Cache,
    Dequantize,
    Gather,
    Normalizer,
    Operation,
    Position,
    Project,
    Quantize,
    Regroup,
    Scan,
    TensorType,
    grouped,
    tensor_type,
)
from attncompile.ir.expr import Const, Index, Size
from attncompile.ir.operators import Kind
from attncompile.ir.ops import OPERATIONS
from attncompile.ir.text import parse_expr
from tests.ir.operands import PLAIN, expr


def attend_types(**changes: TensorType) -> dict[str, TensorType]:
    return {
        "q": tensor_type("bhid", ("B", 6, "I", 16)),
        "k": tensor_type("bgjd", ("B", 2, "J", 16)),
        "v": tensor_type("bgje", ("B", 2, "J", 8)),
        "keep": tensor_type("bj", ("B", "J"), "bool"),
        "bias": tensor_type("hij", (6, "I", "J"), "float16"),
        **changes,
    }


GROUPED = replace(PLAIN, kv_head=grouped(6, 2))


@dataclass(frozen=True)
class TypeCase:
    name: str
    operation: Operation
    types: Mapping[str, TensorType]
    expected: Mapping[str, str] = field(default_factory=dict)


TYPED = [
    TypeCase("attend", GROUPED, attend_types(), {"out": "[B,6,I,8] float32", "lse": "[B,6,I] float32"}),
    TypeCase(
        "attend in half",
        GROUPED,
        {name: replace(found, dtype="float16") for name, found in attend_types().items()},
        {"out": "[B,6,I,8] float16", "lse": "[B,6,I] float32"},
    ),
    TypeCase(
        "scan",
        Scan("q", "k", "v", kv_head=grouped(6, 2)),
        attend_types(k=tensor_type("bgid", ("B", 2, "I", 16)), v=tensor_type("bgie", ("B", 2, "I", 8))),
        {"out": "[B,6,I,8] float32"},
    ),
    TypeCase("position", Position("q", channels=8), attend_types(), {"out": "[B,6,I,16] float32"}),
    TypeCase(
        "project",
        Project("x", "kernel", heads=4),
        {"x": tensor_type("bic", ("B", "I", 24)), "kernel": tensor_type("oc", (32, 24))},
        {"out": "[B,4,I,8] float32"},
    ),
    TypeCase(
        "cache",
        Cache("old", "new"),
        {"old": tensor_type("bgpd", ("B", 2, "P", 16)), "new": tensor_type("bgid", ("B", 2, "I", 16))},
        {"out": "[B,2,I + P,16] float32"},
    ),
    TypeCase("quantize", Quantize("k"), attend_types(), {"out": "[B,2,J,16] float32"}),
    TypeCase(
        "gather",
        Gather(
            "pages",
            (parse_expr("table[b, j // 16]", {"table": Kind.INT}), *map(parse_expr, ("j % 16", "g", "d"))),
            tuple(map(parse_expr, ("B", "2", "16·M", "8"))),
        ),
        {"pages": tensor_type("psgd", ("P", 16, 2, 8), "int8"), "table": tensor_type("bm", ("B", "M"), "int32")},
        {"out": "[B,2,16·M,8] int8"},
    ),
    TypeCase(
        "dequantize",
        Dequantize("codes", bits=4, dtype="bfloat16"),
        {"codes": tensor_type("bgjd", ("B", 2, "J", 8), "uint8")},
        {"out": "[B,2,J,16] bfloat16"},
    ),
    TypeCase("regroup", Regroup("k", expr("2·i"), Const(4)), attend_types(), {"out": "[B,2,4,16] float32"}),
]


@pytest.mark.parametrize("case", TYPED, ids=lambda case: case.name)
def test_types_are_inferred(case: TypeCase) -> None:
    assert {name: str(found) for name, found in case.operation.infer(case.types).items()} == case.expected


def test_every_operation_has_a_typed_case() -> None:
    assert {type(case.operation) for case in TYPED} == set(OPERATIONS.values())


@pytest.mark.parametrize("case", TYPED, ids=lambda case: case.name)
def test_inferred_types_are_those_of_the_reference(case: TypeCase) -> None:
    sizes = {"B": 2, "I": 3, "J": 3, "P": 4, "M": 2}
    tensors = {
        name: torch.randn([int(s.value) if isinstance(s, Const) else sizes[s.name] for s in found.sizes])  # type: ignore[attr-defined]
        for name, found in case.types.items()
    }
    made = case.operation.reference(tensors, sizes, torch.float32)
    for name, found in case.operation.infer(case.types).items():
        assert made[name].numel() == found.elements(sizes)
        assert made[name].dim() == len(found.axes)


ILL_TYPED = [
    (
        GROUPED,
        attend_types(k=tensor_type("bgjd", ("B", 2, "J", 12))),
        "attend: axis d of q is 16, but axis d of k is 12",
    ),
    (
        GROUPED,
        attend_types(k=tensor_type("bgjd", ("C", 2, "J", 16))),
        "attend: axis b of q is B, but axis b of k is C",
    ),
    (
        GROUPED,
        attend_types(v=tensor_type("bgje", ("B", 2, "I", 8))),
        "attend: axis j of k is J, but axis j of v is I",
    ),
    (
        GROUPED,
        attend_types(v=tensor_type("bgje", ("B", 6, "J", 8))),
        "attend: axis g of k is 2, but axis g of v is 6",
    ),
    (
        GROUPED,
        attend_types(q=tensor_type("hid", (6, "I", 16))),
        "attend: q should have 4 axes, but is q[6,I,16] float32",
    ),
    (replace(GROUPED, key="key"), attend_types(), "attend reads 'key', which nothing defines"),
    (PLAIN, attend_types(), "attend: kv_head h of 6 query heads reaches from 0 to 5, but axis g of k is 2"),
    (replace(GROUPED, kv_head=expr("h // 3 − 1")), attend_types(), "reaches from -1 to 0"),
    (replace(GROUPED, divisor=expr("t + 1.0")), attend_types(), "attend: only sum and l1 divide by a sum (t + 1.0)"),
    (
        replace(GROUPED, lse="", mask=expr("j ≤ i"), norm=Normalizer("sum")),
        attend_types(),
        "attend: a masked position of the normaliser sum (float32) needs a finite fill",
    ),
    (replace(GROUPED, score=expr("j")), attend_types(), "attend: score j is int, should be float"),
    (replace(GROUPED, mask=expr("s")), attend_types(), "attend: mask s is float, should be bool"),
    (replace(GROUPED, mask=expr("s > 0.0")), attend_types(), "attend: mask s > 0.0 may not read s"),
    (replace(GROUPED, score=expr("s + w")), attend_types(), "attend: score s + w may not read w"),
    (replace(GROUPED, weight=expr("w·s")), attend_types(), "attend: weight w·s may not read s"),
    (replace(GROUPED, kv_head=expr("h + j")), attend_types(), "attend: kv_head h + j may not read j, only h"),
    (
        replace(GROUPED, score=expr("s·d")),
        attend_types(),
        "reads 'd'; only b, h, i, j, s, t, w have a meaning here",
    ),
    (
        replace(GROUPED, score=expr("s + gate[h]")),
        attend_types(),
        "loads 'gate', which is not a tensor of the Spec",
    ),
    (
        replace(GROUPED, score=expr("s + bias[i, j]")),
        attend_types(),
        "bias[i, j] (float) does not fit bias[6,I,J] float16",
    ),
    (
        replace(GROUPED, mask=expr("keep[b, j]")),
        attend_types(keep=tensor_type("bj", ("B", "J"), "int64")),
        "keep[b, j] (bool) does not fit keep[B,J] int64",
    ),
    (
        replace(GROUPED, mask=expr("keep[b, s]")),
        attend_types(),
        "index s of keep[b, s] is float, should be int",
    ),
    (
        replace(GROUPED, norm=Normalizer("sigmoid")),
        attend_types(),
        "attend: only softmax has a log-sum-exp, the normaliser is sigmoid (float32)",
    ),
    (Scan("q", "k", "v"), attend_types(), "scan: axis i of q is I, but axis j of k is J"),
    (Scan("q", "q", "q", decay=Const(1)), attend_types(), "scan: decay 1 is int, should be float"),
    (
        Scan("q", "q", "q", decay=expr("exp(float(i))")),
        attend_types(),
        "scan: exp(float(i)) reads 'i'; only h have",
    ),
    (
        Scan("q", "q", "q", mask=expr("j ≤ i")),
        attend_types(),
        "scan: j ≤ i reads 'i'; only b, j have a meaning in its mask",
    ),
    (
        Scan("q", "q", "q", feature="cos"),
        attend_types(),
        "unknown feature map 'cos'; choose one of identity, elu1, relu",
    ),
    (Position("q", channels=18), attend_types(), "position: channels must be even and at most 16, got 18"),
    (Position("q", channels=3), attend_types(), "position: channels must be even and at most 16, got 3"),
    (
        Position("q", convention="neox"),
        attend_types(),
        "unknown convention 'neox'; choose half or interleaved",
    ),
    (Position("q", cos=Const(1)), attend_types(), "position: cos 1 is int, should be float"),
    (Position("q", cos=expr("cos(j)")), attend_types(), "reads 'j'; only b, d, i have a meaning here"),
    (
        Project("x", "kernel", heads=3),
        {"x": tensor_type("bic", ("B", "I", 24)), "kernel": tensor_type("oc", (32, 24))},
        "project: 32 outputs do not split into 3 heads",
    ),
    (
        Project("x", "kernel", heads=0),
        {"x": tensor_type("bic", ("B", "I", 24)), "kernel": tensor_type("oc", ("O", 24))},
        "project: heads must be at least 1, got 0",
    ),
    (
        Project("x", "kernel"),
        {"x": tensor_type("bic", ("B", "I", 24)), "kernel": tensor_type("oc", (32, 16))},
        "project: axis c of x is 24, but axis c of kernel is 16",
    ),
    (
        Project("x", "kernel", "bias"),
        {
            "x": tensor_type("bic", ("B", "I", 24)),
            "kernel": tensor_type("oc", (32, 24)),
            "bias": tensor_type("o", (24,)),
        },
        "project: axis o of kernel is 32, but axis o of bias is 24",
    ),
    (Cache("k", "q"), attend_types(), "cache: axis g of k is 2, but axis h of q is 6"),
    (Quantize("q", dtype="int4"), attend_types(), "quantize: unknown dtype 'int4'"),
    (Quantize("q", block=0), attend_types(), "quantize: block must be at least 1, got 0"),
    (Regroup("q", expr("j")), attend_types(), "reads 'j'; only i have a meaning here"),
    (Regroup("q", Const(1.0)), attend_types(), "regroup: at 1.0 is float, should be int"),
]


@pytest.mark.parametrize(
    ("operation", "types", "message"), ILL_TYPED, ids=[message[:60] for *_, message in ILL_TYPED]
)
def test_what_does_not_fit_is_refused(
    operation: Operation, types: Mapping[str, TensorType], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        operation.infer(types)


def test_symbolic_head_counts_are_taken_on_trust() -> None:
    types = attend_types(q=tensor_type("bhid", ("B", "H", "I", 16)))
    assert str(PLAIN.infer(types)["out"]) == "[B,H,I,8] float32"
    grouped_by_size = replace(PLAIN, kv_head=Index("h") // (Size("H") // Size("G")))
    assert str(grouped_by_size.infer(attend_types())["out"]) == "[B,6,I,8] float32"


# Cost


def test_flops_of_a_case_worked_out_by_hand() -> None:
    sizes = {"B": 2, "I": 10, "J": 20, "P": 4}
    # 2·6·10·20 pairs, 16 multiply-adds for the score and 8 for the value
    assert GROUPED.flops(attend_types(), sizes) == 2 * 2400 * (16 + 8)
    scan = Scan("q", "k", "v")
    types = attend_types(k=tensor_type("bgid", ("B", 6, "I", 16)), v=tensor_type("bgie", ("B", 6, "I", 8)))
    # 120 tokens; each updates a 16x8 state and reads it
    assert scan.flops(types, sizes) == 120 * 2 * 2 * 16 * 8
    project = Project("x", "kernel", heads=4)
    matrix = {"x": tensor_type("bic", ("B", "I", 24)), "kernel": tensor_type("oc", (32, 24))}
    assert project.flops(matrix, sizes) == 2 * 20 * 24 * 32
    assert Cache("old", "new").flops({}, sizes) == 0
