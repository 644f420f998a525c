"""The Triton target as the rest of the house sees it."""

from __future__ import annotations

import math
import textwrap

import pytest
import torch

from attncompile.codegen.triton import lower, why_not
from attncompile.codegen.triton.lower import _Chosen, modules
from attncompile.codegen.triton.structure import logits
from attncompile.ir import parse_spec, print_spec
from attncompile.ir.expr import TRUE
from attncompile.ir.neighbourhood import neighbourhood
from attncompile.ir.rearrange import regrouped
from tests.cases import BY_NAME
from tests.kernels.cases import ALL_BY_NAME
from tests.kernels.comparison import measured


def test_a_cpu_is_refused_with_the_reason() -> None:
    spec = BY_NAME["causal"].spec
    if not (why_not(spec, "cuda") or "").startswith("Triton is not installed"):
        assert "need a GPU" in (why_not(spec, "cpu") or "")
    with pytest.raises(ValueError, match=r"no Triton kernel for causal on cpu"):
        lower(spec, "cpu")


def test_other_devices_are_refused() -> None:
    pytest.importorskip("triton")
    assert "not on mps" in (why_not(BY_NAME["causal"].spec, "mps") or "")


@pytest.mark.parametrize("name", ("causal", "int8", "scan", "empty-rows-lowest"))
def test_what_a_lowering_says(name: str) -> None:
    pytest.importorskip("triton")
    found = lower(ALL_BY_NAME[name].spec, "cuda")
    assert found.target == "triton"
    assert found.source is not None and f"def {found.operator}(" in found.source
    assert ("give zeros" in found.reason) == (name == "empty-rows-lowest")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ("causal", "gqa", "padding", "log-sum-exp", "int8", "scan"))
def test_runs_traces_and_differentiates_on_a_gpu(name: str) -> None:
    case = BY_NAME[name]
    spec = case.spec
    run = lower(spec, "cuda").run
    tensors = {key: tensor.cuda() for key, tensor in case.tensors().items()}
    given = [tensors[v.name].requires_grad_(tensors[v.name].is_floating_point()) for v in spec.inputs]
    plain = {key: tensor.detach() for key, tensor in tensors.items()}

    def total(*inputs: torch.Tensor) -> torch.Tensor:
        found = run(*inputs)
        outputs = (found,) if isinstance(found, torch.Tensor) else found
        if not torch.compiler.is_compiling():
            outcomes = measured(spec, plain, [output.detach() for output in outputs], given[0].dtype)
            assert all(outcome.passed for outcome in outcomes), outcomes
        return sum((output.sum() for output in outputs), torch.zeros((), device="cuda"))

    eager = total(*given)
    compiled = torch.compile(total, fullgraph=True, dynamic=True)(*given)
    torch.testing.assert_close(eager, compiled)
    compiled.backward()
    for tensor in given:
        if tensor.is_floating_point():
            assert tensor.grad is not None and bool(tensor.grad.isfinite().all())


@pytest.mark.gpu
def test_strides_past_two_to_the_31_on_a_gpu() -> None:
    spec = BY_NAME["full"].spec
    # 4 GiB: the second batch row starts at element 2^31
    query = torch.empty_strided(
        (2, 4, 16, 16), (1 << 31, 256, 16, 1), dtype=torch.float16, device="cuda"
    ).normal_()
    found = lower(spec, "cuda").run(query, query, query)
    assert isinstance(found, torch.Tensor)
    (outcome,) = measured(spec, {"q": query, "k": query, "v": query}, found, query.dtype)
    assert outcome.passed, outcome


def test_tokens_of_a_grid_are_moved_where_the_spec_says_so() -> None:
    text = "x   attend  q,k,v[1,2,{0},64]  bfloat16\n  score  0.125·s\n  mask   {1}\n  norm   softmax (float32)"
    spec = parse_spec(text.format(math.prod((128, 128)), neighbourhood((128, 128), (16, 16))))
    boxes = regrouped(spec, 128, 64)
    assert boxes is not None
    for stated, moved in ((boxes, True), (spec, False)):
        found = modules(stated)
        assert set(found) == {"", "_hopper"}
        for module in found.values():
            assert ("def move_queries(" in module.source) == moved
            assert module.source.count("def attend(") == 1


def test_the_query_is_known_by_which_kernels_are_chosen() -> None:
    text = "x   attend  q,k,v[1,2,{0},64]  bfloat16\n  score  0.125·s\n  mask   {1}\n  norm   softmax (float32)"
    spec = parse_spec(text.format(32 * 128, neighbourhood((32, 128), (6, 6))))
    boxes = regrouped(spec, 128, 128, False)
    assert boxes is not None
    assert [_Chosen(print_spec(each))._query for each in (spec, boxes)] == [0, 0]


def test_a_fill_beside_numbers_that_are_read_counts() -> None:
    """They may hide all that the mask leaves visible, and then weigh no more than what it hides."""
    text = """
    site   attend  q[B,4,I,16]  k,v[B,4,J,16]  float32
      score  0.25·s + added[b, 0, 0, j]
      mask   j ≤ i
      fill   {fill}
      norm   softmax (float32)
      given  added[B,1,1,J]:float32
    """
    for fill, counts in (("0.25·s + added[b, 0, 0, j] − 1e30", True), ("0.25·s − 1e30", False)):
        attend = parse_spec(textwrap.dedent(text.format(fill=fill)).strip()).attend()
        assert attend is not None and (logits(attend)[1] == TRUE) is counts
