"""``GroupQueryAttention`` of ONNX Runtime: defined as its kernel computes it, lifted, and put back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import helper
from onnx.reference import ReferenceEvaluator

from attncompile.convert.onnx_rewrite import rewrite_onnx
from attncompile.frontends.onnx import onnx_graph
from attncompile.frontends.onnx_contrib import CONTRIB
from attncompile.frontends.onnx_evaluate import OnnxEvaluator
from attncompile.frontends.onnx_group_query import INPUTS
from attncompile.lift import lift_graph
from attncompile.passes import parse_passes
from attncompile.verify import derive_tolerance
from tests.frontends.onnx_reference import parsed
from tests.frontends.test_onnx_multi_head import defined, run
from tests.frontends.test_onnx_projected import assert_lifted_and_put_back

HEADS, GROUPS = 6, 2
CHANNELS, TURNED = 8, 16
"""Channels of a head; the kernel turns heads of 16 only."""

ANGLES = 24
"""Positions that angles are given for."""

WHOLE = ("seqlens_k", "total_sequence_length", "position_ids")


@dataclass(frozen=True)
class Call:
    """One call.

    Attributes:
        name: what is special about it.
        lengths: keys of each row, with the new ones.
        queries: new positions. past: what the cache has room for; ``None`` without one.
        more: shapes of further inputs. settings: attributes beside the numbers of heads.
        total: the longest row, where it is not the longest of these. channels: of a head.
        packed: whether queries, keys and values are one tensor. says: parts of the Spec.
    """

    name: str
    lengths: tuple[int, ...]
    queries: int
    past: int | None = None
    more: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    settings: Mapping[str, object] = field(default_factory=dict)
    total: int = 0
    channels: int = CHANNELS
    packed: bool = False
    says: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name

    @property
    def keys(self) -> int:
        """``total_sequence_length``."""
        return self.total or max(self.lengths)

    def feeds(self) -> dict[str, np.ndarray]:
        random, rows = np.random.default_rng(3), len(self.lengths)
        widths = {"query": HEADS, "key": GROUPS, "value": GROUPS}
        if self.packed:
            widths = {"query": HEADS + 2 * GROUPS}
        shapes = {name: (rows, self.queries, heads * self.channels) for name, heads in widths.items()}
        if self.past is not None:
            shapes |= dict.fromkeys(("past_key", "past_value"), (rows, GROUPS, self.past, self.channels))
        made = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
        made["seqlens_k"] = np.array(self.lengths, np.int32) - 1
        made["total_sequence_length"] = np.array(self.keys, np.int32)
        for name, shape in self.more.items():
            if name == "position_ids":
                made[name] = random.integers(0, ANGLES - self.queries, shape)
            else:
                made[name] = random.standard_normal(shape).astype(np.float32)
        if "hidden row" in self.name:
            made["attention_bias"][:, :, 1] = -np.inf
        return {name: made[name] for name in INPUTS if name in made}

    def model(self) -> onnx.ModelProto:
        """One node, over axes with names."""
        feeds = self.feeds()
        reads = [name if name in feeds else "" for name in INPUTS]
        while not reads[-1]:
            reads.pop()
        made: dict[str, list[object]] = {"out": ["B", "S", HEADS * self.channels]}
        made |= {name: ["B", GROUPS, None, self.channels] for name in ("present_key", "present_value")}
        settings = {"num_heads": HEADS, "kv_num_heads": GROUPS, **self.settings}
        node = helper.make_node("GroupQueryAttention", reads, list(made), "call", domain=CONTRIB, **settings)
        inputs = []
        for name, array in feeds.items():
            axes = [_named(name, axis, size) for axis, size in enumerate(array.shape)]
            inputs.append(helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), axes))
        results = [helper.make_tensor_value_info(name, 1, shape) for name, shape in made.items()]
        imports = [helper.make_opsetid("", 17), helper.make_opsetid(CONTRIB, 1)]
        return helper.make_model(
            helper.make_graph([node], "g", inputs, results), opset_imports=imports, ir_version=8
        )

    def stated(self, results: list[np.ndarray]) -> list[np.ndarray]:
        """What the kernel computes by a rule: queries and keys within the length of their row."""
        out, *present = results
        kept = [np.concatenate([row[: max(length, 0)] for row, length in zip(out, self.lengths, strict=True)])]
        for side in present:
            kept.append(np.concatenate([row[:, :n].reshape(-1) for row, n in zip(side, self.lengths, strict=True)]))
        return kept


def _named(name: str, axis: int, size: int) -> int | str:
    """What a model calls an axis: numbers of heads and channels, and axes of size 1 of a bias, are numbers."""
    named = {
        "past_key": "B P ", "past_value": "B P ", "cos_cache": "A ", "sin_cache": "A ", "head_sink": " ",
        "total_sequence_length": "", "attention_bias": "B ST" if size > 1 else "  S ",
    }  # fmt: skip
    letter = named.get(name, "BS ")[axis]
    return size if letter == " " else letter


def turning(*rows: int, ids: tuple[int, int] | None = None, half: int = TURNED // 2) -> dict[str, tuple[int, ...]]:
    """Shapes of the inputs of a call that turns."""
    angles = {"cos_cache": (ANGLES, half), "sin_cache": (ANGLES, half)}
    return angles | ({"position_ids": ids} if ids else {})


PROMPT = {"lengths": (5, 5), "queries": 5}
RAGGED = {"lengths": (5, 2, 4), "queries": 5}
STEP = {"lengths": (7, 4, 1), "queries": 1, "past": 6}
SEVERAL = {"lengths": (10,), "queries": 4, "past": 6}
BUFFER = {"lengths": (7, 4, 1), "queries": 1, "past": 12}
TURN = {"do_rotary": 1}
PAIRS = {"do_rotary": 1, "rotary_interleaved": 1}
# fmt: off
CALLS = (
    Call("prompt", **PROMPT, says=("j ≤ i", "0.35355", "h // 3", "empty rows zero")),
    Call("prompt, rows of different lengths", **RAGGED, says=("j ≤ i",)),
    Call("prompt, empty cache", **RAGGED, past=0),
    Call("prompt, buffer", **RAGGED, past=9),
    Call("step", **STEP, says=("seqlens_k[b]",)),
    Call("step, longer total", (5, 4), 1, 6, total=7),
    Call("step, buffer", **BUFFER),
    Call("several", **SEVERAL, says=("seqlens_k[b]",)),
    Call("several, buffer", (10,), 4, 15),
    Call("several behind fewer keys than there is room for", (8,), 4, 6, total=10),
    Call("packed", **PROMPT, packed=True),
    Call("packed, several", **SEVERAL, packed=True),
    Call("scale", **SEVERAL, settings={"scale": 0.75}, says=("0.75·s",)),
    Call("window, prompt", **PROMPT, settings={"local_window_size": 3}, says=("j > i − 3",)),
    Call("window, several", **SEVERAL, settings={"local_window_size": 3}),
    Call("window, steps", **STEP, settings={"local_window_size": 3}),
    Call("soft cap", **SEVERAL, settings={"softcap": 0.5}, says=("tanh",)),
    Call("sinks", **STEP, more={"head_sink": (HEADS,)}, says=("head_sink[h]",)),
    Call("sinks, window, soft cap", **SEVERAL, more={"head_sink": (HEADS,)},
         settings={"local_window_size": 4, "softcap": 2.0}),
    Call("smooth softmax", **SEVERAL, settings={"smooth_softmax": 1}, says=("sink",)),
    Call("sinks and smooth softmax", **SEVERAL, more={"head_sink": (HEADS,)}, settings={"smooth_softmax": 1}),
    Call("bias", **SEVERAL, more={"attention_bias": (1, HEADS, 4, 10)}, says=("attention_bias[0, h, i, j]",)),
    Call("bias, rows", **STEP, more={"attention_bias": (3, 1, 1, 7)}),
    Call("bias, buffer", **BUFFER, more={"attention_bias": (3, HEADS, 1, 7)}),
    Call("bias, soft cap", **SEVERAL, more={"attention_bias": (1, 1, 4, 10)}, settings={"softcap": 0.5}),
    Call("bias, hidden row", **SEVERAL, more={"attention_bias": (1, 1, 4, 10)}),
    Call("bias, hidden row, soft cap", **SEVERAL, more={"attention_bias": (1, 1, 4, 10)}, settings={"softcap": 0.5}),
    Call("bias, hidden row, sinks", **SEVERAL, more={"attention_bias": (1, 1, 4, 10), "head_sink": (HEADS,)}),
    Call("both sides", **RAGGED, settings={"causal": 0}, says=("seqlens_k[b]",)),
    Call("both sides, several", **SEVERAL, settings={"causal": 0}),
    *(Call(f"{how}, {name}", **rows, more=turning(), settings=turn, channels=TURNED)
      for how, turn in (("halves", TURN), ("pairs", PAIRS))
      for name, rows in {"prompt": RAGGED, "step": STEP, "several": SEVERAL, "buffer": BUFFER}.items()),
    *(Call(f"{how}, position_ids, {name}", **rows, settings=turn, channels=TURNED,
           more=turning(ids=(len(rows["lengths"]), rows["queries"])))
      for how, turn in (("halves", TURN), ("pairs", PAIRS))
      for name, rows in {"prompt": PROMPT, "step": STEP, "several": SEVERAL}.items()),
    Call("halves, position_ids, prompt in a buffer", **PROMPT, past=8, settings=TURN, channels=TURNED,
         more=turning(ids=(2, 5))),
    Call("halves of some channels", **SEVERAL, more=turning(half=8), settings=TURN, channels=32),
    Call("pairs of some channels, packed", **SEVERAL, more=turning(half=8), settings=PAIRS, channels=32, packed=True),
    Call("halves, packed, window, sinks", **STEP, more=turning() | {"head_sink": (HEADS,)},
         settings=TURN | {"local_window_size": 3}, channels=TURNED, packed=True),
)
# fmt: on


def assert_alike(call: Call, found: list[np.ndarray], wanted: list[np.ndarray], exact: list[np.ndarray]) -> None:
    """Results are as near as two orders of summing are, by the error of the kernel itself."""
    assert len(found) == len(wanted) == len(exact)
    for mine, theirs, truth in zip(*map(call.stated, (found, wanted, exact)), strict=True):
        assert mine.shape == theirs.shape
        plain, reference = torch.from_numpy(mine), torch.from_numpy(truth)
        bound = derive_tolerance(reference, plain, max(call.keys, call.channels)).bound
        np.testing.assert_allclose(theirs, mine, rtol=0, atol=bound)


def exact(call: Call, feeds: Mapping[str, np.ndarray] | None = None) -> list[np.ndarray]:
    """What the definition says in float64, of the call's own inputs or of others."""
    model = ir.from_proto(call.model())
    graph = onnx_graph(model)  # values that follow from sizes are computed too
    assert not any(node.domain for node in model.graph)
    given = {name: torch.from_numpy(array) for name, array in (feeds or call.feeds()).items()}
    assert isinstance(graph.evaluate, OnnxEvaluator)
    made = replace(graph.evaluate, known={}, _producers={})(graph.outputs, given, {})
    return [made[name].numpy() for name in graph.outputs]


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_a_definition_is_what_the_kernel_computes(call: Call) -> None:
    found = ReferenceEvaluator(ir.to_proto(defined(call.model()))).run(None, call.feeds())
    assert_alike(call, found, run(call.model(), call.feeds()), exact(call))


