"""How native tensors hold the axes of a Spec, where several native axes are one axis of it."""

from __future__ import annotations

import io

import onnx
import onnx_ir as ir
import pytest
import torch

from attncompile.convert.calibration import Call
from attncompile.convert.onnx_rewrite import rewrite_onnx
from attncompile.convert.runtime import run, session
from attncompile.lift.program import Layout

BLOCK = 4
"""Positions of a block, each of which attends to its own block and the one before."""


class BlockAttention(torch.nn.Module):
    """Attention of blocks of positions to their own block and the one before: five axes, no copy into four."""

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """The blocks of the result, ``[batch, blocks, positions, heads, channels]``."""
        batch, length, heads, channels = query.shape
        missing = -length % BLOCK
        blocks = [
            torch.nn.functional.pad(x, (0, 0, 0, 0, 0, missing)).reshape(batch, -1, BLOCK, heads, channels)
            for x in (query, key, value)
        ]
        keys, values = (
            torch.cat([torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1], x], dim=2) for x in blocks[1:]
        )
        scores = torch.einsum("bnqhd,bnkhd->bnhqk", blocks[0], keys)
        return torch.einsum("bnhqk,bnkhd->bnqhd", scores.softmax(-1), values)


def exported() -> bytes:
    """The module as the TorchScript exporter writes it, with any length."""
    buffer = io.BytesIO()
    names = ["query", "key", "value"]
    inputs = tuple(torch.randn(2, 11, 3, 8) for _ in names)
    axes = {name: {0: "batch", 1: "length"} for name in names}
    torch.onnx.export(
        BlockAttention(), inputs, buffer, input_names=names, dynamic_axes=axes, opset_version=17, dynamo=False
    )
    return buffer.getvalue()


@pytest.mark.parametrize("length", [3, 8, 21])
def test_blocks_of_a_sequence_run_in_the_operators_that_are_written_for_them(length: int) -> None:
    stored = exported()
    model = ir.from_proto(onnx.load_from_string(stored))
    rewritten = rewrite_onnx(model, "blocks", (), "cpu", "fused", False, ())
    (site,) = rewritten.program.sites
    assert site.status == "lifted" and site.proof is not None and len(rewritten.choices) == 1
    inputs = {name: torch.randn(3, length, 3, 8) for name in ("query", "key", "value")}
    call = Call((), inputs, "blocks")
    (expected,) = run(session(stored, "cpu", threads=1), call).values()
    (actual,) = run(session(ir.to_proto(rewritten.model).SerializeToString(), "cpu", threads=1), call).values()
    assert torch.allclose(actual, expected, rtol=0, atol=64 * torch.finfo(torch.float32).eps)
    with torch.no_grad():
        assert torch.allclose(actual, BlockAttention()(**inputs), rtol=0, atol=64 * torch.finfo(torch.float32).eps)


def test_the_groups_of_a_layout_and_their_sizes() -> None:
    layout = Layout((("b",), ("h",), ("i",), ("d",)), (1, 2, 1, 1))
    assert layout.places() == ((0, 1), (1, 3), (3, 4), (4, 5))
    assert layout.extents((2, 3, 4, 5, 8)) == (2, 12, 5, 8)
    assert not layout.plain and Layout((("b",), ("i",))).plain
