"""What the ONNX target writes for attention is read as attention again: rows without a key stay outside the site."""

from __future__ import annotations

import onnx_ir as ir
import pytest
import torch

from attncompile.codegen.onnx.capabilities import rows_for
from attncompile.codegen.onnx.emit import alone
from attncompile.frontends.onnx import onnx_graph
from attncompile.ir import Spec, parse_spec
from attncompile.ir.sample import random_tensors
from attncompile.lift import lift_graph
from tests.cases import BY_NAME
from tests.codegen.test_onnx_operators import TOLERANCE, run

EMPTY_ROWS = {
    "mask by head": ("0.25·s", "j ≤ i and m[b, h, j] ≠ 0", "m[B,4,I]:int64"),
    "softcap": ("30.0·tanh(s / 30.0)", "j ≤ i and m[b, j] ≠ 0", "m[B,I]:int64"),
    "bias over the map": ("0.25·s + m[b, 0, i, j]", "true", "m[B,1,I,I]:float32"),
    "bias over keys": ("0.25·s + m[b, j]", "true", "m[B,I]:float32"),
    "bias and mask": ("0.25·s + m[b, j]", "j ≤ i", "m[B,I]:float32"),
}
"""Score, mask and captured tensor of Specs whose rows without a key are zero, and not by a mask alone over b i j."""


def empty_rows(name: str) -> Spec:
    score, mask, given = EMPTY_ROWS[name]
    return parse_spec(
        f"x   attend  q,k,v[B,4,I,16]  float32\n  score  {score}\n  mask   {mask}\n"
        f"  norm   softmax (float32), empty rows zero\n  given  {given}"
    )


def statuses(spec: Spec) -> list[str]:
    """The status of each site of the Spec's decomposition."""
    model = alone(spec, rows_for(spec)[-1])
    types = {value.name: value.type for value in spec.inputs}
    for value in model.graph.inputs:
        sizes = [str(size) for size in types[str(value.name)].sizes]
        value.shape = ir.Shape([int(size) if size.isdigit() else size for size in sizes])
    return [site.status for site in lift_graph(onnx_graph(model), blocks=False).sites]


@pytest.mark.parametrize("name", EMPTY_ROWS)
def test_rows_without_a_key_are_zero(name: str) -> None:
    spec = empty_rows(name)
    tensors = random_tensors(spec, {"B": 3, "I": 9}, seed=1)
    captured = tensors["m"]
    if captured.is_floating_point():
        captured[captured < -0.5] = float("-inf")
    captured[0] = float("-inf") if captured.is_floating_point() else 0
    (expected,) = spec.interpret(tensors)
    (found,) = run(spec, rows_for(spec)[-1], tensors, flat=False)
    assert not expected[0].any() and not expected.isnan().any()
    plain = spec.interpret(tensors, torch.float32)[0].double()
    unavoidable = float((plain - expected).abs().max())
    torch.testing.assert_close(found.double(), expected, rtol=TOLERANCE, atol=TOLERANCE + unavoidable)


@pytest.mark.parametrize("name", EMPTY_ROWS)
def test_sites_with_empty_rows_are_lifted_again(name: str) -> None:
    assert statuses(empty_rows(name)) == ["lifted"]


@pytest.mark.parametrize("name", ["causal", "causal-padding", "padding", "softcap", "empty-rows-lowest-zero"])
def test_rows_of_the_table_are_lifted_again(name: str) -> None:
    assert statuses(BY_NAME[name].spec) == ["lifted"]
