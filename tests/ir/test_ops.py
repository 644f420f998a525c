from __future__ import annotations

import cmath
import itertools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import pytest
import torch

from attncompile.ir import (
    Attend,
    Cache,
    Dequantize,
    Gather,
    Normalizer,
    Operation,
    Position,
    Project,
    Quantize,
    Scan,
    TensorType,
    grouped,
    tensor_type,
)
from attncompile.ir.expr import TRUE, Const, Expr, Index, Size
from attncompile.ir.operators import Kind
from attncompile.ir.ops import OPERATIONS
from attncompile.ir.simplify import simplify
from attncompile.ir.text import parse_expr

KINDS = {"keep": Kind.BOOL, "bias": Kind.FLOAT, "gate": Kind.FLOAT}
LOWEST = torch.finfo(torch.float32).min


def expr(text: str) -> Expr:
    return parse_expr(text, KINDS)


@dataclass(frozen=True)
class Shape:
    """Sizes of an attention: batch, query heads, KV heads, queries, keys, channels of query and value."""

    B: int = 2
    H: int = 2
    G: int = 2
    I: int = 5  # noqa: E741
    J: int = 5
    D: int = 4
    E: int = 4


SHAPES = [
    Shape(),
    Shape(B=1, H=1, G=1, I=1, J=1, D=1, E=1),
    Shape(I=1, J=7),
    Shape(I=7, J=3),
    Shape(H=6, G=2),
    Shape(H=4, G=1, I=3, J=6, D=3, E=5),
]


def operands(shape: Shape) -> dict[str, torch.Tensor]:
    double = torch.float64
    return {
        "q": torch.randn(shape.B, shape.H, shape.I, shape.D, dtype=double),
        "k": torch.randn(shape.B, shape.G, shape.J, shape.D, dtype=double),
        "v": torch.randn(shape.B, shape.G, shape.J, shape.E, dtype=double),
        "keep": torch.rand(shape.B, shape.J) < 0.6,
        "bias": torch.randn(shape.H, shape.I, shape.J, dtype=double),
        "gate": torch.rand(shape.H, dtype=double),
    }


Score = Callable[[float, int, int, int, int], float]
Visible = Callable[[int, int, int, int], bool]


@dataclass(frozen=True)
class AttendCase:
    """An Attend, and the same thing as Python functions of one position."""

    name: str
    attend: Attend
    score: Callable[[Mapping[str, torch.Tensor]], Score] = lambda t: lambda s, b, h, i, j: s
    visible: Callable[[Mapping[str, torch.Tensor]], Visible] = lambda t: lambda b, h, i, j: True
    fill: Callable[[float], float] = lambda s: -math.inf
    weight: Callable[[Mapping[str, torch.Tensor]], Callable[[float, int], float]] = lambda t: lambda w, h: w
    divisor: Callable[[list[float]], float] = sum


PLAIN = Attend("q", "k", "v", lse="lse")


def _causal(t: Mapping[str, torch.Tensor]) -> Visible:
    return lambda b, h, i, j: j <= i


def _padded(t: Mapping[str, torch.Tensor]) -> Visible:
    return lambda b, h, i, j: j <= i and bool(t["keep"][b, j])