@pytest.mark.parametrize("call", [call for call in CALLS if call.says], ids=str)
def test_a_call_is_lifted_and_goes_back(call: Call) -> None:
    assert_lifted_and_put_back(call.model(), call.says)


PLACED = [(call, "decomposed") for call in CALLS] + [(call, "fused") for call in CALLS if call.says]


@pytest.mark.parametrize(("call", "prefer"), PLACED, ids=str)
def test_what_takes_its_place_computes_the_same(call: Call, prefer: str) -> None:
    model = ir.from_proto(call.model())
    (outcome,) = rewrite_onnx(model, "m", parse_passes("fuse"), "cpu", prefer, False, ()).outcomes  # type: ignore[arg-type]
    assert outcome.site.status == "lifted"
    assert_alike(call, run(ir.to_proto(model), call.feeds()), run(call.model(), call.feeds()), exact(call))


TEXT = """g (float[B,S,48] q, float[B,S,16] k, float[B,S,16] v, float[B,2,P,8] p, float[B,2,R,8] r, int32[B] n, int32 t,
           float[A,4] c, float[A,6] wide, float[A,H] half, int64[B,S] at, float[6] w, float[1] one, float[8] norm,
           float[B,S,55] odd, float[B,S,32] k16, int8[B,2,P,8] codes, double[B,S,48] dq) => (OUT)
    { MADE = com.microsoft.GroupQueryAttention<num_heads=6, kv_num_heads=2SET>(ARGS) }"""


