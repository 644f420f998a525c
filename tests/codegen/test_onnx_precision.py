"""Quantised projections and narrow graphs: which nodes change, which stay, and errors within what rounding gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from attncompile.codegen.onnx.narrow import narrowed
from attncompile.codegen.onnx.quantize import block_weights, dynamic_int8, plain_projections, static_rounding
from attncompile.codegen.onnx.skips import fuse_skips
from attncompile.codegen.onnx.values import Builder
from attncompile.codegen.onnx.widen import widened, without_kernels
from tests.codegen.test_onnx_graph import WIDTH, model_of, operators, pre_norm, run, state, weights

Write = Callable[[Path, Path, tuple[str, ...]], None]
WEIGHT = np.random.default_rng(1).standard_normal((WIDTH, WIDTH)).astype(np.float32)


def feeds() -> list[dict[str, np.ndarray]]:
    return [{"x": state()}]


def step(values: np.ndarray, levels: int) -> float:
    """Distance of two neighbouring levels over the whole range, zero included."""
    return float(max(values.max(), 0) - min(values.min(), 0)) / levels


def bound(weight_step: float, state_step: float) -> np.ndarray:
    """How far a product may be off when every operand is off by up to one step."""
    rows, columns = np.abs(state()).sum(-1, keepdims=True), np.abs(WEIGHT).sum(0)
    return rows * weight_step + columns * state_step + WIDTH * weight_step * state_step


LARGEST_STATE, LARGEST_WEIGHT = float(np.abs(state()).max()), float(np.abs(WEIGHT).max())
SIGNED, UNSIGNED = 127, 255
FORMS: dict[str, tuple[Write, str, np.ndarray]] = {
    "dynamic": (dynamic_int8, "MatMulInteger", bound(LARGEST_WEIGHT / SIGNED, step(state(), UNSIGNED))),
    "static": (
        lambda source, target, names: static_rounding(source, target, names, feeds(), kind="int8"),
        "QuantizeLinear",
        bound(LARGEST_WEIGHT / SIGNED, step(state(), UNSIGNED)),
    ),
    "8 bits": (
        lambda source, target, names: block_weights(source, target, names, bits=8, block=32, symmetric=True),
        "MatMulNBits",
        bound(LARGEST_WEIGHT / SIGNED, LARGEST_STATE / SIGNED),
    ),
    "4 bits": (
        lambda source, target, names: block_weights(source, target, names, bits=4, block=16, symmetric=False),
        "MatMulNBits",
        bound(step(WEIGHT, 15), LARGEST_STATE / SIGNED),
    ),
}


def attention(build: Builder, x: ir.Value) -> ir.Value:
    """Two projections and a product of activations."""
    query, key = build("MatMul", x, build.constant(WEIGHT, "float32")), build("MatMul", x, weights(build, WIDTH, WIDTH))
    return build("MatMul", query, build("Transpose", key, perm=(0, 2, 1)))


@pytest.mark.parametrize("form", FORMS)
def test_projections_are_rounded_and_products_are_not(form: str, tmp_path: Path) -> None:
    write, operator, _ = FORMS[form]
    model = model_of(attention)
    names = plain_projections(model)
    assert len(names) == 2
    for node in model.graph:
        node.metadata_props["attncompile.site"] = node.name or ""
    source, target = tmp_path / "float.onnx", tmp_path / "rounded.onnx"
    ir.save(model, source)
    write(source, target, names)
    onnx.checker.check_model(target)
    made = ir.load(target)
    assert operators(made).count(operator) == (1 if operator == "QuantizeLinear" else 2)
    product = [node for node in made.graph if node.op_type == "MatMul"][-1]
    assert product.metadata_props["attncompile.site"] == product.name
    assert ir.load(source).graph.node(product.name).op_type == "MatMul"


@pytest.mark.parametrize("form", FORMS)
def test_rounding_is_the_only_error(form: str, tmp_path: Path) -> None:
    write, _, allowed = FORMS[form]
    model = model_of(lambda build, x: build("MatMul", x, build.constant(WEIGHT, "float32")))
    names = plain_projections(model)
    ir.save(model, tmp_path / "float.onnx")
    write(tmp_path / "float.onnx", tmp_path / "rounded.onnx", names)
    apart = np.abs(run(ir.load(tmp_path / "rounded.onnx"), state()) - run(model, state()))
    assert apart.max() > 0
    assert (apart <= allowed).all()


@pytest.mark.parametrize("form", FORMS)
def test_a_weight_of_two_projections_is_stored_once(form: str, tmp_path: Path) -> None:
    def make(build: Builder, x: ir.Value) -> ir.Value:
        weight = build.constant(WEIGHT, "float32")
        return build("MatMul", build("Relu", build("MatMul", x, weight)), weight)

    model = model_of(make)
    names = plain_projections(model)
    ir.save(model, tmp_path / "float.onnx")
    FORMS[form][0](tmp_path / "float.onnx", tmp_path / "rounded.onnx", names)
    stored = [tensor.name for tensor in onnx.load(tmp_path / "rounded.onnx").graph.initializer]
    assert len(stored) == len(set(stored))
    assert np.isfinite(run(ir.load(tmp_path / "rounded.onnx"), state())).all()


def test_projections_in_other_words_become_plain() -> None:
    def make(build: Builder, x: ir.Value) -> ir.Value:
        table = build.constant(WEIGHT.T.copy(), "float32")
        rows = build("Reshape", x, build.constant([-1, WIDTH]))
        bias = build.constant(np.ones(WIDTH), "float32")
        first = build("Gemm", rows, build.constant(WEIGHT, "float32"), bias, transB=1)
        return build("MatMul", first, build("Transpose", table, perm=(1, 0)))

    model = model_of(make)
    before = run(model, state())
    assert len(plain_projections(model)) == 2
    assert "Gemm" not in operators(model)
    terms = WIDTH * np.abs(before).max() * np.finfo(np.float32).eps
    np.testing.assert_allclose(run(model, state()), before, rtol=0, atol=terms)


def test_what_scales_its_product_is_no_plain_projection() -> None:
    def make(build: Builder, x: ir.Value) -> ir.Value:
        rows = build("Reshape", x, build.constant([-1, WIDTH]))
        return build("Gemm", rows, build.constant(WEIGHT, "float32"), alpha=0.5)

    model = model_of(make)
    assert plain_projections(model) == ()
    assert operators(model)[-1] == "Gemm"


def test_float8_stands_in_pairs_around_projections(tmp_path: Path) -> None:
    """Its values are looked at without the fusion that ONNX Runtime's CPU cannot run."""
    model = model_of(lambda build, x: build("MatMul", x, build.constant(WEIGHT, "float32")))
    names = plain_projections(model)
    source, target = tmp_path / "float.onnx", tmp_path / "float8.onnx"
    ir.save(model, source)
    static_rounding(source, target, names, feeds(), kind="float8_e4m3")
    onnx.checker.check_model(target)
    made = ir.load(target)
    assert operators(made) == ["DequantizeLinear", "QuantizeLinear", "DequantizeLinear", "MatMul"]
    kinds = {tensor.dtype for tensor in made.graph.initializers.values()}
    assert ir.DataType.FLOAT8E4M3FN in kinds
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.log_severity_level = 3
    loaded = onnxruntime.InferenceSession(str(target), options, providers=["CPUExecutionProvider"])
    found, wanted = loaded.run(None, feeds()[0])[0], run(model, state())
    # three bits of mantissa and saturation at the scale that the distribution gave
    assert np.linalg.norm(found - wanted) < 2.0**-3 * np.linalg.norm(wanted)


