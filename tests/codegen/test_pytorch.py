"""Specs as PyTorch operators: as good as the plain computation, on the whole table, in every way they are
run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from attncompile.codegen.pytorch import OPERATORS, lower, mask_inputs, visible_mask, why_not
from attncompile.codegen.pytorch import choose as choosing
from attncompile.codegen.pytorch import sdpa as sdpa_module
from attncompile.ir import RefusalError, Spec, parse_spec
from attncompile.ir.sample import random_tensors
from attncompile.passes import parse_passes, run_passes
from attncompile.verify import compare, require_as_good_as_eager
from attncompile.verify.sites import longest_sum
from tests.cases import BY_NAME, CASES, Case

PLAIN_OPERATORS = tuple(name for name in OPERATORS if name != "flex")  # flex has a file of its own


def as_tuple(found: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


def arguments(spec: Spec, tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [tensors[value.name] for value in spec.inputs]


def check(spec: Spec, tensors: dict[str, torch.Tensor], found: object, what: str) -> None:
    dtype = next(t.dtype for t in tensors.values() if t.is_floating_point())
    assert isinstance(found, torch.Tensor | tuple)
    length = longest_sum(spec, tensors)
    wanted, plain = spec.interpret(tensors), spec.interpret(tensors, dtype)
    for one, reference, eager in zip(as_tuple(found), wanted, plain, strict=True):
        require_as_good_as_eager(one, reference, eager, length, what)


@pytest.mark.parametrize("operator", PLAIN_OPERATORS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_table(case: Case, operator: str) -> None:
    spec = case.spec
    reason = why_not(spec, "cpu", operator)
    if reason is not None:
        with pytest.raises(RefusalError, match="cannot compute"):
            lower(spec, "cpu", operator)
        return
    lowering = lower(spec, "cpu", operator)
    assert (lowering.target, lowering.operator) == ("pytorch", operator)
    for dtype in (torch.float32, torch.bfloat16):
        tensors = case.tensors(seed=1, dtype=dtype)
        found = lowering.run(*arguments(spec, tensors))
        assert as_tuple(found)[0].dtype == dtype
        check(spec, tensors, found, f"{case.name} by {operator}")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gradients(case: Case) -> None:
    """In float64 the gradients are those of the definition. Rows without a key give no gradient, not NaN."""
    spec, tensors = case.spec, case.tensors(seed=2, dtype=torch.float64)
    if case.name == "int8":
        pytest.skip("rounding has no useful gradient: zero almost everywhere")
    leaves = [t.requires_grad_() for t in tensors.values() if t.is_floating_point()]

    def gradients(outputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        total = sum((out[out.isfinite()] ** 2).sum() for out in outputs)
        return [g if g is not None else torch.zeros_like(leaf) for g, leaf in zip(
            torch.autograd.grad(total, leaves, allow_unused=True), leaves, strict=True)]

    found = gradients(as_tuple(lower(spec).run(*arguments(spec, tensors))))
    wanted = gradients(spec.interpret(tensors))
    for one, reference in zip(found, wanted, strict=True):
        if not reference.isfinite().all():  # the definition's own softmax over nothing
            assert case.empty_rows and one.isfinite().all()
            continue
        torch.testing.assert_close(one, reference)


# One row for each way of building a mask, sharing heads and treating rows without a key; tracing is slow.
QUICK = ("causal", "causal-last-rows", "causal-padding", "padding-bool", "sink-window", "learned-bias",
         "temperature", "gqa-strided", "empty-rows-nan", "empty-rows-constant", "softcap", "cache")
TRACED = [pytest.param(case, id=case.name, marks=() if case.name in QUICK else pytest.mark.slow)
          for case in CASES if case.name != "one-token"]  # sizes 0 and 1 are always special to a tracer


@pytest.mark.parametrize("case", TRACED)
def test_traces_with_symbolic_sizes(case: Case) -> None:
    """A graph made at one size computes others: nothing of the size was baked in."""
    spec = case.spec
    graph = make_fx(lower(spec).run, tracing_mode="symbolic")(*arguments(spec, case.tensors()))
    scan = spec.scan()
    if scan is not None and not scan.fixed:
        # computed a step after the other: who compiles such a graph is told for how many it was made
        assert {int(size) for size in graph.shape_env.replacements.values()} >= {case.sizes["I"]}
        return
    longer = {name: extent + {"B": 1, "J": 19}.get(name, 16) for name, extent in case.sizes.items()}
    tensors = random_tensors(spec, longer, 3, None, case.ranges)
    found = graph(*arguments(spec, tensors))
    check(spec, tensors, tuple(found) if isinstance(found, list | tuple) else found, case.name)


@pytest.mark.parametrize("row", ["causal", "causal-padding", "sink-window", "gqa", "empty-rows-constant"])
def test_dynamo_sees_one_graph(row: str) -> None:
    case = BY_NAME[row]
    spec, tensors = case.spec, case.tensors()
    lowering = lower(spec)
    torch._dynamo.reset()
    run = torch.compile(lambda *given: lowering.run(*given), backend="eager", fullgraph=True, dynamic=True)
    found, wanted = run(*arguments(spec, tensors)), lowering.run(*arguments(spec, tensors))
    torch.testing.assert_close(found, wanted, equal_nan=True)


# row, operator on the CPU, part of the reason
CHOICES = (
    ("full", "sdpa", "nothing is masked"),
    ("causal", "sdpa", "SDPA's own where queries and keys are equally many"),
    ("padding", "sdpa", "is added to the scores"),
    ("causal-padding", "blockwise", "where inputs are short or a graph is traced"),
    ("documents", "blockwise", "the keys they may see"),
    ("gqa", "sdpa", "shared, not repeated"),
    ("window", "blockwise", "the keys they may see"),
    ("sink-window", "blockwise", "the keys they may see"),
    ("window-symmetric", "blockwise", "the keys they may see"),
    ("softcap", "reference", "not linear in s"),
    ("sigmoid", "reference", "the normaliser sigmoid"),
    ("weight-edit", "reference", "of each weight"),
    ("log-sum-exp", "reference", "log-sum-exp"),
    ("scan", "scan", "linear work"),
    ("scan-padding", "scan", "linear work"),
)


@pytest.mark.parametrize(("row", "operator", "reason"), CHOICES)
def test_choice(row: str, operator: str, reason: str) -> None:
    lowering = lower(BY_NAME[row].spec)
    assert lowering.operator == operator
    assert reason in lowering.reason


def test_flex_is_chosen_on_cuda_where_sdpa_cannot() -> None:
    lowering = lower(BY_NAME["softcap"].spec, "cuda")
    assert lowering.operator == "flex" and lowering.source is not None
    assert lower(BY_NAME["sigmoid"].spec, "cuda").operator == "reference"


def test_unknown_fills_are_refused() -> None:
    spec = parse_spec(BY_NAME["empty-rows-constant"].text.replace("−10000.0", "−5.0"))
    assert why_not(spec, "cpu", "sdpa") == "scaled_dot_product_attention has no place for the fill −5.0"
    assert lower(spec).operator == "reference"


class Recorder:
    """Counts the calls of scaled_dot_product_attention and the positions they visit."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = self.visited = 0
        self.masks: list[tuple[int, ...] | None] = []
        self.causal: list[bool] = []
        original = sdpa_module.scaled_dot_product_attention

        def recorded(query: torch.Tensor, key: torch.Tensor, *rest: torch.Tensor, **options: Any) -> Any:
            self.calls += 1
            self.visited += query.shape[2] * key.shape[2]
            mask = options["attn_mask"]
            self.masks.append(tuple(mask.shape) if isinstance(mask, torch.Tensor) else None)
            self.causal.append(bool(options["is_causal"]))
            return original(query, key, *rest, **options)

        monkeypatch.setattr(sdpa_module, "scaled_dot_product_attention", recorded)


