"""The operator for a site: by measurement, by wish, and two of them switched by length."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from attncompile.codegen.onnx import choose as choosing
from attncompile.codegen.onnx.capabilities import ATTEND_ROWS, Provider
from attncompile.codegen.onnx.choose import (
    CACHED,
    choose,
    largest_prompt_threshold,
    measured_speed,
    measurements,
    row_named,
    threshold_of,
)
from attncompile.codegen.onnx.dispatch import NAME, by_length
from attncompile.convert.calibration import LONGEST
from attncompile.convert.onnx_sites import long_draws
from attncompile.ir import Spec, parse_spec
from tests.cases import BY_NAME
from tests.codegen.test_onnx_operators import assert_agrees

PROMPT = parse_spec("""site   attend  q[B,9,I,64]  k,v[B,3,I,64]  float32
  score  0.125·s
  mask   j ≤ i and attention_mask[b, j] ≠ 0
  fill   −3.4028234663852886e+38
  kv_head h // 3
  norm   softmax (float32)
  given  attention_mask[B,I]:int64""")


def row(operator: str):
    return next(row for row in ATTEND_ROWS if row.operator == operator)


@pytest.mark.parametrize("name", ["causal-padding", "empty-rows-lowest", "gqa", "window", "sink-window"])
@pytest.mark.parametrize("limit", [4, 100], ids=["long branch", "short branch"])
@pytest.mark.parametrize("flat", [False, True], ids=["heads", "flat"])
def test_both_branches_compute_the_spec(name: str, limit: int, flat: bool) -> None:
    assert_agrees(BY_NAME[name], by_length(row("Attention"), row("GroupQueryAttention"), limit), flat=flat)


def test_fastest_never_takes_what_was_measured_slower() -> None:
    for name in ("full", "causal", "padding", "causal-padding", "gqa"):
        spec = BY_NAME[name].spec
        for length in (64, 384, 2048):
            choice = choose(spec, lengths=[length])
            if choice.row.operator != "decomposition":
                speed = measured_speed(spec, choice.row.operator, "cpu", length)
                assert speed is not None and speed > 1.0
                assert "faster" in choice.reason


def test_reason_names_device_version_and_date() -> None:
    reason = choose(BY_NAME["causal"].spec).reason
    measured = measurements()[0]
    assert all(part in reason for part in (measured.device, measured.onnxruntime, measured.date))


def test_wishes_are_followed() -> None:
    spec = BY_NAME["causal-padding"].spec
    assert choose(spec, prefer="decomposed").row.operator == "decomposition"
    assert choose(spec, prefer="fused").row.operator != "decomposition"


def test_impossible_wish_is_explained() -> None:
    assert choose(BY_NAME["softcap"].spec, prefer="fused").row.operator == "Attention"
    choice = choose(BY_NAME["temperature"].spec, prefer="fused")
    assert choice.row.operator == "decomposition"
    assert "constant scale" in choice.reason
    assert {name for name, _ in choice.refused} == {
        "Attention",
        "MultiHeadAttention",
        "GroupQueryAttention",
    }


def test_short_and_long_prompts_get_their_own_operator() -> None:
    operator = choose(PROMPT, lengths=[128, 2048]).row.operator
    assert operator.startswith("Attention up to ") and operator.endswith("GroupQueryAttention")


def test_no_switch_inside_a_switch() -> None:
    assert choose(PROMPT, lengths=[128, 2048], switch=False).row.operator == "Attention"


def test_fixed_length_overrides_the_expected_ones() -> None:
    fixed = parse_spec(str(PROMPT).replace("I,64", "128,64").replace("[B,I]", "[B,128]"))
    assert choose(fixed, lengths=[2048]).reason.count("128 tokens") == 1


@pytest.mark.parametrize("length", [64, 2048])
def test_row_of_a_plan_is_found_again(length: int) -> None:
    for lengths in ([length], [128, 2048]):
        chosen = choose(PROMPT, lengths=lengths).row
        assert row_named(PROMPT, chosen.operator).operator == chosen.operator
    with pytest.raises(ValueError, match="Attenshun"):
        row_named(PROMPT, "Attenshun")


def test_old_opset_rules_out_the_newer_operator() -> None:
    choice = choose(BY_NAME["causal"].spec, opset=20)
    assert choice.row.operator != "Attention"
    assert any("opset 23" in reason for name, reason in choice.refused if name == "Attention")


@pytest.mark.parametrize(
    "arguments,message",
    [({"prefer": "quickest"}, "quickest"), ({"lengths": []}, "at least 1"), ({"lengths": [0]}, "at least 1")],
)
def test_bad_wishes_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose(BY_NAME["causal"].spec, **arguments)


def test_a_wrong_builder_is_noticed() -> None:
    """The comparison that all operator tests rest on does fail."""
    wrong = dataclasses.replace(
        row("decomposition"),
        build=lambda attend, place: row("Attention").build(
            dataclasses.replace(attend, mask=BY_NAME["full"].spec.attend().mask), place
        ),
    )
    with pytest.raises(AssertionError):
        assert_agrees(BY_NAME["causal"], wrong, flat=False)


BEHIND_A_CACHE = parse_spec(
    "site\n  cache  past_k[B,3,P,64]  k[B,3,I,64]  float32\n    out    all_k\n"
    "  cache  past_v[B,3,P,64]  v[B,3,I,64]  float32\n    out    all_v\n"
    "  attend  q[B,9,I,64]  all_k  all_v  float32\n    score  0.125·s\n"
    "    mask   j ≤ i + P and attention_mask[b, j] ≠ 0\n    fill   −3.4028234663852886e+38\n    kv_head h // 3\n"
    "    norm   softmax (float32)\n  given  attention_mask[B,I+P]:int64\n"
)


def test_a_provider_without_a_kernel_for_the_dtype_is_told() -> None:
    """CUDA's GroupQueryAttention has none for float32: the CPU's would run, and copy the cache there."""
    choice = choose(BEHIND_A_CACHE, "cuda", version="1.31")
    assert "GroupQueryAttention" not in choice.row.operator
    assert "float32 on cuda" in dict(choice.refused)["GroupQueryAttention"]


def test_operators_are_chosen_in_the_dtype_that_is_written() -> None:
    """The Spec is float32; the model is rounded to float16 after its sites were replaced."""
    choice = choose(BEHIND_A_CACHE, "cuda", version="1.31", dtype="float16")
    assert "GroupQueryAttention" in choice.row.operator
    assert "GroupQueryAttention" not in choose(BEHIND_A_CACHE, "cpu", version="1.31", dtype="bfloat16").row.operator


FORMS = {
    "prompt behind a cache": "  score  0.25·s\n  mask   j ≤ i + J − I\n",
    "causal": "  score  0.25·s\n  mask   j ≤ i\n",
    "full": "  score  0.25·s\n",
}


def form(name: str, grouped: bool) -> Spec:
    groups, keys = (2, "  kv_head h // 2\n") if grouped else (4, "")
    head = f"site   attend  q[B,4,I,16]  k,v[B,{groups},{'J' if 'cache' in name else 'I'},16]  float32\n"
    return parse_spec(f"{head}{FORMS[name]}{keys}  norm   softmax (float32)\n")


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("provider", ["cpu", "cuda"])
@pytest.mark.parametrize("name", FORMS)
def test_what_is_compared_lies_beyond_every_threshold(name: str, provider: Provider, grouped: bool) -> None:
    """The longest inputs of a site, and the longest prompt of a whole model."""
    spec, cached = form(name, grouped), "cache" in name
    for lengths in itertools.combinations((128, 384, 512, 1024, 2048, 4096), 2):
        operator = choose(spec, provider, lengths=lengths, dtype="float16", version="1.31").row.operator
        limit = threshold_of(operator)
        assert (limit > 0) == (cached or " up to " in operator)
        assert sorted(draw.length > limit for draw in long_draws(operator)) == [limit < 33, True, True]
        assert not cached or limit <= largest_prompt_threshold(provider, grouped) < LONGEST


def test_two_operators_of_any_names_have_their_threshold() -> None:
    for short, long in itertools.permutations(sorted({row.operator for row in measurements()}), 2):
        assert threshold_of(NAME.format(short=short, limit=1388, long=long)) == 1388
    assert threshold_of("Attention") == 0


def test_the_longest_prompt_follows_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = tuple(
        dataclasses.replace(row, speed=0.9 if row.length < 2048 else 1.5) if row.mask == CACHED else row
        for row in measurements()
    )
    before = choosing.largest_prompt_threshold()
    monkeypatch.setattr(choosing, "measurements", lambda: slow)
    choosing.largest_prompt_threshold.cache_clear()
    found = choosing.largest_prompt_threshold()
    choosing.largest_prompt_threshold.cache_clear()
    assert before < LONGEST < found
