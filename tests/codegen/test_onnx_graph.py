"""Rewrites of the graph around attention: exact, and only where the structure proves them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from attncompile.codegen.onnx.layouts import Operand, arrange, drop_double_turns, flat_groups, single_groups
from attncompile.codegen.onnx.normalisation import fuse_root_mean_square
from attncompile.codegen.onnx.residuals import sum_residuals
from attncompile.codegen.onnx.rotary import fuse_rotary
from attncompile.codegen.onnx.skips import fuse_skips
from attncompile.codegen.onnx.tidy import raise_opset, suited_opset, tidy, without_kernel
from attncompile.codegen.onnx.values import Builder, dimensions

BATCH, LENGTH, HEADS, CHANNELS = 2, 7, 3, 8
WIDTH = HEADS * CHANNELS
EPS = float(np.finfo(np.float32).eps)
Make = Callable[[Builder, ir.Value], ir.Value]


def infer_shapes(model: ir.Model) -> ir.Model:
    """What an exporter writes down: the shapes between the nodes."""
    return ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(model)))


def model_of(make: Make, shape: tuple[str | int, ...] = ("B", "S", WIDTH), opset: int = 23) -> ir.Model:
    graph = ir.Graph([], [], nodes=[], opset_imports={"": opset, "com.microsoft": 1}, name="test")
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))
    graph.inputs.append(x)
    build = Builder(graph, "m")
    out = make(build, x)
    out.name, out.dtype = "out", ir.DataType.FLOAT
    graph.extend(build.nodes)
    graph.outputs.append(out)
    return infer_shapes(ir.Model(graph, ir_version=10))


def run(model: ir.Model, x: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(["out"], {"x": x})[0]


def state(shape: tuple[int, ...] = (BATCH, LENGTH, WIDTH)) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def assert_same_after(make: Make, rewrite: Callable[[ir.Model], int], count: int) -> ir.Model:
    model = model_of(make)
    before = run(model, state())
    assert rewrite(model) == count
    tidy(model)
    np.testing.assert_allclose(run(model, state()), before, rtol=WIDTH * EPS, atol=WIDTH * EPS)
    return model


def weights(build: Builder, *shape: int) -> ir.Value:
    return build.constant(np.random.default_rng(1).standard_normal(shape), "float32")


def rms(
    build: Builder, x: ir.Value, weight: ir.Value, *, square: str = "Pow", inverse: str = "Reciprocal"
) -> ir.Value:
    two, one = build.constant(2.0, "float32"), build.constant(1.0, "float32")
    squared = build("Pow", x, two) if square == "Pow" else build("Mul", x, x)
    mean = build("ReduceMean", squared, build.constant([-1]), keepdims=1)
    root = build("Sqrt", build("Add", mean, build.constant(1e-5, "float32")))
    if inverse == "Reciprocal":
        return build("Mul", weight, build("Mul", x, build("Reciprocal", root)))
    if inverse == "one over":
        return build("Mul", build("Mul", build("Div", one, root), x), weight)
    return build("Mul", build("Div", x, root), weight)


@pytest.mark.parametrize("square", ["Pow", "Mul"])
@pytest.mark.parametrize("inverse", ["Reciprocal", "one over", "Div"])
def test_every_spelling_of_rms_normalisation(square: str, inverse: str) -> None:
    model = assert_same_after(
        lambda build, x: rms(build, x, weights(build, WIDTH), square=square, inverse=inverse),
        fuse_root_mean_square,
        1,
    )
    assert operators(model) == ["RMSNormalization"]


def test_weight_that_broadcasts_rows_is_left_alone() -> None:
    assert_same_after(lambda build, x: rms(build, x, weights(build, LENGTH, WIDTH)), fuse_root_mean_square, 0)


def test_root_of_another_tensor_is_left_alone() -> None:
    def make(build: Builder, x: ir.Value) -> ir.Value:
        other = build("Neg", x)
        mean = build("ReduceMean", build("Mul", other, other), build.constant([-1]), keepdims=1)
        root = build("Sqrt", build("Add", mean, build.constant(1e-5, "float32")))
        return build("Mul", build("Div", x, root), weights(build, WIDTH))

    assert_same_after(make, fuse_root_mean_square, 0)


def test_old_opset_keeps_the_spelling() -> None:
    model = model_of(lambda build, x: rms(build, x, weights(build, WIDTH)), opset=20)
    assert fuse_root_mean_square(model) == 0
    assert raise_opset(model)
    assert fuse_root_mean_square(model) == 1


def rotary(*, repeat: bool = True, swapped: bool = False, normed: bool = False) -> Make:
    half = CHANNELS // 2

    def make(build: Builder, x: ir.Value) -> ir.Value:
        heads = build("Reshape", x, build.constant([0, 0, HEADS, CHANNELS]))
        heads.shape = ir.Shape(("B", "S", HEADS, CHANNELS))
        if normed:
            heads.dtype = x.dtype
            heads = rms(build, heads, weights(build, CHANNELS))
            heads.shape, heads.dtype = ir.Shape(("B", "S", HEADS, CHANNELS)), x.dtype
        turned = build("Transpose", heads, perm=(0, 2, 1, 3))
        length = build("Squeeze", build("Shape", x, start=1, end=2))
        places = build("Cast", build("Range", build.constant(0), length, build.constant(1)), to=1)
        places = build("Unsqueeze", places, build.constant([0, 2]))
        angles = build("Mul", places, build.constant(0.5 ** np.arange(half), "float32"))
        second = angles if repeat else build("Neg", angles)
        table = build("Concat", angles, second, axis=-1)
        cos = build("Unsqueeze", build("Cos", table), build.constant([1]))
        sin = build("Unsqueeze", build("Sin", table), build.constant([1]))
        cuts = build.constant([0]), build.constant([half]), build.constant([2**62])
        left = build("Slice", turned, cuts[0], cuts[1], build.constant([3]))
        right = build("Slice", turned, cuts[1], cuts[2], build.constant([3]))
        if swapped:
            left, right = right, left
        rotated = build("Concat", build("Neg", right), left, axis=-1)
        return build("Add", build("Mul", turned, cos), build("Mul", rotated, sin))

    return make


def test_rotary_map_becomes_an_operator() -> None:
    assert "RotaryEmbedding" in operators(assert_same_after(rotary(), fuse_rotary, 1))


@pytest.mark.parametrize("near_miss", [rotary(repeat=False), rotary(swapped=True)], ids=["table", "halves"])
def test_near_misses_of_rotary_are_left_alone(near_miss: Make) -> None:
    assert_same_after(near_miss, fuse_rotary, 0)


def post_norm(build: Builder, x: ir.Value) -> ir.Value:
    branch = build("Add", build("MatMul", x, weights(build, WIDTH, WIDTH)), weights(build, WIDTH))
    return build("LayerNormalization", build("Add", branch, x), weights(build, WIDTH), weights(build, WIDTH))


def test_residual_is_one_sum() -> None:
    model = assert_same_after(post_norm, sum_residuals, 1)
    assert operators(model) == ["MatMul", "Sum", "LayerNormalization"]


def test_residual_that_is_read_elsewhere_stays() -> None:
    def make(build: Builder, x: ir.Value) -> ir.Value:
        total = build("Add", x, weights(build, WIDTH))
        normal = build("LayerNormalization", total, weights(build, WIDTH))
        return build("Add", total, normal)

    assert_same_after(make, sum_residuals, 0)


def test_residual_sum_keeps_the_fused_kernel_out(tmp_path: Path) -> None:
    """The reason for the rewrite: remove it once ONNX Runtime no longer fuses, or fuses well."""
    plain, rewritten = model_of(post_norm), model_of(post_norm)
    sum_residuals(rewritten)
    assert "SkipLayerNormalization" in optimised_operators(plain, tmp_path)
    assert "SkipLayerNormalization" not in optimised_operators(rewritten, tmp_path)


def pre_norm(build: Builder, x: ir.Value) -> ir.Value:
    """Two blocks of a decoder: each normalises a sum, which goes on into the next one."""
    total = x
    for _ in range(2):
        total = build("Add", build("MatMul", total, weights(build, WIDTH, WIDTH)), total)
        normal = build("RMSNormalization", total, weights(build, WIDTH), axis=-1, epsilon=1e-3)
        total = build("Add", total, build("MatMul", normal, weights(build, WIDTH, WIDTH)))
    return build("RMSNormalization", total, weights(build, WIDTH), axis=-1, epsilon=1e-6)


def joined(model: ir.Model, **options: str) -> int:
    return fuse_skips(model, "cuda", "1.31", **options)


def test_a_sum_goes_into_the_normalisation_behind_it() -> None:
    model = assert_same_after(pre_norm, joined, 3)
    assert operators(model).count("SkipSimplifiedLayerNormalization") == 3
    assert "RMSNormalization" not in operators(model) and operators(model).count("Add") == 1
    assert [node.attributes.get_float("epsilon") for node in model.graph if "Skip" in node.op_type][:2] == [
        pytest.approx(1e-3), pytest.approx(1e-3)
    ]  # fmt: skip


def broadcast_sum(build: Builder, x: ir.Value) -> ir.Value:
    return build("RMSNormalization", build("Add", x, weights(build, WIDTH)), weights(build, WIDTH), axis=-1)


def no_sum(build: Builder, x: ir.Value) -> ir.Value:
    return build("RMSNormalization", build("Mul", x, x), weights(build, WIDTH), axis=-1)


def sum_of_rows(build: Builder, x: ir.Value) -> ir.Value:
    flat = build("Reshape", x, build.constant([-1, WIDTH]))
    normal = build("RMSNormalization", build("Add", flat, flat), weights(build, WIDTH), axis=-1)
    return build("Reshape", normal, build.constant([BATCH, LENGTH, WIDTH]))


@pytest.mark.parametrize("make", [broadcast_sum, no_sum, sum_of_rows])
def test_other_sums_stay(make: Make) -> None:
    assert_same_after(make, joined, 0)


WEIGHTS: Mapping[str, Callable[[Builder, ir.Value], ir.Value]] = {
    "of one number": lambda build, total: weights(build, 1),
    "with axes of 1": lambda build, total: weights(build, 1, 1, WIDTH),
    "for each position": lambda build, total: weights(build, LENGTH, WIDTH),
    "for each row": lambda build, total: weights(build, BATCH, LENGTH, WIDTH),
    "computed from the sum": lambda build, total: build("ReduceMean", total, build.constant([0, 1]), keepdims=0),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_sum_stays_beside_a_weight_that_the_operator_does_not_take(kind: str) -> None:
    def make(build: Builder, x: ir.Value) -> ir.Value:
        total = build("Add", x, x)
        return build("Add", build("RMSNormalization", total, WEIGHTS[kind](build, total), axis=-1), total)

    assert_same_after(make, joined, 0)


def test_a_sum_stays_beside_a_weight_in_another_type() -> None:
    def make(build: Builder, x: ir.Value) -> ir.Value:
        weight = build.constant(np.ones(WIDTH), "float16")
        return build("Cast", build("RMSNormalization", build("Add", x, x), weight, axis=-1), to=int(ir.DataType.FLOAT))

    assert joined(model_of(make)) == 0


def test_who_reads_a_sum_before_its_normalisation_does_comes_behind_the_operator() -> None:
    def make(build: Builder, x: ir.Value) -> ir.Value:
        total = build("Add", x, x)
        early = build("Neg", total)
        return build("Add", build("RMSNormalization", total, weights(build, WIDTH), axis=-1), early)

    model = model_of(make)
    assert joined(model) == 1
    order = operators(model)
    assert order.index("SkipSimplifiedLayerNormalization") < order.index("Neg")


def test_a_sum_that_is_a_result_stays() -> None:
    model = model_of(lambda build, x: build("Add", x, x))
    total = model.graph.outputs[0]
    build = Builder(model.graph, "more")
    build("RMSNormalization", total, weights(build, WIDTH), axis=-1)
    model.graph.extend(build.nodes)
    assert joined(model) == 0


def test_sums_are_joined_where_that_was_found_right() -> None:
    assert joined(model_of(pre_norm), dtype="float16") == 3
    assert fuse_skips(model_of(pre_norm), "cpu", "1.22", dtype="bfloat16") == 0
    assert tidy(model_of(pre_norm), "cpu").skips == 0
    assert tidy(model_of(pre_norm), "cuda", "1.31").skips == 3


def optimised_operators(model: ir.Model, folder: Path) -> list[str]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    session.run(None, {"x": state()})
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return [event["args"]["op_name"] for event in events if event["name"].endswith("kernel_time")]


def test_double_turn_disappears() -> None:
    def make(build: Builder, x: ir.Value) -> ir.Value:
        heads = build("Reshape", x, build.constant([0, 0, HEADS, CHANNELS]))
        turned = build("Transpose", heads, perm=(0, 2, 1, 3))
        flat = build("Reshape", build("Transpose", turned, perm=(0, 2, 1, 3)), build.constant([0, 0, WIDTH]))
        return build("Relu", flat)

    assert operators(assert_same_after(make, drop_double_turns, 1)) == ["Relu"]


LAYOUTS = [
    flat_groups("bhid"),
    single_groups("bhid"),
    single_groups("bihd"),
    (("b", "h"), ("i",), ("d",)),
    (("i",), ("b",), ("h", "d")),
]


@pytest.mark.parametrize("source", LAYOUTS, ids=str)
@pytest.mark.parametrize("wanted", LAYOUTS, ids=str)
def test_every_layout_from_every_other(
    source: tuple[tuple[str, ...], ...], wanted: tuple[tuple[str, ...], ...]
) -> None:
    sizes = {"b": BATCH, "h": HEADS, "i": LENGTH, "d": CHANNELS}
    whole = state((BATCH, HEADS, LENGTH, CHANNELS))

    def laid_out(groups: tuple[tuple[str, ...], ...]) -> np.ndarray:
        order = ["bhid".index(axis) for group in groups for axis in group]
        return whole.transpose(order).reshape([np.prod([sizes[a] for a in group]) for group in groups])

    def make(build: Builder, x: ir.Value) -> ir.Value:
        lengths = {
            "b": lambda: build.constant([BATCH]),
            "i": lambda: build.constant([LENGTH]),
            "h": HEADS,
            "d": CHANNELS,
        }
        return build("Identity", arrange(build, Operand(x, source), wanted, lengths))

    given = laid_out(source)
    model = model_of(make, (None,) * given.ndim)
    np.testing.assert_array_equal(run(model, np.ascontiguousarray(given)), laid_out(wanted))


def test_output_keeps_its_name_and_shape() -> None:
    model = model_of(lambda build, x: rms(build, x, weights(build, WIDTH)))
    tidy(model)
    assert [value.name for value in model.graph.outputs] == ["out"]
    assert dimensions(model.graph.outputs[0]) == ("B", "S", WIDTH)


def test_an_opset_without_a_kernel_is_not_taken() -> None:
    """ONNX Runtime 1.31 draws random numbers below opset 22 alone."""
    text = """<ir_version: 8, opset_import: ["" : 17]> drawn (float[N] x) => (float[N] z) {
        y = RandomUniformLike(x)
        z = Relu(y)
    }"""
    model = ir.from_onnx_text(text)
    assert without_kernel(model, 23) == ["RandomUniformLike"] and suited_opset(model) == 18
    assert raise_opset(model, suited_opset(model)) and without_kernel(model, 21) == []
    plain = ir.from_onnx_text(text.replace("RandomUniformLike", "Abs"))
    assert without_kernel(plain, 23) == [] and suited_opset(plain) == 23


def test_a_rotary_map_behind_a_norm_of_each_head_takes_flat_operands() -> None:
    model = model_of(rotary(normed=True))
    before = run(model, state())
    assert fuse_root_mean_square(model) == 1 and fuse_rotary(model) == 1
    tidy(model)
    np.testing.assert_allclose(run(model, state()), before, rtol=WIDTH * EPS, atol=WIDTH * EPS)
    (turned,) = (node for node in model.graph if node.op_type == "RotaryEmbedding")
    assert turned.attributes.get_int("num_heads", 0) == HEADS
    assert len(turned.inputs[0].shape) == 3
