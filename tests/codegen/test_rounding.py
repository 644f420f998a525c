"""Operands of 8 bits: what is generated and refused, zero blocks, and the machine code of products."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from attncompile.codegen.gluon import generate as generate_gluon
from attncompile.codegen.gluon import slower
from attncompile.codegen.gluon import why_not_spec as why_not_gluon
from attncompile.codegen.gluon.tiles import E4M3, SHARED_MEMORY, Codes, hopper_tile, shared_bytes
from attncompile.codegen.onnx.choose import choose
from attncompile.codegen.onnx.emit import alone
from attncompile.codegen.pytorch import lower as lower_pytorch
from attncompile.codegen.triton import generate
from attncompile.codegen.triton.ahead import TARGETS, compile_ahead, cuobjdump
from attncompile.codegen.triton.rounding import why_no_e4m3
from attncompile.codegen.triton.structure import why_not_spec
from attncompile.ir import RefusalError, Spec, parse_spec
from attncompile.passes import parse_passes, run_passes
from tests.cases import BY_NAME
from tests.codegen.sass import instructions, unset_descriptors

FORMS = ("quantize.fp8", "quantize.int8(values=true)", "quantize.int8", "quantize.fp8(values=false)")
compiles = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"), reason="TRITON_INTERPRET replaces the compiler"
)


def attention(channels: int, mask: str = "true", score: str = "0.1·s", more: str = "", features: int = 0) -> Spec:
    """One attention of 16 heads."""
    text = (
        f"x   attend  q[B,16,I,{channels}]  k[B,4,J,{channels}]  v[B,4,J,{features or channels}]  bfloat16\n"
        f"  score  {score}\n  mask   {mask}\n  kv_head h // 4\n{more}  norm   softmax (float32)"
    )
    return parse_spec(text)


def rounded(spec: Spec, form: str) -> Spec:
    """The Spec after a pass, which applies."""
    found = run_passes(spec, parse_passes(form))
    assert found.applied
    return found.spec


def changed(text: str, *pairs: tuple[str, str]) -> Spec:
    """A Spec's text with parts replaced."""
    for old, new in pairs:
        assert old in text
        text = text.replace(old, new)
    return parse_spec(text)


FP8 = str(rounded(attention(64), "quantize.fp8"))


@pytest.mark.parametrize(
    "spec, said",
    (
        (changed(FP8, (", weights float8_e4m3", "")), "values are rounded"),
        (changed(str(rounded(attention(64), "quantize.int8")), ("(float32)", "(float32), weights float8_e4m3")),
         "values are as they are"),
        (changed(FP8, ("    dtype  float8_e4m3\n    block  128\n    smooth", "    block  128\n    smooth")),
         "queries are rounded to float8_e4m3 and keys to int8"),
        (changed(FP8, ("    dtype  float8_e4m3\n    block  128\n    out    v_fp8", "    block  128\n    out    v_fp8")),
         "values are rounded to int8"),
        (parse_spec(FP8.replace("    norm", "    weight 0.5·w\n    norm")), "no edit of them such as 0.5·w"),
    ),
    ids=("values-only", "weights-only", "two-types", "int8-values", "edit"),
)  # fmt: skip
def test_what_no_kernel_multiplies(spec: Spec, said: str) -> None:
    assert said in (why_not_spec(spec) or "")
    with pytest.raises(ValueError, match="no Triton kernel"):
        generate(spec)


@pytest.mark.parametrize("form", FORMS)
def test_which_gpus_have_e4m3(form: str) -> None:
    spec = rounded(attention(64), form)
    for capability in ((8, 0), (8, 6), None):
        assert (why_no_e4m3(spec, capability) is None) == (form == "quantize.int8")
    for capability in ((8, 9), (9, 0), (10, 0)):
        assert why_no_e4m3(spec, capability) is None
    named = "compute capability 8.9 or higher" in generate(spec).source
    assert named == (form != "quantize.int8")


def test_targets_without_rounded_weights_say_so() -> None:
    spec = rounded(BY_NAME["causal-long"].spec, "quantize.fp8")
    assert lower_pytorch(spec).operator == "reference"
    for text in (spec, rounded(BY_NAME["causal-long"].spec, "quantize.fp8(values=false)")):
        with pytest.raises(RefusalError, match="float8_e4m3"):
            alone(text, choose(text).row)


@pytest.mark.parametrize(
    "spec, form, said",
    (
        (attention(64), "quantize.fp8(block=64)", "k_fp8 has a scale for 64 positions"),
        (attention(64), "quantize.int8(block=96)", "multiples of the 128 keys of a tile"),
        (attention(64, features=20), "quantize.int8", "v has 20 channels"),
    ),
)
def test_what_the_hopper_kernel_does_not_take(spec: Spec, form: str, said: str) -> None:
    assert said in (why_not_gluon(rounded(spec, form)) or "")


