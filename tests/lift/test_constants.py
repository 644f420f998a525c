"""Constant tensors whose elements follow from their indices, and sites that read one element of many."""

from __future__ import annotations

import onnx_ir as ir
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attncompile.frontends import onnx_evaluate
from attncompile.frontends.onnx import onnx_graph
from attncompile.ir import Expr
from attncompile.lift import lift_graph
from attncompile.lift.constants import MOST, progression

STEPS = st.integers(-(2**40), 2**40)


@given(STEPS, st.lists(st.tuples(st.integers(1, 5), STEPS), max_size=4))
def test_a_progression_is_found(start: int, axes: list[tuple[int, int]]) -> None:
    tensor = torch.tensor(start)
    for axis, (size, step) in enumerate(axes):
        shape = [size if n == axis else 1 for n in range(len(axes))]
        tensor = tensor + step * torch.arange(size).reshape(shape)
    assert progression(tensor) == (start, *(step if size > 1 else 0 for size, step in axes))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor([0, 1, 3]),
        torch.tensor([[0, 1], [1, 3]]),
        torch.tensor([0.0, 1.0]),
        torch.tensor([True, False]),
        torch.zeros(0, dtype=torch.int64),
        torch.zeros(MOST + 1, dtype=torch.int8),
    ],
    ids=["bent", "twisted", "real", "truth-values", "empty", "huge"],
)
def test_anything_else_is_none(tensor: torch.Tensor) -> None:
    assert progression(tensor) is None


def test_truth_values_that_are_all_alike_are_one() -> None:
    assert progression(torch.ones(3, 2, dtype=torch.bool)) == (1, 0, 0)


HEAD = "<ir_version: 10, opset_import: [\"\" : 18]>\n"


def mask_of(text: str) -> Expr:
    program = lift_graph(onnx_graph(ir.from_onnx_text(HEAD + text)))
    (site,) = program.sites
    assert site.status == "lifted", site.refusal
    assert site.spec is not None
    attend = site.spec.attend()
    assert attend is not None
    return attend.mask


@pytest.mark.parametrize("in_pieces", [False, True])
def test_positions_that_an_exporter_stored_are_indices(in_pieces: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if in_pieces:  # as the parts of large models are evaluated
        monkeypatch.setattr(onnx_evaluate, "LARGE", -1)
        monkeypatch.setattr(onnx_evaluate, "PIECE", 1)
    positions = "{0, 1, 2, 3, 4}"
    mask = mask_of(
        f"""g (float[B, 2, 5, 8] q, float[B, 2, 5, 8] k, float[B, 2, 5, 8] v) => (float[B, 2, 5, 8] y)
        <int64[5, 1] row = {positions}, int64[1, 5] column = {positions}, float low = {{-1e30}}> {{
           t = Transpose<perm = [0, 1, 3, 2]>(k)
           s = MatMul(q, t)
           shown = LessOrEqual(column, row)
           m = Where(shown, s, low)
           w = Softmax<axis = -1>(m)
           y = MatMul(w, v)
        }}"""
    )
    assert str(mask) == "j ≤ i"


def test_a_mask_of_which_every_third_element_is_read_is_proven_on_one_that_is_long_enough() -> None:
    mask = mask_of(
        """g (float[B, 2, 4, 8] q, float[B, 2, 4, 8] k, float[B, 2, 4, 8] v, int64[B, S] tokens)
          => (float[B, 2, 4, 8] y)
        <int64[4] place = {0, 3, 6, 9}, int64[2] middle = {1, 2}, float low = {-1e30}> {
           t = Transpose<perm = [0, 1, 3, 2]>(k)
           s = MatMul(q, t)
           some = Gather<axis = 1>(tokens, place)
           truth = Cast<to = 9>(some)
           shown = Unsqueeze(truth, middle)
           m = Where(shown, s, low)
           w = Softmax<axis = -1>(m)
           y = MatMul(w, v)
        }"""
    )
    assert str(mask) == "tokens[b, 3·j] ≠ 0"