@pytest.mark.parametrize(
    ("arguments", "settings", "made", "reason"),
    [
        ("q, k, v, p, p, n, t", "", "y", "past keys, and no outputs for the present ones"),
        ("q, k, v, p, p, n, t", "", "y, pk", "past keys, and no outputs for the present ones"),
        ("q, k, v, p, , n, t", "", "y, pk, pv", "it has past_key and no past_value"),
        ("q, k, , p, p, n, t", "", "y, pk, pv", "it has key and no value"),
        ("q, k, v, p, p, , t", "", "y, pk, pv", "it has no seqlens_k"),
        ("q, k, v, codes, codes, n, t, , , , , , one, one", "", "y, pk, pv", "a cache in integers (k_scale)"),
        ("q, k, v, p, p, n, t", ', k_quant_type="PER_TENSOR"', "y, pk, pv", "k_quant_type says"),
        ("q, k, v, p, p, n, t", ", kv_cache_bit_width=8", "y, pk, pv", "kv_cache_bit_width is set"),
        ("q, k, v, p, p, n, t, , , , , , , , norm, norm", "", "y, pk, pv", "a norm of queries and keys"),
        ("q, k, v, p, p, n, t", ", sliding_window_cache=1, local_window_size=3", "y, pk, pv", "sliding_window_cache"),
        ("q, k, v, p, p, n, t", ", qk_output=1", "y, pk, pv, s", "qk_output is set"),
        ("q, k, v, p, p, n, t", ", local_window_size=0", "y, pk, pv", "a window of no keys"),
        ("q, k, v, p, p, n, t", ", causal=0, local_window_size=2", "y, pk, pv", "it has a window and is not causal"),
        ("q, k, v, p, p, n, t", ", do_rotary=1", "y, pk, pv", "it has no angles"),
        ("q, k, v, p, p, n, t, c", ", do_rotary=1", "y, pk, pv", "it has cos_cache and no sin_cache"),
        ("q, k, v, p, p, n, t, wide, wide", ", do_rotary=1", "y, pk, pv", "of 6 channels, where a head has 8"),
        ("q, k, v, p, p, n, t, half, half", ", do_rotary=1", "y, pk, pv", "of H channels, where a head has 8"),
        ("odd, , , p, p, n, t", "", "y, pk, pv", "the channels of its query (55) are no multiple of 10 heads"),
        ("q, k16, k16, p, p, n, t", "", "y, pk, pv", "[8, 16] channels a head"),
        ("dq, k, v, p, p, n, t", "", "y, pk, pv", "dq is float64"),
        ("t, , , p, p, n, t", "", "y, pk, pv", "its query has 0 axes, where it should have 3"),
        ("p, k, v, p, p, n, t", "", "y, pk, pv", "its query has 4 axes, where it should have 3"),
    ],
)
def test_a_call_that_is_not_defined_says_why(arguments: str, settings: str, made: str, reason: str) -> None:
    text = TEXT.replace("OUT", made.removesuffix(", s")).replace("MADE", made)
    (site,) = lift_graph(onnx_graph(parsed(text.replace("SET", settings).replace("ARGS", arguments), 17))).sites
    assert site.status == "refused" and site.refusal is not None
    assert reason in site.refusal.reason and site.refusal.hint


