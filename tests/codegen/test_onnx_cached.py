"""Operators behind a cache: prompts, steps and all between, against the Spec, and which operator ran."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from attncompile.codegen.onnx.cached import CONCATENATED, hand_over
from attncompile.codegen.onnx.capabilities import ATTEND_ROWS, Capability, from_queries
from attncompile.codegen.onnx.choose import choose, row_named
from attncompile.codegen.onnx.emit import alone
from attncompile.ir import Spec, parse_spec
from tests.codegen.test_onnx_operators import TOLERANCE

ROW = next(row for row in ATTEND_ROWS if row.operator == "GroupQueryAttention")
MANY = next(row for row in ATTEND_ROWS if row.operator == "MultiHeadAttention")

PADDED = "  given  attention_mask[B,I+P]:int64\n"
FORMS = {
    "causal": ("0.25·s", "j ≤ i + P", "", ""),
    "padding": ("0.25·s", "j ≤ i + P and attention_mask[b, j] ≠ 0", "", PADDED),
    "window": ("0.25·s", "j ≤ i + P and j > i + P − 4", "", ""),
    "softcap": ("5.0·tanh(0.05·s)", "j ≤ i + P and attention_mask[b, j] ≠ 0", "", PADDED),
    "sinks": ("0.25·s", "j ≤ i + P", "    sink   sinks[h]\n", "  given  sinks[6]:float32\n"),
    "slopes": ("0.25·s + exp2(−2·h − 2)·(j − i)", "j ≤ i + P", "", ""),
}
SIZES = (
    {"B": 1, "I": 5, "P": 0},
    {"B": 2, "I": 5, "P": 0},
    {"B": 2, "I": 1, "P": 7},
    {"B": 1, "I": 4, "P": 7},
    {"B": 3, "I": 4, "P": 7},
    {"B": 1, "I": 1, "P": 0},
)


def behind_a_cache(form: str) -> Spec:
    score, mask, sink, given = FORMS[form]
    caches = "".join(
        f"  cache  past_{side}[B,2,P,16]  {side}[B,2,I,16]  float32\n    out    all_{side}\n" for side in "kv"
    )
    return parse_spec(
        f"site\n{caches}  attend  q[B,6,I,16]  all_k  all_v  float32\n    score  {score}\n    mask   {mask}\n"
        f"    fill   −3.4028234663852886e+38\n{sink}    kv_head h // 3\n    norm   softmax (float32)\n{given}"
    )


def ungrouped(spec: Spec) -> Spec:
    """The same with a KV head for each query head."""
    return parse_spec(str(spec).replace("[B,2,", "[B,6,").replace("    kv_head h // 3\n", ""))


def whole_keys() -> Spec:
    """Keys that nobody cut into past and new."""
    return parse_spec(
        "site   attend  q[B,6,I,16]  k,v[B,2,J,16]  float32\n  score  0.25·s\n  mask   j ≤ i + J − I\n"
        "  kv_head h // 3\n  norm   softmax (float32), empty rows zero"
    )


def inputs(spec: Spec, sizes: dict[str, int], *, padded: bool) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {}
    for value in spec.inputs:
        shape = [int(str(size)) if str(size).isdigit() else sum(sizes[part] for part in str(size).split(" + "))
                 for size in value.type.sizes]
        if value.name == "attention_mask":
            made[value.name] = torch.ones(shape, dtype=torch.int64)
            if padded:
                made[value.name][-1, : shape[1] // 3] = 0
        else:
            made[value.name] = torch.randn(shape, generator=generator)
    return made


def run(spec: Spec, row: Capability, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        ir.to_proto(alone(spec, row)).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    wanted = {value.name for value in session.get_inputs()}
    return torch.from_numpy(session.run(None, {n: t.numpy() for n, t in tensors.items() if n in wanted})[0])


def assert_agrees(spec: Spec, row: Capability, tensors: dict[str, torch.Tensor]) -> None:
    (right,), (plain,) = spec.interpret(tensors, torch.float64), spec.interpret(tensors, torch.float32)
    unavoidable = float((plain.double() - right).abs().max())
    found = run(spec, row, tensors).double()
    torch.testing.assert_close(found, right, rtol=TOLERANCE, atol=TOLERANCE + unavoidable)


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("form", FORMS)
def test_every_call_equals_the_spec(form: str, padded: bool) -> None:
    spec = behind_a_cache(form)
    if padded and "attention_mask" not in {value.name for value in spec.inputs}:
        pytest.skip("this form reads no mask")
    assert ROW.why_not(spec) is None
    for sizes in SIZES:
        assert_agrees(spec, ROW, inputs(spec, sizes, padded=padded))


@pytest.mark.parametrize("form", [form for form in FORMS if form not in ("softcap", "sinks")])
def test_every_call_with_a_kv_head_for_each_query_head(form: str) -> None:
    spec = ungrouped(behind_a_cache(form))
    assert MANY.why_not(spec) is None
    (node,) = (node for node in nodes(alone(spec, MANY).graph) if node.op_type == "MultiHeadAttention")
    assert ("unidirectional" in node.attributes) == (form == "causal")
    for sizes in SIZES:
        assert_agrees(spec, MANY, inputs(spec, sizes, padded=form == "padding"))


@pytest.mark.parametrize("sizes", [{"B": 1, "I": 4, "J": 9}, {"B": 2, "I": 1, "J": 9}, {"B": 1, "I": 9, "J": 4}])
def test_whole_keys_are_cut(sizes: dict[str, int]) -> None:
    spec = whole_keys()
    assert_agrees(spec, ROW, inputs(spec, sizes, padded=False))


def nodes(graph: ir.Graph) -> Iterator[ir.Node]:
    return iter(graph.all_nodes())


@pytest.mark.parametrize("queries,fused", [(3, True), (4, True), (5, False)])
def test_few_queries_are_decomposed(queries: int, fused: bool) -> None:
    """Which branch ran is seen by breaking the other one: its query is made NaN."""
    spec, sizes = behind_a_cache("causal"), {"B": 1, "I": 4, "P": 3}
    tensors = inputs(spec, sizes, padded=False)
    model = alone(spec, from_queries(queries))
    (switch,) = [node for node in nodes(model.graph) if CONCATENATED in node.meta]
    name = "then_branch" if not fused else "else_branch"
    broken = switch.attributes[name].as_graph()
    output = broken.outputs[0]
    undefined = ir.node("Mul", [output, not_a_number(model.graph)], name="broken")
    undefined.outputs[0].name, undefined.outputs[0].dtype = "broken.out", output.dtype
    broken.append(undefined)
    broken.outputs[0] = undefined.outputs[0]
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    wanted = {value.name for value in session.get_inputs()}
    found = session.run(None, {n: t.numpy() for n, t in tensors.items() if n in wanted})[0]
    assert np.isfinite(found).all()


def not_a_number(graph: ir.Graph) -> ir.Value:
    value = ir.Value(
        name="nan", shape=ir.Shape(()), type=ir.TensorType(ir.DataType.FLOAT),
        const_value=ir.tensor(np.array(np.nan, dtype=np.float32), name="nan"),
    )
    graph.register_initializer(value)
    return value


def test_the_choice_is_measured_and_can_be_named() -> None:
    spec = behind_a_cache("padding")
    fastest = choose(spec)
    assert fastest.row.operator.startswith("GroupQueryAttention from ") and "slower below" in fastest.reason
    assert row_named(spec, fastest.row.operator).operator == fastest.row.operator
    assert choose(spec, prefer="fused").row.operator == "GroupQueryAttention"
    assert choose(spec, prefer="decomposed").row.operator == "decomposition"


def test_few_positions_are_not_worth_a_switch() -> None:
    grouped, single = behind_a_cache("padding"), ungrouped(behind_a_cache("padding"))
    assert "here are at most 448" in choose(grouped, longest=448).reason
    assert choose(grouped, longest=448).row.operator == "decomposition"
    chosen = choose(single, longest=448)
    assert chosen.row.operator == "MultiHeadAttention" and "at 128 and 448 tokens" in chosen.reason
    assert choose(single).row.operator.startswith("GroupQueryAttention from ")
    assert row_named(single, chosen.row.operator).operator == "MultiHeadAttention"


def test_a_row_for_caches_wants_a_cache() -> None:
    square = parse_spec(
        "site   attend  q,k,v[B,4,I,16]  float32\n  score  0.25·s\n  mask   j ≤ i\n  norm   softmax (float32)"
    )
    reason = from_queries(64).why_not(square)
    assert reason is not None and "nothing is cached" in reason
    shifted = parse_spec(str(behind_a_cache("causal")).replace("j ≤ i + P", "j ≤ i + P + 1"))
    assert "last query at the last key" in str(ROW.why_not(shifted))


def test_a_mask_is_made_once_and_only_where_it_is_read() -> None:
    model = alone(behind_a_cache("padding"), ROW)
    first, second = (node for node in nodes(model.graph) if node.op_type == "If")
    assert CONCATENATED in second.meta and first.inputs[0] is second.inputs[0]
    masks = [node.op_type for node in first.attributes["else_branch"].as_graph()]
    plain = [node.op_type for node in second.attributes["else_branch"].as_graph()]
    assert "LessOrEqual" in masks and "MatMul" not in masks
    assert "LessOrEqual" not in plain and plain.count("MatMul") == 2
    assert [node.op_type for node in first.attributes["then_branch"].as_graph()] == ["Identity"] * len(first.outputs)


@pytest.mark.parametrize("row", [ROW, MANY], ids=lambda row: row.operator)
def test_results_of_the_operator_replace_the_concatenation(row: Capability) -> None:
    spec = behind_a_cache("causal")
    model = alone(ungrouped(spec) if row is MANY else spec, row)
    (switch,) = [node for node in nodes(model.graph) if CONCATENATED in node.meta]
    keys, values = switch.meta[CONCATENATED]
    keys.name = "present.key"
    model.graph.outputs.append(keys)
    assert hand_over(model) == 1
    assert model.graph.outputs[1] is switch.outputs[1] and switch.outputs[1].name == "present.key"
    assert keys.name == "present.key.before" and values.name != keys.name
