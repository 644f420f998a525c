"""Operations compute their formulas."""

from __future__ import annotations

import cmath
import itertools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import pytest
import torch

from attncompile.ir import (
    Attend,
    Cache,
    Normalizer,
    Position,
    Project,
    Quantize,
    Regroup,
    Scan,
    grouped,
)
from attncompile.ir.expr import TRUE, Const, Expr, Index, Size
from attncompile.ir.simplify import simplify
from tests.ir.operands import LOWEST, PLAIN, SHAPES, Shape, expr, operands

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


@pytest.mark.parametrize("shape", ((0, 2, 5, 4), (2, 2, 0, 4)), ids=("no-rows", "no-positions"))
def test_quantize_of_nothing_is_nothing(shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape)
    codes, scale = Quantize("x", block=3).parts(x)
    assert codes.shape == shape and scale.shape == (*shape[:2], -(-shape[2] // 3))


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3"])
def test_quantize_is_exported_for_all_lengths(dtype: str) -> None:
    rounding = Quantize("x", dtype, block=32, smooth=True)

    class Rounded(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return rounding.reference({"x": x}, {}, torch.float32)["out"]

    free = {0: torch.export.Dim("batch"), 2: torch.export.Dim("length")}
    exported = torch.export.export(Rounded(), (torch.randn(2, 3, 37, 4),), dynamic_shapes={"x": free}).module()
    for length in (1, 9, 32, 64, 100):
        x = torch.randn(1, 3, length, 4)
        assert torch.equal(exported(x), Rounded()(x))


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


def test_a_place_without_a_token_holds_zeros() -> None:
    tensor = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    moved = Regroup("k", expr("where(i = 2, −1, 2·i − 2)"), Const(5)).reference({"k": tensor}, {}, torch.float64)["out"]
    wanted = torch.zeros(2, 3, 5, 4, dtype=torch.float64)
    for place, token in ((1, 0), (3, 4)):
        wanted[:, :, place] = tensor[:, :, token]
    assert torch.equal(moved, wanted)