# --- float16 and bfloat16 -----------------------------------------------------------------------------------


def over_positions(build: Builder, x: ir.Value) -> ir.Value:
    """Scores of projected states, with angles of positions and a mask that adds the lowest number of float32."""
    length = build("Squeeze", build("Shape", x, start=1, end=2), build.constant([0]))
    positions = build("Cast", build("Range", build.constant(0), length, build.constant(1)), to=1)
    angles = build("Mul", positions, build.constant([0.5], "float32"))
    lowest = build.constant(np.finfo(np.float32).min, "float32")
    late = build("Greater", positions, build.constant(3.0, "float32"))
    hidden = build("Where", late, lowest, build.constant(0.0, "float32"))
    states = build("MatMul", x, build.constant(WEIGHT, "float32"))
    scores = build("MatMul", states, build("Transpose", states, perm=(0, 2, 1)))
    weights = build("Softmax", build("Add", build("Add", scores, build("Sin", angles)), hidden), axis=-1)
    return build("MatMul", weights, states)


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_what_needs_digits_stays_wide(kind: str) -> None:
    model = model_of(over_positions)
    assert narrowed(model, kind) == 4  # type: ignore[arg-type]
    types = {node.op_type: node.outputs[0].dtype for node in model.graph if node.op_type != "Cast"}
    narrow = ir.DataType.FLOAT16 if kind == "float16" else ir.DataType.BFLOAT16
    assert types["MatMul"] is types["Transpose"] is narrow
    wide = ("Mul", "Sin", "Add", "Softmax", "Where")
    assert {types[name] for name in wide} == {ir.DataType.FLOAT}
    assert [value.dtype for value in (*model.graph.inputs, *model.graph.outputs)] == [ir.DataType.FLOAT] * 2
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert model.graph.outputs[0].name == "out"


