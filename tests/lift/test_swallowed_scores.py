"""Whether a model adds to hidden scores or fills them in: values agree, gradients do not."""

from __future__ import annotations

import pytest
import torch

from attncompile.backend.rewrite import Decision, decide
from attncompile.codegen.pytorch import lower
from attncompile.codegen.pytorch.empty_rows import PASSED
from attncompile.frontends.aten import aten_graph
from attncompile.frontends.capture import capture_export
from attncompile.ir import print_spec
from attncompile.lift import Program, lift_graph

LOWEST = torch.finfo(torch.float32).min


class Attention(torch.nn.Module):
    """Causal, with padding, hidden as it is told."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.bias = torch.nn.Parameter(torch.randn(9, 9))

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor, numbers: torch.Tensor
    ) -> torch.Tensor:
        places = torch.arange(q.shape[2])
        seen = places[None, :] <= places[:, None]
        if "padding" in self.how:
            seen = seen & keep[:, None, None, :]
        if "condition" in self.how:
            seen = seen & (numbers > 0.5)
        scores = q @ k.mT * 0.3
        if "loaded" in self.how:
            scores = scores + numbers
        if "learned" in self.how:
            scores = scores + self.bias
        if "capped" in self.how:
            scores = 30.0 * torch.tanh(scores / 30.0)
        if "adds" in self.how:
            scores = scores + torch.where(seen, 0.0, -torch.inf if "infinity" in self.how else LOWEST)
        else:
            scores = scores.masked_fill(~seen, LOWEST)
        if "sink" in self.how:
            scores = torch.cat([scores, torch.zeros(*scores.shape[:3], 1)], -1)
            return torch.softmax(scores, -1)[..., :-1] @ v
        return torch.softmax(scores, -1) @ v


def lifted(how: str) -> Program:
    q, k, v = (torch.randn(2, 3, 9, 8) for _ in range(3))
    captured = capture_export(Attention(how), (q, k, v, torch.ones(2, 9, dtype=torch.bool), torch.zeros(2, 1, 1, 9)))
    return lift_graph(aten_graph(captured), how, captured.notes)


@pytest.mark.parametrize(
    ("how", "swallows"),
    [
        ("adds padding", True),
        ("adds padding capped", True),
        ("adds", True),
        ("fills padding", False),
        ("adds infinity padding", False),
        ("adds padding sink", False),  # which has all of the weight where everything else is hidden
    ],
)
def test_a_site_knows_whether_hidden_scores_are_swallowed(how: str, swallows: bool) -> None:
    (site,) = lifted(how).sites
    assert site.status == "lifted" and site.swallows is swallows


@pytest.mark.parametrize(
    ("how", "numbers", "fill"),
    [
        ("adds loaded", True, "+"),  # which is read beside the fill
        ("adds learned", False, "−3.4"),
        ("adds condition", False, "−3.4"),
        ("adds padding", False, "−3.4"),
        ("fills loaded", True, "−3.4"),
    ],
)
def test_a_number_swallows_no_mask_that_is_loaded(how: str, numbers: bool, fill: str) -> None:
    """It may be as low: two of them weigh less than one."""
    (site,) = lifted(how).sites
    assert site.status == "lifted" and site.numbers is numbers and site.spec is not None
    attend = site.spec.attend()
    assert attend is not None
    assert ("s" in str(attend.fill)) is (fill == "+") and (fill == "+") is ("[" in str(attend.fill))


def test_the_spec_is_the_same_either_way() -> None:
    (added,), (filled,) = lifted("adds padding").sites, lifted("fills padding").sites
    assert added.spec is not None and filled.spec is not None
    assert print_spec(added.spec).partition(" ")[2] == print_spec(filled.spec).partition(" ")[2]


def decided(how: str, training: bool, operator: str = "sdpa") -> Decision:
    (made,) = decide(lifted(how), (), lambda spec: lower(spec, "cpu", operator), training=training)
    return made


@pytest.mark.parametrize(
    ("how", "training", "passed"),
    [
        ("adds padding", True, True),
        ("adds padding", False, False),
        ("adds", True, False),  # causality leaves each row a key
        ("fills padding", True, False),
    ],
)
def test_only_training_a_row_that_may_be_empty_needs_more(how: str, training: bool, passed: bool) -> None:
    decision = decided(how, training)
    assert decision.lowering is not None and (PASSED in decision.reason) is passed


def test_a_site_without_a_closed_form_keeps_the_model_in_training_and_says_what_to_do() -> None:
    """Soft caps: FlexAttention and generated kernels compute them, without these gradients."""
    kept = decided("adds padding capped", True, "flex")
    assert kept.lowering is None and "a score that is not linear" in kept.reason
    assert 'attn_implementation="attncompile"' in kept.reason
    assert decided("adds padding capped", False, "flex").lowering is not None
    assert decided("adds capped", True, "flex").lowering is not None
