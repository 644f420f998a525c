"""Which versions of the standard are loaded: a model of the plain operators that an export of a transformer has.

A version is in the table where every one of these operators runs in that version; a version of ONNX Runtime that has
not all kernels of an opset yet, reads such files only in part.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import onnx
import torch
from onnx import TensorProto, helper

from benchmarks.onnx_capabilities.attempt import IR_VERSION, Attempt, Case, Results, draw

OPSETS = range(17, 29)
IR_VERSIONS = range(8, 14)


def plain(dtype: torch.dtype, length: int) -> Case:
    """Numbers for the model; it computes a block of attention in plain operators."""
    x = draw("states", 2, length, 16, dtype=dtype)

    def reference(as_dtype: torch.dtype) -> Results:
        whole = x.to(as_dtype)
        scores = whole @ whole.transpose(1, 2) * 0.25
        hidden = torch.arange(length)[None, :] > torch.arange(length)[:, None]
        weights = torch.softmax(scores.masked_fill(hidden, -30000.0), -1)
        made = torch.nn.functional.layer_norm(whole + weights @ whole, (16,))
        gates = torch.sigmoid(made) * torch.tanh(made) + torch.erf(made)
        scale = torch.rsqrt((gates * gates).mean(-1, keepdim=True) + 0.5)
        return [(gates * scale)[:, :, 4:] * 2.0]

    return Case([x], {}, reference, max(length, 16))


def model(case: Case, opset: int = 18, ir_version: int = IR_VERSION) -> onnx.ModelProto:
    """The block as nodes of one opset."""
    kind = TensorProto.FLOAT if case.inputs[0] is not None and case.inputs[0].dtype == torch.float32 else None
    if kind is None:
        raise ValueError("opsets are tried in float32")
    node = helper.make_node
    numbers: dict[str, list[int]] = {
        "one": [1], "zero": [0], "last": [2], "four": [4], "end": [2**31 - 1],
        "shape": [0, -1, 4, 4], "back": [0, -1, 16], "places_of_rows": [0, 1],
    }  # fmt: skip
    constants = [helper.make_tensor(name, TensorProto.INT64, [len(row)], row) for name, row in numbers.items()]
    for name, number in (("start", 0), ("by", 1)):
        constants.append(helper.make_tensor(name, TensorProto.INT64, [], [number]))
    floats = {"quarter": 0.25, "low": -30000.0, "half": 0.5, "two": 2.0, "none": 0.0}
    constants += [helper.make_tensor(name, kind, [], [number]) for name, number in floats.items()]
    constants += [helper.make_tensor(name, kind, [16], [one] * 16) for name, one in (("ones", 1.0), ("zeros", 0.0))]
    branches = [
        helper.make_graph(
            [node("Identity" if same else "Mul", ["sliced"] if same else ["sliced", "two"], [f"branch_{same}"])],
            f"branch_{same}", [], [helper.make_tensor_value_info(f"branch_{same}", kind, None)],
        )
        for same in (False, True)
    ]  # fmt: skip
    nodes = [
        node("Shape", ["input_0"], ["sizes"], start=1, end=2),
        node("Squeeze", ["sizes", "zero"], ["count"]),
        node("Range", ["start", "count", "by"], ["places"]),
        node("Unsqueeze", ["places", "zero"], ["columns"]),
        node("Unsqueeze", ["places", "one"], ["rows"]),
        node("Greater", ["columns", "rows"], ["ahead"]),
        node("Not", ["ahead"], ["seen"]),
        node("And", ["seen", "seen"], ["both"]),
        node("Reshape", ["input_0", "shape"], ["split"]),
        node("Transpose", ["split"], ["turned"], perm=[0, 2, 1, 3]),
        node("Transpose", ["turned"], ["returned"], perm=[0, 2, 1, 3]),
        node("Reshape", ["returned", "back"], ["whole"]),
        node("Transpose", ["whole"], ["key"], perm=[0, 2, 1]),
        node("MatMul", ["whole", "key"], ["product"]),
        node("Mul", ["product", "quarter"], ["scaled"]),
        node("Where", ["both", "scaled", "low"], ["masked"]),
        node("Softmax", ["masked"], ["weights"], axis=-1),
        node("MatMul", ["weights", "whole"], ["mixed"]),
        node("Sum", ["mixed", "whole"], ["residual"]),
        node("LayerNormalization", ["residual", "ones", "zeros"], ["normal"], axis=-1),
        node("Sigmoid", ["normal"], ["gate"]),
        node("Tanh", ["normal"], ["bent"]),
        node("Mul", ["gate", "bent"], ["gated"]),
        node("Erf", ["normal"], ["error"]),
        node("Add", ["gated", "error"], ["gates"]),
        node("Mul", ["gates", "gates"], ["squares"]),
        *(
            [node("ReduceMean", ["squares", "last"], ["mean"], keepdims=1)]
            if opset >= 18
            else [node("ReduceMean", ["squares"], ["mean"], axes=[2], keepdims=1)]
        ),
        node("Add", ["mean", "half"], ["above"]),
        node("Sqrt", ["above"], ["root"]),
        node("Div", ["gates", "root"], ["divided"]),
        node("Cast", ["divided"], ["cast"], to=kind),
        node("Concat", ["cast", "cast"], ["doubled"], axis=0),
        node("Gather", ["doubled", "places_of_rows"], ["gathered"], axis=0),
        node("Expand", ["gathered", "one"], ["expanded"]),
        node("Slice", ["expanded", "four", "end", "last"], ["sliced"]),
        node("GreaterOrEqual", ["none", "two"], ["never"]),
        node("If", ["never"], ["output_0"], then_branch=branches[1], else_branch=branches[0]),
    ]  # fmt: skip
    inputs = [helper.make_tensor_value_info("input_0", kind, [None, None, 16])]
    outputs = [helper.make_tensor_value_info("output_0", kind, None)]
    graph = helper.make_graph(nodes, "tried", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)


def attempts() -> Iterator[Attempt]:
    """All of them."""
    for opset in OPSETS:
        whole = partial(model, opset=opset)
        yield Attempt("", "opset", f"opset {opset}", plain, opset=opset, dtypes=("float32",), whole=whole)
    for version in IR_VERSIONS:
        whole = partial(model, ir_version=version)
        yield Attempt("", "IR version", f"IR version {version}", plain, dtypes=("float32",), whole=whole)
