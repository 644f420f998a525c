"""``fuse`` states scale, mask and bias in one form."""

from __future__ import annotations

import pytest
import torch

from attncompile.ir import parse_expr, parse_spec, print_expr, simplify
from attncompile.ir.expr import Size
from attncompile.ir.sample import example_sizes, random_tensors
from attncompile.passes import parse_passes, run_passes
from attncompile.passes.fuse import without_implied

FULL = """
site   attend  q,k,v[B,2,I,8]  float32
  score  {score}
  mask   {mask}
{fill}  norm   softmax (float32)
"""

SHIFTED = "0.5·s + where(j ≤ i, 0.0, −10000.0)"

# score, mask, fill before; the same after
ROWS = (
    ("0.5·(0.5·s)", "true", "", "0.25·s", "true", "−inf"),
    ("(s + 1.0)·0.5", "j ≤ i", "", "0.5·s + 0.5", "j ≤ i", "−inf"),
    ("0.5·s + where(j ≤ i, 0.0, −inf)", "true", "", "0.5·s", "j ≤ i", "−inf"),
    ("0.5·s + where(j > i, −inf, 0.0)", "j > i − 3", "", "0.5·s", "j ≤ i and j > i − 3", "−inf"),
    (SHIFTED, "true", "", "0.5·s", "j ≤ i", "0.5·s − 10000.0"),
    # a second finite shift adds up with the first; it has no place in one fill and stays a bias
    (SHIFTED, "j > i − 3", "", SHIFTED, "j > i − 3", "−inf"),
    ("0.5·s", "j ≤ i and j < I", "", "0.5·s", "j ≤ i", "−inf"),
    ("0.5·s", "j ≤ i and j < i + 5", "", "0.5·s", "j ≤ i", "−inf"),
    ("0.5·s", "j ≥ 0", "−10000.0", "0.5·s", "true", "−inf"),
)


@pytest.mark.parametrize(("score", "mask", "fill", "new_score", "new_mask", "new_fill"), ROWS)
def test_canonical_form(
    score: str, mask: str, fill: str, new_score: str, new_mask: str, new_fill: str
) -> None:
    spec = parse_spec(FULL.format(score=score, mask=mask, fill=f"  fill   {fill}\n" if fill else ""))
    result = run_passes(spec, parse_passes("fuse"))
    attend = result.spec.attend()
    assert attend is not None
    for found, wanted in ((attend.score, new_score), (attend.mask, new_mask), (attend.fill, new_fill)):
        assert print_expr(found) == print_expr(simplify(parse_expr(wanted)))
    tensors = random_tensors(spec, example_sizes(spec, 11), dtype=torch.float64)
    torch.testing.assert_close(result.spec.interpret(tensors)[0], spec.interpret(tensors)[0])


@pytest.mark.parametrize(("mask", "wanted"), [
    ("j ≤ i and j ≤ i + 3", "j ≤ i"),
    ("j > i − 4 and j > i − 9", "j > i − 4"),
    ("j ≤ i and j > i − 4", "j ≤ i and j > i − 4"),  # limits on two sides: nothing is implied
    ("j ≤ i and (j ≤ i or j < 5)", "j ≤ i"),
    ("j ≤ i and (j ≤ i + 2 or j < 5)", "j ≤ i"),
    ("j ≤ i and (j ≤ i − 2 or j < 5)", "j ≤ i and (j ≤ i − 2 or j < 5)"),  # tighter, not looser
    ("j ≤ i and j ≤ 2·i", "j ≤ i"),
    ("j ≤ i + 1 and j ≤ 2·i", "j ≤ i + 1 and j ≤ 2·i"),  # neither is looser everywhere
])
def test_implied_parts(mask: str, wanted: str) -> None:
    assert without_implied(parse_expr(mask), {"i": Size("I"), "j": Size("I")}) == simplify(parse_expr(wanted))
