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


def test_a_mask_of_the_encoder_is_expanded_for_each_number_of_queries() -> None:
    """Self- and cross-attention of a decoder share a padding mask; fused operators want it over their own queries."""
    text = """<ir_version: 10, opset_import: ["" : 23]>
    g (float[B, 2, S, 8] x, float[B, 2, T, 8] y, bool[B, 1, 1, S] keep) => (float[B, 2, S, 8] a, float[B, 2, T, 8] c) {
       zero = Constant<value = float {0.0}>()
       low = Constant<value = float {-3.0e38}>()
       mask = Where(keep, zero, low)
       xt = Transpose<perm = [0, 1, 3, 2]>(x)
       s0 = MatMul(x, xt)
       m0 = Add(s0, mask)
       w0 = Softmax<axis = -1>(m0)
       a = MatMul(w0, x)
       s1 = MatMul(y, xt)
       m1 = Add(s1, mask)
       w1 = Softmax<axis = -1>(m1)
       c = MatMul(w1, x)
    }"""
    proto = onnx.parser.parse_model(text)
    model = ir.from_proto(proto)
    rewritten = rewrite_onnx(model, "shared", (), "cpu", "fused", False, ())
    assert [one.operator for one in rewritten.outcomes] == ["Attention", "Attention"]
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 2, 7, 8, generator=generator), torch.randn(2, 2, 3, 8, generator=generator)
    keep = torch.rand(2, 1, 1, 7, generator=generator) < 0.6
    keep[..., 0] = True
    call = Call((), {"x": x, "y": y, "keep": keep}, "two")
    expected = run(session(proto.SerializeToString(), "cpu", threads=1), call)
    actual = run(session(ir.to_proto(rewritten.model).SerializeToString(), "cpu", threads=1), call)
    for name, value in expected.items():
        assert torch.allclose(actual[name], value, rtol=0, atol=64 * torch.finfo(torch.float32).eps)


def test_an_operand_without_a_batch_axis_is_repeated_and_a_result_without_one_squeezed() -> None:
    text = """<ir_version: 10, opset_import: ["" : 23]>
    g (float[2, S, 8] q, float[2, S, 8] k, float[2, S, 8] v) => (float[2, S, 8] out) {
       kt = Transpose<perm = [0, 2, 1]>(k)
       scores = MatMul(q, kt)
       weights = Softmax<axis = -1>(scores)
       out = MatMul(weights, v)
    }"""
    proto = onnx.parser.parse_model(text)
    rewritten = rewrite_onnx(ir.from_proto(proto), "flat", (), "cpu", "fused", False, ())
    assert [one.operator != "original" for one in rewritten.outcomes] == [True]
    call = Call((), {name: torch.randn(2, 5, 8) for name in "qkv"}, "one")
    (expected,) = run(session(proto.SerializeToString(), "cpu", threads=1), call).values()
    (actual,) = run(session(ir.to_proto(rewritten.model).SerializeToString(), "cpu", threads=1), call).values()
    assert torch.allclose(actual, expected, rtol=0, atol=64 * torch.finfo(torch.float32).eps)
