"""One small attention model as an ONNX file, in floats and in every form that ONNX Runtime's quantiser gives it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static

WIDTH = 32
FLOAT = """<ir_version: 8, opset_import: ["" : 17]>
g (float[B,I,32] x, float[B,1,1,I] mask) => (float[B,I,32] y) <float scale = {0.35355339}> {
    heads = Constant<value_ints = [0, 0, 4, 8]>()  rows = Constant<value_ints = [0, 0, 32]>()
    q0 = MatMul(x, wq)  q1 = Add(q0, bq)  q2 = Reshape(q1, heads)  q = Transpose<perm = [0, 2, 1, 3]>(q2)
    k0 = MatMul(x, wk)  k1 = Add(k0, bk)  k2 = Reshape(k1, heads)  k = Transpose<perm = [0, 2, 3, 1]>(k2)
    v0 = MatMul(x, wv)  v1 = Add(v0, bv)  v2 = Reshape(v1, heads)  v = Transpose<perm = [0, 2, 1, 3]>(v2)
    s0 = MatMul(q, k)   s1 = Mul(s0, scale)  s2 = Add(s1, mask)    p = Softmax<axis = -1>(s2)
    o0 = MatMul(p, v)   o1 = Transpose<perm = [0, 2, 1, 3]>(o0)    o2 = Reshape(o1, rows)
    y = MatMul(o2, wo)
}"""

STATIC: dict[str, dict[str, Any]] = {
    "qdq": {"quant_format": QuantFormat.QDQ, "op_types_to_quantize": ["MatMul"]},
    "qdq-everything": {"quant_format": QuantFormat.QDQ, "activation_type": QuantType.QUInt8},
    "qoperator": {"quant_format": QuantFormat.QOperator, "op_types_to_quantize": ["MatMul"]},
    "qoperator-everything": {"quant_format": QuantFormat.QOperator},
}
FORMS = (*STATIC, "dynamic")
"""Pairs around products, pairs around everything, products of codes, all in codes, and products of whole numbers."""


def attention_model() -> onnx.ModelProto:
    """The model in floats."""
    model, random = onnx.parser.parse_model(FLOAT), np.random.default_rng(0)
    for name in ("wq", "wk", "wv", "wo", "bq", "bk", "bv"):
        array = random.standard_normal((WIDTH, WIDTH) if name[0] == "w" else WIDTH).astype(np.float32) / 5
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    for number, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{number}"
    return model


def inputs(seed: int, batch: int = 2, length: int = 9) -> dict[str, np.ndarray]:
    """States, and a mask that hides the last keys of the second row."""
    x = np.random.default_rng(seed).standard_normal((batch, length, WIDTH)).astype(np.float32)
    mask = np.zeros((batch, 1, 1, length), np.float32)
    mask[1:, ..., length * 2 // 3 :] = -30.0
    return {"x": x, "mask": mask}


class _Calibration(CalibrationDataReader):  # type: ignore[misc]
    """Four calls."""

    def __init__(self) -> None:
        self.calls: Iterator[dict[str, np.ndarray]] = iter([inputs(seed) for seed in range(4)])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.calls, None)


def quantised_file(form: str, folder: Path) -> Path:
    """The file of a form, written to a folder."""
    plain, file = folder / "float.onnx", folder / f"{form}.onnx"
    if not plain.exists():
        onnx.save(attention_model(), plain)
    silenced, logging.root.disabled = logging.root.disabled, True  # the quantiser's advice
    try:
        if form in STATIC:
            quantize_static(plain, file, _Calibration(), **STATIC[form])
        else:
            quantize_dynamic(plain, file, extra_options={"MatMulConstBOnly": False})
    finally:
        logging.root.disabled = silenced
    return file
