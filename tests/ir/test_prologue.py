"""Rotary maps stated in a Spec and left out of it: both are the same function, and both read back from text."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from attncompile.ir import Position, Spec, Value, parse_expr, parse_spec, print_spec, tensor_type
from attncompile.ir.operators import Kind
from attncompile.ir.prologue import (
    Prologue,
    input_behind,
    leading_positions,
    rotated_tensors,
    with_positions,
    without_positions,
)
from attncompile.ir.sample import random_tensors

SPEC = parse_spec(
    "x   attend  q[B,4,I,10]  k[B,2,J,10]  v[B,2,J,3]  float32\n  score  0.3·s + bias[h]\n  mask   j ≤ i + 2\n"
    "  kv_head h // 2\n  norm   softmax (float32)\n  given  bias[4]:float32"
)
SIZES = {"B": 2, "I": 5, "J": 7}
TABLES = {"cos": Kind.FLOAT, "sin": Kind.FLOAT}


def prologue(tensors: str = "qk", channels: int = 10, convention: str = "half") -> Prologue:
    cos, sin = (parse_expr(f"{name}[b, i, d]", TABLES) for name in TABLES)
    positions = tuple(Position(name, cos, sin, channels, convention) for name in tensors)
    table = tensor_type("bid", ("B", 9, channels))
    known = {value.name: value.type for value in SPEC.inputs}
    return Prologue(positions, (*(Value(n, known[n]) for n in tensors), Value("cos", table), Value("sin", table)))


@pytest.mark.parametrize("tensors", ("q", "k", "qk"))
@pytest.mark.parametrize("convention", ("half", "interleaved"))
@pytest.mark.parametrize("channels", (10, 4))
def test_both_forms_are_one_function(tensors: str, convention: str, channels: int) -> None:
    """The yardstick rotates with complex numbers, as the paper states it."""
    whole = with_positions(SPEC, prologue(tensors, channels, convention))
    given = random_tensors(whole, SIZES, dtype=torch.float64)
    # the same angle for both channels of a pair, so that multiplication by exp(i·angle) is the map
    angle = torch.rand(2, 9, channels // 2, dtype=torch.float64)
    spread = torch.cat([angle, angle], -1) if convention == "half" else angle.repeat_interleave(2, -1)
    given |= {"cos": spread.cos(), "sin": spread.sin()}
    turned = dict(given)
    for name in tensors:
        part, rest = given[name][..., :channels], given[name][..., channels:]
        pairs = part.unflatten(-1, (2, -1)).transpose(-1, -2) if convention == "half" else part.unflatten(-1, (-1, 2))
        made = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angle), angle)[
            :, None, : part.shape[2]
        ]
        real = torch.view_as_real(made)
        real = real.transpose(-1, -2) if convention == "half" else real
        turned[name] = torch.cat([real.flatten(-2), rest], -1)
    torch.testing.assert_close(whole.interpret(given), SPEC.interpret(turned))
    inside = without_positions(whole)
    torch.testing.assert_close(inside.interpret(rotated_tensors(whole, given, torch.float64)), SPEC.interpret(turned))


def test_the_text_reads_back() -> None:
    whole = with_positions(SPEC, prologue())
    assert parse_spec(print_spec(whole)).fingerprint() == whole.fingerprint()
    assert [value.name for value in whole.inputs] == ["q", "k", "v", "bias", "cos", "sin"]
    assert [position.out for position in leading_positions(whole)] == ["q_rotated", "k_rotated"]


def test_what_is_left_reads_rotated_tensors_alone() -> None:
    inside = without_positions(with_positions(SPEC, prologue("k")))
    assert [value.name for value in inside.inputs] == ["q", "k_rotated", "v", "bias"]
    assert not leading_positions(inside) and inside.verify()


def test_a_tensor_that_is_also_read_unrotated_stays_an_input() -> None:
    attend = SPEC.attend()
    assert attend is not None
    spec = dataclasses.replace(SPEC, operations=(dataclasses.replace(attend, value="k"),))
    spec = dataclasses.replace(spec, inputs=tuple(value for value in spec.inputs if value.name != "v"))
    # the value reads the key before its map: no pass makes this, but a Spec may say so
    whole = with_positions(spec, prologue("k"))
    raw = dataclasses.replace(whole.operations[-1], value="k")
    whole = dataclasses.replace(whole, operations=(*whole.operations[:-1], raw)).verify()
    assert [value.name for value in without_positions(whole).inputs] == ["q", "k", "k_rotated", "bias"]


def test_names_that_are_taken() -> None:
    text = print_spec(SPEC).replace("bias", "q_rotated")
    whole = with_positions(parse_spec(text), prologue("q"))
    assert leading_positions(whole)[0].out == "q_rotated_"


def test_a_map_of_no_input() -> None:
    with pytest.raises(ValueError, match="no input 'out' that a rotary map could make"):
        with_positions(SPEC, Prologue((Position("out"),)))


def test_the_input_behind_codes() -> None:
    text = print_spec(with_positions(SPEC, prologue("q"))).replace("attend  q_rotated", "attend  q_codes")
    spec: Spec = parse_spec(text.replace("  attend", "  quantize  q_rotated\n    out    q_codes\n  attend"))
    assert input_behind(spec, "q_codes") == "q" and input_behind(spec, "k") == "k"
