"""What is tried of the operators around attention: rotary positions, normalisation, products with packed weights."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.onnx_capabilities.attempt import MICROSOFT, Attempt, Case, Results, attempted, draw
from benchmarks.onnx_capabilities.formulas import flat, root_mean_square, rotary, tables

BATCH, HEADS, CHANNELS, WIDTH = 2, 4, 16, 48
EPSILON = 1e-3


def turned(
    dtype: torch.dtype,
    length: int,
    *,
    standard: bool,
    flat_heads: bool = True,
    interleaved: bool = False,
    partly: bool = False,
    positions: str = "",
    scale: float = 0.0,
) -> Case:
    """One call of RotaryEmbedding.

    Args:
        dtype: of the operand; length: positions in it.
        standard: of the standard, else ONNX Runtime's own.
        flat_heads: ``[B, S, H·D]`` rather than ``[B, H, S, D]``; partly: half of the channels turn.
        positions: ``[B, S]``, ``[1]`` for the first, or none: then tables ``[B, S, R/2]`` (standard).
        scale: ONNX Runtime's attribute of that name.
    """
    channels = CHANNELS // 2 if partly else CHANNELS
    x = draw("states", BATCH, HEADS, length, CHANNELS, dtype=dtype)
    cos, sin = (table.to(dtype) for table in tables(length + 9, channels))
    ids = (torch.arange(length) * 3 + torch.tensor([[0], [2]])) % (length + 9)
    first = torch.tensor([4])
    at = {"[B, S]": ids, "[1]": first + torch.arange(length), "": ids}[positions]

    def reference(as_dtype: torch.dtype) -> Results:
        made = rotary(x.to(as_dtype), cos[at].to(as_dtype), sin[at].to(as_dtype), interleaved=interleaved)
        return [flat(made) if flat_heads else made]

    operand = flat(x).contiguous() if flat_heads else x
    attributes: dict[str, Any] = {"num_heads": HEADS} if flat_heads or partly else {}
    optional = {"interleaved": int(interleaved), "rotary_embedding_dim": channels if partly else 0, "scale": scale}
    attributes |= {name: number for name, number in optional.items() if number}
    given = {"[B, S]": ids, "[1]": first, "": None}[positions]
    if standard:
        cached = [cos, sin] if positions else [cos[ids], sin[ids]]
        return Case([operand, *cached, given], attributes, reference, 2)
    return Case([operand, given, cos, sin], attributes, reference, 2)


def normalised(
    dtype: torch.dtype,
    length: int,
    *,
    mean: bool,
    skip: str = "",
    shift: bool = False,
    bias: bool = False,
    total: bool = False,
) -> Case:
    """One call of LayerNormalization, of its root-mean-square forms, or of those that add first.

    Args:
        dtype: of the states; length: rows.
        mean: subtract the mean; skip: shape of what is added first; shift: beta; bias: one more summand.
        total: the sum is a result.
    """
    x = draw("states", BATCH, length, WIDTH, dtype=dtype) + 1
    shapes = {"[B, S, C]": (BATCH, length, WIDTH), "[1, S, C]": (1, length, WIDTH), "[S, C]": (length, WIDTH)}
    added = draw("skip", *shapes[skip], dtype=dtype) if skip else None
    weight = draw("weight", WIDTH, dtype=dtype)
    beta = draw("beta", WIDTH, dtype=dtype) if shift else None
    more = draw("bias", WIDTH, dtype=dtype) if bias else None

    def reference(as_dtype: torch.dtype) -> Results:
        whole = x.to(as_dtype)
        for part in (added, more):
            whole = whole if part is None else whole + part.to(as_dtype)
        if mean:
            shiftless = beta.to(as_dtype) if beta is not None else None
            made = torch.nn.functional.layer_norm(whole, (WIDTH,), weight.to(as_dtype), shiftless, EPSILON)
        else:
            made = root_mean_square(whole, weight.to(as_dtype), EPSILON)
        return [made, None, None, whole] if total else [made]

    middle = [added] if skip else []
    last = [beta] if mean else []
    inputs = [x, *middle, weight, *last, *([more] if skip else [])]
    attributes: dict[str, Any] = {"epsilon": EPSILON} | ({} if skip else {"axis": -1})
    return Case(inputs, attributes, reference, WIDTH)


def packed_product(
    dtype: torch.dtype,
    length: int,
    *,
    bits: int = 4,
    block: int = 32,
    zero: str = "",
    bias: bool = False,
    level: int = 0,
    inner: int = 128,
) -> Case:
    """One call of MatMulNBits.

    Args:
        dtype: of the states; length: rows.
        bits, block: of the weights; zero: ``packed`` or ``float`` zero points; level: accuracy_level.
        inner: channels of the states.
    """
    outer = 40
    blocks = -(-inner // block)
    x = draw("states", length, inner, dtype=dtype)
    numbers = (draw("numbers", outer, blocks, block).abs() * 1000).long() % 2**bits
    scales = (0.02 + 0.01 * draw("scales", outer, blocks).abs()).to(dtype)
    points = torch.full((outer, blocks), 2 ** (bits - 1))
    if zero:
        points = (draw("points", outer, blocks).abs() * 1000).long() % 2**bits
    sums = draw("bias", outer, dtype=dtype) if bias else None
    weights = ((numbers - points[..., None]) * scales.double()[..., None]).reshape(outer, -1)[:, :inner]

    def reference(as_dtype: torch.dtype) -> Results:
        made = x.to(as_dtype) @ weights.to(as_dtype).T
        return [made if sums is None else made + sums.to(as_dtype)]

    per = 8 // bits
    stored = _packed(numbers.reshape(outer, blocks, block // per, per), bits)
    given: torch.Tensor | None = None
    if zero == "float":
        given = points.to(dtype)
    elif zero == "packed":
        lacking = -blocks % per
        filled = torch.cat([points, points.new_zeros(outer, lacking)], 1)
        given = _packed(filled.reshape(outer, -1, per), bits)
    attributes = {"K": inner, "N": outer, "bits": bits, "block_size": block}
    rounding = 0.0
    if level:
        attributes["accuracy_level"] = level
    if level == 4:
        # states may be rounded to int8 with one scale per block: each is off by half of a 127th of its block's largest
        halves = torch.nn.functional.pad(x.double(), (0, blocks * block - inner)).reshape(length, blocks, block)
        off = (halves.abs().amax(-1, keepdim=True) / 254).expand(halves.shape).reshape(length, -1)[:, :inner]
        rounding = float((off @ weights.abs().T).max())
    inputs = [x, stored, scales, given, None, sums]
    constants = frozenset({1, 2} | ({3} if zero else set()) | ({5} if bias else set()))
    return Case(inputs, attributes, reference, inner, constants=constants, rounding=rounding)


def _packed(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """The last axis in one byte, the first in the lowest bits."""
    places = torch.arange(numbers.shape[-1]) * bits
    return (numbers << places).sum(-1).to(torch.uint8)


def attempts() -> Iterator[Attempt]:
    """All of them."""
    for domain, opset in ((MICROSOFT, 18), ("", 23)):
        row = partial(attempted, partial(turned, standard=domain == ""), domain, "RotaryEmbedding", opset=opset)
        all_rows = "[B, S]"
        yield row("positions [B, S], operand [B, S, H·D]", positions=all_rows)
        yield row("positions [B, S], operand [B, H, S, D]", positions=all_rows, flat_heads=False)
        yield row("interleaved", {"positions": all_rows}, interleaved=True)
        yield row("a part of the channels", positions=all_rows, partly=True)
        if domain:
            yield row("position of the first, operand [B, S, H·D]", positions="[1]")
            yield row("position of the first, operand [B, H, S, D]", positions="[1]", flat_heads=False)
        else:
            yield row("tables of each row, operand [B, S, H·D]")
            yield row("tables of each row, operand [B, H, S, D]", flat_heads=False)

    def norm(operator: str, feature: str, domain: str = "", opset: int = 18, **options: Any) -> Attempt:
        return Attempt(domain, operator, feature, partial(normalised, **options), opset=opset)

    yield norm("LayerNormalization", "weight and shift", mean=True, shift=True)
    yield norm("LayerNormalization", "no shift", mean=True)
    yield norm("SimplifiedLayerNormalization", "weight", mean=False)
    yield norm("RMSNormalization", "weight", opset=23, mean=False)
    for operator, mean in (("SkipLayerNormalization", True), ("SkipSimplifiedLayerNormalization", False)):
        common: dict[str, Any] = {"domain": MICROSOFT, "mean": mean, "shift": mean}
        yield norm(operator, "sum of two", **common, skip="[B, S, C]")
        yield norm(operator, "sum of three", **common, skip="[B, S, C]", bias=True)
        yield norm(operator, "the sum as a result", **common, skip="[B, S, C]", bias=True, total=True)
        yield norm(operator, "second summand [1, S, C]", **common, skip="[1, S, C]")
        yield norm(operator, "second summand [S, C]", **common, skip="[S, C]")

    def product(feature: str, base: dict[str, Any] | None = None, **options: Any) -> Attempt:
        without = partial(packed_product, **base) if base is not None else None
        make = partial(packed_product, **{**(base or {}), **options})
        return Attempt(MICROSOFT, "MatMulNBits", feature, make, without)

    for bits in (2, 4, 8):
        for block in (16, 32, 64, 128):
            yield product(f"{bits} bits, blocks of {block}", bits=bits, block=block)
    for bits in (2, 4, 8):
        yield product(f"{bits} bits, packed zero points", {"bits": bits}, zero="packed")
    yield product("4 bits, zero points as states", {}, zero="float")
    yield product("4 bits, bias", {}, bias=True)
    yield product("4 bits, states not a multiple of the block", inner=120)
    for bits in (4, 8):
        yield product(f"{bits} bits, accuracy_level 4", bits=bits, level=4)
    yield product("4 bits, packed zero points, accuracy_level 4", zero="packed", level=4)
