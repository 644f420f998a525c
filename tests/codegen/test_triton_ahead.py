"""Kernels compile for GPUs that are not there, without spilling registers where speed matters."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton")

from attncompile.codegen.triton import generate
from attncompile.codegen.triton.ahead import TARGETS, Target, compile_ahead
from attncompile.codegen.triton.structure import why_not_spec
from attncompile.ir import parse_spec
from tests.cases import Case
from tests.kernels.cases import ALL_BY_NAME, ALL_CASES
from tests.kernels.decode_cases import DECODE_BY_NAME, DECODE_CASES

LOWERED = tuple(case for case in (*ALL_CASES, *DECODE_CASES) if why_not_spec(case.spec) is None)
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"), reason="TRITON_INTERPRET replaces the compiler"
)

# one row for each shape of kernel, compiled in every run; the whole table is marked slow
SHAPES = (
    "full",
    "causal",
    "sink-window",
    "three-ranges",
    "grouped-everything",
    "bias-heads",
    "sigmoid-padding",
    "head-mask",
    "softcap",
    "operators",
    "int8",
    "scan-decays",
    "scan-padding",
)
SM90 = next(target for target in TARGETS if target.arch == 90)


@pytest.fixture(autouse=True)
def _cache(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNCOMPILE_CACHE", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", f"{tmp_path}/compiled")


@pytest.mark.parametrize("name", SHAPES)
def test_compiles_for_sm_90(name: str) -> None:
    for kernel in compile_ahead(generate(ALL_BY_NAME[name].spec), SM90, "bfloat16"):
        assert kernel.texts["cubin"]
        assert (
            kernel.spills in (0, None) or name == "operators"
        )  # that one has seventeen transcendental terms


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_kernels_that_tell_of_weights(target: Target) -> None:
    spec = parse_spec("""x   attend  q[B,16,I,128]  k,v[B,4,I,128]  bfloat16
        score  0.09·s
        mask   j ≤ i
        kv_head h // 4
        norm   softmax (float32)
        peak   highest
        entropy spread
        mass   got
        gives  out, highest, spread, got""")
    kernels = compile_ahead(generate(spec), target, "bfloat16")
    assert [kernel.kernel for kernel in kernels] == ["column_mass", "attend_forward"]
    assert target is not SM90 or all(kernel.spills in (0, None) for kernel in kernels)


@pytest.mark.parametrize("target", [t for t in TARGETS if t is not SM90], ids=str)
def test_compiles_for_other_gpus(target: Target) -> None:
    for name in ("grouped-everything", "int8", "scan-decays", "scan-padding"):
        for kernel in compile_ahead(generate(ALL_BY_NAME[name].spec), target, "float16"):
            assert kernel.texts[target.binary]
            assert kernel.shared <= target.memory


# half precision; the tiles of float32 are compiled with the whole table
@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("name", ("channels-128", "paged", "float8", "int8-smooth", "int4-channel", "int4-groups"))
def test_decode_compiles(name: str, target: Target) -> None:
    for kernel in compile_ahead(generate(DECODE_BY_NAME[name].spec), target, "bfloat16"):
        assert kernel.texts[target.binary]
        assert kernel.shared <= target.memory
        assert target.backend == "hip" or kernel.spills in (0, None)


@pytest.mark.parametrize("target", [target for target in TARGETS if target.backend == "cuda"], ids=str)
def test_wide_heads_compile_without_spills(target: Target) -> None:
    spec = parse_spec(
        "x   attend  q[B,128,I,576]  k[B,1,J,576]  v[B,1,J,512]  bfloat16\n  score  0.04·s\n  mask   j < length[b]\n"
        "  kv_head 0\n  norm   softmax (float32)\n  given  length[B]:int32"
    )
    for kernel in compile_ahead(generate(spec), target, "bfloat16"):
        assert kernel.spills in (0, None) and kernel.shared <= 163840


@pytest.mark.parametrize("target", [target for target in TARGETS if target.backend == "cuda"], ids=str)
def test_four_programs_with_numbers_of_4_bits_share_the_registers(target: Target) -> None:
    codes = "[B,8,J,64]:uint8\n    scale  {0}_scale[{1}]\n    bits   4\n    dtype  bfloat16\n    out    {0}\n"
    spec = parse_spec(
        f"x\n  dequantize  k_codes{codes.format('k', 'b, g, d')}  dequantize  v_codes{codes.format('v', 'b, g, j')}"
        "  attend  q[B,32,I,128]  k  v  bfloat16\n    score  0.09·s\n    mask   j ≤ i + J − I\n    kv_head h // 4\n"
        "    norm   softmax (float32)\n  given  k_scale[B,8,128]:float32\n  given  v_scale[B,8,J]:float32"
    )
    for kernel in compile_ahead(generate(spec), target, "bfloat16"):
        assert kernel.spills in (0, None) and kernel.shared * 4 <= target.memory
        assert kernel.registers is None or -(-kernel.registers // 8) * 8 * kernel.threads * 4 <= 65536


@pytest.mark.parametrize("channels", (64, 128))
@pytest.mark.parametrize("mask", ("true", "j ≤ i", "j ≤ i and (j > i − 1024 or j < 4)"))
def test_no_spills_at_common_head_sizes(channels: int, mask: str) -> None:
    spec = parse_spec(
        f"x   attend  q,k,v[B,16,I,{channels}]  bfloat16\n  score  0.125·s\n  mask   {mask}\n"
        "  norm   softmax (float32)\n  lse    lse\n  gives  out, lse"
    )
    (kernel,) = compile_ahead(generate(spec), SM90, "bfloat16")
    assert kernel.spills in (0, None)
    assert kernel.shared <= SM90.memory


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("dtype", ("float16", "bfloat16", "float32"))
@pytest.mark.parametrize("case", LOWERED, ids=lambda case: case.name)
def test_the_whole_table_compiles(case: Case, dtype: str, target: Target) -> None:
    for kernel in compile_ahead(generate(case.spec), target, dtype):
        assert kernel.texts[target.binary]