def test_float16_is_as_near_as_its_digits() -> None:
    model = model_of(over_positions)
    exact = run(model, state())
    narrowed(model, "float16")
    found = run(model, state())
    # scores of 24 terms, rounded in 11 bits, move weights by as much as they move themselves
    states = np.abs(state()) @ np.abs(WEIGHT)
    moved = 2.0**-11 * 3 * float((states @ states.transpose(0, 2, 1)).max())
    assert np.abs(found - exact).max() <= (np.expm1(2 * moved) + 2.0**-10) * states.max()
    assert np.isfinite(found).all()


def test_a_huge_constant_stays_finite_in_float16() -> None:
    def make(build: Builder, x: ir.Value) -> ir.Value:
        lowest = build("Mul", build("Cast", build("Shape", x), to=1), build.constant(-1e30, "float32"))
        smallest = build("ReduceMin", lowest, keepdims=0)
        return build("MatMul", build("Max", x, smallest), build.constant(WEIGHT, "float32"))

    model = model_of(make)
    narrowed(model, "float16")
    assert "Clip" in operators(model)
    assert np.isfinite(run(model, state())).all()


def test_results_that_nobody_reads_do_not_keep_an_operator_wide() -> None:
    """The mean and deviation that a joined normalisation could give are float32 by its specification."""
    model = model_of(pre_norm)
    assert fuse_skips(model, "cuda", "1.31", "float16") == 3
    narrowed(model, "float16")
    assert operators(model).count("Cast") == 2, "of what goes in and comes out"
    reference = run(model_of(pre_norm), state())
    apart = np.linalg.norm(run(model, state()) - reference) / np.linalg.norm(reference)
    assert apart < 8 * 2**-11, "a few roundings in a row"


def test_sizes_are_read_without_a_cast() -> None:
    def make(build: Builder, x: ir.Value) -> ir.Value:
        state = build("MatMul", x, build.constant(WEIGHT, "float32"))
        return build("Reshape", state, build("Shape", state))

    model = model_of(make)
    narrowed(model, "float16")
    (shape,) = [node for node in model.graph if node.op_type == "Shape"]
    producer = shape.inputs[0].producer() if shape.inputs[0] is not None else None
    assert producer is not None and producer.op_type == "MatMul"
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


@pytest.mark.parametrize("keep", [(), ("out",)])
def test_the_cache_is_narrow_and_logits_are_where_it_is_said(keep: tuple[str, ...]) -> None:
    model = model_of(lambda build, x: build("MatMul", x, build.constant(WEIGHT, "float32")))
    past = ir.Value(
        name="past_key_values.0.key", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["B", "P", WIDTH])
    )
    model.graph.inputs.append(past)
    node = ir.node("Concat", [past, model.graph.outputs[0]], attributes={"axis": 1}, name="keys")
    node.outputs[0].name, node.outputs[0].dtype = "present.0.key", ir.DataType.FLOAT
    node.outputs[0].shape = ir.Shape(["B", "T", WIDTH])
    model.graph.append(node)
    model.graph.outputs.append(node.outputs[0])
    narrowed(model, "float16", keep=keep)
    kinds = {value.name: value.dtype for value in (*model.graph.inputs, *model.graph.outputs)}
    assert kinds == {
        "x": ir.DataType.FLOAT,
        "past_key_values.0.key": ir.DataType.FLOAT16,
        "out": ir.DataType.FLOAT16 if keep else ir.DataType.FLOAT,
        "present.0.key": ir.DataType.FLOAT16,
    }
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


