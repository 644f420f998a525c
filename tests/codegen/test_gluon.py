"""Gluon modules as text, and compiled for a Hopper GPU that is not there."""

from __future__ import annotations

import ast
import dataclasses
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attncompile.codegen.gluon import generate, slower, why_not_installed, why_not_spec
from attncompile.codegen.gluon.cells import cell, samples
from attncompile.codegen.gluon.columns import fold_columns
from attncompile.codegen.gluon.tiles import E4M3, SHARED_MEMORY, hopper_tile, shared_bytes
from attncompile.codegen.triton.ahead import cuobjdump
from attncompile.codegen.triton.cache import load_module
from attncompile.codegen.triton.structure import dense
from attncompile.ir import parse_expr, parse_spec
from attncompile.ir.evaluate import Environment, evaluate
from attncompile.ir.expr import Load
from attncompile.ir.operators import Kind
from attncompile.ir.types import bind_sizes
from attncompile.passes import parse_passes, run_passes
from tests.cases import BY_NAME, Case
from tests.codegen.readable import check_text
from tests.codegen.sass import instructions, rounds, unset_descriptors
from tests.ir.rounding import operations, within_rounding
from tests.kernels.cases import ALL_BY_NAME, ALL_CASES
from tests.kernels.neighbourhood_cases import NEIGHBOURHOODS

LOWERED = tuple(case for case in ALL_CASES if why_not_spec(case.spec) is None)


@pytest.mark.parametrize("case", LOWERED, ids=lambda case: case.name)
def test_module_text(case: Case) -> None:
    spec = case.spec
    module = generate(spec)
    assert module == generate(dataclasses.replace(spec, name="another.place"))
    assert module.name.isidentifier()
    check_text(module.source, spec, "attend", "LAUNCHED")


@pytest.mark.parametrize(
    "name, said",
    (
        ("head-mask", "no edit of weights"),
        ("int8", "a scale for 64 positions"),
        ("channels-3-7", "multiples of 8"),
        ("operators", "instructions for each pair"),
        ("rotary", "position, position, attend"),
    ),
)
def test_refusals_name_the_cause(name: str, said: str) -> None:
    assert said in (why_not_spec(ALL_BY_NAME[name].spec) or "")
    with pytest.raises(ValueError, match="no Hopper kernel"):
        generate(ALL_BY_NAME[name].spec)


def test_operands_of_8_bits_are_for_softmax() -> None:
    spec = parse_spec(
        "x   attend  q,k,v[B,2,I,64]  bfloat16\n  score  0.125·s\n  mask   j ≤ i\n  norm   softmax (float32)"
    )
    rounded = run_passes(spec, parse_passes("quantize.int8")).spec
    assert why_not_spec(rounded) is None
    rounded = parse_spec(str(rounded).replace("softmax", "sigmoid"))
    assert "operands of 8 bits for softmax, not for sigmoid" in (why_not_spec(rounded) or "")


@pytest.mark.parametrize("norm, kept", (("softmax", ("peak", "total", "rescaled")), ("sigmoid", ()), ("relu", ())))
def test_only_a_softmax_keeps_a_peak_and_a_sum(norm: str, kept: tuple[str, ...]) -> None:
    spec = parse_spec(
        f"x   attend  q,k,v[B,2,I,64]  bfloat16\n  score  0.125·s\n  mask   j ≤ i\n  norm   {norm} (float32)"
    )
    names = {node.id for node in ast.walk(ast.parse(generate(spec).source)) if isinstance(node, ast.Name)}
    assert names & {"peak", "total", "rescaled", "own_sums", "EMPTY", "LOWEST"} >= set(kept)
    assert kept or not names & {"peak", "total", "rescaled", "own_sums", "EMPTY", "LOWEST", "factor"}


@pytest.mark.parametrize(
    "name, said",
    (
        ("additive-bias", "bias[b, 0, i, j] is loaded for each pair"),
        ("alibi", None),
        ("sigmoid", None),
    ),
)
def test_where_plain_triton_is_faster(name: str, said: str | None) -> None:
    found = slower(BY_NAME[name].spec)
    assert found is None if said is None else said in (found or "")


