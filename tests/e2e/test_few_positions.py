"""A file whose table of positions is shorter than the inputs that a conversion makes up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

import attncompile

TEXT = """<ir_version: 10, opset_import: ["" : 21]>
few (float[B,I,32] x) => (float[B,I,32] y)
  <float[9,32] table = {zeros}, int64 zero = {{0}}, int64 one = {{1}}, int64[4] split = {{0, 0, 4, 8}},
   int64[3] whole = {{0, 0, 32}}> {{
    sizes = Shape(x)  length = Gather(sizes, one)  positions = Range(zero, length, one)
    known = Gather(table, positions)  h = Add(x, known)
    parts = Reshape(h, split)  q = Transpose<perm=[0,2,1,3]>(parts)  k = Transpose<perm=[0,2,3,1]>(parts)
    s = MatMul(q, k)  w = Softmax(s)  o = MatMul(w, q)
    turned = Transpose<perm=[0,2,1,3]>(o)  y = Reshape(turned, whole)
}}"""


def test_latency_is_measured_where_the_model_runs(tmp_path: Path) -> None:
    """ONNX Runtime's own error ended the conversion, after all had been compared."""
    model = onnx.parser.parse_model(TEXT.format(zeros="{" + ", ".join(["0.0"] * 288) + "}"))
    drawn = np.random.default_rng(0).standard_normal((9, 32), np.float32)
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(drawn, "table"))
    onnx.save(model, tmp_path / "few.onnx")
    made = attncompile.convert(tmp_path / "few.onnx", tmp_path / "out", prefer="fused")
    assert "latency" in str(made) and "was not compared" in str(made)