@pytest.mark.parametrize("codes", ((E4M3, E4M3), ("int8", E4M3), ("int8", None), (E4M3, None)))
@pytest.mark.parametrize("features", (16, 64, 128, 256))
@pytest.mark.parametrize("channels", (16, 64, 128, 256))
def test_tiles_of_codes_fit(channels: int, features: int, codes: Codes) -> None:
    for light in (True, False):
        tile = hopper_tile(channels, features, light=light, codes=codes)
        assert shared_bytes(tile, channels, features, codes) <= SHARED_MEMORY
        assert tile.stages <= 3  # as many named barriers are there
        assert not tile.ahead or codes == (E4M3, E4M3)


@pytest.mark.parametrize(
    "form", ("quantize.fp8", "quantize.int8(values=true)", "quantize.fp8(values=false)", "quantize.int8")
)
def test_operands_of_8_bits_are_for_the_hopper_kernel(form: str) -> None:
    assert slower(rounded(attention(64), form)) is None


# masks that leave a loop without rounds, score functions, sinks with the log-sum-exp, padded channels
SHAPES = {
    "full-64": attention(64),
    "causal-128": attention(128, "j ≤ i"),
    "window-128": attention(128, "j ≤ i and j > i − 1000"),
    "alibi-64": attention(64, "j ≤ i", "0.1·s + exp2(−0.5·h)·float(j − i)"),
    "narrow-72": attention(72, "j ≤ i + J − I", features=40),
}


# the first two in every run; the others are marked slow
COMPILED = [("full-64", "quantize.fp8"), ("causal-128", "quantize.int8")]
COMPILED += [(name, form) for name in SHAPES for form in FORMS if (name, form) not in COMPILED]


SCALARS_AHEAD = 32
"""Bytes of scalars for which the scores of two blocks of 128 keys leave no register: see ``codegen/gluon/tiles.py``."""


