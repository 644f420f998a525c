"""Maps that are computed a piece at a time: the same results, and never more of a map at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from attncompile.ir import Attend, Spec, parse_spec
from attncompile.ir.some_rows import interpret_in_pieces
from attncompile.verify import derive_tolerance, require_within
from attncompile.verify.sites import longest_sum
from tests.cases import CASES, Case

PIECE = 600
"""Elements; most maps of the table have more."""


class Watched:
    """Counts evaluations of attention, and the elements of the largest map among them."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.times = self.largest = 0
        reference = Attend.reference

        def watched(attend: Attend, tensors: Mapping[str, torch.Tensor], *rest: Any) -> dict[str, torch.Tensor]:
            self.times += 1
            elements = tensors[attend.query][..., 0].numel() * tensors[attend.key].shape[2]
            self.largest = max(self.largest, elements)
            return reference(attend, tensors, *rest)

        patch.setattr(Attend, "reference", watched)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_pieces_give_what_the_whole_gives(case: Case) -> None:
    tensors = case.tensors()
    whole, pieces = case.spec.interpret(tensors), interpret_in_pieces(case.spec, tensors, piece=PIECE, least=1)
    narrow = case.spec.interpret(case.tensors(), torch.float32)
    for one, other, rounded in zip(whole, pieces, narrow, strict=True):
        assert torch.equal(one.isnan(), other.isnan())
        known = [each.double().nan_to_num() for each in (one, rounded)]
        bound = derive_tolerance(known[0], known[1].float(), longest_sum(case.spec, tensors), torch.float64).bound
        require_within(other.nan_to_num(), known[0].to(other.dtype), bound, case.name)


@pytest.mark.parametrize("name", ["causal", "causal-last-rows", "causal-padding", "softcap", "sink-lse"])
def test_no_more_of_a_map_is_computed_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in CASES if case.name == name)
    attend, watched = case.spec.attend(), Watched(monkeypatch)
    assert attend is not None
    interpret_in_pieces(case.spec, case.tensors(), piece=PIECE, least=1)
    elements = attend.map_elements(case.spec.types(), case.sizes)
    assert watched.times > 1 and watched.largest <= PIECE < elements


WHOLE = {
    "a sum over all queries": """x   attend  q[1,2,I,4]  k,v[1,2,J,4]  float32
        score  0.5·s
        mask   j ≤ i
        norm   softmax (float32)
        mass   got
        gives  out, got""",
    "queries that are keys": """x   attend  q,q,v[1,2,I,4]  float32
        score  0.5·s
        mask   j ≤ i
        norm   softmax (float32)""",
}


@pytest.mark.parametrize("text", WHOLE.values(), ids=WHOLE)
def test_what_has_no_form_for_some_queries_is_computed_as_a_whole(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec: Spec = parse_spec(text)
    tensors = {value.name: torch.randn(1, 2, 20, 4) for value in spec.inputs}
    expected, watched = spec.interpret(tensors), Watched(monkeypatch)
    found = interpret_in_pieces(spec, tensors, piece=100, least=1)
    assert watched.times == 1 and all(map(torch.equal, found, expected))
