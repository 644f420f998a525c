"""Attention calls of ONNX: lifted, refused with the reason, or spelled out."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import pytest
import torch

from attncompile.frontends.graph import (
    RefusedAttention,
)
from attncompile.frontends.onnx import onnx_graph
from attncompile.frontends.onnx_evaluate import OnnxEvaluator
from attncompile.lift import lift_graph
from attncompile.lift.prove import canonical
from attncompile.lift.sites import find_sites
from tests.frontends.onnx_reference import Row, parsed


@dataclass(frozen=True)
class Call:
    """A fused call: its node, its inputs, and parts of the Spec's text that must be there;
    the range of its integer inputs."""

    name: str
    body: str
    inputs: str
    says: tuple[str, ...]
    opset: int = 24
    low: int = 0
    high: int = 2


Q4, KV4 = "float[B,6,I,8] q", "float[B,6,J,8] k, float[B,6,J,4] v"
NEW = KV4.replace("J", "I")
# fmt: off
CALLS = (
    Call("plain", "y = Attention(q, k, v)", f"{Q4}, {KV4}", ("0.35355339059327373·s", "empty rows zero")),
    Call("causal", "y = Attention<is_causal=1, scale=0.5>(q, k, v)", f"{Q4}, {KV4}", ("j ≤ i", "0.5·s")),
    Call("float mask", "y = Attention(q, k, v, m)", f"{Q4}, {KV4}, float[B,1,I,J] m", ("m[b, 0, i, j]",)),
    Call("bool mask", "y = Attention<softcap=3.0>(q, k, v, m)", f"{Q4}, {KV4}, bool[I,J] m",
        ("mask   m[i, j]", "tanh")),
    Call("short mask", "y = Attention(q, k, v, m)", f"{Q4}, {KV4}, bool[I,S] m", ("j < S and m[i, j]",)),
    Call("valid keys", "y = Attention<is_causal=1>(q, k, v, , , , n)", f"{Q4}, {KV4}, int64[B] n",
         ("j ≤ i + n[b] − I",), low=3, high=8),
    Call("grouped", "y = Attention(q, k, v)", f"{Q4}, float[B,2,J,8] k, float[B,2,J,4] v", ("k[B,2,J,8]",
        "h // 3")),
    Call("flat", "y = Attention<q_num_heads=6, kv_num_heads=2>(q, k, v)",
         "float[B,I,48] q, float[B,J,16] k, float[B,J,8] v", ("q[B,6,I,8]", "h // 3")),
    Call("window", "y = Attention<left_window_size=2, is_causal=1>(q, k, v)", f"{Q4}, {KV4}", ("j ≤ i",
        "j > i − 3"), 25),
    Call("multi-head", "y = com.microsoft.MultiHeadAttention<num_heads=6>(q, k, v)",
         "float[B,I,48] q, float[B,J,48] k, float[B,J,24] v", ("0.35355339059327373·s",)),
    Call("multi-head, padding", "y = com.microsoft.MultiHeadAttention<num_heads=6>(q, k, v, , p)",
         "float[B,I,48] q, float[B,J,48] k, float[B,J,24] v, int32[B,J] p", ("p[b, j] ≠ 0", "− 10000.0")),
    Call("multi-head, bias", "y = com.microsoft.MultiHeadAttention<num_heads=6, scale=0.25>(q, k, v, , , a)",
         "float[B,I,48] q, float[B,J,48] k, float[B,J,24] v, float[1,6,I,J] a", ("a[0, h, i, j]", "0.25·s")),
    Call("multi-head, causal", "y = com.microsoft.MultiHeadAttention<num_heads=6, unidirectional=1>(q, k, v)",
         "float[B,I,48] q, float[B,I,48] k, float[B,I,24] v", ("j ≤ i",)),
    Call("linear attention of ONNX Runtime",
         "y, z = com.microsoft.LinearAttention<q_num_heads=4, kv_num_heads=2>(q, k, v, s, g, r)",
         "float[B,I,32] q, float[B,I,16] k, float[B,I,16] v, float[B,2,8,8] s, float[B,I,2] g, float[B,I,1] r",
         ("scan", "gate[B,2,I,1]", "rate[B,2,I]", "past[B,2,8,8]", "h // 2")),
    Call("linear attention of the standard",
         'y = LinearAttention<q_num_heads=2, kv_num_heads=2, update_rule="gated", scale=0.5>(q, k, v, , g)',
         "float[B,I,16] q, float[B,I,16] k, float[B,I,8] v, float[B,I,16] g",
         ("scan", "gate[B,2,I,8]", "scale  0.5"), opset=27),
)
# fmt: on


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
def test_fused_call_is_lifted(call: Call) -> None:
    row = Row(
        call.name,
        call.body,
        call.inputs,
        opset=call.opset,
        symbols={"B": 2, "I": 5, "J": 7, "S": 4},
        low=call.low,
        high=call.high,
    )
    graph = onnx_graph(row.model())
    (site,) = find_sites(graph)
    assert site.spec is not None and site.region is not None, site.refusal
    for part in call.says:
        assert part in str(site.spec), str(site.spec)
    feeds = {name: torch.from_numpy(value) for name, value in row.feeds().items()}
    assert isinstance(graph.evaluate, OnnxEvaluator)
    precision = graph.evaluate.precision(["y"], list(feeds))
    assert precision is (torch.float32 if "com.microsoft" in call.body else torch.float64)
    types, sizes = site.spec.types(), dict(row.symbols)
    tensors = {
        b.name: canonical(feeds[b.value], b.layout, types[b.name], sizes) if b.layout else feeds[b.value]
        for b in site.region.inputs
    }
    (stated,) = site.spec.interpret(tensors)
    (output,) = site.region.outputs
    assert output.layout is not None
    native = canonical(graph.evaluate(["y"], feeds, sizes)["y"], output.layout, types["out"], sizes)
    torch.testing.assert_close(native.to(precision), stated.to(precision))


@pytest.mark.parametrize(
    ("body", "inputs", "reason"),
    [
        (
            "y = com.microsoft.MultiHeadAttention<num_heads=6>(q, k, v, , , , p, p, n)",
            "float[B,I,48] q, float[B,J,48] k, float[B,J,48] v, float[B,6,P,8] p, int32[1] n",
            "updates a cache in place",
        ),
        (
            "y = com.microsoft.MultiHeadAttention<num_heads=6>(q, , , b)",
            "float[B,I,6,3,8] q, float[144] b",
            "a bias for operands that are packed",
        ),
        (
            "y = com.microsoft.Attention<num_heads=6, do_rotary=1>(q, w, b)",
            "float[B,I,48] q, float[48,144] w, float[144] b",
            "do_rotary",
        ),
        (
            "y = com.microsoft.LinearAttention<q_num_heads=2, kv_num_heads=2, state_window=3>(q, k, v, s, g, r)",
            "float[B,I,16] q, float[B,I,16] k, float[B,I,16] v, float[3,B,2,8,8] s, float[B,I,2] g, float[B,I,2] r",
            "window of states",
        ),
        (
            "y = com.microsoft.LinearAttention<q_num_heads=2, kv_num_heads=2>(q, k, v, , g)",
            "float[B,I,16] q, float[B,I,16] k, float[B,I,16] v, float[B,I,2] g",
            "beta do not go together",
        ),
        (
            'y = com.microsoft.LinearAttention<q_num_heads=3, kv_num_heads=2, update_rule="linear">(q, k, v)',
            "float[B,I,24] q, float[B,I,16] k, float[B,I,16] v",
            "no positive multiple",
        ),
        (
            'y = com.microsoft.LinearAttention<q_num_heads=2, kv_num_heads=2, update_rule="delta">(q, k, v, , , r)',
            "float[B,I,16] q, float[B,I,16] k, float[B,I,16] v, float[B,I,3] r",
            "3 channels, where it should have 2 or 1",
        ),
        (
            'y = com.microsoft.LinearAttention<q_num_heads=2, kv_num_heads=2, update_rule="decay">(q, k, v)',
            "float[B,I,16] q, float[B,I,16] k, float[B,I,16] v",
            "none of linear",
        ),
    ],
    ids=["buffer", "packed", "rotary", "window", "no-rate", "heads", "rate", "unknown-rule"],
)
def test_fused_call_that_cannot_be_stated_is_refused(body: str, inputs: str, reason: str) -> None:
    graph = onnx_graph(parsed(f"g ({inputs}) => (y) {{ {body} }}", 24))
    assert any(isinstance(node, RefusedAttention) for node in graph.nodes)
    (site,) = lift_graph(graph).sites
    assert site.status == "refused" and site.refusal is not None
    assert reason in site.refusal.reason and site.refusal.hint


@pytest.mark.parametrize(
    ("body", "inputs", "status", "keys"),
    [
        (
            "y, pk, pv = Attention<is_causal=1>(q, k, v, , past_k, past_v)",
            f"{Q4}, {NEW}, float[B,6,P,8] past_k, float[B,6,P,4] past_v",
            "lifted",
            "j ≤ i + J − ",
        ),
        ("y, , , w = Attention<is_causal=1>(q, k, v)  z = Exp(w)", f"{Q4}, {KV4}", "observed", "j ≤ i"),
    ],
    ids=["cache", "scores"],
)
def test_call_that_is_more_than_one_product_is_spelled_out(
    body: str, inputs: str, status: str, keys: str
) -> None:
    returned = "y, z" if "z = " in body else "y"
    (site,) = lift_graph(onnx_graph(parsed(f"g ({inputs}) => ({returned}) {{ {body} }}", 24))).sites
    assert site.status == status, str(site.refusal)
    assert keys in str(site.spec)


def test_nan_replaced_by_zero_is_a_property_of_empty_rows() -> None:
    text = """g (float[B,2,I,4] q, float[B,2,4,J] k, float[B,2,J,4] v, bool[B,1,1,J] m) => (y)
        <float zero = {{0.0}}, float hidden = {{-inf}}> {{
        s = MatMul(q, k)  f = Where(m, zero, hidden)  l = Add(s, f)  w = Softmax(l)
        n = IsNaN(w)  c = Where(n, {0}, {1})  y = MatMul(c, v) }}"""
    hidden = -math.inf
    for then, otherwise, empty in (("zero", "w", "zero"), ("w", "zero", "nan")):
        proto = parsed(text.format(then, otherwise).replace("-inf", "-1.0"))
        proto.graph.initializers["hidden"].const_value = ir.tensor(np.array(hidden, np.float32))
        (site,) = lift_graph(onnx_graph(proto)).sites
        assert site.spec is not None, site.refusal
        assert f"empty rows {empty}" in str(site.spec) or empty == "nan"
        attend = site.spec.attend()
        assert attend is not None and attend.norm.empty == empty


def test_scores_and_weights_that_are_rounded_are_observed() -> None:
    """Pairs of QuantizeLinear and DequantizeLinear, as static quantisation puts them around everything."""
    (site,) = lift_graph(onnx_graph(parsed("""g (float[B,4,I,8] q, float[B,4,8,I] k, float[B,4,I,8] v) => (y)
        <float scale = {0.1}, uint8 zero = {128}> {
        s = MatMul(q, k)  sq = QuantizeLinear(s, scale, zero)  sd = DequantizeLinear(sq, scale, zero)
        w = Softmax(sd)   wq = QuantizeLinear(w, scale, zero)  wd = DequantizeLinear(wq, scale, zero)
        y = MatMul(wd, v) }"""))).sites  # fmt: skip
    assert site.status == "observed" and site.refusal is not None
    assert "the scores, the weights to uint8" in site.refusal.reason
