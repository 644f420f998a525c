"""``MultiHeadAttention`` of ONNX Runtime with a bias, a past or packed operands: defined as its kernel computes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import helper
from onnx.reference import ReferenceEvaluator

from attncompile.convert.onnx_rewrite import rewrite_onnx
from attncompile.frontends.onnx import onnx_graph
from attncompile.frontends.onnx_contrib import CONTRIB
from attncompile.frontends.onnx_definitions import spell_out_contrib
from attncompile.frontends.onnx_multi_head import INPUTS
from attncompile.lift import lift_graph
from attncompile.passes import parse_passes
from tests.frontends.onnx_reference import parsed
from tests.frontends.test_onnx_projected import assert_lifted_and_put_back, infos

HEADS, CHANNELS, NARROW = 3, 8, 4
WIDTH = HEADS * CHANNELS
SIZES = {"B": 2, "S": 5, "L": 7, "P": 3, "T": 8}
"""Rows, queries, keys of another sequence, past keys, past keys with those of the queries."""

PAST = ("B", HEADS, "P", CHANNELS)
LATER = {"unidirectional": 1}


@dataclass(frozen=True)
class Call:
    """One call.

    Attributes:
        name: what is special about it.
        shapes: of its inputs, by their names, beside queries, keys and values ``[B, S, n·D]``.
        settings: its attributes, beside the number of heads.
        present: whether keys and values are outputs. opset: of the model.
        says: parts of the Spec.
    """

    name: str
    shapes: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    settings: Mapping[str, object] = field(default_factory=dict)
    present: bool = False
    opset: int = 17
    says: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name

    def given(self) -> dict[str, tuple[object, ...]]:
        """Shapes of all inputs."""
        rows = ("B", "S", WIDTH)
        return {"query": rows} | ({} if "packed" in self.name else {"key": rows, "value": rows}) | dict(self.shapes)

    def model(self) -> onnx.ModelProto:
        given = self.given()
        reads = [name if name in given else "" for name in INPUTS]
        while not reads[-1]:
            reads.pop()
        value = given.get("value", given.get("key", given["query"]))
        width = value[-1] if len(value) == 3 else WIDTH
        makes: dict[str, list[object]] = {"out": ["B", "S", width]}
        if self.present:
            makes |= {"present_key": [None] * 4, "present_value": [None] * 4}
        settings = {"num_heads": HEADS, **self.settings}
        node = helper.make_node("MultiHeadAttention", reads, list(makes), "call", domain=CONTRIB, **settings)
        kinds = {name: 6 if name == "key_padding_mask" else 1 for name in given}
        graph = helper.make_graph(
            [node], "g", [helper.make_tensor_value_info(n, kinds[n], shape) for n, shape in given.items()],
            [helper.make_tensor_value_info(name, 1, shape) for name, shape in makes.items()],
        )  # fmt: skip
        imports = [helper.make_opsetid("", self.opset), helper.make_opsetid(CONTRIB, 1)]
        return helper.make_model(graph, opset_imports=imports, ir_version=8)

    def feeds(self) -> dict[str, np.ndarray]:
        random, made = np.random.default_rng(2), {}
        for name, shape in self.given().items():
            sizes = [SIZES[size] if isinstance(size, str) else size for size in shape]
            made[name] = random.standard_normal(sizes).astype(np.float32)  # type: ignore[arg-type]
            if name == "key_padding_mask" and len(sizes) > 1:
                made[name] = (random.random(sizes) < 0.6).astype(np.int32)  # type: ignore[arg-type]
            elif name == "key_padding_mask":
                made[name] = np.array([4, 2], np.int32)
        return made


OTHER = {"key": ("B", "L", WIDTH), "value": ("B", "L", WIDTH)}
CACHED = {"past_key": PAST, "past_value": PAST}
BIAS = {"bias": (3 * WIDTH,)}
# fmt: off
CALLS = (
    Call("bias", BIAS, says=("0.35355",)),
    Call("bias of an old operator set", BIAS, opset=11),
    Call("bias of a new operator set", BIAS, opset=23),
    Call("bias, another sequence", BIAS | OTHER, says=("k,v[B,3,J,8]",)),
    Call("bias, causal", BIAS, LATER, says=("j ≤ i",)),
    Call("bias, padding", BIAS | {"key_padding_mask": ("B", "S")}, {"mask_filter_value": -30.0},
         says=("key_padding_mask[b, j]", "30")),
    Call("bias, added", BIAS | {"attention_bias": (1, HEADS, "S", "S")}, says=("attention_bias[0, h, i, j]",)),
    Call("bias, narrow values", {"bias": (2 * WIDTH + HEADS * NARROW,), "value": ("B", "S", HEADS * NARROW)}),
    Call("scale", BIAS, {"scale": 0.5}, says=("0.5·s",)),
    Call("lengths", {"key_padding_mask": ("B",)}, says=("j < key_padding_mask[b]",)),
    Call("padding by query", {"key_padding_mask": ("B", "S", "S")}, says=("key_padding_mask[b, i, j]",)),
    Call("present", present=True),
    Call("past", CACHED, present=True),
    Call("past, bias, causal", CACHED | BIAS, LATER, present=True, says=("j ≤ i",)),
    Call("past, padding", CACHED | {"key_padding_mask": ("B", "T")}, present=True, says=("key_padding_mask[b, j]",)),
    Call("past, causal, added", CACHED | {"attention_bias": ("B", 1, "S", "T")}, LATER, present=True,
         says=("attention_bias[b, 0, i, j]",)),
)
PACKED = (
    Call("all packed", {"query": ("B", "S", HEADS, 3, CHANNELS)}, says=("q,k,v[B,3,I,8]",)),
    Call("keys and values packed", {"key": ("B", "L", HEADS, 2, CHANNELS)}, says=("k,v[B,3,J,8]",)),
)
# fmt: on


def run(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """By ONNX Runtime's kernels, with its optimisations off."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    written = model.SerializeToString()
    return onnxruntime.InferenceSession(written, options, providers=["CPUExecutionProvider"]).run(None, feeds)


