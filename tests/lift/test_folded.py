"""Heads that share a key folded into the queries of one product: heads and queries are apart in the Spec."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch

from attncompile.convert.onnx_rewrite import rewrite_onnx
from attncompile.convert.runtime import session
from attncompile.frontends.onnx import onnx_graph
from attncompile.ir import Index, Size
from attncompile.ir.expr import Const
from attncompile.lift import lift_graph
from attncompile.lift.folded import Fold, find_fold, unfolded
from attncompile.passes import parse_passes
from attncompile.verify import derive_tolerance, require_within
from tests.frontends.onnx_reference import parsed

HEADS, GROUPS, CHANNELS = 6, 2, 8

FOLDED = """g (float[B,6,I,8] q, float[B,2,P,8] pk, float[B,2,I,8] k, float[B,2,P,8] pv, float[B,2,I,8] v)
=> (float[B,6,I,8] y)
<int64[4] fold = {0, 2, -1, 8}, int64[4] scores = {0, 6, -1, 0}, int64[4] weights = {0, 2, -1, 0},
 int64[4] heads = {0, 6, -1, 8}, float low = {-10000.0}, float zero = {0.0}, int64 none = {0}, int64 one = {1},
 int64[1] behind = {1}> {
    keys = Concat<axis=2>(pk, k)  values = Concat<axis=2>(pv, v)
    kt = Transpose<perm=[0,1,3,2]>(keys)
    qf = Reshape(q, fold)  raw = MatMul(qf, kt)  map = Reshape(raw, scores)
    n = Shape<start=2, end=3>(q)  t = Shape<start=2, end=3>(keys)  n0 = Squeeze(n)  t0 = Squeeze(t)
    before = Sub(t0, n0)  i0 = Range(none, n0, one)  i1 = Add(i0, before)  i2 = Unsqueeze(i1, behind)
    j0 = Range(none, t0, one)  seen = LessOrEqual(j0, i2)  bias = Where(seen, zero, low)
    l = Add(map, bias)  p = Softmax(l)  pf = Reshape(p, weights)  of = MatMul(pf, values)  y = Reshape(of, heads) }"""


def folded(queries: str) -> ir.Model:
    """Causal attention behind a past, of any number of queries or of a fixed one."""
    return parsed(FOLDED.replace("I,8]", f"{queries},8]"))


@pytest.mark.parametrize("queries", ["I", "4", "1"])
def test_heads_and_queries_are_apart(queries: str) -> None:
    """Also in one step of fixed length, where the normaliser has the folded heads among all heads already."""
    (site,) = lift_graph(onnx_graph(folded(queries))).sites
    assert site.status == "lifted", str(site.refusal)
    said = str(site.spec)
    assert f"q[B,6,{queries},8]  k,v[B,2," in said and "kv_head h // 3" in said
    assert site.region is not None
    assert site.region.inputs[0].value == "q" and site.proof is not None


def test_a_window_counts_positions_and_not_heads() -> None:
    size = 3
    model = folded("I")
    requested = parse_passes(f"sparsify.window(size={size}, sinks=0)")
    (outcome,) = rewrite_onnx(model, "m", requested, "cpu", "fastest", False, ()).outcomes
    assert outcome.lossy, outcome.reason
    loaded = session(ir.to_proto(model).SerializeToString(), "cpu", threads=1)
    for rows, count, past in ((1, 5, 0), (2, 4, 7), (3, 1, 9)):
        feeds = drawn(rows, count, past)
        (found,) = loaded.run(None, feeds)
        exact, plain = (torch.from_numpy(attended(feeds, size, dtype)) for dtype in ("float64", "float32"))
        bound = derive_tolerance(exact, plain, CHANNELS).bound
        require_within(torch.from_numpy(found), exact, bound, f"{count} tokens behind {past}")


def drawn(rows: int, count: int, past: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(count)
    shapes = {"q": (HEADS, count), **dict.fromkeys(("pk", "pv"), (GROUPS, past))}
    shapes |= dict.fromkeys("kv", (GROUPS, count))
    return {
        name: random.standard_normal((rows, heads, length, CHANNELS)).astype(np.float32) / 2
        for name, (heads, length) in shapes.items()
    }


def attended(feeds: dict[str, np.ndarray], size: int, dtype: str) -> np.ndarray:
    """Causal attention ``[b,h,i,d]`` over the last ``size`` keys, head by head."""
    q = feeds["q"].astype(dtype)
    whole = (np.concatenate([feeds[f"p{name}"], feeds[name]], axis=2).astype(dtype) for name in "kv")
    k, v = (np.repeat(x, HEADS // GROUPS, axis=1) for x in whole)
    own = k.shape[2] - q.shape[2] + np.arange(q.shape[2])[:, None]
    keys = np.arange(k.shape[2])
    logits = np.where((keys <= own) & (keys > own - size), q @ k.swapaxes(2, 3), np.array(-np.inf, dtype))
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


X, Y = Index("y0"), Index("y1")
SIZE = Size("J") - Size("P")


def test_the_size_of_a_group_divides_the_axis() -> None:
    extents = {"y0": Size("B"), "y1": 3 * SIZE}
    assert find_fold([Y], extents, (X, Y // SIZE, Y % SIZE)) == Fold(Y, Const(3), SIZE)
    assert find_fold([Y], extents, (X, Y // 2, Y % 2)) is None  # nothing says that J − P is even
    assert find_fold([X], extents, (X, Y // SIZE, Y % SIZE)) is None
    assert find_fold([Y], extents, (X, Y, Index("j"))) is None


def test_axes_behind_a_fold_are_counted_on() -> None:
    meaning, sizes = unfolded(Fold(X, Const(3), SIZE), (X, Y), {"y0": 3 * SIZE, "y1": Const(8)})
    assert meaning == {X: X * SIZE + Y, Y: Index("y2")} and sizes == [Const(3), SIZE, Const(8)]
