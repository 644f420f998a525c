"""Backward modules for Hopper as text, what they do on the host, and compiled for a GPU that is not there."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import math
import os
import re
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from attncompile.codegen.gluon import generate_backward, why_not_backward
from attncompile.codegen.gluon.backward import folded
from attncompile.codegen.gluon.tiles import SHARED_MEMORY
from attncompile.codegen.triton.ahead import cuobjdump
from attncompile.codegen.triton.cache import load_module
from attncompile.codegen.triton.structure import dense
from attncompile.ir import parse_spec, print_spec
from attncompile.ir.derivative import derivative
from attncompile.ir.evaluate import evaluate
from attncompile.ir.expr import SCORE
from attncompile.ir.types import bind_sizes
from attncompile.kernels.operators import with_log_sum_exp
from tests.cases import BY_NAME, Case
from tests.codegen.readable import check_text
from tests.codegen.sass import instructions, unset_descriptors
from tests.ir.rounding import operations, within_rounding
from tests.kernels.backward_cases import BACKWARD_BY_NAME
from tests.kernels.hopper_backward_cases import ROWS, SIZES

ROWS_BY_NAME = {row.name: row for row in ROWS}


@pytest.fixture
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton.experimental.gluon")
    monkeypatch.setenv("ATTNCOMPILE_CACHE", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", f"{tmp_path}/compiled")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_module_text(row: Case) -> None:
    spec = row.spec
    module = generate_backward(spec)
    assert module == generate_backward(dataclasses.replace(spec, name="another.place"))
    markers = ("_HEAD,", "ROW_BLOCKS", "RISING", "GIVEN", "OUT_STRIDES", "LENGTH_J")
    check_text(module.source, spec, "attend_backward", *markers)


_REFUSED = "x   attend  q,k,v[B,4,I,{channels}]  bfloat16\n  score  {score}\n  mask   {mask}\n  norm   {norm} (float32)"


@pytest.mark.parametrize(
    ("said", "changed"),
    (
        ("those of softmax, not of sigmoid", {"norm": "sigmoid"}),
        ("multiples of 8", {"channels": 100}),
        ("fit into registers up to 128", {"channels": 256}),
        ("no limits in closed form", {"mask": "j ≤ i and (j > i − 70 or j < 4)"}),
        ("instructions for each pair", {"score": "0.1·s + exp(−0.1·abs(float(i − j))) + sin(0.1·float(i + 2·j))"}),
    ),
)
def test_refusals_name_the_cause(said: str, changed: dict[str, Any]) -> None:
    usual: dict[str, Any] = {"channels": 128, "score": "0.09·s", "mask": "j ≤ i", "norm": "softmax"}
    spec = parse_spec(_REFUSED.format(**usual))
    assert why_not_backward(spec) is None
    spec = parse_spec(_REFUSED.format(**{**usual, **changed}))
    assert said in (why_not_backward(spec) or "")
    with pytest.raises(ValueError, match="no Hopper backward kernel"):
        generate_backward(spec)


@pytest.mark.parametrize(
    ("name", "said"),
    (
        ("slopes", "the gradient of slopes[h] is summed by plain Triton"),
        ("one-tensor", "are not three tensors"),
        ("edit-by-pair", "no gradient of an edit"),
        ("scan", "backward kernels are generated for one attend"),
        ("window-documents", "is read by plain Triton"),
    ),
)
def test_what_stays_with_plain_triton(name: str, said: str) -> None:
    case = BACKWARD_BY_NAME.get(name) or BY_NAME[name]
    assert said in (why_not_backward(case.spec) or "")


def test_gradients_come_together_and_tensors_are_not_read() -> None:
    spec = ROWS_BY_NAME["causal"].spec
    assert why_not_backward(spec, ("q", "k", "v")) is None
    assert "v needs none" in (why_not_backward(spec, ("q", "k")) or "")
    loaded = parse_spec(
        _REFUSED.format(channels=128, score="0.1·s + slopes[h]·float(j − i)", mask="j ≤ i", norm="softmax")
        + "\n  given  slopes[4]:float32"
    )
    assert "slopes[h] is read by plain Triton's kernels" in (why_not_backward(loaded, ("q", "k", "v")) or "")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_visible_query_is_visited_once(row: Case) -> None:
    """The loop limits, run as Python: blocks cover what is visible, each once; those without a mask see all of it."""
    spec = row.spec
    module = generate_backward(spec)
    source, width = module.source, module.skeleton.tile.queries
    functions = re.findall(r"@gluon\.jit\n(def (?:query_blocks|block_start)\(.*?)\n\n\n", source, re.DOTALL)
    numbers: dict[str, Any] = {"BLOCK_I": width, "BLOCK_J": 128, "gl": _Integers}
    for function in functions:
        exec(function, numbers)
    for _, queries, keys in (*SIZES, (1, 500, 200), (1, 300, 900)):
        sizes = {"I": queries, "J": keys, "B": 1}
        i, j = torch.arange(queries)[:, None], torch.arange(keys)[None, :]
        shown = _mask(spec, i, j, queries, keys)
        arguments = [sizes.get(name, 8) for name in _parameters(functions[0])[3:]]
        for key_first in range(0, keys, 128):
            blocks, *known = numbers["query_blocks"](key_first, 0, 3, *arguments)
            edges = min(max(known[0], 1), blocks) if "shown = visible" in source else 0
            edges = blocks if key_first + 128 > keys else edges
            last = (-(-queries // width) - 1) * width
            starts = [min(numbers["block_start"](number, *known), last) for number in range(blocks)]
            assert all(start % width == 0 and start >= 0 for start in starts)
            assert len(set(starts)) == len(starts)
            seen = torch.zeros(queries, dtype=torch.bool)
            for start in starts:
                seen[start : start + width] = True
            tile = shown[:, key_first : key_first + 128]
            assert bool(seen[tile.any(1)].all())
            for start in starts[edges:]:
                assert bool(tile[start : start + width].all())


class _Integers:
    """The functions of Gluon that limits are written with."""

    minimum, maximum = staticmethod(min), staticmethod(max)
    cdiv = staticmethod(lambda left, right: -(-left // right))
    where = staticmethod(lambda condition, then, otherwise: then if condition else otherwise)


def _parameters(function: str) -> list[str]:
    (definition,) = ast.parse(function).body
    assert isinstance(definition, ast.FunctionDef)
    return [argument.arg for argument in definition.args.args]


def _mask(spec: Any, i: torch.Tensor, j: torch.Tensor, queries: int, keys: int) -> torch.Tensor:
    attend = spec.attend()
    tensors = {name: torch.zeros(1, 1, n, 1) for name, n in (("q", queries), ("k", keys), ("v", keys))}
    sizes = {"I": queries, "J": keys, "B": 1}
    environment = attend.environment(tensors, sizes, torch.float64, score=torch.zeros(1, 1, queries, keys))
    environment = dataclasses.replace(environment, indices={**environment.indices, "i": i, "j": j})
    return evaluate(dense(spec).mask, environment).expand(queries, keys)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_split_columns_keep_the_values(row: Case) -> None:
    """Score, slope and mask with the queries of a block split, as the kernel computes them."""
    case = dataclasses.replace(row, sizes={"B": 1, "I": 130, "J": 90})
    spec = case.spec
    parts, tensors = dense(spec), case.tensors(0, torch.float64)
    attend = spec.attend()
    assert attend is not None
    raw = torch.randn(1, tensors["q"].shape[1], 130, 90).double()
    sizes = bind_sizes({value.name: value.type for value in spec.inputs}, tensors)
    environment = attend.environment(tensors, sizes, torch.float64, score=raw)
    column = environment.indices["i"]
    split = {"near": column // 64 * 64 + (column & 6), "far": column & 63 & ~6}
    inside = dataclasses.replace(environment, indices={**environment.indices, **split})
    assert torch.equal(evaluate(folded(parts.mask), inside), evaluate(parts.mask, environment))
    for expr in (parts.score, derivative(parts.score, SCORE)):
        parted = folded(expr)
        found, wanted = evaluate(parted, inside), evaluate(expr, environment)
        narrow = evaluate(expr, dataclasses.replace(environment, dtype=torch.float32))
        assert within_rounding(found, wanted, narrow, operations(parted, expr))


@pytest.mark.usefixtures("_cache")
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_what_the_host_passes(row: Case) -> None:
    """Each kernel gets an argument for each parameter, of the kind and the size that it reads."""
    generated = generate_backward(row.spec)
    module, tile = load_module(generated), generated.skeleton.tile
    sizes = {"B": 2, "I": 70, "J": 140}
    case = dataclasses.replace(row, sizes=sizes)
    dtype = torch.float16 if "float16" in row.text.split() else torch.bfloat16
    given = case.tensors(0, dtype)
    query, value = given["q"], given["v"]
    out = torch.randn(*query.shape[:3], value.shape[3]).to(dtype)
    lse = torch.randn(query.shape[:3])
    calls: dict[str, dict[str, Any]] = {}

    def launched(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        named = [name for name in kernel.arg_names if name not in options]
        assert len(named) == len(arguments), kernel.__name__
        calls[kernel.__name__] = {**dict(zip(named, arguments, strict=True)), "grid": grid}

    with (
        mock.patch.object(module, "launch", launched),
        mock.patch.object(torch.cuda, "device_of", lambda _: contextlib.nullcontext()),
        mock.patch.object(torch.cuda, "get_device_properties", lambda _: mock.Mock(multi_processor_count=3)),
    ):
        before = [out, lse] if "log-sum-exp" in row.name else [out]
        results = module.attend_backward(*before, out, lse, *given.values())
    assert [result.shape for result in results] == [tensor.shape for tensor in given.values()]
    assert list(calls) == ["prepare", "attend_backward_kernel", "finish"]
    kernel, blocks = calls["attend_backward_kernel"], -(-70 // tile.queries)
    for name, tensor in (("query", query), ("key", given["k"]), ("value", value), ("grad_out", out)):
        rows = tile.queries if name in ("query", "grad_out") else 64
        assert kernel[name].base is tensor and kernel[name].block_shape == [1, 1, rows, tile.channels]
    assert [kernel["grad_key"].base is results[1], kernel["grad_value"].base is results[2]] == [True, True]
    assert kernel["row_values"].base.numel() == 2 * 2 * query.shape[1] * blocks * tile.queries
    assert kernel["query_sums"].numel() == 2 * query.shape[1] * blocks * tile.queries * tile.channels
    assert calls["prepare"]["grid"] == calls["finish"]["grid"] == (2 * query.shape[1] * blocks,)
    listed = kernel["work"][kernel["work"] >= 0]
    groups = given["k"].shape[1]
    wanted = {(b << 40) | (g << 24) | block for b in range(2) for g in range(groups) for block in range(2)}
    assert sorted(listed.tolist()) == sorted(wanted) and bool((kernel["work"][:, -1] < 0).all())
    assert kernel["work"].shape[1] == kernel["work_width"]


@pytest.mark.usefixtures("_cache")
def test_what_it_refuses_at_run_time() -> None:
    module = load_module(generate_backward(ROWS_BY_NAME["causal-half"].spec))
    good = torch.zeros(1, 8, 70, 128, dtype=torch.float16)
    lse = torch.zeros(1, 8, 70)
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(module.Refused, match="no fixed order"):
            module.attend_backward(good, good, lse, good, good, good)
    finally:
        torch.use_deterministic_algorithms(False)
    with pytest.raises(module.Refused, match="2 elements apart"):
        wide = torch.zeros(1, 8, 70, 256, dtype=torch.float16)[..., ::2]
        module.attend_backward(good, good, lse, wide, good, good)
    nothing = torch.zeros(0, 8, 70, 128, dtype=torch.float16)
    found = module.attend_backward(nothing, nothing, torch.zeros(0, 8, 70), nothing, nothing, nothing)
    assert [tensor.shape for tensor in found] == [nothing.shape] * 3


@pytest.mark.parametrize(
    ("queries", "dtype", "wanted", "refuses", "runs"),
    (
        (80, torch.bfloat16, ("q", "k", "v"), False, ["hopper"]),
        (80, torch.bfloat16, ("q", "k", "v"), True, ["hopper", "plain"]),
        (80, torch.bfloat16, ("q", "v"), False, ["plain"]),
        (63, torch.bfloat16, ("q", "k", "v"), False, ["plain"]),
        (80, torch.float32, ("q", "k", "v"), False, ["plain"]),
    ),
)
def test_what_computes_gradients_on_a_hopper_gpu(
    queries: int,
    dtype: torch.dtype,
    wanted: tuple[str, ...],
    refuses: bool,
    runs: list[str],
) -> None:
    pytest.importorskip("triton.experimental.gluon")
    from attncompile.codegen.triton.lower import _hopper_backward, backward_implementation

    _hopper_backward.cache_clear()

    class Refused(ValueError):
        """What the module raises."""

    found: list[str] = []

    def loaded(module: Any) -> Any:
        def attend_backward(*arguments: torch.Tensor) -> list[torch.Tensor]:
            found.append("hopper" if "gluon" in module.source else "plain")
            if found == ["hopper"] and refuses:
                raise Refused
            return list(arguments[-3:])

        return mock.Mock(attend_backward=attend_backward, Refused=Refused)

    case = dataclasses.replace(ROWS_BY_NAME["causal"], sizes={"B": 1, "I": queries, "J": 80})
    tensors = list(case.tensors(0, dtype).values())
    out, lse = torch.zeros_like(tensors[0]), torch.zeros(tensors[0].shape[:3])
    gradients = backward_implementation(print_spec(with_log_sum_exp(case.spec)))
    assert not isinstance(gradients, str)
    place = "attncompile.codegen.triton.lower"
    with mock.patch(f"{place}.on_hopper", lambda _: True), mock.patch(f"{place}.load_module", loaded):
        gradients(wanted, [out, torch.empty(0)], tensors, [out, lse])
    _hopper_backward.cache_clear()
    assert found == runs


@pytest.mark.usefixtures("_cache")
@pytest.mark.parametrize("name", ("full", "window", "softcap", "causal-64"))
@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"), reason="TRITON_INTERPRET replaces the compiler"
)
def test_compiles_for_sm_90(name: str) -> None:
    from attncompile.codegen.gluon.ahead import compile_gradients_ahead

    kernel = compile_gradients_ahead(generate_backward(ROWS_BY_NAME[name].spec), "bfloat16")
    text = kernel.texts["ptx"]
    assert "wgmma.mma_async" in text and "cp.async.bulk.tensor" in text
    assert "red.relaxed.gpu.global.add.v4.f32" in text
    assert kernel.shared <= SHARED_MEMORY
    if cuobjdump() is not None:
        code = instructions(kernel.texts["cubin"])
        products = sum(bool(each.describes()) for each in code)
        waits = sum(each.operation.startswith("WARPGROUP.DEPBAR") for each in code)
        assert products > 100
        assert waits < products / 3, "ptxas waits for each product: registers do not suffice"
        assert not unset_descriptors(code)
        assert kernel.spills is None or kernel.spills <= 256


def test_the_gain_is_that_of_query_and_key() -> None:
    """∂logit/∂s is the scale for a plain score, and leaves its slope to the kernel where it varies."""
    gains = {name: generate_backward(ROWS_BY_NAME[name].spec).skeleton.gain for name in ("causal", "softcap")}
    assert math.isclose(gains["causal"], 0.09) and math.isclose(gains["softcap"], 30.0)