@compiles
@pytest.mark.parametrize(
    "name, form", [pytest.param(*each, marks=pytest.mark.slow if n > 1 else ()) for n, each in enumerate(COMPILED)]
)
def test_hopper_kernels_compile(name: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton.experimental.gluon")
    from attncompile.codegen.gluon.ahead import compile_ahead as compile_gluon

    monkeypatch.setenv("ATTNCOMPILE_CACHE", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", f"{tmp_path}/compiled")
    module = generate_gluon(rounded(SHAPES[name], form))
    kernel = compile_gluon(module, "bfloat16")[-1]
    types = "s32.s8.s8" if "int8" in form else "f32.e4m3.e4m3"
    assert types in kernel.texts["ptx"] and kernel.shared <= SHARED_MEMORY
    assert ("e4m3x2" in kernel.texts["ptx"]) == (form != "quantize.int8" and "false" not in form)
    assert (kernel.spills or 0) <= (SCALARS_AHEAD if module.skeleton.tile.ahead else 0)
    if cuobjdump() is not None:
        code = instructions(kernel.texts["cubin"])
        assert sum(bool(each.describes()) for each in code) > 10
        assert not unset_descriptors(code)


@compiles
@pytest.mark.parametrize("form", [FORMS[0], *(pytest.param(form, marks=pytest.mark.slow) for form in FORMS[1:])])
def test_plain_kernels_compile(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNCOMPILE_CACHE", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", f"{tmp_path}/compiled")
    module = generate(rounded(attention(64, "j ≤ i"), form))
    target = next(target for target in TARGETS if target.arch == 89)
    for kernel in compile_ahead(module, target, "float16"):
        assert kernel.texts["cubin"] and kernel.spills in (0, None)


def rotated(channels: int, part: int, convention: str, dtype: str, query_block: int = 32) -> Spec:
    """Queries and keys rotated by tables of 16 bits, then rounded."""
    maps = "".join(
        f"  position  {name}\n    cos    cos[b, i, d]\n    sin    sin[b, i, d]\n    channels {part}\n"
        f"    convention {convention}\n    out    {name[0]}_rotated\n"
        for name in (f"q[B,16,I,{channels}]  bfloat16", f"k[B,4,I,{channels}]  bfloat16")
    )
    codes = "".join(
        f"  quantize  {name}_rotated\n    dtype  {dtype}\n    block  {block}\n    smooth {smooth}\n"
        f"    out    {name}_codes\n"
        for name, block, smooth in (("q", query_block, "false"), ("k", 128, "true"))
    )
    return parse_spec(
        f"x\n{maps}{codes}  attend  q_codes  k_codes  v[B,4,I,64]  bfloat16\n    score  0.1·s\n    mask   j ≤ i\n"
        f"    kv_head h // 4\n    norm   softmax (float32)\n"
        f"  given  cos[B,I,{part}]:bfloat16\n  given  sin[B,I,{part}]:bfloat16"
    )


@pytest.mark.parametrize(
    "old, new, said",
    (
        ("quantize  q_rotated", "quantize  q", "q_rotated is read otherwise"),
        ("attend  q_codes  k_codes  v[B,4,I,64]  bfloat16", "attend  q_codes  k_codes  k_rotated", "read otherwise"),
        ("channels 64", "channels 0", "rotates no channel"),
        ("cos[b, i, d]", "(0.0 − cos[b, i, d])^0.5", "a power needs a base"),
    ),
    ids=("codes-of-what-is-not-rotated", "values-are-rotated-keys", "no-channel", "power"),
)
def test_what_no_kernel_rotates(old: str, new: str, said: str) -> None:
    assert said in (why_not_spec(changed(str(rotated(64, 64, "half", "int8")), (old, new))) or "")


def test_one_map_is_written_once_and_two_get_names() -> None:
    spec = rotated(64, 64, "half", "int8")
    source = generate(spec).source
    assert source.count("def rotate_quantize(") == 1 and "def quantize(" not in source
    other = generate(parse_spec(str(spec).replace("sin[b, i, d]", "2.0·sin[b, i, d]", 1))).source
    assert "def rotate_quantize_query(" in other and "def rotate_quantize_key(" in other
    # a mean is subtracted from keys alone
    assert "rotate_sum_blocks_key" in other and "rotate_sum_blocks_query" not in other


@pytest.mark.parametrize("dtype", ("int8", "float8_e4m3"))
def test_the_hopper_kernel_takes_codes_of_rotated_tensors(dtype: str) -> None:
    spec = rotated(128, 128, "half", dtype)
    assert why_not_gluon(spec) is None and slower(spec) is None
    source = generate_gluon(spec).source
    assert "query_codes, query_scale = rotate_quantize(q, cos, sin," in source
    assert source.count("def round_to_codes(") == 1


ROTATED_SHAPES = ((128, 128, "half"), (64, 64, "interleaved"), (96, 24, "half"))
ROTATED_TARGETS = (90, "gfx942", 80)


@compiles
@pytest.mark.parametrize(
    "shape, target",
    [
        pytest.param(shape, target, marks=pytest.mark.slow if n and m else ())
        for n, shape in enumerate(ROTATED_SHAPES)
        for m, target in enumerate(ROTATED_TARGETS)
    ],
)
@pytest.mark.parametrize("dtype", ("int8", "float8_e4m3"))
def test_kernels_that_rotate_compile(
    shape: tuple[int, int, str], target: int | str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from attncompile.codegen.triton.ahead import compile_kernel
    from attncompile.codegen.triton.cache import load_module

    monkeypatch.setenv("ATTNCOMPILE_CACHE", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", f"{tmp_path}/compiled")
    if dtype == "float8_e4m3" and target != 90:
        pytest.skip("a GPU without e4m3")
    module = generate(rotated(*shape, dtype))
    loaded, chosen = load_module(module), next(each for each in TARGETS if each.arch == target)
    names = [kernel.name for kernel in module.kernels]
    assert names == ["rotate_quantize_blocks", "rotate_sum_blocks", "rotate_quantize_blocks", "attend_forward"]
    for kernel in module.kernels[:-1]:
        made = compile_kernel(getattr(loaded, kernel.name), kernel, chosen, "bfloat16")
        assert made.shared <= chosen.memory
        if dtype == "float8_e4m3":  # the division of int8 takes more registers than 128 keys leave
            assert made.spills in (0, None)
        if target == 90 and shape[1] & (shape[1] - 1) == 0 and cuobjdump():
            # sixteen bytes at a time, tensor and tables; an element at a time took ten times as long
            assert not [each for each in instructions(made.texts["cubin"]) if each.operation.startswith("LDG.E.U16")]


def test_one_position_has_no_kernel_of_its_own() -> None:
    """For a single value ptxas 12.8 died of the loads that were then known to be idle."""
    from attncompile.codegen.triton.cache import load_module

    module = load_module(generate(rounded(attention(64), "quantize.fp8")))
    for kernel, length in ((module.quantize_blocks, "I"), (module.quantize_value_blocks, "J")):
        assert length in [each.name for each in kernel.params if each.do_not_specialize]


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("channels", (24, 64, 128))
def test_rounding_on_a_gpu(channels: int, form: str) -> None:
    """Codes and scales are those of the reference, bit for bit, and those of values are turned over."""
    from attncompile.codegen.triton.cache import load_module
    from attncompile.ir import Quantize

    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs compute capability 8.9")
    spec = rounded(attention(channels), form)
    module = load_module(generate(spec))
    x = torch.randn(2, 4, 301, channels, device="cuda", dtype=torch.bfloat16)
    x[:, 1, 128:256] = 0.0
    for step in (step for step in spec.operations if isinstance(step, Quantize)):
        plain = Quantize("x", step.dtype, step.block)
        codes, scale = plain.parts(x.float())
        if step.tensor == "v":
            found, powers = module.quantize_values(x, step.block, False)
            found = found[..., :301].transpose(2, 3)
        else:
            dtype = torch.int8 if step.dtype == "int8" else torch.float8_e4m3fn
            found, powers = module.quantize(x, dtype, step.block, False)
        assert torch.equal(found.float(), codes) and torch.equal(powers, scale)