def test_heads_that_do_not_share_evenly_are_refused() -> None:
    text = TEXT.replace("OUT", "y").replace("MADE", "y").replace("SET", "").replace("num_heads=6", "num_heads=5", 1)
    (site,) = lift_graph(onnx_graph(parsed(text.replace("ARGS", "q, k, v, , , n, t"), 17))).sites
    assert site.refusal is not None and "5 query heads, which 2 heads of keys do not share" in site.refusal.reason


def test_a_definition_needs_the_operator_set_that_gathers_behind_common_axes() -> None:
    text = TEXT.replace("OUT", "y").replace("MADE", "y").replace("SET", "").replace("ARGS", "q, k, v, , , n, t")
    (site,) = lift_graph(onnx_graph(parsed(text, 11))).sites
    assert site.refusal is not None and "defined for opset 12 and later" in site.refusal.reason


COMPOUND = [call for call in CALLS if call.name in ("step", "several, buffer", "packed", "halves, prompt", "sinks")]


@pytest.mark.parametrize("call", COMPOUND, ids=str)
def test_a_call_that_does_more_than_attend_stays_one(call: Call) -> None:
    """Nothing that would stand in its place was measured with a cache, layouts or rotary maps of its own."""
    model = ir.from_proto(call.model())
    (outcome,) = rewrite_onnx(model, "m", parse_passes("fuse"), "cpu", "fastest", False, ()).outcomes
    assert outcome.operator == "original" and "it stays GroupQueryAttention" in outcome.reason
    assert [node.op_type for node in model.graph] == ["GroupQueryAttention"]


