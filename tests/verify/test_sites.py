"""A lowering against its Spec: right ones pass, wrong ones do not."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from attncompile.ir import Attend, Spec, parse_spec
from attncompile.ir.some_rows import PIECE
from attncompile.passes import parse_passes, run_passes
from attncompile.verify import check_site, refused_site
from attncompile.verify.sites import DRAWS, Draw
from tests.cases import BY_NAME
from tests.kernels.cases import ALL_BY_NAME


def interpreted(spec: Spec, *tensors: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
    named = {value.name: tensor for value, tensor in zip(spec.inputs, tensors, strict=True)}
    found = spec.interpret(named, tensors[0].dtype)
    return found if len(found) > 1 else found[0]


@pytest.mark.parametrize("row", [
    "causal-padding", "empty-rows-nan", "cross", "gqa", "log-sum-exp", "int8", "scan", "learned-bias",
    "cache",
])
def test_the_definition_passes(row: str) -> None:
    spec = BY_NAME[row].spec
    entry = check_site(row, spec, functools.partial(interpreted, spec), operator="definition")
    assert entry.passed and len(entry.cases) == 5
    assert {case.masks for case in entry.cases} == {"ones", "random", "empty"}


# row, what is computed instead
CANARIES = (
    ("causal-padding", ("j ≤ i", "j ≤ i + 1")),
    ("causal-padding", ("attention_mask[b, j] ≠ 0", "attention_mask[b, i] ≠ 0")),
    ("causal-last-rows", ("j ≤ i + J − I", "j ≤ i")),
    ("window", ("j > i − 4", "j ≥ i − 4")),
    ("gqa", ("h // 3", "h % 2")),
    ("full", ("0.25·s", "0.251·s")),
    ("empty-rows-nan", ("softmax (float32)", "softmax (float32), empty rows zero")),
    ("empty-rows-lowest", ("fill   −3.4028234663852886e+38", "fill   −inf")),
    ("scan", ("+ 1.0", "+ 0.99")),
    ("scan", ("scale  0.25", "scale  0.26")),
)


@pytest.mark.parametrize(("row", "change"), CANARIES, ids=[f"{row}-{new}" for row, (_, new) in CANARIES])
def test_canary_another_computation_fails(row: str, change: tuple[str, str]) -> None:
    spec = BY_NAME[row].spec
    old, new = change
    text = BY_NAME[row].text
    assert old in text
    wrong = parse_spec(text.replace(old, new))
    assert not check_site(row, spec, functools.partial(interpreted, wrong), operator="wrong").passed


def _moved(factor: float, spec: Spec, *tensors: torch.Tensor) -> torch.Tensor:
    """The definition in float64, of queries and keys that are a little larger."""
    named = {value.name: tensor.double() for value, tensor in zip(spec.inputs, tensors, strict=True)}
    named |= {name: named[name] * factor for name in "qk"}
    return spec.interpret(named, torch.float64)[0].float()


def test_a_code_at_an_edge_may_be_either(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rotated number that float32 does not tell from the middle of two codes."""
    spec, draws = ALL_BY_NAME["rotated-interleaved"].spec, (Draw(70, "ones", 9),)
    near, far = (functools.partial(_moved, 1 + 2.0**-power, spec) for power in (22, 10))
    assert check_site("rotated", spec, near, operator="nearly", draws=draws).passed
    assert not check_site("rotated", spec, far, operator="not nearly", draws=draws).passed
    monkeypatch.setattr("attncompile.verify.sites.EDGES", 0)
    assert not check_site("rotated", spec, near, operator="nearly", draws=draws).passed


@pytest.mark.parametrize(
    "old, new",
    (("sin    sin[b, i, d]", "sin    −1.0·sin[b, i, d]"), ("convention interleaved", "convention half"), ("24", "22")),
)
def test_canary_another_rotation_fails(old: str, new: str) -> None:
    case = ALL_BY_NAME["rotated-interleaved"]
    wrong = case.text.replace(f"channels {old}", f"channels {new}") if old == "24" else case.text.replace(old, new)
    assert wrong != case.text
    run = functools.partial(interpreted, parse_spec(wrong))
    assert not check_site(case.name, case.spec, run, operator="wrong", draws=DRAWS[:2]).passed


def test_canary_a_single_nan_fails() -> None:
    spec = BY_NAME["causal"].spec

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        out = interpreted(spec, *tensors)
        assert isinstance(out, torch.Tensor)
        out[0, 0, 0, 0] = torch.nan
        return out

    entry = check_site("causal", spec, run, operator="nan")
    assert not entry.passed and all(case.misplaced == 1 for case in entry.cases)


def test_the_change_by_lossy_passes_is_recorded() -> None:
    original = BY_NAME["causal"].spec
    changed = run_passes(original, parse_passes("sparsify.window(size=16, sinks=0)")).spec
    entry = check_site("causal", changed, functools.partial(interpreted, changed), operator="definition",
                       original=original)
    changes = [case.change for case in entry.cases]
    assert entry.passed
    assert changes[0] == 0.0 and changes[-1] is not None and changes[-1] > 0.01  # length 1; length 150


def test_every_float_dtype() -> None:
    spec = BY_NAME["causal"].spec
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        run = functools.partial(interpreted, spec)
        assert check_site("causal", spec, run, operator="definition", dtype=dtype).passed


def test_a_refused_site() -> None:
    entry = refused_site("layers.0", "its weights are returned")
    assert entry.passed and entry.status == "unchanged" and entry.reason


LONG = parse_spec(
    "x   attend  q,k,v[1,8,4096,4]  float32\n  score  0.5·s\n  mask   j ≤ i and j > i − 3000\n"
    "  norm   softmax (float32)"
)


@pytest.mark.parametrize("window", [3000, 2900])
def test_of_a_large_map_some_rows_are_checked(window: int) -> None:
    """Among them the last, so that a window that is too narrow shows."""
    places = torch.arange(4096)
    apart = places[:, None] - places
    visible = (apart >= 0) & (apart < window)

    def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, visible)

    certificate = check_site("x", LONG, run, operator="sdpa", draws=DRAWS[-1:])
    assert certificate.passed == (window == 3000)


def test_a_site_is_checked_a_piece_of_the_map_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64 a whole map takes four times as long: its memory comes from the system anew for each operation."""
    spec, largest, reference = BY_NAME["causal"].spec, [0], Attend.reference

    def watched(attend: Attend, tensors: Mapping[str, torch.Tensor], *rest: Any) -> dict[str, torch.Tensor]:
        largest.append(tensors[attend.query][..., 0].numel() * tensors[attend.key].shape[2])
        return reference(attend, tensors, *rest)

    def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.25)

    monkeypatch.setattr(Attend, "reference", watched)
    draw = Draw(500, "ones", 0)
    assert check_site("x", spec, run, operator="sdpa", draws=[draw]).passed
    assert max(largest) <= PIECE < 2 * 4 * draw.length**2