@pytest.mark.parametrize("version, runs", (("3.5.1", False), ("3.6.0", True), ("3.9.0+git1", True), ("3.10.0", False)))
def test_releases_of_triton_that_it_is_written_for(version: str, runs: bool) -> None:
    assert (why_not_installed(version) is None) == runs


@pytest.mark.parametrize("queries, groups", ((1024, 2), (16384, 3)))
def test_few_queries_under_a_mask_get_smaller_tiles(queries: int, groups: int) -> None:
    assert generate(BY_NAME["causal"].spec, queries=queries).skeleton.tile.groups == groups
    assert generate(BY_NAME["full"].spec, queries=queries).skeleton.tile.groups == 3


@pytest.mark.parametrize(
    "plain, split",
    (
        ("j ≤ i", "i − near ≥ far"),
        ("j > i − 1024", "i − near − 1024 < far"),
        ("2·j < i", "i − 2·near > 2·far"),
        ("j < 4", "−near + 4 > far"),
        ("j // 8 ≤ i // 8", "j // 8 ≤ i // 8"),
        ("(i − j) % 3 = 0", "(i − j) % 3 = 0"),
    ),
)
def test_columns_in_comparisons(plain: str, split: str) -> None:
    assert str(fold_columns(parse_expr(plain, {}))) == split


@pytest.mark.parametrize("case", LOWERED, ids=lambda case: case.name)
def test_split_columns_keep_the_values(case: Case) -> None:
    spec = case.spec
    parts = dense(spec)
    tensors = case.tensors(0, torch.float64)
    attend = spec.attend()
    assert attend is not None
    sizes = bind_sizes({value.name: value.type for value in spec.inputs}, tensors)
    for step in spec.operations[:-1]:
        tensors.update(step.reference(tensors, sizes, torch.float64))
    query, key = tensors[attend.query], tensors[attend.key]
    raw = torch.randn(*query.shape[:3], key.shape[2]).double()  # float32 holds it exactly
    environment = attend.environment(tensors, sizes, torch.float64, score=raw)
    column = environment.indices["j"]
    near = column // 16 * 16 + (column & 6)
    inside = dataclasses.replace(environment, indices={**environment.indices, "near": near, "far": column - near})
    assert torch.equal(evaluate(fold_columns(parts.mask), inside), evaluate(parts.mask, environment))
    split = fold_columns(parts.score)
    found, wanted = evaluate(split, inside), evaluate(parts.score, environment)
    narrow = evaluate(parts.score, dataclasses.replace(environment, dtype=torch.float32))
    assert within_rounding(found, wanted, narrow, operations(split, parts.score))


@pytest.mark.parametrize("channels", (16, 32, 64, 128, 256))
@pytest.mark.parametrize("features", (16, 32, 64, 128, 256))
@pytest.mark.parametrize("light", (True, False))
@pytest.mark.parametrize("sinks", (True, False))
def test_tiles_fit_into_shared_memory(channels: int, features: int, light: bool, sinks: bool) -> None:
    tile = hopper_tile(channels, features, light=light, sinks=sinks)
    assert shared_bytes(tile, channels, features) <= SHARED_MEMORY
    assert tile.stages <= 3  # named barriers: three of each kind
    assert 128 * ((tile.groups * tile.registers) + 24) <= 65536


@pytest.mark.parametrize("channels", (64, 128))
def test_sinks_choose_a_tile(channels: int) -> None:
    text = (
        f"attention   attend  q,k,v[2,4,5000,{channels}]  bfloat16\n  score  0.1·s\n  mask   j ≤ i\n{{}}"
        "  norm   softmax (float32)\n"
    )
    specs = (text.format(""), text.format("  sink   sinks[h]\n") + "  given  sinks[4]:float32\n")
    without, having = (generate(parse_spec(spec)).skeleton.tile for spec in specs)
    assert without.groups == having.groups
    # ptxas hides the exponentials of a step that waits for its own keys either with sinks or without, by head size
    assert (without.early, having.early) == ((False, True) if channels == 64 else (True, False))
    for codes in (("int8", None), (E4M3, E4M3)):
        tiles = {hopper_tile(channels, channels, light=True, sinks=sinks, codes=codes) for sinks in (False, True)}
        assert len(tiles) == 1