@pytest.mark.parametrize(("row", "mask", "causal"), [
    ("full", None, False),
    ("causal", None, True),
    ("padding", (2, 1, 1, 13), False),
    ("causal-padding", (6, 1, 13, 13), False),
    ("learned-bias", (1, 4, 13, 13), False),
    ("one-token", None, False),
])
def test_masks_are_as_small_as_can_be(
    row: str, mask: tuple[int, ...] | None, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(monkeypatch)
    case = BY_NAME[row]
    lower(case.spec).run(*arguments(case.spec, case.tensors()))
    assert (recorder.masks, recorder.causal) == ([mask], [causal])


def test_a_window_really_leaves_out_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = run_passes(BY_NAME["causal"].spec, parse_passes("sparsify.window(size=128, sinks=4)")).spec
    tensors = random_tensors(spec, {"B": 1, "I": 2048})
    recorder = Recorder(monkeypatch)
    found = lower(spec).run(*arguments(spec, tensors))
    assert recorder.calls == 2048 // sdpa_module.BLOCK_QUERY
    # a block of queries sees itself, the window before it, and one tile of sinks, rounded to tiles
    widest = sdpa_module.BLOCK_QUERY + 128 + 2 * sdpa_module.BLOCK_KEY
    assert recorder.visited <= 2048 * widest <= 0.25 * 2048**2
    check(spec, tensors, found, "window")


LONG = {"B": 2, "I": 600, "J": 700, "P": 100}


@pytest.mark.parametrize("case", [case for case in CASES if why_not(case.spec, "cpu", "blockwise") is None],
                         ids=lambda case: case.name)
def test_blockwise_is_exact_for_every_mask(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it does not pay, and where a long run of padding empties whole blocks of rows."""
    spec = case.spec
    tensors = random_tensors(spec, {name: LONG[name] for name in case.sizes}, 5, None, case.ranges)
    for value in spec.captured():
        if value.type.dtype == "int64" and value.name not in case.ranges:
            tensors[value.name][0, :300] = 0
    calls = []
    walk = choosing.attend_blockwise
    monkeypatch.setattr(choosing, "attend_blockwise", lambda *given: calls.append(1) or walk(*given))
    monkeypatch.setattr(choosing, "blockwise_pays", lambda *given: True)
    found = lower(spec, "cpu", "blockwise").run(*arguments(spec, tensors))
    assert calls
    check(spec, tensors, found, case.name)


WINDOWED = parse_spec("""
windowed   attend  q,k,v[B,2,I,16]  float32
  score  0.25·s
  mask   j ≤ i and (j > i − 100 or j < 4) and attention_mask[b, j] ≠ 0
  norm   softmax (float32), empty rows zero
  given  attention_mask[B,I]:int64
""")


@pytest.mark.parametrize("rest", ["eager", "inductor", "export"])
def test_blocks_are_skipped_inside_a_traced_graph(rest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph holds one operator, which walks the blocks when it runs, at lengths that tracing did not know."""
    run = lower(WINDOWED, "cpu").run

    class Site(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
            return run(2.0 * q, k, v, m) + 1.0  # type: ignore[no-any-return]

    def given(length: int) -> list[torch.Tensor]:
        tensors = random_tensors(WINDOWED, {"B": 2, "I": length}, 3)
        tensors["attention_mask"][0, :300] = 0
        return arguments(WINDOWED, tensors)

    walked = []
    walk = choosing.attend_blockwise
    monkeypatch.setattr(choosing, "attend_blockwise", lambda *a: walked.append(1) or walk(*a))
    with torch.no_grad():
        if rest == "export":
            length = torch.export.Dim("length", min=8, max=4096)
            axes = [{2: length}] * 3 + [{1: length}]
            program = torch.export.export(Site(), tuple(given(900)), dynamic_shapes=axes)
            assert [n.target for n in program.graph.nodes].count(torch.ops.attncompile.run.default) == 1
            compiled: Callable[..., torch.Tensor] = program.module()
        else:
            compiled = torch.compile(
                Site(), backend={"eager": "aot_eager", "inductor": "inductor"}[rest], fullgraph=True, dynamic=True
            )
            compiled(*given(900))
        for length in (900, 1300):
            walked.clear()
            tensors = given(length)
            found = compiled(*tensors)
            assert walked
            named = dict(zip((v.name for v in WINDOWED.inputs), tensors, strict=True))
            check(WINDOWED, {**named, "q": 2.0 * named["q"]}, found - 1.0, f"{rest} at {length}")


def test_a_traced_graph_with_gradients_keeps_the_masked_call() -> None:
    run = lower(WINDOWED, "cpu").run
    tensors = arguments(WINDOWED, random_tensors(WINDOWED, {"B": 1, "I": 300}, 3))
    tensors[0].requires_grad_()
    torch.compile(run, backend="aot_eager", fullgraph=True)(*tensors).sum().backward()
    found, tensors[0].grad = tensors[0].grad, None
    run(*tensors).sum().backward()
    torch.testing.assert_close(found, tensors[0].grad)


def test_one_mask_serves_equal_sites() -> None:
    case = BY_NAME["causal-padding"]
    first, second = case.spec, parse_spec(case.text.replace("0.25·s", "0.5·s"))
    assert mask_inputs(first) == mask_inputs(second)
    assert mask_inputs(first) != mask_inputs(BY_NAME["padding"].spec)
    assert mask_inputs(BY_NAME["full"].spec) is None and mask_inputs(BY_NAME["softcap"].spec) is None
    tensors = case.tensors(seed=4)
    mask = visible_mask(first, tensors)
    assert mask is not None
    for spec in (first, second):
        lowering = lower(spec)
        assert torch.equal(lowering.run(*arguments(spec, tensors), mask=mask),
                           lowering.run(*arguments(spec, tensors)))


def test_no_mask_is_built_where_sdpa_has_its_own() -> None:
    case = BY_NAME["causal"]
    assert visible_mask(case.spec, case.tensors()) is None


def test_a_bias_of_minus_infinity_empties_a_row() -> None:
    case = BY_NAME["additive-bias"]
    tensors = case.tensors()
    tensors["bias"][1, 0, 3] = -torch.inf
    found = lower(case.spec).run(*arguments(case.spec, tensors))
    comparison = compare(found, case.spec.interpret(tensors)[0])  # type: ignore[arg-type]
    assert comparison.misplaced == 0 and bool(found[1, :, 3].isnan().all())  # type: ignore[index]


def test_strided_operands() -> None:
    """Heads cut out of one projection, as models have them."""
    case = BY_NAME["causal"]
    tensors = case.tensors()
    joined = torch.cat([tensors[name].transpose(1, 2).flatten(2) for name in "qkv"], -1)
    cut = [part.unflatten(-1, (4, 16)).transpose(1, 2) for part in joined.chunk(3, -1)]
    assert not any(part.is_contiguous() for part in cut)
    check(case.spec, tensors, lower(case.spec).run(*cut), "strided")


def test_bad_calls() -> None:
    case = BY_NAME["causal-padding"]
    lowering, tensors = lower(case.spec), case.tensors()
    with pytest.raises(ValueError, match=r"takes 4 tensors \(q, k, v, attention_mask\), got 3"):
        lowering.run(*arguments(case.spec, tensors)[:3])
    with pytest.raises(ValueError, match="axis a1 of attention_mask is 9, but I is 13 elsewhere"):
        lowering.run(tensors["q"], tensors["k"], tensors["v"], tensors["attention_mask"][:, :9])
    with pytest.raises(ValueError, match="q should be"):
        lowering.run(tensors["q"][0], tensors["k"], tensors["v"], tensors["attention_mask"])
    with pytest.raises(ValueError, match="no mask can be handed in"):
        lower(BY_NAME["softcap"].spec).run(*arguments(BY_NAME["softcap"].spec, BY_NAME["softcap"].tensors()),
                                           mask=tensors["q"])
    with pytest.raises(ValueError, match="unknown operator 'sdp'; choose one of sdpa, blockwise, flex"):
        why_not(case.spec, "cpu", "sdp")
