"""A cache in integers: codes there and back, and the operator on codes against attention to what they stand for."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from attncompile.codegen.onnx.stored import (
    Bits,
    Codes,
    caching_nodes,
    codes_of,
    scale_of,
    special_features,
    store_narrow,
    why_not_stored,
)
from attncompile.ir import parse_spec
from attncompile.verify import derive_tolerance

HEADS, GROUPS, CHANNELS, CAPACITY = 4, 2, 16, 48
SPEC = parse_spec(
    "site   attend  q[B,4,I,16]  k,v[B,2,J,16]  float32\n  score  0.25·s\n  mask   j ≤ i + J − I\n"
    "  kv_head h // 2\n  norm   softmax (float32)\n"
)


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_are_half_a_step_off_at_most_and_stay_in_range(bits: Bits) -> None:
    values = drawn(3, GROUPS, 5, CHANNELS)
    codes = Codes(scale_of(np.abs(values).max(axis=(0, 2)), bits), bits)
    kept = codes.encode(values)
    assert (kept.dtype, kept.shape[-1]) == ((np.int8, CHANNELS) if bits == 8 else (np.uint8, CHANNELS // 2))
    steps = codes.scale[None, :, None]
    # the quotient is rounded to float32 before it is rounded to an integer
    assert (np.abs(codes.decode(kept) - values) <= steps * (0.5 + 2 * codes.largest * np.finfo(np.float32).eps)).all()
    beyond = codes.decode(codes.encode(10 * values))
    assert (np.abs(beyond) <= steps * (codes.largest + 1)).all() and (beyond * values >= 0).all()
    assert (scale_of(np.zeros((1, 2)), bits) > 0).all()


def buffered(**attributes: Any) -> ir.Model:
    """One attention on buffers, and nothing else."""
    node = helper.make_node(
        "GroupQueryAttention",
        ["q", "k", "v", "past_key", "past_value", "lasts", "count"],
        ["out", "present_key", "present_value"],
        domain="com.microsoft", num_heads=HEADS, kv_num_heads=GROUPS, scale=0.25, **attributes,
    )  # fmt: skip
    cache = ["B", GROUPS, "C", CHANNELS]
    kinds = {"q": ["B", "S", HEADS * CHANNELS], "k": ["B", "S", GROUPS * CHANNELS], "v": ["B", "S", GROUPS * CHANNELS]}
    given = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in
             (kinds | {"past_key": cache, "past_value": cache}).items()]  # fmt: skip
    given += [helper.make_tensor_value_info(name, TensorProto.INT32, shape) for name, shape in
              (("lasts", ["B"]), ("count", []))]  # fmt: skip
    results = [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)]
    results += [helper.make_tensor_value_info(name, TensorProto.FLOAT, cache)
                for name in ("present_key", "present_value")]  # fmt: skip
    graph = helper.make_graph([node], "layer", given, results)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    return ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=10))


def heads(flat: np.ndarray, count: int) -> np.ndarray:
    return flat.reshape(*flat.shape[:2], count, -1).transpose(0, 2, 1, 3)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("batch,past,length", [(1, 0, 1), (2, 0, 9), (1, 0, 31), (3, 17, 1), (1, 17, 7)])
def test_attention_is_to_what_the_codes_stand_for(bits: Bits, batch: int, past: int, length: int) -> None:
    model, total = buffered(), past + length
    ranges = {name: np.abs(drawn(GROUPS, CHANNELS, seed=seed)) + 2 for seed, name in enumerate(("past_key",
              "past_value"))}  # fmt: skip
    assert store_narrow(model, ranges, bits) == 1
    codes = codes_of(model)
    assert codes.keys() == {"past_key", "past_value", "present_key", "present_value"}
    query = drawn(batch, length, HEADS * CHANNELS, seed=5)
    new = {side: drawn(batch, length, GROUPS * CHANNELS, seed=6 + n) for n, side in enumerate(("key", "value"))}
    before = {side: drawn(batch, GROUPS, CAPACITY, CHANNELS, seed=8 + n) for n, side in enumerate(new)}
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    kept = {side: codes[f"past_{side}"].encode(before[side]) for side in new}
    out, *present = session.run(None, {
        "q": query, "k": new["key"], "v": new["value"], "past_key": kept["key"], "past_value": kept["value"],
        "lasts": np.full(batch, total - 1, dtype=np.int32), "count": np.array(total, dtype=np.int32),
    })  # fmt: skip
    whole = []
    for side, found in zip(new, present, strict=True):
        code = codes[f"past_{side}"]
        wanted = np.concatenate([kept[side][:, :, :past], code.encode(heads(new[side], GROUPS))], axis=2)
        assert np.array_equal(found[:, :, :total], wanted)
        whole.append(torch.from_numpy(code.decode(wanted)))
    tensors = dict(zip("qkv", (torch.from_numpy(heads(query, HEADS).copy()), *whole), strict=True))
    exact, eager = (SPEC.interpret(tensors, kind)[0] for kind in (torch.float64, torch.float32))
    apart = (torch.from_numpy(heads(out, HEADS).copy()).double() - exact).abs().max()
    assert float(apart) <= derive_tolerance(exact, eager, max(total, CHANNELS)).bound


def test_only_caches_that_come_in_and_go_out_are_kept_so() -> None:
    model = buffered()
    assert len(caching_nodes(model)) == 1 and codes_of(model) == {}
    model.graph.outputs.pop()
    assert caching_nodes(model) == []


def test_what_a_node_does_besides_is_looked_up() -> None:
    (node,) = buffered(local_window_size=4, softcap=2.0, do_rotary=1).graph
    assert special_features(node) == ["rotary", "window", "softcap"]
    assert why_not_stored(8, "cpu", "1.31", "float32", special_features(node)) is None
    assert "1.26" in str(why_not_stored(8, "cpu", "1.26", "float32"))
    assert "was not tried" in str(why_not_stored(8, "cpu", "1.31", "float32", ["something else"]))


@pytest.mark.parametrize("element", [np.nan, np.inf])
def test_a_range_that_is_not_finite_is_refused(element: float) -> None:
    ranges = {name: np.ones((GROUPS, CHANNELS), np.float32) for name in ("past_key", "past_value")}
    ranges["past_value"][1, 3] = element
    with pytest.raises(ValueError, match=f"past_value: among the elements that were seen is {element}"):
        store_narrow(buffered(), ranges, 8)