def test_tensors_that_tma_cannot_read_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton.experimental.gluon")
    monkeypatch.setenv("ATTNCOMPILE_CACHE", str(tmp_path))
    why_not = load_module(generate(BY_NAME["causal"].spec)).why_not
    room = torch.empty(2, 4, 9, 33, dtype=torch.bfloat16)
    good = torch.empty(2, 9, 4, 16, dtype=torch.bfloat16).transpose(1, 2)
    assert why_not(good, good, good) is None
    assert why_not(good[:1, :1], good, good) is None
    for tensor, said in (
        (room[..., 1:17], "does not begin at a multiple of 16 bytes"),
        (room[..., :16], "axis 0 of the value has stride 1188"),
        (good.float(), "float16 and bfloat16"),
        (torch.empty(2, 4, 9, 32, dtype=torch.bfloat16)[..., ::2], "2 elements apart"),
        (good[:, :1].expand(2, 4, 9, 16), "has stride 0"),
        (good[:, :, :0], "is empty"),
    ):
        assert said in (why_not(good, good, tensor) or "")


COORDINATES = (
    "j // 16 % 8 ≤ i // 16 + 2",
    "8·(j // 1024) + j // 16 % 8 ≥ min(40, max(0, i // 3))",
    "j % 16 + 16·(j // 128 % 5) < i % 7 + 9",
    "j % 4 − 4·(j // 128 % 20) ≤ i",
    "j // 32 % 4 = i % 4",
    "j // 24 ≤ i",
    "j // 16 % 24 > i",
    "abs(float(i % 8 − j % 8)) + float(j // 256) ≤ 3.5",
    "j // 8 + j ≤ 3·i",
    "j % 16 ≥ i % 9 − 2 and j % 16 < i % 9 + 5 and j // 16 % 4 ≥ i and j // 16 % 4 ≤ i + 2 and j > i",
    "j % 32 > i and j % 32 < i + 1",
)


@pytest.mark.parametrize("keys", (64, 128))
@pytest.mark.parametrize("text", COORDINATES)
def test_split_coordinates_keep_the_values(text: str, keys: int) -> None:
    expr = parse_expr(text, {})
    folded = fold_columns(expr, keys=keys)
    j = torch.arange(4096)[None, :]
    inside = j % keys
    grid = {"i": torch.arange(0, 300, 7)[:, None], "j": j, "near": j - inside + (inside & 6), "far": inside & ~6}
    assert torch.equal(evaluate(folded, Environment(grid, {})), evaluate(expr, Environment(grid, {})))


def test_coordinates_that_a_block_holds_whole_turns_of_are_literals() -> None:
    expr = parse_expr("j // 16 % 8 ≤ i", {})
    assert str(fold_columns(expr, keys=128)) == "i − near // 16 % 8 ≥ far // 16 % 8"
    assert str(fold_columns(parse_expr("j // 256 ≤ i", {}), keys=128)) == "i − near // 256 ≥ 0"
    window = parse_expr("j // 16 % 8 ≥ i and j // 16 % 8 ≤ i + 5 and j ≤ i", {})
    assert str(fold_columns(window, keys=128)).count("far // 16 % 8") == 1
    assert str(fold_columns(expr, keys=64)) == str(expr) == str(fold_columns(expr))


