"""The decode kernel against the reference in float64: on the CPU in Triton's interpreter, on a GPU compiled."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

from attncompile.codegen.triton import generate, why_not
from attncompile.codegen.triton.backward import why_not_backward
from attncompile.codegen.triton.cache import load_module
from attncompile.codegen.triton.decode import decode_visits
from attncompile.codegen.triton.structure import why_not_spec
from attncompile.ir import Size, parse_spec
from attncompile.ir.expr import Const
from attncompile.ir.storage import LARGEST, narrow, with_narrow_store
from tests.cases import Case
from tests.kernels.comparison import compare
from tests.kernels.decode_cases import (
    DECODE_BY_NAME,
    DECODE_CASES,
    PLAIN_CASES,
    STORED_CASES,
    WIDE_CASES,
    stored_inputs,
)
from tests.kernels.interpreter import Interpreter
from tests.kernels.test_values import check

HALF = ("three-queries", "sink", "paged-narrow", "float8", "int8-smooth", "int4-channel", "int4-groups", "mixed")


@pytest.mark.parametrize("case", DECODE_CASES, ids=lambda case: case.name)
def test_float32_in_several_parts(case: Case, interpreter: Interpreter) -> None:
    check(interpreter.ask(case=case.name, dtype="float32", small=True))


@pytest.mark.parametrize("name", HALF)
def test_float16_in_several_parts(name: str, interpreter: Interpreter) -> None:
    check(interpreter.ask(case=name, dtype="float16", small=True))


@pytest.mark.parametrize("case", PLAIN_CASES, ids=lambda case: case.name)
def test_a_module_holds_both_kernels(case: Case) -> None:
    assert [kernel.name for kernel in generate(case.spec).kernels] == ["merge_splits", "attend_split", "attend_forward"]


def test_keys_behind_the_position_of_a_single_query_are_not_visited() -> None:
    mask = parse_spec(DECODE_BY_NAME["static-cache"].text).attend().mask
    filled = decode_visits(mask, Const(1), Size("J")).main.stop
    assert str(filled) == "min(J, position[0] + 1)"
    assert decode_visits(mask, Size("I"), Size("J")).main.stop == Size("J"), "each query has a position of its own"


@pytest.mark.parametrize("case", STORED_CASES, ids=lambda case: case.name)
def test_a_store_has_the_decode_kernel_alone(case: Case) -> None:
    assert [kernel.name for kernel in generate(case.spec).kernels] == ["merge_splits", "attend_split"]


@pytest.mark.parametrize("case", WIDE_CASES, ids=lambda case: case.name)
def test_a_wide_head_has_the_decode_kernel_alone(case: Case) -> None:
    module = generate(case.spec)
    assert [kernel.name for kernel in module.kernels] == ["merge_splits", "attend_split"]
    assert "up to 256 channels" in (why_not_backward(case.spec) or "")


@pytest.mark.parametrize(
    "channels, change, said",
    (
        (1032, "", "multiples of 16 up to 1024"),
        (300, "", "multiples of 16 up to 1024"),
        (576, "norm   sigmoid (float32)", "normalises by softmax, not by sigmoid"),
        (576, "kv_head (h + 1) // 2 % 2", "neither neighbours nor equally far apart"),
    ),
)
def test_wide_heads_that_have_no_kernel(channels: int, change: str, said: str) -> None:
    lines = {"kv_head": "kv_head h // 2", "norm": "norm   softmax (float32)"}
    lines |= {change.split()[0]: change} if change else {}
    text = f"x   attend  q[B,4,I,{channels}]  k,v[B,2,J,{channels}]  float32\n  score  s\n  mask   true\n  "
    assert said in (why_not_spec(parse_spec(text + "\n  ".join(lines.values()))) or "")


@pytest.mark.parametrize("storage", LARGEST)
def test_a_plain_cache_in_a_narrow_type_has_a_kernel(storage: Any) -> None:
    spec = with_narrow_store(PLAIN_CASES[0].spec, "k", storage, "channel", smooth=True)
    assert why_not_spec(spec) is None
    module = generate(with_narrow_store(spec, "v", storage, "token"))
    assert [kernel.name for kernel in module.kernels] == ["merge_splits", "attend_split"]


def test_as_many_queries_as_keys_have_no_decode_kernel() -> None:
    text = "x   attend  q,k,v[B,4,I,16]  float32\n  score  s\n  mask   j ≤ i\n  norm   softmax (float32)"
    assert [kernel.name for kernel in generate(parse_spec(text)).kernels] == ["attend_forward"]


STORE = "x\n  {}\n  attend  q[B,4,I,64]  k  v[B,{},J,64]  float32\n    score  s\n    mask   true\n    {}\n    norm   {}"
CODES = "dequantize  codes[B,2,J,64]:int8 float32\n    out    k"
REFUSED = (
    (CODES, 2, "kv_head h // 2", "sigmoid (float32)", "softmax"),
    (CODES, 2, "kv_head (h + 1) // 2 % 2", "softmax (float32)", "neighbours"),
    (
        "gather  pages[J,2,8,8]  float32\n    at     j, g, d % 8, d // 8\n    sizes  B, 2, J, 64\n    out    k",
        2,
        "kv_head h // 2",
        "softmax (float32)",
        "along one axis",
    ),
)


@pytest.mark.parametrize("store, groups, head, norm, said", REFUSED, ids=("norm", "heads", "channels"))
def test_refusals_name_the_cause(store: str, groups: int, head: str, norm: str, said: str) -> None:
    spec = parse_spec(STORE.format(store, groups, head, norm))
    assert said in (why_not_spec(spec) or "")
    assert said in (why_not(spec, "cuda") or "") or "not installed" in (why_not(spec, "cuda") or "")
    with pytest.raises(ValueError, match="no Triton kernel"):
        generate(spec)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("case", DECODE_CASES, ids=lambda case: case.name)
def test_on_a_gpu(case: Case, dtype: torch.dtype) -> None:
    module = load_module(generate(case.spec))
    with mock.patch.multiple(module, LEAST_TILES=1, **({"LONG_CACHE": 0} if hasattr(module, "LONG_CACHE") else {})):
        for outcome in compare(case, module.attend, dtype, "cuda", place=stored_inputs):
            assert outcome.passed, f"{outcome.output} is off by {outcome.error:.3g}, allowed is {outcome.limit:.3g}"


@pytest.mark.parametrize(
    "programs, tiles, splits",
    ((1, 1, 1), (1, 100, 8), (4, 100, 2), (8, 100, 1), (5, 100, 3), (9, 100, 3), (1, 9, 3), (1000, 100, 1)),
)
def test_keys_are_cut_so_that_waves_are_full(programs: int, tiles: int, splits: int) -> None:
    """Without a GPU eight programs are taken to run at a time."""
    module = load_module(generate(PLAIN_CASES[0].spec))
    assert module.splits_of(torch.zeros(1), programs, tiles, warps=4) == splits


def test_rows_at_odd_bytes_are_refused() -> None:
    case = next(case for case in STORED_CASES if case.name == "int8-token")
    tensors = case.tensors()
    tensors["k_codes"] = torch.empty(2, 2, 300, 65, dtype=torch.int8)[..., :64]
    with pytest.raises(ValueError, match="rows of k_codes should be contiguous and begin at even bytes"):
        load_module(generate(case.spec)).attend(*(tensors[value.name] for value in case.spec.inputs))


POOL = """x
  gather  pages[P,16,2,64]  float32
    at     table[b, j // 16], j % 16, g, d
    sizes  B, 2, 16·M, 64
    out    k
  attend  q[B,4,I,64]  k  v[B,2,16·M,64]  float32
    score  s + gain[kind[j]]
    mask   true
    kv_head h // 2
    norm   softmax (float32)
  given  table[B,M]:int32
  given  gain[G]:float32
  given  kind[16·M]:int32"""


@pytest.mark.parametrize("empty", ("pages", "gain"))
def test_what_is_read_by_index_has_elements(empty: str) -> None:
    """An index is clamped into its tensor, which is nowhere in one without elements: memory next to it was read."""
    spec = parse_spec(POOL)
    attend = load_module(generate(spec)).attend
    sizes = {"B": 1, "I": 2, "M": 3, "P": 5, "G": 4}
    missing = {**sizes, "P" if empty == "pages" else "G": 0}
    with pytest.raises(ValueError, match=rf"{empty} should have elements, but its shape is \((0,|0, 16, 2, 64)\)"):
        attend(*Case("pool", POOL, missing, ranges={"kind": (0, 1)}).tensors().values())
    for unread in ("B", "I"):
        out = attend(*Case("pool", POOL, {**missing, unread: 0}, ranges={"kind": (0, 1)}).tensors().values())
        assert out.numel() == 0


@pytest.mark.gpu
@pytest.mark.parametrize("name", ("keys-1000", "paged", "int4-channel"))
def test_results_repeat_on_a_gpu(name: str) -> None:
    case = next(case for case in DECODE_CASES if case.name == name)
    given = [case.tensors()[value.name].cuda() for value in case.spec.inputs]
    attend = load_module(generate(case.spec)).attend
    first, second = (attend(*given) for _ in range(2))
    pairs = zip(first, second, strict=True) if isinstance(first, tuple) else [(first, second)]
    assert all(torch.equal(left, right) for left, right in pairs)


def _error_of_one_part(storage: str) -> float:
    """Relative distance from float64 of a kernel that sums all of a long cache in one part."""
    keys = 32768
    plain = "attend  q[B,4,I,64]  k,v[B,1,J,64]  bfloat16\n  score  0.125·s\n  mask   true\n  kv_head 0"
    spec = parse_spec(f"long   {plain}\n  norm   softmax (float32)")
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, 1, 64, generator=generator).to(torch.bfloat16).cuda()
    drawn = [torch.randn(1, 1, keys, 64, generator=generator).to(torch.bfloat16).cuda() for _ in "kv"]
    tensors = {"q": query, **dict(zip("kv", drawn, strict=True))}
    if storage != "bfloat16":
        for name, by in (("k", "channel"), ("v", "token")):
            spec = with_narrow_store(spec, name, storage, by)  # type: ignore[arg-type]
            found = narrow(tensors.pop(name), storage, by)  # type: ignore[arg-type]
            tensors |= {f"{name}_codes": found.codes, f"{name}_scale": found.scale}
    module = load_module(generate(spec))
    with mock.patch.multiple(module, splits_of=lambda *_: 1):
        got = module.attend(*(tensors[value.name] for value in spec.inputs)).double()
    (exact,) = spec.interpret(tensors, torch.float64)
    return float((got - exact).norm() / exact.norm())


@pytest.mark.gpu
@pytest.mark.parametrize("storage", LARGEST)
def test_a_long_sum_of_codes_is_as_exact_as_one_of_bfloat16(storage: str) -> None:
    """Weights are rounded to eleven bits beside codes, to eight in bfloat16; what matrix units cut off is far less."""
    assert _error_of_one_part(storage) <= _error_of_one_part("bfloat16")