PADDED = replace(PLAIN, mask=expr("j ≤ i and keep[b, j]"))
UNSOFTENED = replace(PADDED, lse="", fill=Const(0.0))
CASES = [
    AttendCase("plain", PLAIN),
    AttendCase("scaled", replace(PLAIN, score=expr("0.5·s")), score=lambda t: lambda s, b, h, i, j: s * 0.5),
    AttendCase(
        "capped with a bias",
        replace(PLAIN, score=expr("3.0·tanh(s / 3.0) + bias[h, i, j]")),
        score=lambda t: lambda s, b, h, i, j: 3 * math.tanh(s / 3) + float(t["bias"][h, i, j]),
    ),
    AttendCase(
        "linear bias",
        replace(PLAIN, score=expr("s + exp2(−h − 1)·(j − i)")),
        score=lambda t: lambda s, b, h, i, j: s + 2.0 ** (-h - 1) * (j - i),
    ),
    AttendCase("causal", replace(PLAIN, mask=expr("j ≤ i")), visible=_causal),
    AttendCase("padded", PADDED, visible=_padded),
    AttendCase("empty rows zero", replace(PADDED, norm=Normalizer(empty="zero")), visible=_padded),
    AttendCase(
        "filled with the lowest float",
        replace(PADDED, fill=Const(LOWEST)),
        visible=_padded,
        fill=lambda s: LOWEST,
    ),
    AttendCase("filled with -1e4", replace(PADDED, fill=Const(-1e4)), visible=_padded, fill=lambda s: -1e4),
    AttendCase(
        "the fill is added",
        replace(PADDED, fill=expr("s − 10000.0")),
        visible=_padded,
        fill=lambda s: s - 10000,
    ),
    AttendCase(
        "nothing visible",
        replace(PLAIN, mask=expr("false"), fill=expr("s − 10000.0")),
        visible=lambda t: lambda b, h, i, j: False,
        fill=lambda s: s - 10000,
    ),
    AttendCase("sigmoid", replace(PADDED, lse="", norm=Normalizer("sigmoid")), visible=_padded),
    AttendCase("relu", replace(PADDED, lse="", norm=Normalizer("relu")), visible=_padded),
    AttendCase("none", replace(UNSOFTENED, norm=Normalizer("none")), visible=_padded, fill=lambda s: 0.0),
    AttendCase(
        "divided by the sum",
        replace(UNSOFTENED, score=expr("s·s"), norm=Normalizer("sum"), divisor=expr("t + 0.001")),
        score=lambda t: lambda s, b, h, i, j: s * s,
        visible=_padded,
        fill=lambda s: 0.0,
        divisor=lambda logits: sum(logits) + 0.001,
    ),
    AttendCase(
        "divided by the sum of absolute values",
        replace(UNSOFTENED, norm=Normalizer("l1"), divisor=expr("max(1.0, t)")),
        visible=_padded,
        fill=lambda s: 0.0,
        divisor=lambda logits: max(1.0, sum(map(abs, logits))),
    ),
    AttendCase(
        "gated weights",
        replace(PLAIN, weight=expr("gate[h]·w − 0.125")),
        weight=lambda t: lambda w, h: float(t["gate"][h]) * w - 0.125,
    ),
]


