"""Passes over maps too large to be evaluated as a whole."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from attncompile.ir import Spec, parse_spec
from attncompile.ir.expr import TRUE
from attncompile.ir.some_rows import ROWS, chosen_rows, some_rows
from attncompile.passes import parse_passes, run_passes
from attncompile.passes.frame import Options, Pass, PassCall

LONG = parse_spec(
    "x   attend  q,k,v[1,16,16384,16]  float32\n  score  0.25·s + where(i - j < 9000, 0.0, -inf)\n"
    "  mask   j ≤ i\n  norm   softmax (float32)"
)


def test_some_rows_are_rows_of_the_whole() -> None:
    text = (
        "x   attend  q,k,v[2,3,40,4]  float32\n  score  0.5·s + bias[h, i, j]\n  mask   j ≤ i and j > i − m[b]\n"
        "  norm   softmax (float32)\n  sink   0.1·i\n  given  bias[3,40,40]:float32\n  given  m[2]:int64"
    )
    spec = parse_spec(text)
    tensors = {
        value.name: torch.randn([int(str(size)) for size in value.type.sizes], dtype=torch.float64)
        for value in spec.inputs
    }
    tensors["m"] = torch.tensor([5, 17])
    rows = chosen_rows(40, 7)
    fewer = some_rows(spec, 7)
    assert fewer is not None and rows[0] == 0 and rows[-1] == 39
    (whole,), (part,) = spec.interpret(tensors), fewer.interpret({**tensors, "q": tensors["q"][:, :, rows], ROWS: rows})
    torch.testing.assert_close(part, whole[:, :, rows])


def test_a_pass_is_compared_on_some_rows() -> None:
    result = run_passes(LONG, parse_passes("fuse"))
    attend = result.spec.attend()
    assert result.applied == ("fuse",) and attend is not None and "9000" in str(attend.mask)


def test_a_pass_that_is_wrong_far_from_the_start_is_told_to_its_author() -> None:
    def everything(spec: Spec, options: Options) -> Spec:
        attend = spec.attend()
        assert attend is not None
        return dataclasses.replace(spec, operations=(dataclasses.replace(attend, mask=TRUE),))

    broken = Pass("broken", "Break.", "exact", ("prefill",), Options, lambda spec, options: None, everything)
    near = parse_spec(str(LONG).replace("j ≤ i", "j < 16300"))
    with pytest.raises(ValueError, match="is declared exact, but the output out differs"):
        run_passes(near, (PassCall(broken, Options()),))


def test_what_nothing_can_compare_is_left_alone() -> None:
    """Two steps cannot be stated for some queries alone."""
    spec = run_passes(LONG, parse_passes("quantize.int8")).spec
    assert len(spec.operations) > 1
    result = run_passes(spec, parse_passes("fuse"))
    assert result.spec == spec and "too many to compare" in result.refused[0][1]
