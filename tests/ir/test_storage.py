"""Keys and values as a cache stores them: the references by hand, rounding, and the printed form."""

from __future__ import annotations

import pytest
import torch

from attncompile.ir import Dequantize, Gather, parse_expr, parse_spec, print_spec, tensor_type
from attncompile.ir.expr import Const, Load
from attncompile.ir.operators import Kind
from attncompile.ir.storage import LARGEST, narrow, pack, unpack, with_narrow_store

KINDS = {"table": Kind.INT, "scale": Kind.FLOAT, "shift": Kind.FLOAT}


def test_pages_are_read_in_the_order_of_the_table() -> None:
    pages = torch.arange(5 * 4 * 2 * 3, dtype=torch.float64).reshape(5, 4, 2, 3)
    table = torch.tensor([[3, 0], [1, 9]], dtype=torch.int32)  # 9: there is no such page, the last one is read
    at = tuple(parse_expr(text, KINDS) for text in ("table[b, j // 4]", "j % 4", "g", "d"))
    gather = Gather("pages", at, tuple(map(parse_expr, ("B", "2", "4·M", "3"))))
    found = gather.reference({"pages": pages, "table": table}, {"B": 2, "M": 2}, torch.float64)["out"]
    assert found.shape == (2, 2, 8, 3)
    for b in range(2):
        for j in range(8):
            page = min(int(table[b, j // 4]), 4)
            assert torch.equal(found[b, :, j], pages[page, j % 4])


@pytest.mark.parametrize("storage", LARGEST)
@pytest.mark.parametrize("by", ("channel", "token"))
@pytest.mark.parametrize("smooth", (False, True))
def test_narrowed_numbers_are_within_half_a_step(storage: str, by: str, smooth: bool) -> None:
    x = torch.randn(2, 3, 7, 8) * torch.rand(8) * 5 + torch.randn(8)
    found = narrow(x, storage, by, smooth)  # type: ignore[arg-type]
    index = "b, g, d" if by == "channel" else "b, g, j"
    operation = Dequantize(
        "codes",
        parse_expr(f"scale[{index}]", KINDS),
        parse_expr("shift[b, g, d]", KINDS) if smooth else Const(0.0),
        4 if storage == "int4" else 8,
    )
    tensors = {"codes": found.codes, "scale": found.scale}
    tensors |= {} if found.shift is None else {"shift": found.shift}
    read = operation.reference(tensors, {}, torch.float64)["out"]
    scale = found.scale[:, :, None, :] if by == "channel" else found.scale[:, :, :, None]
    # float8 e4m3 has four significant bits: half a step at the largest magnitude is 2^-4 of it
    step = scale * 448 / 16 if storage == "float8_e4m3" else scale / 2
    assert bool(((read - x).abs() <= step * (1 + 1e-5) + 1e-6).all())


def test_ties_are_rounded_to_even_and_zeros_stay() -> None:
    x = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5]).reshape(1, 1, 1, 6)
    found = narrow(x, "int8", "token")
    assert found.codes.flatten().tolist() == [127, 0, 2, 2, 0, -2]
    assert not narrow(torch.zeros(1, 1, 3, 4), "int4", "channel").codes.any()


def test_packing_is_inverted() -> None:
    codes = torch.arange(-8, 8, dtype=torch.int8).reshape(2, 8)
    packed = pack(codes)
    assert packed.dtype == torch.uint8 and packed.shape == (2, 4)
    assert int(packed[0, 0]) == (-8 & 15) | (-4 & 15) << 4
    assert torch.equal(unpack(packed), codes)
    with pytest.raises(ValueError, match="in pairs"):
        pack(codes[:, :3])


TEXT = """paged
  gather  pages[P,16,2,32]  uint8
    at     table[b, j // 16], j % 16, g, d
    sizes  B, 2, 16·M, 32
    out    codes
  dequantize  codes
    scale  scale[b, g, d]
    bits   4
    dtype  bfloat16
    out    k
  attend  q[B,8,I,64]  k  v[B,2,16·M,64]  bfloat16
    score  0.125·s
    mask   j < lengths[b]
    kv_head h // 4
    norm   softmax (float32)
  given  table[B,M]:int32
  given  scale[B,2,64]:float32
  given  lengths[B]:int32"""


def test_a_store_prints_and_reads_back() -> None:
    spec = parse_spec(TEXT)
    assert print_spec(spec) == TEXT
    assert {value.name for value in spec.captured()} == {"table", "scale", "lengths"}


PLAIN = """plain   attend  q[B,4,I,16]  k,v[B,2,J,16]  bfloat16
  score  0.25·s
  mask   j ≤ i + J − I
  kv_head h // 2
  norm   softmax (float32)"""


@pytest.mark.parametrize("storage", LARGEST)
def test_a_plain_cache_becomes_a_narrow_one(storage: str) -> None:
    plain = parse_spec(PLAIN)
    spec = with_narrow_store(plain, "k", storage, "channel", smooth=True)  # type: ignore[arg-type]
    spec = with_narrow_store(spec, "v", storage, "token")  # type: ignore[arg-type]
    assert parse_spec(print_spec(spec)).fingerprint() == spec.fingerprint()
    q, k, v = torch.randn(2, 4, 3, 16), torch.randn(2, 2, 9, 16) + 1, torch.randn(2, 2, 9, 16)
    keys = narrow(k, storage, "channel", smooth=True)  # type: ignore[arg-type]
    values = narrow(v, storage, "token")  # type: ignore[arg-type]
    assert keys.shift is not None
    stored = {"k_codes": keys.codes, "k_scale": keys.scale, "k_shift": keys.shift}
    stored |= {"v_codes": values.codes, "v_scale": values.scale}
    (found,) = spec.interpret({"q": q, **stored})
    (exact,) = plain.interpret({"q": q, "k": k, "v": v})
    relative = float((found - exact).norm() / exact.norm())
    assert 0 < relative < (0.3 if storage == "int4" else 0.05)


def test_only_operands_have_a_store() -> None:
    with pytest.raises(ValueError, match="no operand with four axes"):
        with_narrow_store(parse_spec(TEXT), "table", "int8", "token")
    odd = parse_spec(PLAIN.replace(",16]", ",15]"))
    with pytest.raises(ValueError, match="packs them in pairs"):
        with_narrow_store(odd, "k", "int4", "channel")


WRONG = (
    (Gather("pages", (parse_expr("j"), parse_expr("d")), ()), "should have 2 axes"),
    (Gather("pages", tuple(map(parse_expr, "bgjd")), (Const(1),)), "axes b, g, j and d"),
    (Gather("pages", (parse_expr("i"), *map(parse_expr, "gjd")), tuple(map(Const, (1, 1, 1, 1)))), "'i'"),
    (Dequantize("pages", bits=3), "bits are 8 or 4"),
    (Dequantize("pages", bits=4), "a store of 4 bits is uint8"),
    (Dequantize("pages", dtype="int8"), "the result is real"),
    (Dequantize("pages", scale=Load("none", (), Kind.FLOAT)), "not a tensor"),
)


@pytest.mark.parametrize("operation, said", WRONG, ids=lambda value: value if isinstance(value, str) else "")
def test_what_does_not_fit_is_named(operation: Gather | Dequantize, said: str) -> None:
    types = {"pages": tensor_type("bgjd", ("B", 2, "J", 8), "int8")}
    with pytest.raises(ValueError, match=said):
        operation.infer(types)
