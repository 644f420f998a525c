"""The operator on a buffer against the Spec, and what is taken into it against the graph as it was."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_ir.passes import common as passes

from attncompile.codegen.onnx.capabilities import IN_PLACE as NAME
from attncompile.codegen.onnx.capabilities import in_place
from attncompile.codegen.onnx.choose import choose, row_named
from attncompile.codegen.onnx.in_place import IN_PLACE, Counted
from attncompile.codegen.onnx.packing import Packed, pack
from attncompile.convert.onnx_rewrite import first_positions
from attncompile.frontends.onnx import onnx_graph
from attncompile.ir import parse_spec
from tests.codegen.test_onnx_cached import FORMS, SIZES, assert_agrees, behind_a_cache, inputs, ungrouped, whole_keys

HEADS, GROUPS, CHANNELS, WIDTH, LONGEST = 4, 2, 16, 24, 64
TAKEN = [sizes for sizes in SIZES if sizes["B"] == 1 or sizes["I"] == 1 or not sizes["P"]]


@pytest.mark.parametrize("grouped", [True, False], ids=["grouped", "single"])
@pytest.mark.parametrize("form", [form for form in FORMS if form not in ("padding", "softcap")])
def test_calls_that_it_takes_equal_the_spec(form: str, grouped: bool) -> None:
    spec = behind_a_cache(form)
    if not grouped:
        if form == "sinks":
            pytest.skip("the form says how heads share")
        spec = ungrouped(spec)
    assert in_place().why_not(spec) is None
    for sizes in TAKEN:
        assert_agrees(spec, in_place(), inputs(spec, sizes, padded=False))


def test_a_soft_cap_equals_the_spec() -> None:
    spec = parse_spec(str(behind_a_cache("softcap")).replace(" and attention_mask[b, j] ≠ 0", ""))
    spec = parse_spec("\n".join(line for line in str(spec).splitlines() if "given" not in line))
    for sizes in TAKEN:
        assert_agrees(spec, in_place(), inputs(spec, sizes, padded=False))


def test_other_calls_are_errors() -> None:
    spec = behind_a_cache("causal")
    with pytest.raises(Exception, match="batch_size must be 1 when sequence_length > 1 and past context is given"):
        assert_agrees(spec, in_place(), inputs(spec, {"B": 3, "I": 4, "P": 7}, padded=False))


def test_it_is_for_a_mask_that_is_causal_and_a_cache() -> None:
    assert "hides nothing else" in str(in_place().why_not(behind_a_cache("padding")))
    square = parse_spec(
        "site   attend  q,k,v[B,4,I,16]  float32\n  score  0.25·s\n  mask   j ≤ i\n  norm   softmax (float32)"
    )
    assert "nothing is cached" in str(in_place().why_not(square))
    assert choose(square, shared=True).row.operator != NAME


def test_it_is_chosen_for_buffers_alone_and_can_be_named() -> None:
    spec = whole_keys()
    assert choose(spec, shared=True).row.operator == row_named(spec, NAME).operator == NAME
    assert choose(spec).row.operator != NAME
    assert choose(spec, prefer="decomposed", shared=True).row.operator == "decomposition"
    assert choose(behind_a_cache("padding"), shared=True).row.operator != NAME


# What is taken into it


def layer(*, biased: bool = False, other: str = "") -> ir.Model:
    """One attention on a buffer behind three projections and two rotary maps.

    Args:
        biased: whether projections have biases.
        other: what is unlike the rest: ``tables`` that depend on all positions, ``key`` of another tensor, ``query``
            read by somebody else, ``step`` of positions 2.
    """
    generator = np.random.default_rng(0)

    def drawn(*shape: int) -> np.ndarray:
        return generator.standard_normal(shape).astype(np.float32) / 4

    sizes = {"q": HEADS * CHANNELS, "k": GROUPS * CHANNELS, "v": GROUPS * CHANNELS}
    stored = {f"{name}_weight": drawn(WIDTH, size) for name, size in sizes.items()}
    stored |= {f"{name}_bias": drawn(size) for name, size in sizes.items()}
    stored["frequencies"] = (100.0 ** -np.linspace(0, 1, CHANNELS // 2)).astype(np.float32)[None]
    stored |= {name: np.asarray(value, dtype=np.int64) for name, value in
               {"one": 2 if other == "step" else 1, "last": [-1], "zero": [0]}.items()}  # fmt: skip
    nodes = [
        helper.make_node("Range", ["past", "total", "one"], ["positions"]),
        helper.make_node("Cast", ["positions"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["numbers", "last"], ["column"]),
        helper.make_node("Mul", ["column", "frequencies"], ["angles"]),
    ]
    angles = "angles"
    if other == "tables":
        nodes += [helper.make_node("ReduceMax", ["angles", "zero"], ["largest"], keepdims=1),
                  helper.make_node("Sub", ["largest", "angles"], ["turned"])]  # fmt: skip
        angles = "turned"
    nodes += [helper.make_node("Cos", [angles], ["cosines"]), helper.make_node("Sin", [angles], ["sines"])]
    for name in sizes:
        source = "y" if other == "key" and name == "k" else "x"
        nodes.append(helper.make_node("MatMul", [source, f"{name}_weight"], [f"{name}_product"]))
        if biased:
            nodes.append(helper.make_node("Add", [f"{name}_product", f"{name}_bias"], [f"{name}_flat"]))
        else:
            nodes.append(helper.make_node("Identity", [f"{name}_product"], [f"{name}_flat"]))
    nodes += [
        helper.make_node("RotaryEmbedding", [f"{name}_flat", "zero", "cosines", "sines"], [f"{name}_turned"],
                         domain="com.microsoft", num_heads=count)
        for name, count in (("q", HEADS), ("k", GROUPS))
    ]  # fmt: skip
    nodes.append(
        helper.make_node(
            "GroupQueryAttention",
            ["q_turned", "k_turned", "v_flat", "past_key", "past_value", "lasts", "count"],
            ["out", "present_key", "present_value"],
            domain="com.microsoft",
            name="attention",
            num_heads=HEADS,
            kv_num_heads=GROUPS,
            scale=0.25,
        )
    )
    cache = ["B", GROUPS, "C", CHANNELS]
    kinds = {"x": ["B", "S", WIDTH], "y": ["B", "S", WIDTH], "past_key": cache, "past_value": cache}
    given = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in kinds.items()]
    given += [helper.make_tensor_value_info(name, TensorProto.INT64, []) for name in ("past", "total")]
    given += [helper.make_tensor_value_info(name, TensorProto.INT32, shape) for name, shape in
              (("lasts", ["B"]), ("count", []))]  # fmt: skip
    outputs = ["out", "present_key", "present_value", *(["q_flat"] if other == "query" else [])]
    graph = helper.make_graph(
        nodes, "layer", given, [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in stored.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model = ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=10))
    passes.IdentityEliminationPass()(model)
    for node in model.graph:
        if node.op_type == "GroupQueryAttention":
            node.meta[IN_PLACE] = Counted(node.inputs[6], node.inputs[1])
    return model


def results(model: ir.Model, batch: int, past: int, length: int) -> list[np.ndarray]:
    generator = torch.Generator().manual_seed(past + length)
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    fed = {name: torch.randn(batch, length, WIDTH, generator=generator).numpy() for name in ("x", "y")}
    fed |= {name: torch.randn(batch, GROUPS, LONGEST, CHANNELS, generator=generator).numpy()
            for name in ("past_key", "past_value")}  # fmt: skip
    fed |= {"past": np.int64(past), "total": np.int64(past + length), "count": np.int32(past + length)}
    fed["lasts"] = np.full(batch, past + length - 1, dtype=np.int32)
    wanted = {entry.name for entry in session.get_inputs()}
    found = session.run(None, {name: np.asarray(value) for name, value in fed.items() if name in wanted})
    return [found[0], *(side[:, :, : past + length] for side in found[1:3])]


def require_reordered(after: np.ndarray, before: np.ndarray) -> None:
    """That two float32 computations differ by what sums in another order do: each by √terms · eps of the size."""
    allowed = 2 * math.sqrt(max(WIDTH, LONGEST)) * np.finfo(np.float32).eps * np.abs(before).max()
    assert np.abs(after - before).max() <= allowed


CALLS = ((1, 0, 1), (2, 0, 9), (1, 11, 5), (3, 20, 1), (1, 0, LONGEST), (1, LONGEST - 1, 1))


@pytest.mark.parametrize("biased", [False, True])
def test_rotary_maps_and_projections_become_one_operator_and_one_product(biased: bool) -> None:
    model = layer(biased=biased)
    assert pack(model, longest=LONGEST, begins=counted) == Packed(2, 3)
    passes.RemoveUnusedNodesPass()(model)
    found = [node.op_type for node in model.graph]
    assert found == ["MatMul", *(["Add"] if biased else []), "GroupQueryAttention"]
    for batch, past, length in CALLS:
        for before, after in zip(results(layer(biased=biased), batch, past, length),
                                 results(model, batch, past, length), strict=True):  # fmt: skip
            require_reordered(after, before)


@pytest.mark.parametrize(
    "other,packed",
    [("tables", Packed(0, 0)), ("step", Packed(0, 0)), ("query", Packed(2, 0)), ("key", Packed(2, 0))],
)
def test_what_is_not_the_same_stays(other: str, packed: Packed) -> None:
    """Tables that no position has by itself, positions that are not counted by one, products of two tensors."""
    model = layer(other=other)
    assert pack(model, longest=LONGEST, begins=counted) == packed
    if other != "step":  # its positions are too few for the queries
        for before, after in zip(results(layer(other=other), 1, 11, 5), results(model, 1, 11, 5), strict=True):
            require_reordered(after, before)


def counted(first: ir.Value, keys: ir.Value, new: ir.Value) -> bool:
    """The proof for the layers above, whose inputs are what their names say."""
    return (first.name, keys.name, new.name) == ("past", "count", "k_turned")


def test_rotary_maps_stay_where_their_first_position_is_not_proven() -> None:
    assert pack(layer(), longest=LONGEST) == Packed(0, 0)
    assert pack(layer(), longest=LONGEST, begins=lambda first, keys, new: False) == Packed(0, 0)


@pytest.mark.parametrize("start,proven", [("0", True), ("1", False)])
def test_a_first_position_is_proven_from_the_sizes_of_the_graph(start: str, proven: bool) -> None:
    model = ir.from_onnx_text(f"""<ir_version: 10, opset_import: ["" : 18]>
        positions (int64[B,S] ids, int64[B,T] mask, float[B,2,S,4] new) => (int64[N] made, float[B,2,S,4] same)
        <int64 one = {{1}}, int64[1] last = {{0}}, int64 more = {{{start}}}> {{
            keys = Shape<start=1, end=2>(mask)
            queries = Shape<start=1, end=2>(ids)
            apart = Sub(keys, queries)
            past = Squeeze(apart, last)
            first = Add(past, more)
            length = Squeeze(queries, last)
            end = Add(first, length)
            made = Range(first, end, one)
            same = Identity(new)
        }}""")
    begins = first_positions(onnx_graph(model))
    values = {value.name: value for node in model.graph for value in (*node.inputs, *node.outputs) if value is not None}
    assert begins is not None
    assert begins(values["first"], values["keys"], values["new"]) is proven
    assert not begins(values["first"], values["queries"], values["new"])


def test_a_model_without_a_largest_position_keeps_its_rotary_maps() -> None:
    assert pack(layer(), begins=counted) == Packed(0, 0)


def test_nodes_of_others_are_left_alone() -> None:
    model = layer()
    for node in model.graph:
        node.meta.pop(IN_PLACE, None)
    assert pack(model, longest=LONGEST, begins=counted) == Packed(0, 0)