# One row for each shape of text: dense with a tail, two ranges with loads, sinks with rows in a head of 128.
COMPILED = {
    "full": BY_NAME["full"].spec,
    "sink-window": BY_NAME["sink-window"].spec,
    "rows": parse_spec("""x   attend  q[B,16,I,128]  k,v[B,4,J,128]  bfloat16
        score  30.0·tanh(0.003·s) + bias[h, i, j]
        mask   j ≤ i + J − I and document[b, j] = document[b, i]
        sink   sinks[h]
        kv_head h // 4
        norm   softmax (float32)
        lse    lse
        given  bias[16,I,J]:bfloat16
        given  document[B,J]:int64
        given  sinks[16]:float32
        gives  out, lse"""),
    "blocks": parse_spec("""x   attend  q,k,v[B,4,I,64]  bfloat16
        score  0.125·s
        mask   j ≤ i and blocks[h, i // 128, j // 128]
        norm   softmax (float32)
        given  blocks[4,(I+127)//128,(I+127)//128]:bool"""),
    "sigmoid": parse_spec("""x   attend  q[B,16,I,128]  k,v[B,4,J,128]  bfloat16
        score  0.09·s − 6.0
        mask   j ≤ i + J − I
        kv_head h // 4
        norm   sigmoid (float32)"""),
    **{
        name: next(row for row in NEIGHBOURHOODS if row.name == row_name).moved(128, 128)
        for name, row_name in (("plane", "plane"), ("volume", "wider-than-the-grid"), ("copied", "dilated"))
    },
}


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"), reason="TRITON_INTERPRET replaces the compiler"
)
def test_compiles_for_sm_90(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton.experimental.gluon")
    from attncompile.codegen.gluon.ahead import compile_ahead

    monkeypatch.setenv("ATTNCOMPILE_CACHE", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", f"{tmp_path}/compiled")
    module = generate(COMPILED[name], in_place=True)
    *small, kernel = compile_ahead(module, "bfloat16")
    marks = module.skeleton.marks
    lists = [*(["key_extremes"] if marks.by_key else []), "mark_blocks", "order_tiles"] if marks else []
    before = [each.name for each in module.moving] + lists
    assert [each.kernel for each in small] == before
    assert (module.skeleton.boxes is not None) == (name in ("plane", "volume"))
    assert bool(module.moving) == (name == "copied")
    assert kernel.texts["cubin"]
    assert "wgmma.mma_async" in kernel.texts["ptx"] and "cp.async.bulk.tensor" in kernel.texts["ptx"]
    assert kernel.shared <= SHARED_MEMORY
    if cuobjdump() is not None:
        code = instructions(kernel.texts["cubin"])
        assert sum(bool(each.describes()) for each in code) > 4
        assert not unset_descriptors(code)
        steps = rounds(code)
        assert len(steps) >= module.skeleton.tile.groups
        # Weights would be joined by a PRMT for each word of two: a thread has words for a quarter of a block's keys.
        # Loaded numbers of 16 bits are, and digits are rounded to them.
        joined = max(sum(each.operation.startswith("PRMT") for each in step) for step in steps)
        assert joined < module.skeleton.tile.keys // 4 or "bias" in dict(kernel.arguments)


@pytest.mark.parametrize(
    "text, sizes",
    (("blocks[h, i // 128, j // 64]", (128, 64)), ("blocks[i // 96, j // 128 + i // 64]", (32, 128)),
     ("blocks[i, j]", (1, 1)), ("blocks[b, j // 8]", (0, 8))),
)  # fmt: skip
def test_cells_of_a_load(text: str, sizes: tuple[int, int]) -> None:
    load = parse_expr(text, {"blocks": Kind.INT})
    assert isinstance(load, Load)
    assert (cell(load, "i"), cell(load, "j")) == sizes


@given(size=st.integers(1, 300), span=st.sampled_from((64, 128, 192)), place=st.integers(0, 50))
def test_samples_reach_every_cell_of_a_range(size: int, span: int, place: int) -> None:
    cells = {position // size for position in range(place * span, (place + 1) * span)}
    assert len(cells) <= samples(size, span)


def test_a_mask_given_for_blocks_is_read_once_for_a_tile() -> None:
    text = "x   attend  q,k,v[B,2,I,64]  bfloat16\n  score  s\n  mask   {}\n  norm   softmax (float32)\n"
    text += "  given  blocks[I,I]:bool"
    for mask, wide, keys in (
        ("j ≤ i and blocks[i // 128, j // 128]", True, 128),
        ("blocks[i // 64, j // 64] and blocks[i // 128, j // 256]", True, 64),
        ("blocks[i // 32, j // 128]", False, 128),
        ("blocks[i // 64, j // 96]", False, 128),
    ):
        spec = parse_spec(text.format(mask))
        assert (slower(spec) is None) == wide
        skeleton = generate(spec).skeleton
        assert skeleton.tile.keys == keys
        visible = skeleton.visible
        assert visible is not None and ("start" in visible.parameters) == wide