def assert_alike(found: list[np.ndarray], wanted: list[np.ndarray]) -> None:
    assert len(found) == len(wanted)
    for mine, theirs in zip(found, wanted, strict=True):
        # both round to float32: scores of CHANNELS products of a few units, and sums of as many values as keys
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=CHANNELS * 16 * float(np.finfo(np.float32).eps))


def defined(written: onnx.ModelProto) -> ir.Model:
    """The model with the definitions of its calls in their places."""
    model = ir.from_proto(written)
    assert spell_out_contrib(model, infos(model))
    assert not any(node.domain for node in model.graph)
    return model


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_a_definition_is_what_the_kernel_computes(call: Call) -> None:
    found = ReferenceEvaluator(ir.to_proto(defined(call.model()))).run(None, call.feeds())
    assert_alike(found, run(call.model(), call.feeds()))


@pytest.mark.parametrize("call", PACKED, ids=str)
def test_packed_operands_are_those_side_by_side(call: Call) -> None:
    """No kernel for a CPU takes them: the call with its operands apart says what they mean."""
    given = call.feeds()
    packed = given.get("key", given["query"])
    parts = [packed[:, :, :, n].reshape(*packed.shape[:2], WIDTH) for n in range(packed.shape[3])]
    feeds = dict(zip(INPUTS, parts if len(parts) == 3 else [given["query"], *parts], strict=False))
    apart = Call("apart", {name: ("B", array.shape[1], WIDTH) for name, array in feeds.items()})
    found = ReferenceEvaluator(ir.to_proto(defined(call.model()))).run(None, call.feeds())
    assert_alike(found, run(apart.model(), feeds))


@pytest.mark.parametrize("call", [call for call in (*CALLS, *PACKED) if call.says], ids=str)
def test_a_call_is_lifted_and_goes_back(call: Call) -> None:
    assert_lifted_and_put_back(call.model(), call.says)


@pytest.mark.parametrize("prefer", ["fastest", "fused", "decomposed"])
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_what_takes_its_place_computes_the_same(call: Call, prefer: str) -> None:
    model = ir.from_proto(call.model())
    (outcome,) = rewrite_onnx(model, "m", parse_passes("fuse"), "cpu", prefer, False, ()).outcomes  # type: ignore[arg-type]
    assert outcome.site.status == "lifted"
    assert_alike(run(ir.to_proto(model), call.feeds()), run(call.model(), call.feeds()))


TEXT = """g (float[B,S,24] q, float[B,S,24] k, float[B,S,24] v, float[72] b, float[B,3,P,8] p, int32[N] three,
           int32[1] n, float[B,3,P,8] past, float[B,3,L,8] c, float[B,L,3,2,8] kv, float[B,S,25] odd,
           float[B,S,48] wide, int32[B,1,S,S] m) => (y)
    { y = com.microsoft.MultiHeadAttention<num_heads=3>(ARGS) }"""


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("q, k, v, , , , p, p, n", "past_sequence_length"),
        ("q, k, v, , , , p", "a past key and no past value"),
        ("q, c, c, b", "a bias for operands that are packed, or heads already"),
        ("q, kv, , b", "a bias for operands that are packed, or heads already"),
        ("q, c, c, , , , p, p", "past keys beside keys that are a cache"),
        ("odd, k, v, b", "the channels of its query (25) are no multiple of 3 heads"),
        ("wide, k, v, b", "its queries have 16 channels a head, its keys 8"),
        ("q, k, v, , , , past, past", "no outputs for the present ones"),
        ("q, k, v, b, three", "its mask has N numbers for B rows"),
        ("q, k", "its operands have 3, 3, 0 axes"),
        ("q, k, v, b, m", "its mask has 4 axes"),
    ],
)
def test_a_call_that_is_not_defined_says_why(arguments: str, reason: str) -> None:
    (site,) = lift_graph(onnx_graph(parsed(TEXT.replace("ARGS", arguments), 17))).sites
    assert site.status == "refused" and site.refusal is not None
    assert reason in site.refusal.reason and site.refusal.hint


@pytest.mark.parametrize("arguments", ["q, k, v", "q, k, v, b"])
def test_a_causal_call_over_another_sequence_is_refused(arguments: str) -> None:
    """ONNX Runtime's kernel then shows one query all keys, and several of them some that come later."""
    text = f"""g (float[B,S,24] q, float[B,L,24] k, float[B,L,24] v, float[72] b) => (y)
        {{ y = com.microsoft.MultiHeadAttention<num_heads=3, unidirectional=1>({arguments}) }}"""
    (site,) = lift_graph(onnx_graph(parsed(text, 17))).sites
    assert site.refusal is not None and "it is causal" in site.refusal.reason
