"""What divides scores by a sum is read off ONNX as it is off ATen."""

from __future__ import annotations

import pytest
import torch

from attncompile.frontends.onnx import onnx_graph
from attncompile.ir import print_expr
from attncompile.lift import lift_graph
from tests.lift.spellings import SPELLINGS

FORMS: dict[str, tuple[str, str, bool]] = {
    "divided_after_the_values": ("softmax", "t", False),
    "sink_as_a_sigmoid_of_the_log_sum": ("softmax", "t", False),
    "log_sum_exp_returned": ("softmax", "t", True),
    "relu_divided_by_its_sum": ("sum", "t", False),
    "linear_attention_in_parallel_form_normalised": ("sum", "t + 1e-06", False),
}
"""By the spelling: kind of the normaliser, divisor, and whether the log-sum-exp is a result too."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FORMS)
def test_quotient_of_an_onnx_graph(name: str) -> None:
    kind, divisor, second = FORMS[name]
    form = next(form for form in SPELLINGS.rows if form.name == name)
    exported = torch.onnx.export(form.module(), (), kwargs=form.inputs, dynamo=True, verbose=False)
    assert exported is not None
    (site,) = lift_graph(onnx_graph(exported.model), name).sites
    assert site.status == "lifted" and site.proof is not None and site.spec is not None, site.refusal
    attend = site.spec.attend()
    assert attend is not None
    assert attend.norm.kind == kind and print_expr(attend.divisor, 5) == divisor and bool(attend.lse) is second
