"""Small ONNX files of many kinds, to be damaged: exports, results of conversions, bodies, functions, integers."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx.backend.test.case import node as onnx_cases
from onnx.backend.test.case.node import linear_attention

import attncompile
from tests.backend.test_backend import small_bert, small_llama

REGISTERED = (linear_attention,)
"""Importing it registers its cases."""


class _Hidden(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = small_bert()

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, attention_mask=mask).last_hidden_state  # type: ignore[no-any-return]


def encoder() -> onnx.ModelProto:
    """An export of a small encoder."""
    ids = torch.ones(2, 7, dtype=torch.int64)
    axes = {0: "batch", 1: "length"}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file = Path(folder) / "model.onnx"
        torch.onnx.export(_Hidden().eval(), (ids, ids), file, dynamo=True, dynamic_shapes=(axes, axes),
                          external_data=False, verbose=False)  # fmt: skip
        return onnx.load(file)


def cached() -> onnx.ModelProto:
    """A decoder with its cache, in operators of ONNX Runtime's own set."""
    with tempfile.TemporaryDirectory() as folder:
        small_llama().save_pretrained(Path(folder) / "llama")
        attncompile.convert(Path(folder) / "llama", Path(folder) / "out", prefer="fused")
        return onnx.load(Path(folder) / "out" / "model.onnx")


PROJECTIONS = {"MatMulConstBOnly": True}
"""Products of two activations stay as they are."""


def quantised(whole: onnx.ModelProto, *, static: bool) -> onnx.ModelProto:
    """The encoder in INT8: ``MatMulInteger``, or pairs of ``QuantizeLinear`` and ``DequantizeLinear``."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_dynamic, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            ids = np.ones((2, 7), np.int64)
            self.left = [dict.fromkeys((value.name for value in whole.graph.input), ids)]

        def get_next(self) -> dict[str, np.ndarray] | None:
            return self.left.pop() if self.left else None

    with tempfile.TemporaryDirectory() as folder:
        before, after = Path(folder) / "before.onnx", Path(folder) / "after.onnx"
        onnx.save(whole, before)
        if static:
            quantize_static(before, after, Reader(), quant_format=QuantFormat.QDQ, extra_options=PROJECTIONS)
        else:
            quantize_dynamic(before, after)
        return onnx.load(after)


TEXT = """<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1, "pkg.local" : 1]>
bodies (float[B,I,32] x, bool flag) => (out, last)
  <float[32,96] w = {zeros}, int64 rounds = {{2}}, int64[4] split = {{0, 0, 4, 8}}, int64[3] whole = {{0, 0, 32}}> {{
    packed = MatMul(x, w)
    qf, kf, vf = Split<axis=-1, num_outputs=3>(packed)
    qr = Reshape(qf, split)  q = Transpose<perm=[0,2,1,3]>(qr)
    kr = Reshape(kf, split)  k = Transpose<perm=[0,2,3,1]>(kr)
    vr = Reshape(vf, split)  v = Transpose<perm=[0,2,1,3]>(vr)
    y = If (flag) <then_branch = plain () => (float[B,4,I,8] a) {{
            a = pkg.local.Attend(q, k, v)
        }}, else_branch = other () => (float[B,4,I,8] b) {{
            s = MatMul(q, k)  p = Softmax(s)  b = MatMul(p, v)
        }}>
    yt = Transpose<perm=[0,2,1,3]>(y)
    flat = Reshape(yt, whole)
    out = com.microsoft.MultiHeadAttention<num_heads=4>(flat, kf, vf)
    last = Loop (rounds, flag, flat) <body = round (int64 n, bool go, float[B,I,32] state) => (bool again, next) {{
            again = Identity(go)
            next = com.microsoft.MultiHeadAttention<num_heads=4, unidirectional=1>(state, state, vf)
        }}>
}}
<domain: "pkg.local", opset_import: ["" : 21]>
Attend (q, k, v) => (o) {{
    scale = Constant<value_float = 0.35>()
    s = MatMul(q, k)  t = Mul(s, scale)  p = Softmax(t)  o = MatMul(p, v)
}}"""


def bodies() -> onnx.ModelProto:
    """Attention in a branch, a loop and a function, and as one call."""
    drawn = np.random.default_rng(0).standard_normal((32, 96), np.float32) * 0.2
    zeros = ", ".join(["0.0"] * drawn.size)
    model = onnx.parser.parse_model(TEXT.format(zeros="{" + zeros + "}"))
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(drawn, "w"))
    return model


def recurrence() -> onnx.ModelProto:
    """The body that ONNX defines linear attention by, which is a ``Scan``."""
    name = "test_linear_attention_gated_delta_gqa_expanded"
    return next(case.model for case in onnx_cases._NodeTestCases if case.name == name)


def linear_call() -> onnx.ModelProto:
    """Linear attention as one call of an operator set that is not run yet."""
    name = "test_linear_attention_gated_delta_gqa"
    return next(case.model for case in onnx_cases._NodeTestCases if case.name == name)


ROWS = 99
"""Rows that are left of a table of embeddings."""


def first_attention(file: Path) -> onnx.ModelProto:
    """What a large file computes up to its first attention, with the first rows of its tables."""
    model = onnx.load(file)
    nodes = list(model.graph.node)
    softmax = next(n for n, node in enumerate(nodes) if node.op_type == "Softmax")
    products = ("MatMul", "MatMulInteger", "QLinearMatMul", "QAttention")
    last = next(node for node in nodes[softmax:] if node.op_type in products)
    wanted, kept = {last.output[0]}, []
    for node in reversed(nodes):
        if wanted & set(node.output):
            kept.append(node)
            wanted |= {name for name in node.input if name}
    del model.graph.node[:]
    model.graph.node.extend(reversed(kept))
    tensors = [tensor for tensor in model.graph.initializer if tensor.name in wanted]
    del model.graph.initializer[:], model.graph.output[:], model.graph.value_info[:]
    for tensor in tensors:
        if tensor.dims and tensor.dims[0] > 5000:
            array = onnx.numpy_helper.to_array(tensor)[:ROWS]
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(array), tensor.name))
    model.graph.initializer.extend(tensors)
    inputs = [value for value in model.graph.input if value.name in wanted]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    kind = onnx.TensorProto.INT32 if last.op_type == "MatMulInteger" else onnx.TensorProto.FLOAT
    model.graph.output.append(onnx.helper.make_tensor_value_info(last.output[0], kind, list("bhie")))
    return model


def small_sources() -> dict[str, onnx.ModelProto]:
    """By name, all that is made here."""
    whole = encoder()
    makers: Mapping[str, Callable[[], onnx.ModelProto]] = {
        "cached": cached,
        "integers": lambda: quantised(whole, static=False),
        "quantised pairs": lambda: quantised(whole, static=True),
        "bodies": bodies,
        "recurrence": recurrence,
        "linear attention": linear_call,
    }
    return {"encoder": whole, **{name: make() for name, make in makers.items()}}


__all__ = ["encoder", "first_attention", "small_sources"]
