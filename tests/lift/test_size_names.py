"""Sizes that a graph happens to call as the axes of a Spec are called are told apart from them."""

from __future__ import annotations

import itertools

import onnx_ir
import pytest
from onnx import TensorProto, helper

from attncompile.frontends.onnx import onnx_graph
from attncompile.lift import lift_graph


@pytest.mark.parametrize("names", list(itertools.permutations("BIJ")), ids="".join)
def test_sizes_named_like_axes(names: tuple[str, str, str]) -> None:
    batch, queries, keys = names
    values = [
        helper.make_tensor_value_info("query", TensorProto.FLOAT, [batch, 2, queries, 4]),
        helper.make_tensor_value_info("key", TensorProto.FLOAT, [batch, 2, keys, 4]),
        helper.make_tensor_value_info("value", TensorProto.FLOAT, [batch, 2, keys, 4]),
        helper.make_tensor_value_info("bias", TensorProto.FLOAT, [queries, keys]),
    ]
    nodes = [
        helper.make_node("Transpose", ["key"], ["turned"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["query", "turned"], ["scores"]),
        helper.make_node("Add", ["scores", "bias"], ["biased"]),
        helper.make_node("Softmax", ["biased"], ["weights"], axis=-1),
        helper.make_node("MatMul", ["weights", "value"], ["out"]),
    ]
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, [batch, 2, queries, 4])
    graph = helper.make_graph(nodes, "attention", values, [out])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    (site,) = lift_graph(onnx_graph(onnx_ir.from_proto(model)), "named").sites
    assert site.status == "lifted", site.refusal
    assert site.spec is not None
    assert "q[B,2,I,4]  k,v[B,2,J,4]" in str(site.spec) and "given  bias[I,J]:float32" in str(site.spec)