WINDOW, FIRST = 3, 1
CACHED = [call for call in CALLS if call.name in ("step", "step, buffer", "several", "prompt, buffer")]


@pytest.mark.parametrize("call", CACHED, ids=str)
def test_a_window_counts_from_where_each_query_is(call: Call) -> None:
    """Rows of different length, and buffers with room behind their keys: no query stands at the end of them."""
    model, feeds = ir.from_proto(call.model()), call.feeds()
    requested = parse_passes(f"sparsify.window(size={WINDOW}, sinks={FIRST})")
    (outcome,) = rewrite_onnx(model, "m", requested, "cpu", "fastest", False, ()).outcomes
    assert outcome.operator != "original", outcome.reason
    past = np.maximum(0, feeds["seqlens_k"] + 1 - call.queries)
    own = (past[:, None] + np.arange(call.queries))[:, None, :, None]
    keys = np.arange(call.keys)
    hidden = (keys <= own - WINDOW) & (keys >= FIRST)
    added = replace(call, more={"attention_bias": hidden.shape})
    biased = {**feeds, "attention_bias": np.where(hidden, -np.inf, 0).astype(np.float32)}
    assert_alike(call, run(ir.to_proto(model), feeds), run(added.model(), biased), exact(added, biased))


BRANCHES = """g (float[B,S,48] q, float[B,S,16] k, float[B,S,16] v, int32[B] n, int32 t, bool c) => (float[B,S,48] y) {
    y = If (c) <
        then_branch = one () => (float[B,S,48] a) {
            a = com.microsoft.GroupQueryAttention<num_heads=6, kv_num_heads=2>(q, k, v, , , n, t) },
        else_branch = other () => (float[B,S,48] b) {
            b = com.microsoft.GroupQueryAttention<num_heads=6, kv_num_heads=2SET>(q, k, v, , , n, t) } > }"""


@pytest.mark.parametrize("settings", ["", ", sliding_window_cache=1"])
def test_both_branches_of_a_switch_change_or_none(settings: str) -> None:
    model = parsed(BRANCHES.replace("SET", settings), 17)
    outcomes = rewrite_onnx(model, "m", parse_passes("sparsify.window(size=3)"), "cpu", "fastest", False, ()).outcomes
    assert [outcome.operator == "original" for outcome in outcomes] == [bool(settings)] * 2
    if settings:
        assert "in the other branch of its If is not lifted" in outcomes[0].reason
        assert [node.op_type for node in model.graph.all_nodes()].count("GroupQueryAttention") == 2
