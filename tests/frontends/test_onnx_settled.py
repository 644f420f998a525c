"""Results of an ``If`` that are read where its condition is settled: they are what one branch gives."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from attncompile.convert.onnx_rewrite import rewrite_onnx
from attncompile.frontends.graph import Move, Opaque
from attncompile.frontends.onnx import onnx_graph
from attncompile.frontends.onnx_bodies import nested_nodes
from attncompile.frontends.onnx_settled import settled
from attncompile.lift import lift_graph
from attncompile.passes import parse_passes
from attncompile.verify import derive_tolerance, require_within
from tests.frontends.onnx_reference import parsed

MODEL = """g (bool c, float[B,2,J,4] q, float[B,2,J,4] k, float[B,2,J,4] v, bool[B,J] m) => (float[B,2,J,4] y MORE)
<float zero = {0.0}, float low = {-1.0e9}, int64[2] axes = {1, 2}> {
    kt = Transpose<perm=[0,1,3,2]>(k)
    mask = If(c) <
        then_branch = nothing () => (float none) { none = Identity(zero) },
        else_branch = made () => (some) { wide = Unsqueeze(m, axes)  some = Where(wide, zero, low) BESIDE }>
    OUTSIDE
    y = If(c) <
        then_branch = t () => (float[B,2,J,4] a) { s1 = MatMul(q, kt)  READ p1 = Softmax(s1)  a = MatMul(p1, v) },
        else_branch = e () => (float[B,2,J,4] b) {
            s2 = MatMul(q, kt)  l2 = Add(s2, mask)  p2 = Softmax(l2)  b = MatMul(p2, v) }> }"""

READERS = {
    "nowhere else": {},
    "by a result": {"MORE": ", mask"},
    "outside": {"OUTSIDE": "other = Abs(mask)"},
    "in the other branch": {"READ": "u = Abs(mask)"},
    "with a product in the branch": {"BESIDE": "score = MatMul(q, kt)"},
}


def model(**changes: str) -> ir.Model:
    text = MODEL
    for place in ("MORE", "BESIDE", "OUTSIDE", "READ"):
        text = text.replace(place, changes.get(place, ""))
    return parsed(text)


def test_the_mask_of_a_branch_is_looked_through() -> None:
    """Also its rank: no operator says what shape two different results have."""
    plain, masked = lift_graph(graph := onnx_graph(model())).sites
    assert "mask   true" in str(plain.spec)
    assert masked.status == "lifted", str(masked.refusal)
    assert "mask   m[b, j]" in str(masked.spec) and "fill   s − 1000000000.0" in str(masked.spec)
    assert masked.region is not None
    assert [binding.value for binding in masked.region.inputs] == ["q", "k", "v", "m"]
    assert isinstance(graph.producer["mask"], Move) and not graph.is_readable("some")


@pytest.mark.parametrize("readers", READERS)
def test_a_result_is_one_branch_only_where_nobody_reads_it_otherwise(readers: str) -> None:
    made = model(**READERS[readers])
    graph = onnx_graph(made)
    known = settled(made)
    if readers == "nowhere else":
        assert known.given == {"mask": "some"} and known.inside == {"wide", "some"}
    else:
        assert not known.given and not known.inside
        assert isinstance(graph.producer["mask"], Opaque) and graph.is_readable("some")


def test_what_a_branch_alone_can_read_is_loaded_as_its_result() -> None:
    """A mask that is stated by nothing: the rewritten branch reads what the ``If`` gives, which it sees."""
    opaque = "wide = Unsqueeze(m, axes)  some = Where(wide, zero, low)"
    drawn = "big = Where(m, zero, low)  sorted, places = TopK<axis=1>(big, one)  some = Unsqueeze(sorted, axes)"
    text = MODEL.replace(opaque, drawn).replace("int64[2] axes", "int64[1] one = {1}, int64[2] axes")
    for place in ("MORE", "BESIDE", "OUTSIDE", "READ"):
        text = text.replace(place, "")
    _, masked = lift_graph(onnx_graph(parsed(text))).sites
    assert masked.region is not None, str(masked.refusal)
    assert [binding.value for binding in masked.region.inputs][3:] == ["mask"]


def test_both_branches_are_given_a_window() -> None:
    windowed = model()
    passes = parse_passes("sparsify.window(size=2, sinks=0)")
    outcomes = rewrite_onnx(windowed, "m", passes, "cpu", "fastest", False, ()).outcomes
    assert [outcome.lossy for outcome in outcomes] == [True, True]
    assert not any(node.op_type == "If" and node.outputs[0].name == "mask" for node in nested_nodes(windowed.graph))
    random, length = np.random.default_rng(0), 5
    feeds = {name: random.standard_normal((2, 2, length, 4)).astype(np.float32) for name in "qkv"}
    feeds["m"] = np.array([[True] * length, [False, True, True, False, True]])
    seen = np.abs(np.arange(length)[:, None] - np.arange(length)) < 2
    loaded = onnxruntime.InferenceSession(ir.to_proto(windowed).SerializeToString())
    for c in (True, False):
        (found,) = loaded.run(None, {**feeds, "c": np.array(c)})
        shown = seen if c else seen & feeds["m"][:, None, None, :]
        exact, plain = (torch.from_numpy(attended(feeds, shown, dtype)) for dtype in ("float64", "float32"))
        require_within(torch.from_numpy(found), exact, derive_tolerance(exact, plain, length).bound, f"c is {c}")


def attended(feeds: dict[str, np.ndarray], shown: np.ndarray, dtype: str) -> np.ndarray:
    """Attention ``[b,h,i,d]`` over the keys that are shown."""
    q, k, v = (feeds[name].astype(dtype) for name in "qkv")
    logits = np.where(shown, q @ k.swapaxes(2, 3), np.array(-1e9, dtype))
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v
