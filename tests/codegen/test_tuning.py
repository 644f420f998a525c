"""The fastest way to compute a Spec: what is tried, taken, refused and kept. Clocks are made up; none is read."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import attncompile
from attncompile.codegen.triton.alternatives import alternatives
from attncompile.codegen.triton.candidates import tiles_to_try
from attncompile.codegen.triton.compiling import Workers
from attncompile.codegen.triton.generate import GeneratedModule, generate
from attncompile.codegen.triton.lower import _Chosen
from attncompile.codegen.triton.tiles import Tile, TunedTile
from attncompile.codegen.triton.trial import apart
from attncompile.codegen.triton.tuned import Choice, bucket, keep_choices, read_choices
from attncompile.codegen.triton.tuning import Alternative, Run, Tuned, session, tune
from attncompile.ir import parse_spec, print_spec
from attncompile.kernels.hopper import HopperTile
from tests.kernels.cases import ALL_BY_NAME
from tests.kernels.comparison import compare
from tests.kernels.decode_cases import DECODE_BY_NAME, stored_inputs

CAUSAL = "x   attend  q,k,v[B,8,N,64]  bfloat16\n  score  0.125·s\n  mask   j ≤ i\n  norm   softmax (float32)"
DECODE = (
    "x   attend  q[B,8,I,64]  k,v[B,2,J,64]  bfloat16\n  score  0.125·s\n  mask  true\n  kv_head h // 4\n"
    "  norm   softmax (float32)"
)
FAST = Choice("triton", tile=TunedTile("dense", "bfloat16", Tile(64, 64, 4, 3)))
SLOW = Choice("triton", tile=TunedTile("dense", "bfloat16", Tile(64, 32, 4, 3)))
TABLE = Choice("table")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNCOMPILE_CACHE", str(tmp_path))


def _query(length: int = 40) -> torch.Tensor:
    return torch.randn(2, 8, length, 64, dtype=torch.bfloat16)


def _giving(result: torch.Tensor, cost: float) -> Run:
    """A function with a cost that the clock below reads."""

    def run(*_: torch.Tensor) -> torch.Tensor:
        run.cost = cost  # type: ignore[attr-defined]
        asked.append(cost)
        return result

    return run


asked: list[float] = []


def _clock(call: Callable[[], object]) -> float:
    call()
    return asked[-1]


def _failing(message: str) -> Callable[[], Run]:
    def make() -> Run:
        raise RuntimeError(message)

    return make


def test_the_fastest_is_taken() -> None:
    tensors = [_query()]
    options = [Alternative(SLOW, lambda: _giving(tensors[0], 3.0)), Alternative(FAST, lambda: _giving(tensors[0], 1.0))]
    default = Alternative(TABLE, lambda: _giving(tensors[0], 2.0))
    found = tune(CAUSAL, "here", tensors, default, options, seconds=60, clock=_clock)
    assert found.choice == Choice("triton", FAST.tile, None, 1.0, 2.0)
    assert found.timed == {"as it was": 2.0, FAST.describe(): 1.0, SLOW.describe(): 3.0}
    assert "triton 64 x 64, 4 warps, 3 stages, 1 ms instead of 2 (2.00x)" in str(found)


def test_what_is_not_ahead_in_every_round_changes_nothing() -> None:
    right = _query()
    # compared, timed, and five times in turns
    costs = iter([1.0, 1.0, 1.0, 1.0, 2.5, 1.0, 1.0])

    def wandering(*tensors: torch.Tensor) -> torch.Tensor:
        asked.append(next(costs))
        return tensors[0]

    default = Alternative(TABLE, lambda: _giving(right, 2.0))
    found = tune(CAUSAL, "here", [right], default, [Alternative(FAST, lambda: wandering)], seconds=60, clock=_clock)
    assert found.choice.target == "table" and found.timed[FAST.describe()] == 1.0


def test_what_is_hardly_faster_changes_nothing() -> None:
    tensors = [_query()]
    options = [Alternative(FAST, lambda: _giving(tensors[0], 1.99))]
    found = tune(
        CAUSAL, "here", tensors, Alternative(TABLE, lambda: _giving(tensors[0], 2.0)), options, seconds=60, clock=_clock
    )
    assert found.choice == Choice("table", None, None, 2.0, 2.0)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    (
        (lambda right: right * 1.1, "apart in norm"),
        (lambda right: torch.where(right > 2, math.nan, right), "in other places"),
        (lambda right: right.float(), "torch.float32"),
        (lambda right: right[:1], r"\(1, 8, 40, 64\)"),
    ),
)
def test_another_result_is_refused_however_fast(wrong: Callable[[torch.Tensor], torch.Tensor], reason: str) -> None:
    right = _query()
    options = [Alternative(FAST, lambda: _giving(wrong(right), 0.1))]
    default = Alternative(TABLE, lambda: _giving(right, 2.0))
    found = tune(CAUSAL, "here", [right], default, options, seconds=60, clock=_clock)
    assert found.choice.target == "table"
    (said,) = found.refused.values()
    assert re.search(reason, said), said


def test_a_row_that_was_left_out_is_another_result() -> None:
    """The norm of the whole hides one row of thousands, which is what a mistake at the last tile would be."""
    right = _query(4000)
    wrong = right.clone()
    wrong[1, 7, -1] = 0
    assert "has a row" in (apart([wrong], [right], codes=False) or "")
    assert "has a row" in (apart([0.6 * right], [right], codes=True) or "")
    assert apart([right], [right], codes=False) is None
    cancelling = right.clone()
    cancelling[0, 0, 0] *= 1e-3
    near = cancelling.clone()
    near[0, 0, 0] += 1e-3
    assert apart([near], [cancelling], codes=False) is None


def test_infinities_of_another_kind_are_another_result() -> None:
    right = torch.zeros(1, 1, 2, 2)
    right[0, 0, 0, 0] = math.inf
    for other in (math.nan, -math.inf, 0.0):
        wrong = right.clone()
        wrong[0, 0, 0, 0] = other
        assert apart([wrong], [right], codes=False) == "gives infinities or NaN in other places"


def test_rounding_is_no_other_result_and_infinities_are_compared() -> None:
    right = _query()
    right[0, 0, 0, 0] = -math.inf
    near = right * (1 + torch.finfo(torch.bfloat16).eps)
    options = [Alternative(FAST, lambda: _giving(near, 0.1))]
    default = Alternative(TABLE, lambda: _giving(right, 2.0))
    assert tune(CAUSAL, "", [right], default, options, seconds=60, clock=_clock).choice.tile == FAST.tile


def test_what_does_not_compile_is_told() -> None:
    right = _query()
    options = [Alternative(FAST, _failing("out of resource: shared memory\nmore")), Alternative(SLOW, _failing(""))]
    default = Alternative(TABLE, lambda: _giving(right, 2.0))
    found = tune(CAUSAL, "", [right], default, options, seconds=60, clock=_clock)
    assert found.choice.target == "table"
    assert found.refused == {FAST.describe(): "out of resource: shared memory", SLOW.describe(): "RuntimeError"}


def test_what_cannot_be_timed_is_refused_and_the_rest_goes_on() -> None:
    right = _query()

    def clock(call: Callable[[], object]) -> float:
        call()
        if asked[-1] == 0.5:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return asked[-1]

    options = [Alternative(FAST, lambda: _giving(right, 0.5)), Alternative(SLOW, lambda: _giving(right, 1.0))]
    default = Alternative(TABLE, lambda: _giving(right, 2.0))
    found = tune(CAUSAL, "", [right], default, options, seconds=60, clock=clock)
    assert found.choice.tile == SLOW.tile and found.refused == {FAST.describe(): "CUDA out of memory."}


def test_what_was_not_tried_is_tried_the_next_time() -> None:
    with attncompile.tuning(seconds=60) as session:
        assert session.wants(CAUSAL, "here", None)
        assert session.wants(CAUSAL, "here", Choice("table", untried=3))
        assert not session.wants(CAUSAL, "here", Choice("table"))
        tuned = Tuned(CAUSAL, "here", Choice("table", untried=3), {}, {}, 3)
        session.found.append(tuned)
        assert not session.wants(CAUSAL, "here", Choice("table", untried=3)), "not twice in one session"


def test_tuning_is_of_the_thread_that_asked_for_it() -> None:
    with attncompile.tuning(seconds=60) as mine, ThreadPoolExecutor(1) as pool:
        assert session() is mine
        assert pool.submit(session).result() is None


def test_nothing_begins_when_the_time_is_over() -> None:
    right = _query()

    def long() -> Run:
        time.sleep(0.05)
        return _giving(right, 1.0)

    choices = [Choice("triton", tile=TunedTile("dense", "bfloat16", tile)) for tile in
               tiles_to_try("dense", Tile(128, 64, 4, 3))]  # fmt: skip
    default = Alternative(TABLE, lambda: _giving(right, 2.0))
    found = tune(CAUSAL, "", [right], default, [Alternative(c, long) for c in choices], seconds=1e-6, clock=_clock)
    assert found.untried >= len(choices) - 4 and found.choice.milliseconds == 2.0


def test_a_choice_is_kept_for_later_processes(tmp_path: Path) -> None:
    device = torch.device("cpu")
    assert read_choices(CAUSAL, device) == {}
    path = keep_choices(CAUSAL, device, {"B2 N64 bfloat16": FAST})
    keep_choices(CAUSAL, device, {"B2 N128 bfloat16": TABLE})
    assert read_choices(CAUSAL, device) == {"B2 N64 bfloat16": FAST, "B2 N128 bfloat16": TABLE}
    assert read_choices(DECODE, device) == {}
    assert path.parent == tmp_path / "tuning" and [each.name for each in path.parent.iterdir()] == [path.name]
    assert json.loads(path.read_text())["versions"]["torch"]


@pytest.mark.parametrize(
    "damage", (b"", b"{}", b'{"device": "cpu", "versions": {}, "choices": {"B2": {"target": "rm"}}}')
)
def test_a_damaged_file_is_left_aside_with_a_warning(damage: bytes) -> None:
    device = torch.device("cpu")
    path = keep_choices(CAUSAL, device, {"B2 N64 bfloat16": FAST})
    path.write_bytes(damage)
    with pytest.warns(RuntimeWarning, match="is left aside.*remove it to tune again"):
        assert read_choices(CAUSAL, device) == {}


def test_sizes_that_round_up_to_the_same_powers_share_a_choice() -> None:
    text = print_spec(parse_spec(CAUSAL))
    for length, rounded in ((33, 64), (64, 64), (65, 128), (1, 1), (0, 0)):
        assert bucket(text, [_query(length)] * 3) == f"B2 N{rounded} bfloat16"
    assert bucket(text, [_query().half()] * 3) == "B2 N64 float16"


@pytest.mark.parametrize("seconds", (0, -1, math.nan, math.inf, 1e9, "10", None))
def test_no_time_is_refused(seconds: Any) -> None:
    with pytest.raises(ValueError, match="seconds is"), attncompile.tuning(seconds=seconds):
        pass


def test_tuning_inside_tuning_is_refused_and_ends_with_its_block() -> None:
    with attncompile.tuning(seconds=1) as outer:
        assert session() is outer and "nothing was tuned" in str(outer)
        with pytest.raises(ValueError, match="on already"), attncompile.tuning(seconds=1):
            pass
        assert session() is outer
        outer.left = 0
        assert session() is None
    assert session() is None


@pytest.mark.parametrize(
    ("kernel", "table"),
    (("dense", Tile(128, 64, 4, 3)), ("decode", Tile(16, 128, 4, 3)), ("scan", Tile(64, 64, 4, 2))),
)
def test_the_nearest_tiles_come_first_and_each_once(kernel: str, table: Tile) -> None:
    found = tiles_to_try(kernel, table)  # type: ignore[arg-type]
    assert table not in found and len(set(found)) == len(found) >= 20
    first = found[0]
    assert sum(getattr(first, name) != getattr(table, name) for name in ("queries", "keys", "warps", "stages")) == 1
    fixed = tiles_to_try(kernel, table, fixed=True)  # type: ignore[arg-type]
    assert fixed and {(each.queries, each.keys) for each in fixed} == {(table.queries, table.keys)}


@pytest.mark.parametrize("name", ("causal", "scan", "int4-groups"))
def test_a_tuned_tile_is_in_the_text_for_its_element_type_alone(name: str) -> None:
    pytest.importorskip("triton")
    spec = {**ALL_BY_NAME, **DECODE_BY_NAME}[name].spec
    usual = generate(spec)
    kernel = {"causal": "dense", "scan": "scan", "int4-groups": "decode"}[name]
    tile = Tile(32, 16, 4, 5)
    tuned = generate(spec, TunedTile(kernel, "bfloat16", tile))  # type: ignore[arg-type]
    assert tuned.name == usual.name and tuned.digest != usual.digest
    changed = [each for each in tuned.source.splitlines() if each not in usual.source.splitlines()]
    row = "(16, 4, 5)" if kernel == "decode" else "(32, 16, 4, 5)"
    assert changed == [f"    torch.bfloat16: {row},"]


@pytest.mark.parametrize(
    ("text", "queries", "kernel"), ((CAUSAL, 40, "dense"), (DECODE, 1, "decode"), (DECODE, 40, "dense"))
)
def test_what_is_tried_is_of_the_kernel_that_runs(text: str, queries: int, kernel: str) -> None:
    pytest.importorskip("triton")
    spec = parse_spec(text)
    keys = queries if text is CAUSAL else 600
    heads = 8 if text is CAUSAL else 2
    shapes = [(1, 8, queries, 64), (1, heads, keys, 64), (1, heads, keys, 64)]
    tensors = [torch.empty(shape, dtype=torch.bfloat16) for shape in shapes]
    found = alternatives(print_spec(spec), generate(spec), tensors, 1024, runs="triton")
    tiles = [each.choice.tile for each in found if each.choice.tile]
    assert {tile.kernel for tile in tiles} == {kernel} and {tile.element for tile in tiles} == {"bfloat16"}
    assert Choice("sdpa") in [each.choice for each in found], "a full map and a causal one"
    assert Choice("triton") not in [each.choice for each in found], "that runs anyway"


def test_hopper_tiles_that_fit() -> None:
    pytest.importorskip("triton")
    from attncompile.codegen import gluon
    from attncompile.codegen.gluon.tiles import SHARED_MEMORY, shared_bytes

    spec = parse_spec(CAUSAL)
    table = gluon.generate_fastest(spec).skeleton.tile
    found = gluon.hopper_tiles_to_try(spec, table)
    assert table not in found and len(set(found)) == len(found) >= 10
    assert all(shared_bytes(tile, 64, 64) <= SHARED_MEMORY for tile in found)
    assert {tile.stages for tile in found} == {1, 2, 3}, "a fourth would share a barrier with another's"
    with pytest.raises(ValueError, match="there are barriers for 1 to 3"):
        gluon.generate(spec, dataclasses.replace(table, stages=4))
    assert gluon.generate_fastest(spec, found[0]).source != gluon.generate_fastest(spec).source
    assert len({gluon.generate_fastest(spec, tile).source for tile in found}) == len(found)


def test_a_choice_that_does_not_run_is_set_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of kept choices may come from another machine, or from a version whose kernels had other tiles."""
    pytest.importorskip("triton")
    text = print_spec(parse_spec(CAUSAL))
    tensors = [_query()] * 3
    where = bucket(text, tensors)
    four = HopperTile(3, 128, 4, 2, True, 160, 128, True)
    keep_choices(text, tensors[0].device, {where: Choice("gluon", hopper=four)})
    chosen = _Chosen(text)
    monkeypatch.setattr(chosen, "_by_table", lambda *given, lists=None: given[0])
    with pytest.warns(RuntimeWarning, match="does not run, so the tables decide: a tile of 4 stages"):
        assert chosen.run(*tensors) is tensors[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen.run(*tensors) is tensors[0], "once is enough"


@pytest.mark.parametrize("place", (torch.randn(1), None))
def test_with_lists_the_tables_decide(place: torch.Tensor | None, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    text = print_spec(parse_spec(CAUSAL))
    tensors = [_query()] * 3
    keep_choices(text, tensors[0].device, {bucket(text, tensors): Choice("sdpa")})
    chosen = _Chosen(text)
    monkeypatch.setattr(chosen, "_by_table", lambda *given, lists=None: "table")
    asked_for: list[str] = []
    monkeypatch.setattr(chosen, "_tuned", lambda *_: asked_for.append("tuned"))
    assert chosen.run(*tensors, lists=place) == "table"
    assert asked_for == ([] if place is not None else ["tuned"])


FINE = "import torch\n\n\ndef attend(*tensors):\n    print('noise')\n    return tensors[0]\n"
RAISING = FINE.replace("return tensors[0]", "raise ValueError(str((tensors[0].stride(), tensors[1].sum().item())))")
CRASHING = FINE.replace("return tensors[0]", "import os\n    os.abort()")


def test_workers_say_what_went_wrong_and_survive_a_crash() -> None:
    pytest.importorskip("triton")
    tensors = [torch.ones(2, 3, 4).transpose(0, 1), torch.ones(5, dtype=torch.int32)]
    workers = Workers(1)
    try:
        modules = [GeneratedModule(f"made_{n}", text, ()) for n, text in enumerate((FINE, RAISING, CRASHING, FINE))]
        said = [workers.submit(module, tensors) for module in modules]
        assert [each.result() for each in said] == [None, "((4, 12, 1), 0)", "its process crashed", None]
    finally:
        workers.close()


def test_what_fails_in_a_worker_never_runs_here() -> None:
    right = _query()
    module = GeneratedModule("made", CRASHING, ())

    class Refusing(Workers):
        def submit(self, module: GeneratedModule, tensors: Sequence[torch.Tensor]) -> Future[str | None]:
            told: Future[str | None] = Future()
            told.set_result("its process crashed")
            return told

    options = [Alternative(FAST, _failing("it ran"), lambda: module), Alternative(SLOW, lambda: _giving(right, 1.0))]
    default = Alternative(TABLE, lambda: _giving(right, 2.0))
    found = tune(CAUSAL, "", [right], default, options, seconds=60, workers=Refusing(1), clock=_clock)
    assert found.refused == {FAST.describe(): "its process crashed"}
    assert found.choice.tile == SLOW.tile


@pytest.mark.gpu
@pytest.mark.parametrize("name", ("causal-long", "gqa", "padding", "int8", "scan", "int4-channel"))
def test_on_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from attncompile.codegen.triton.lower import lower

    stored = name in DECODE_BY_NAME
    case = DECODE_BY_NAME[name] if stored else ALL_BY_NAME[name]
    # a handful, and time enough for them on the busiest machine
    chooser = sys.modules["attncompile.codegen.triton.lower"]  # the package has a function of that name
    monkeypatch.setattr(chooser, "alternatives", lambda *a, **k: alternatives(*a, **k)[:4])
    checked = functools.partial(compare, place=stored_inputs) if stored else compare
    run = lower(case.spec, "cuda").run
    with attncompile.tuning(seconds=3000, progress=False) as session:
        outcomes = checked(case, run, torch.float16, "cuda")
    print(session)
    (found,) = session.found
    assert len(found.timed) > 1, str(session)
    # as another process would read it
    chosen = _Chosen(found.spec)
    outcomes = (*outcomes, *checked(case, chosen.run, torch.float16, "cuda"))
    assert chosen._choices[torch.device("cuda", 0)] == {found.bucket: found.choice}
    for outcome in outcomes:
        assert outcome.passed, f"{outcome.output} is off by {outcome.error:.3g}, allowed is {outcome.limit:.3g}"