def test_bodies_agree_with_what_is_around_them() -> None:
    model = model_of(lambda build, x: build("MatMul", x, build.constant(WEIGHT, "float32")))
    states = model.graph.outputs[0]
    branches = []
    for name, operator in (("then", "Relu"), ("else", "Exp")):  # Exp stays wide
        inner = ir.node(operator, [states], name=name)
        inner.outputs[0].name, inner.outputs[0].dtype = f"{name}.out", ir.DataType.FLOAT
        branches.append(ir.Graph([], [inner.outputs[0]], nodes=[inner], name=name))
    small = ir.node("Less", [model.graph.inputs[0], model.graph.inputs[0]], name="less")
    some = ir.node("ReduceMax", [ir_cast(small, model)], attributes={"keepdims": 0}, name="some")
    asked = ir.node("Cast", [some.outputs[0]], attributes={"to": int(ir.DataType.BOOL)}, name="asked")
    attributes = {"then_branch": branches[0], "else_branch": branches[1]}
    either = ir.node("If", [asked.outputs[0]], attributes=attributes, name="either")
    either.outputs[0].name, states.name = "out", "states"
    for node in (some, asked, either):
        node.outputs[0].name = node.outputs[0].name or f"{node.name}.out"
        model.graph.append(node)
    either.outputs[0].dtype, either.outputs[0].shape = ir.DataType.FLOAT, states.shape
    model.graph.outputs[0] = either.outputs[0]
    small_state = state() / 8  # so that exponentials are numbers of float16
    exact = run(model, small_state)
    narrowed(model, "float16")
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    found = run(model, small_state)
    # one product of 24 terms in 11 bits, and the exponential of it
    moved = 2.0**-11 * 3 * float((np.abs(small_state) @ np.abs(WEIGHT)).max())
    assert np.abs(found - exact).max() <= np.expm1(moved) * np.abs(exact).max() + 2.0**-11 * np.abs(exact).max()


def ir_cast(node: ir.Node, model: ir.Model) -> ir.Value:
    """The truth values of a node as integers, both appended to the model."""
    cast = ir.node("Cast", [node.outputs[0]], attributes={"to": int(ir.DataType.INT32)}, name=f"{node.name}.cast")
    for one in (node, cast):
        one.outputs[0].name = f"{one.name}.out"
        model.graph.append(one)
    return cast.outputs[0]


def test_kernels_that_a_provider_lacks_are_named() -> None:
    model = model_of(over_positions)
    narrowed(model, "bfloat16")
    assert without_kernels(model, "bfloat16", ("CPUExecutionProvider",)) == ["MatMul"]
    model = model_of(lambda build, x: build("Concat", x, weights(build, 2, 7, WIDTH), axis=-1), (2, 7, WIDTH))
    assert narrowed(model, "bfloat16") == 1
    assert without_kernels(model, "bfloat16", ("CPUExecutionProvider",)) == []
    assert without_kernels(model, "bfloat16", ()) == ["Concat"]


CPU = ("CPUExecutionProvider",)


def in_bfloat16(build: Builder, x: ir.Value) -> ir.Value:
    """An island of bfloat16, one of whose results is read twice."""
    first, second = (build("Cast", value, to=int(ir.DataType.BFLOAT16)) for value in (x, weights(build, WIDTH)))
    product = build("Mul", first, second)
    return build("Cast", build("Add", product, build("Mul", product, first)), to=int(ir.DataType.FLOAT))


def test_nodes_without_a_kernel_compute_in_float32_and_are_rounded() -> None:
    """As PyTorch's CPU computes them: the product of two numbers of 8 bits is exact in float32."""
    model = model_of(in_bfloat16)
    assert without_kernels(model, "bfloat16", CPU) == ["Add", "Mul"]
    assert widened(model, "bfloat16", CPU) == 3 and without_kernels(model, "bfloat16", CPU) == []
    assert widened(model, "bfloat16", CPU) == 0
    x, weight = (torch.tensor(array).bfloat16() for array in (state(), stored_weight(model)))
    product = x * weight
    assert np.array_equal(run(model, state()), (product + product * x).float().numpy())


def test_a_node_that_has_no_kernel_in_float32_either_stays() -> None:
    model = model_of(in_bfloat16)
    before = operators(model)
    assert widened(model, "bfloat16", ()) == 0 and operators(model) == before


def stored_weight(model: ir.Model) -> np.ndarray:
    """The only weight of a model."""
    (value,) = (each for each in model.graph.initializers.values() if each.const_value is not None)
    return np.asarray(value.const_value.numpy())
