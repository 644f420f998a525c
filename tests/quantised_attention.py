"""One small attention model as an ONNX file, in floats and in every form that ONNX Runtime's quantiser gives it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static

WIDTH = 32
OPTIMISED, PACKED = ", saved by the runtime", "packed "
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

CONTRIB = "qdq, ONNX Runtime's own pairs"
BY_RANGES: dict[str, dict[str, Any]] = {
    **STATIC,
    CONTRIB: {"quant_format": QuantFormat.QDQ, "extra_options": {"UseQDQContribOps": True}},
}
REWRITTEN = (
    *(f"{form}{OPTIMISED}" for form in ("qdq-everything", "qoperator-everything", "dynamic")),
    f"{PACKED}qoperator-everything", f"{PACKED}{CONTRIB}", f"{PACKED}{CONTRIB}{OPTIMISED}",
)  # fmt: skip
"""Some of these as ONNX Runtime saves them once it has optimised them, and of a model with one product for queries,
keys and values."""

LINEAR = ("wq", "wk", "wv", "wo", "bq", "bk", "bv")
_PROJECTIONS = {
    "q0 = MatMul(x, wq)  q1 = Add(q0, bq)": """p0 = MatMul(x, w)  p1 = Add(p0, b)
    parts = Constant<value_ints = [32, 32, 32]>()  q1, k1, v1 = Split<axis = 2>(p1, parts)""",
    "k0 = MatMul(x, wk)  k1 = Add(k0, bk)": "shape = Shape(x)",
    "v0 = MatMul(x, wv)  v1 = Add(v0, bv)": "flat = Constant<value_ints = [-1, 32]>()",
    "y = MatMul(o2, wo)": "y0 = Reshape(o2, flat)  y1 = Gemm(y0, wo, bo)  y = Reshape(y1, shape)",
}
"""What becomes of the text above where there is one product, and a ``Gemm`` behind the attention."""


def attention_model(packed: bool = False) -> onnx.ModelProto:
    """The model in floats."""
    text = FLOAT
    for apart, together in _PROJECTIONS.items():
        text = text.replace(apart, together) if packed else text
    model, random = onnx.parser.parse_model(text), np.random.default_rng(0)
    shapes = {"w": (WIDTH, 3 * WIDTH), "b": 3 * WIDTH, "wo": (WIDTH, WIDTH), "bo": WIDTH}
    apart = {name: (WIDTH, WIDTH) if name[0] == "w" else WIDTH for name in LINEAR}
    for name, shape in (shapes if packed else apart).items():
        array = random.standard_normal(shape).astype(np.float32) / 5
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
    if form.endswith(OPTIMISED):
        return saved_by_the_runtime(quantised_file(form.removesuffix(OPTIMISED), folder), folder / f"{form}.onnx")
    plain, file = folder / "float.onnx", folder / f"{form}.onnx"
    if not plain.exists():
        onnx.save(attention_model(packed=form.startswith(PACKED)), plain)
    form = form.removeprefix(PACKED)
    silenced, logging.root.disabled = logging.root.disabled, True  # the quantiser's advice
    try:
        if form in BY_RANGES:
            quantize_static(plain, file, _Calibration(), **BY_RANGES[form])
        else:
            quantize_dynamic(plain, file, extra_options={"MatMulConstBOnly": False})
    finally:
        logging.root.disabled = silenced
    return file


def saved_by_the_runtime(file: Path, made: Path) -> Path:
    """What ONNX Runtime makes of a file when it loads it, written to another one."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(made)
    options.log_severity_level = 3  # that what it writes depends on this machine
    onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return made
