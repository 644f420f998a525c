"""Every registered pass over the whole table of Specs: contracts hold, refusals give a reason."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from attncompile.ir import (
    Kind,
    Position,
    Quantize,
    Spec,
    Value,
    parse_expr,
    parse_spec,
    print_spec,
    simplify,
    tensor_type,
)
from attncompile.ir.expr import Const
from attncompile.ir.prologue import Prologue, with_positions
from attncompile.ir.sample import random_tensors
from attncompile.passes import Options, Pass, PassCall, all_passes, parse_passes, run_passes
from tests.cases import BY_NAME, CASES, Case


def call(text: str) -> PassCall:
    (only,) = parse_passes(text)
    return only


@pytest.mark.parametrize("name", all_passes())
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_pass_on_every_row(case: Case, name: str) -> None:
    spec = case.spec
    result = run_passes(spec, (call(name),), allow_untrained=True)
    assert len(result.applied) + len(result.refused) == 1
    if result.refused:
        assert result.spec == spec
        assert result.refused[0][0] == name and result.refused[0][1]
        return
    assert parse_spec(print_spec(result.spec)).fingerprint() == result.spec.fingerprint()
    stamp = result.stamps[0]
    assert (stamp.before, stamp.after) == (spec.fingerprint(), result.spec.fingerprint())
    tensors = case.tensors(dtype=torch.float64)
    for before, after in zip(spec.interpret(tensors), result.spec.interpret(tensors), strict=True):
        assert after.shape == before.shape
        if stamp.contract == "exact":
            torch.testing.assert_close(after, before, equal_nan=True)


# pass, row, what the reason says
REFUSALS = (
    ("sparsify.window", "scan", "exactly one attention"),
    ("sparsify.window", "cross", "no position among its J keys"),
    ("sparsify.window(size=40,sinks=0)", "window", "already hides every key"),
    ("sparsify.window(size=4,sinks=2)", "window-symmetric", "already hides every key"),
    ("quantize.int8", "scan", "exactly one attention"),
    ("quantize.int8", "sigmoid", "normaliser is sigmoid"),
    ("quantize.int8", "int8", "rounded already"),
    ("quantize.int8", "softcap", "does not pass on"),
    ("quantize.int8", "log-sum-exp", "log-sum-exp"),
    ("quantize.int8", "empty-rows-constant", "not the fill"),
    ("quantize.int8", "sink-logits", "not the sink"),
    ("quantize.fp8", "int8", "rounded already"),
    ("quantize.fp8", "softcap", "does not pass on"),
    ("quantize.fp8", "head-mask", "before the edit w·head_mask[h]"),
    ("linearize.decay", "scan", "exactly one attention"),
    ("linearize.decay", "relu", "normaliser is relu"),
    ("linearize.decay", "cross", "I queries read J keys"),
    ("linearize.decay", "padding", "sees keys j ≤ i, the mask is attention_mask"),
    ("linearize.decay", "window", "the mask part j > i − 4 couples queries and keys"),
    ("linearize.decay", "learned-bias", "no bias"),
    ("linearize.decay", "weight-edit", "no normalised weights"),
)


@pytest.mark.parametrize(("text", "row", "reason"), REFUSALS, ids=[f"{t}-{r}" for t, r, _ in REFUSALS])
def test_refusals(text: str, row: str, reason: str) -> None:
    spec = BY_NAME[row].spec
    result = run_passes(spec, (call(text),), allow_untrained=True)
    assert result.spec == spec and not result.applied
    assert reason in result.refused[0][1]


def test_fuse_refuses_a_spec_without_attention() -> None:
    text = "p   position  q[B,4,I,16]  float32\n  cos    1.0\n  sin    0.0\n  channels 16"
    result = run_passes(parse_spec(text), (call("fuse"),))
    assert result.refused == (("fuse", "there is no attention operation in it"),)


@pytest.mark.parametrize("row", ["softcap", "log-sum-exp", "empty-rows-constant"])
def test_int8_without_smoothing_applies_where_smoothing_does_not(row: str) -> None:
    assert run_passes(BY_NAME[row].spec, (call("quantize.int8(smooth=false)"),)).applied


SMOOTHED = tuple(
    case
    for case in CASES
    if len(case.spec.operations) == 1 and run_passes(case.spec, (call("quantize.fp8(values=false)"),)).applied
)


@pytest.mark.parametrize("case", SMOOTHED, ids=lambda case: case.name)
def test_the_law_of_smoothing(case: Case) -> None:
    """Where a pass smooths keys, subtracting their mean alone, without rounding, changes nothing."""
    attend = case.spec.attend()
    assert attend is not None
    tensors = case.tensors(dtype=torch.float64)
    smooth = {**tensors, attend.key: tensors[attend.key] - tensors[attend.key].mean(2, keepdim=True)}
    for moved, plain in zip(case.spec.interpret(smooth), case.spec.interpret(tensors), strict=True):
        torch.testing.assert_close(moved, plain, equal_nan=True)


def test_sinks_break_the_law_of_smoothing() -> None:
    """A sink does not move along: what the refusal protects."""
    case = BY_NAME["sink-logits"]
    tensors = case.tensors(dtype=torch.float64)
    smooth = {**tensors, "k": tensors["k"] - tensors["k"].mean(2, keepdim=True)}
    assert (case.spec.interpret(smooth)[0] - case.spec.interpret(tensors)[0]).abs().max() > 0.01


@pytest.mark.parametrize(
    "text, dtypes, weights",
    (
        ("quantize.fp8", ("float8_e4m3", "float8_e4m3", "float8_e4m3"), "float8_e4m3"),
        ("quantize.fp8(values=false)", ("float8_e4m3", "float8_e4m3"), ""),
        ("quantize.int8(values=true)", ("int8", "int8", "float8_e4m3"), "float8_e4m3"),
        ("quantize.int8", ("int8", "int8"), ""),
    ),
)
def test_what_is_rounded(text: str, dtypes: tuple[str, ...], weights: str) -> None:
    spec = run_passes(BY_NAME["causal-long"].spec, (call(text),)).spec
    steps = [step for step in spec.operations if isinstance(step, Quantize)]
    assert tuple(step.dtype for step in steps) == dtypes
    assert [step.smooth for step in steps] == [False, True, False][: len(steps)]
    attend = spec.attend()
    assert attend is not None and attend.norm.weights == weights
    assert {attend.query, attend.key, attend.value} >= {step.out for step in steps}


COS, SIN = (parse_expr(f"{name}[i, d]", {name: Kind.FLOAT}) for name in ("cos", "sin"))
MAPS = Prologue(
    (Position("q", COS, SIN, 16), Position("k", COS, SIN, 16)),
    tuple(Value(name, tensor_type("id", ("I", 16))) for name in ("cos", "sin")),
)


def test_rotary_maps_are_pulled_in_at_any_place_of_a_pipeline() -> None:
    spec = BY_NAME["causal"].spec
    first = run_passes(spec, parse_passes("fuse.rotary, quantize.int8"), prologue=MAPS)
    last = run_passes(spec, parse_passes("quantize.int8, fuse.rotary"), prologue=MAPS)
    assert first.applied == ("fuse.rotary", "quantize.int8") and first.pulled and last.pulled
    tensors = random_tensors(first.spec, {"B": 2, "I": 13})
    torch.testing.assert_close(first.spec.interpret(tensors), last.spec.interpret(tensors))
    kinds = [step.keyword for step in first.spec.operations]
    assert kinds == ["position", "position", "quantize", "quantize", "attend"]


@pytest.mark.parametrize(
    "prologue, said",
    (
        (None, "is not known here"),
        (Prologue(), "no rotary map makes its queries or keys"),
        (Prologue(refused=(("q", "q: somebody needs it"), ("k", "k: so too"))), "q: somebody needs it; k: so too"),
    ),
)
def test_why_rotary_maps_stay_outside(prologue: Prologue | None, said: str) -> None:
    spec = BY_NAME["causal"].spec
    result = run_passes(spec, (call("fuse.rotary"),), prologue=prologue)
    assert result.spec == spec and not result.pulled and said in result.refused[0][1]


def test_rotary_maps_are_pulled_in_once() -> None:
    result = run_passes(BY_NAME["causal"].spec, parse_passes("fuse.rotary, fuse.rotary"), prologue=MAPS)
    assert result.refused == (("fuse.rotary", "rotary maps are stated in it already"),)


def test_a_pass_that_pulls_may_change_nothing_else() -> None:
    def apply(spec: Spec, options: Options, prologue: Prologue) -> Spec:
        whole = with_positions(spec, prologue)
        *maps, attend = whole.operations
        return dataclasses.replace(whole, operations=(*maps, dataclasses.replace(attend, score=Const(0.0))))

    wrong = dataclasses.replace(call("fuse.rotary").rewrite, apply=apply)
    with pytest.raises(ValueError, match="changed more of the Spec than what makes its inputs"):
        run_passes(BY_NAME["causal"].spec, (PassCall(wrong, wrong.options()),), prologue=MAPS)


def test_large_channels_cost_less_with_smoothed_keys() -> None:
    """A channel with a mean of 30 in the keys: rounded with it, scores lose what the mean takes."""
    case = BY_NAME["causal-long"]
    tensors = case.tensors(dtype=torch.float64)
    tensors["k"][..., 3] += 30.0
    (exact,) = case.spec.interpret(tensors)
    errors = []
    for text in ("quantize.int8", "quantize.int8(smooth=false)", "quantize.fp8", "quantize.fp8(smooth=false)"):
        (found,) = run_passes(case.spec, (call(text),)).spec.interpret(tensors)
        errors.append(float((found - exact).norm() / exact.norm()))
    assert 2 * errors[0] < errors[1] and 2 * errors[2] < errors[3]


def test_an_untrained_scan_needs_permission() -> None:
    spec = BY_NAME["causal"].spec
    refused = run_passes(spec, parse_passes("linearize.decay"))
    assert refused.spec == spec
    assert "ruin" in refused.refused[0][1]
    allowed = run_passes(spec, parse_passes("linearize.decay"), allow_untrained=True)
    assert allowed.spec.scan() is not None and allowed.lossy


def test_passes_run_in_order_and_each_sees_the_last_result() -> None:
    calls = parse_passes("fuse,sparsify.window(size=3,sinks=1),quantize.int8")
    result = run_passes(BY_NAME["causal"].spec, calls)
    assert result.applied == ("fuse", "sparsify.window(size=3, sinks=1)", "quantize.int8")
    attend = result.spec.attend()
    assert attend is not None and attend.query == "q_int8"
    assert str(attend.mask) == "j ≤ i and (j > i − 3 or j < 1)"
    assert result.lossy
    assert [s.after for s in result.stamps[:-1]] == [s.before for s in result.stamps[1:]]


def _changed(spec: Spec, options: Options) -> Spec:
    attend = spec.attend()
    assert attend is not None
    scaled = dataclasses.replace(attend, score=simplify(attend.score * 1.01))
    return dataclasses.replace(spec, operations=(scaled,))


def _unverified(spec: Spec, options: Options) -> Spec:
    attend = spec.attend()
    assert attend is not None
    return dataclasses.replace(spec, operations=(dataclasses.replace(attend, mask=Const(1.0)),))


def _other_outputs(spec: Spec, options: Options) -> Spec:
    return dataclasses.replace(spec, outputs=("q",))


@pytest.mark.parametrize(("apply", "contract", "message"), [
    (_changed, "exact", "is declared exact, but the output out differs"),
    (_unverified, "calibrated", "made a Spec that does not verify"),
    (_other_outputs, "calibrated", "changed the inputs or outputs"),
])
def test_a_broken_contract_is_told_to_the_author(apply, contract, message) -> None:
    broken = Pass("broken", "Break.", contract, ("prefill",), Options, lambda spec, options: None, apply)
    with pytest.raises(ValueError, match=f"(?s)pass developer: broken {message}.*attend"):
        run_passes(BY_NAME["causal"].spec, (PassCall(broken, Options()),))


def test_in_training_only_passes_run_that_serve_it() -> None:
    spec = BY_NAME["causal"].spec
    result = run_passes(spec, parse_passes("fuse, sparsify.window(size=8), quantize.int8"), training=True)
    assert result.applied == ("fuse", "sparsify.window(size=8)")
    ((name, reason),) = result.refused
    assert name == "quantize.int8" and "serves prefill and decode, and gradients may be asked" in reason