def attend_by_loops(
    case: AttendCase, shape: Shape, t: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """``out`` and ``lse``, one row at a time, in Python numbers."""
    out = torch.zeros(shape.B, shape.H, shape.I, shape.E, dtype=torch.float64)
    lse = torch.zeros(shape.B, shape.H, shape.I, dtype=torch.float64)
    score, visible, edit = case.score(t), case.visible(t), case.weight(t)
    for b, h, i in itertools.product(range(shape.B), range(shape.H), range(shape.I)):
        g = h // (shape.H // shape.G)
        logits = []
        for j in range(shape.J):
            s = sum(float(t["q"][b, h, i, d]) * float(t["k"][b, g, j, d]) for d in range(shape.D))
            logits.append(score(s, b, h, i, j) if visible(b, h, i, j) else case.fill(s))
        top = max(logits)
        match case.attend.norm.kind:
            case "softmax" if top == -math.inf:
                total = 0.0
                weights = [0.0 if case.attend.norm.empty == "zero" else math.nan] * shape.J
            case "softmax":
                total = math.fsum(math.exp(logit - top) for logit in logits)
                weights = [math.exp(logit - top) / total for logit in logits]
            case "sigmoid":
                weights = [0.0 if logit == -math.inf else 1 / (1 + math.exp(-logit)) for logit in logits]
            case "relu":
                weights = [max(logit, 0.0) for logit in logits]
            case "none":
                weights = logits
            case _:
                weights = [logit / case.divisor(logits) for logit in logits]
        if case.attend.norm.kind == "softmax":
            lse[b, h, i] = top + math.log(total) if total else -math.inf
        for j, weight in enumerate(weights):
            out[b, h, i] += edit(weight, h) * t["v"][b, g, j]
    return out, lse


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_attend_is_its_formula(case: AttendCase, shape: Shape) -> None:
    tensors = operands(shape)
    attend = replace(case.attend, kv_head=grouped(shape.H, shape.G))
    found = attend.reference(tensors, {}, torch.float64)
    out, lse = attend_by_loops(case, shape, tensors)
    torch.testing.assert_close(found["out"], out, equal_nan=True)
    if attend.lse:
        torch.testing.assert_close(found["lse"], lse, equal_nan=True)


def test_attend_computes_in_the_dtype_it_is_given() -> None:
    tensors = operands(Shape())
    assert PLAIN.reference(tensors, {}, torch.float32)["out"].dtype is torch.float32
    half = {
        name: tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }
    assert PLAIN.reference(half, {}, torch.float64)["out"].dtype is torch.float64


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("feature", ["identity", "elu1", "relu"])
@pytest.mark.parametrize("shape", [s for s in SHAPES if s.I == s.J], ids=str)
def test_scan_is_its_recurrence(shape: Shape, feature: str, normalize: bool, padded: bool) -> None:
    tensors = operands(shape)
    scan = Scan(
        "q",
        "k",
        "v",
        mask=Index("j") % 3 >= 1 if padded else TRUE,
        decay=expr("1.0 − exp2(−h − 2)"),
        scale=0.5,
        feature=feature,
        normalize=normalize,
        kv_head=grouped(shape.H, shape.G),
    )
    found = scan.reference(tensors, {}, torch.float64)["out"]

    def phi(x: torch.Tensor) -> torch.Tensor:
        if feature == "identity":
            return x
        return x.clamp(min=0) if feature == "relu" else torch.where(x > 0, x + 1, x.exp())

    for b, h in itertools.product(range(shape.B), range(shape.H)):
        g, decay = h // (shape.H // shape.G), 1 - 2.0 ** (-h - 2)
        state = torch.zeros(shape.D, shape.E, dtype=torch.float64)
        total = torch.zeros(shape.D, dtype=torch.float64)
        for t in range(shape.I):
            key, query = phi(tensors["k"][b, g, t]), phi(tensors["q"][b, h, t])
            key = torch.zeros_like(key) if padded and t % 3 == 0 else key
            state = decay * state + torch.outer(key, tensors["v"][b, g, t])
            total = decay * total + key
            expected = 0.5 * query @ state
            if normalize:
                expected = expected / max(abs(0.5 * float(query @ total)), 1.0)
            torch.testing.assert_close(found[b, h, t], expected)


@pytest.mark.parametrize("convention", ["half", "interleaved"])
@pytest.mark.parametrize("channels", [0, 2, 6])
def test_position_rotates_pairs_as_complex_numbers(convention: str, channels: int) -> None:
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    # the angle of a pair, by the pair's number
    pair = "(d % R)" if convention == "half" else "(d // 2)"
    angle = f"i·10.0^(−0.5·{pair.replace('R', str(max(channels // 2, 1)))})"
    position = Position(
        "x", cos=expr(f"cos({angle})"), sin=expr(f"sin({angle})"), channels=channels, convention=convention
    )
    found = position.reference({"x": x}, {}, torch.float64)["out"]
    assert torch.equal(found[..., channels:], x[..., channels:])
    for i, p in itertools.product(range(5), range(channels // 2)):
        first, second = (p, p + channels // 2) if convention == "half" else (2 * p, 2 * p + 1)
        turned = torch.complex(x[:, :, i, first], x[:, :, i, second]) * cmath.exp(1j * i * 10 ** (-0.5 * p))
        torch.testing.assert_close(found[:, :, i, first], turned.real)
        torch.testing.assert_close(found[:, :, i, second], turned.imag)


@pytest.mark.parametrize(("length", "block"), [(7, 3), (1, 4), (6, 3), (5, 64), (4, 1)])
@pytest.mark.parametrize("smooth", [False, True])
def test_quantize_rounds_each_block_by_its_largest_value(length: int, block: int, smooth: bool) -> None:
    x = torch.randn(2, 2, length, 3, dtype=torch.float64)
    x[0, 0] = 0.0
    found = Quantize("x", block=block, smooth=smooth).reference({"x": x}, {}, torch.float64)["out"]
    whole, scales = Quantize("x", block=block, smooth=smooth).parts(x)
    assert scales.shape == (2, 2, math.ceil(length / block))
    for b, h in itertools.product(range(2), range(2)):
        rows = [[float(v) for v in row] for row in x[b, h]]
        if smooth:
            means = [math.fsum(row[d] for row in rows) / length for d in range(3)]
            rows = [[value - mean for value, mean in zip(row, means, strict=True)] for row in rows]
        for start in range(0, length, block):
            part = rows[start : start + block]
            scale = max(abs(value) for row in part for value in row) / 127
            assert float(scales[b, h, start // block]) == pytest.approx(scale)
            for i, row in enumerate(part, start):
                for d, value in enumerate(row):
                    number = round(value / scale) if scale else 0
                    assert abs(number) <= 127 and float(whole[b, h, i, d]) == number
                    assert float(found[b, h, i, d]) == pytest.approx(number * scale)


@pytest.mark.parametrize("bias", ["", "bias"])
def test_project_splits_its_outputs_into_heads(bias: str) -> None:
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    kernel, offset = torch.randn(8, 5, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    found = Project("x", "kernel", bias, heads=2).reference(
        {"x": x, "kernel": kernel, "bias": offset}, {}, torch.float64
    )
    for b, h, i, d in itertools.product(range(2), range(2), range(3), range(4)):
        expected = sum(float(x[b, i, c]) * float(kernel[4 * h + d, c]) for c in range(5))
        assert float(found["out"][b, h, i, d]) == pytest.approx(
            expected + (float(offset[4 * h + d]) if bias else 0.0)
        )


@pytest.mark.parametrize("past", [0, 4])
def test_cache_puts_the_past_first(past: int) -> None:
    tensors = {"old": torch.randn(1, 2, past, 3), "new": torch.randn(1, 2, 2, 3)}
    found = Cache("old", "new").reference(tensors, {}, torch.float64)["out"]
    assert found.shape == (1, 2, past + 2, 3)
    for j in range(past + 2):
        expected = tensors["old"][:, :, j] if j < past else tensors["new"][:, :, j - past]
        assert torch.equal(found[:, :, j], expected.double())


# Gradients


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.attend.norm.kind != "relu"], ids=lambda case: case.name
)
def test_attend_is_differentiable(case: AttendCase) -> None:
    tensors = operands(Shape(B=1, H=2, G=1, I=3, J=3, D=2, E=2))
    tensors["keep"][:, 0] = (
        case.attend.norm.empty == "nan"
    )  # a row without keys has no gradient, unless it is zero
    attend = replace(case.attend, kv_head=grouped(2, 1))

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attend.reference({**tensors, "q": q, "k": k, "v": v}, {}, torch.float64)["out"]

    assert torch.autograd.gradcheck(run, [tensors[name].requires_grad_() for name in "qkv"])


@pytest.mark.parametrize("normalize", [False, True])
def test_scan_is_differentiable(normalize: bool) -> None:
    tensors = operands(Shape(B=1, H=2, G=2, I=4, J=4, D=2, E=3))
    scan = Scan("q", "k", "v", decay=expr("gate[h]"), feature="elu1", normalize=normalize)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return scan.reference({"q": q, "k": k, "v": v, "gate": gate}, {}, torch.float64)["out"]

    assert torch.autograd.gradcheck(run, [tensors[name].requires_grad_() for name in ("q", "k", "v", "gate")])


# Types


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


# Small things


GROUPS = [(4, 4, "h"), (6, 2, "h // 3"), (6, 1, "0"), (Size("H"), Size("H"), "h"), (Size("H"), 1, "h // H")]


@pytest.mark.parametrize(("heads", "groups", "text"), GROUPS)
def test_grouped_heads(heads: Expr | int, groups: Expr | int, text: str) -> None:
    assert simplify(grouped(heads, groups)) == expr(text)


@pytest.mark.parametrize(("heads", "groups"), [(6, 4), (6, 0), (2, 4)])
def test_heads_that_do_not_divide_are_refused(heads: int, groups: int) -> None:
    with pytest.raises(ValueError, match=f"{heads} query heads do not share {groups} KV heads evenly"):
        grouped(heads, groups)


@pytest.mark.parametrize(
    "text", ["softmax (float32)", "sigmoid (bfloat16)", "softmax (float16), empty rows zero"]
)
def test_normalisers_read_back(text: str) -> None:
    assert str(Normalizer.parse(text)) == text


BAD_NORMALISERS = [
    ("softmax", "cannot read the normaliser 'softmax'"),
    ("softmax (float32) rows", "cannot read the normaliser"),
    ("argmax (float32)", "unknown kind 'argmax' of a normaliser; choose one of softmax, sigmoid, relu"),
    ("softmax (int8)", "unknown dtype 'int8' of a normaliser; choose one of float64"),
]


@pytest.mark.parametrize(("text", "message"), BAD_NORMALISERS)
def test_bad_normalisers_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Normalizer.parse(text)
