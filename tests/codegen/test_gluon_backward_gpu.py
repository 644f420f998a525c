"""The backward kernel for Hopper GPUs on one, compared with the reference in float64 at awkward shapes."""

from __future__ import annotations

import pytest
import torch

from attncompile.codegen.gluon import generate_backward
from attncompile.codegen.triton import lower
from attncompile.codegen.triton.cache import load_module
from attncompile.codegen.triton.lower import on_hopper
from attncompile.ir import parse_spec
from tests.cases import Case
from tests.kernels.backward import compare_backward
from tests.kernels.comparison import aligned_inputs
from tests.kernels.hopper_backward_cases import ROWS, SIZES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not on_hopper(torch.device("cuda")), reason="the kernel needs compute capability 9.x"),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_awkward_sizes(row: Case) -> None:
    dtype = torch.float16 if "float16" in row.text.split() else torch.bfloat16
    failures = []
    for batch, queries, keys in SIZES:
        case = Case(row.name, row.text, {"B": batch, "I": queries, "J": keys})
        outcomes = compare_backward(case, dtype, "cuda", make=generate_backward, place=aligned_inputs)
        failures += [(case.sizes, outcome) for outcome in outcomes if not outcome.passed]
    assert not failures


def test_more_tiles_than_processors() -> None:
    """Thread blocks with many tiles: gradients of keys and values are the same again and again."""
    row = next(row for row in ROWS if row.name == "causal-half")
    case = Case(row.name, row.text, {"B": 4, "I": 1500, "J": 1500})
    module = load_module(generate_backward(case.spec))
    found = compare_backward(case, torch.float16, "cuda", make=generate_backward, place=aligned_inputs)
    assert all(outcome.passed for outcome in found), found
    query, key, value = (tensor.cuda() for tensor in case.tensors(1, torch.float16).values())
    given, out = torch.randn_like(query), torch.randn_like(query)
    lse = torch.full(query.shape[:3], 8.0, device="cuda")
    _, *first = module.attend_backward(given, out, lse, query, key, value)
    for _ in range(20):
        _, *again = module.attend_backward(given, out, lse, query, key, value)
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@pytest.mark.parametrize("deterministic", (False, True))
def test_through_the_operator(deterministic: bool) -> None:
    """As a model calls it; where sums must have a fixed order, plain Triton's kernels give the same twice."""
    spec = parse_spec(
        "x   attend  q,k,v[B,4,I,128]  bfloat16\n  score  30.0·tanh(0.003·s)\n  mask   j ≤ i and j > i − 200\n"
        "  norm   softmax (float32)"
    )
    from tests.kernels.backward import reference_gradients, slack
    from tests.kernels.comparison import distance

    query, key, value, given = (torch.randn(2, 4, 500, 128, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    tensors = {"q": query, "k": key, "v": value}
    run = lower(spec, "cuda").run
    torch.use_deterministic_algorithms(deterministic)
    try:
        found = []
        for _ in range(2):
            leaves = [tensor.detach().requires_grad_() for tensor in tensors.values()]
            found.append(torch.autograd.grad(run(*leaves), leaves, given))
    finally:
        torch.use_deterministic_algorithms(False)
    same = [torch.equal(one, other) for one, other in zip(*found, strict=True)]
    assert all(same[1:]) and (same[0] or not deterministic)
    exact = reference_gradients(spec, tensors, [given], torch.float64)
    plain = reference_gradients(spec, tensors, [given], torch.bfloat16)
    for (name, best), gradient in zip(exact.items(), found[0], strict=True):
        allowed = distance(plain[name], best) + slack(spec, tensors, given, torch.bfloat16, name, best, None)
        assert distance(gradient, best) <= allowed, name


def test_strides_of_zero_are_copied() -> None:
    """The gradient of a sum is one number, repeated by strides of 0."""
    row = next(row for row in ROWS if row.name == "window")
    case = Case(row.name, row.text, {"B": 1, "I": 200, "J": 200})
    module = load_module(generate_backward(case.spec))
    query, key, value = (tensor.cuda() for tensor in case.tensors(1, torch.bfloat16).values())
    given = torch.ones((), device="cuda", dtype=torch.bfloat16).expand(query.shape)
    out, lse = torch.randn_like(query), torch.full(query.shape[:3], 8.0, device="cuda")
    found = module.attend_backward(given, out, lse, query, key, value)
    wanted = module.attend_backward(given.contiguous(), out, lse, query, key, value)
    assert all(torch.equal(one, other) for one, other in zip(found[1:], wanted[1:], strict=True))
    with pytest.raises(module.Refused, match="does not begin at a multiple of 16 bytes"):
        wide = torch.randn(1, 8, 200, 129, device="cuda", dtype=torch.bfloat16)[..., 1:]
        module.attend_backward(given, out, lse, wide, key, value)
