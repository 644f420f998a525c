"""Files of the oldest and the newest opset that are taken, with their weights beside them, in and out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import attncompile
from attncompile.convert.runtime import save
from attncompile.plan.schema import load_plan
from tests.onnx_files import assert_clean, operators

WIDTH, HEADS = 64, 4
IR_VERSIONS = {11: 6, 17: 8, 26: 12}


def attentions(opset: int, layers: int = 2) -> onnx.ModelProto:
    """Plain attention under padding, residual sums, no names for people and no value infos."""
    generator = np.random.default_rng(0)
    stored = {"split": np.array([0, 0, HEADS, WIDTH // HEADS]), "flat": np.array([0, 0, WIDTH]),
              "row": np.array([0, 1, 1, -1]), "scale": np.float32(0.25), "one": np.float32(1),
              "low": np.float32(-10000)}  # fmt: skip
    node = helper.make_node
    nodes = [
        node("Cast", ["mask"], ["kept"], to=TensorProto.FLOAT),
        node("Sub", ["one", "kept"], ["hidden"]),
        node("Mul", ["hidden", "low"], ["added"]),
        node("Reshape", ["added", "row"], ["bias"]),
    ]
    x = "x"
    for layer in range(layers):
        heads = {}
        for side, order in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3]), ("o", [])):
            stored[f"{layer}{side}"] = generator.standard_normal((WIDTH, WIDTH)).astype(np.float32) / WIDTH**0.5
            if order:
                heads[side] = f"{layer}{side}.heads"
                nodes += [
                    node("MatMul", [x, f"{layer}{side}"], [f"{layer}{side}.flat"]),
                    node("Reshape", [f"{layer}{side}.flat", "split"], [f"{layer}{side}.split"]),
                    node("Transpose", [f"{layer}{side}.split"], [heads[side]], perm=order),
                ]
        nodes += [
            node("MatMul", [heads["q"], heads["k"]], [f"{layer}.raw"]),
            node("Mul", [f"{layer}.raw", "scale"], [f"{layer}.scaled"]),
            node("Add", [f"{layer}.scaled", "bias"], [f"{layer}.logits"]),
            node("Softmax", [f"{layer}.logits"], [f"{layer}.weights"], axis=3),
            node("MatMul", [f"{layer}.weights", heads["v"]], [f"{layer}.out"]),
            node("Transpose", [f"{layer}.out"], [f"{layer}.turned"], perm=[0, 2, 1, 3]),
            node("Reshape", [f"{layer}.turned", "flat"], [f"{layer}.joined"]),
            node("MatMul", [f"{layer}.joined", f"{layer}o"], [f"{layer}.projected"]),
            node("Add", [x, f"{layer}.projected"], [f"{layer}.x"]),
        ]
        x = f"{layer}.x"
    graph = helper.make_graph(
        nodes, "attentions",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", "S", WIDTH]),
         helper.make_tensor_value_info("mask", TensorProto.INT64, ["B", "S"])],
        [helper.make_tensor_value_info(x, TensorProto.FLOAT, ["B", "S", WIDTH])],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in stored.items()],
    )  # fmt: skip
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=IR_VERSIONS[opset]
    )


def outputs(file: Path) -> np.ndarray:
    generator = np.random.default_rng(1)
    fed = {"x": generator.standard_normal((2, 9, WIDTH)).astype(np.float32), "mask": np.ones((2, 9), dtype=np.int64)}
    fed["mask"][1, 6:] = 0
    return np.asarray(onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]).run(None, fed)[0])


@pytest.mark.parametrize("opset", IR_VERSIONS)
def test_weights_beside_a_file_of_any_opset(opset: int, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    save(onnx_ir.from_proto(attentions(opset)), tmp_path / "in" / "model.onnx", largest=0)
    assert (tmp_path / "in" / "model.onnx.data").stat().st_size >= 8 * 4 * WIDTH**2
    made = attncompile.convert(tmp_path / "in" / "model.onnx", tmp_path / "out")
    assert made.certificate.passed
    file = tmp_path / "out" / "model.onnx"
    assert_clean(tmp_path / "out")
    assert operators(file).count("Attention") == 2
    assert {entry.domain: entry.version for entry in onnx.load(file).opset_import}[""] == max(opset, 23)
    (tmp_path / "beside").mkdir()
    save(onnx_ir.load(file), tmp_path / "beside" / "model.onnx", largest=0)
    before = outputs(tmp_path / "in" / "model.onnx")
    # a logit of 1e4 has a rounding of 1e-3, the same in both
    for after in (file, tmp_path / "beside" / "model.onnx"):
        assert np.abs(outputs(after) - before).max() <= WIDTH * np.finfo(np.float32).eps * np.abs(before).max()
    attncompile.convert(tmp_path / "beside" / "model.onnx", tmp_path / "again")
    sites = load_plan(tmp_path / "again" / "plan.json").sites
    assert [site.operator for site in sites] == ["original"] * 2 and "already" in sites[0].reason
