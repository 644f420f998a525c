"""Sites whose log-sum-exp is a result too: both are replaced by one call, or the original stays."""

from __future__ import annotations

import pytest
import torch

from attncompile.backend.choose import choose_lowering
from attncompile.backend.rewrite import decide, rewrite
from attncompile.frontends.aten import aten_graph
from attncompile.lift import lift_graph
from tests.lift.forms import Form
from tests.lift.spellings import SPELLINGS

FORMS = [form for form in SPELLINGS.rows if "lse" in form.expected]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_both_results_are_those_of_the_model(form: Form) -> None:
    captured = form.capture()
    program = lift_graph(aten_graph(captured), form.name)
    decisions = decide(program, (), lambda spec: choose_lowering(spec, "cpu"), even_reference=True)
    assert all(decision.lowering is not None for decision in decisions)
    rewritten = rewrite(captured.graph_module, program, decisions)
    flat = captured.flat_inputs((), form.inputs)
    with torch.no_grad():
        wanted, found = captured.graph_module(*flat), rewritten(*flat)
    for left, right in zip(wanted, found, strict=True):
        # both round in float32, over sums of a dozen terms
        torch.testing.assert_close(right, left, rtol=0, atol=64 * torch.finfo(torch.float32).eps)


def test_what_only_the_reference_computes_stays_as_it_is() -> None:
    form = next(form for form in FORMS if form.name == "log_sum_exp_returned")
    program = lift_graph(aten_graph(form.capture()), form.name)
    decisions = decide(program, (), lambda spec: choose_lowering(spec, "cpu"))
    assert all(decision.lowering is None for decision in decisions)
    assert all("no operator is known to be faster" in decision.reason for decision in decisions)
