"""One softmax whose weights are sliced and multiplied with different values is one attention, and only then."""

from __future__ import annotations

import io
import warnings

import onnx
import onnx_ir
import onnxruntime
import pytest
import torch

from attncompile.backend.rewrite import decide, rewrite
from attncompile.codegen.pytorch import lower
from attncompile.convert.onnx_rewrite import rewrite_onnx
from attncompile.frontends.aten import aten_graph
from attncompile.ir import Cache, parse_spec, print_spec
from attncompile.lift import lift_graph
from attncompile.lift.prove import AGREEMENT
from tests.lift.forms import Form
from tests.lift.split_products import NOT_ONE, SPLIT
from tests.lift.test_spellings import DEFAULTS, agrees_on_real_inputs, stated


@pytest.mark.parametrize("form", SPLIT.rows, ids=lambda form: form.name)
def test_pieces_are_one_attention(form: Form) -> None:
    captured = form.capture()
    program = lift_graph(aten_graph(captured), form.name, captured.notes)
    expected = dict(form.expected)
    status, reason = expected.pop("status", "lifted"), expected.pop("reason", "")
    (site,) = program.sites
    assert site.status == status, site.refusal
    found = stated(site)
    assert {name: found[name] for name in {**DEFAULTS, **expected}} == {**DEFAULTS, **expected}
    assert site.proof is not None and site.proof.cases and site.proof.max_error <= AGREEMENT[torch.float64]
    assert site.spec is not None and parse_spec(print_spec(site.spec)) == site.spec
    assert reason in (site.refusal.reason if site.refusal else "")
    agrees_on_real_inputs(captured, form, program.sites)


@pytest.mark.parametrize("form", NOT_ONE.rows, ids=lambda form: form.name)
def test_near_miss(form: Form) -> None:
    sites = form.lift().sites
    assert len(sites) == form.expected.get("sites", 1), sites
    for site in sites:
        assert site.status == "refused" and site.refusal is not None
        assert site.refusal.kind == form.expected["kind"], site.refusal


def test_a_tensor_that_holds_all_pieces_is_the_operand() -> None:
    form = next(form for form in SPLIT.rows if form.name == "slices_of_one_tensor")
    (site,) = form.lift().sites
    assert site.spec is not None and site.region is not None
    assert not any(isinstance(operation, Cache) for operation in site.spec.operations)
    assert [binding.value for binding in site.region.inputs] == ["q", "k", "v"]


REPLACED = ("two_pieces", "global_and_local_in_blocks", "learned_keys_for_all", "one_piece_subtracted")


@pytest.mark.parametrize("name", REPLACED)
def test_pieces_can_be_replaced(name: str) -> None:
    form = next(form for form in SPLIT.rows if form.name == name)
    captured = form.capture()
    program = lift_graph(aten_graph(captured), form.name, captured.notes)
    decisions = decide(program, (), lambda spec: lower(spec, "cpu"), even_reference=True)
    assert [decision.lowering is not None for decision in decisions] == [True]
    inputs = captured.flat_inputs((), form.inputs)
    (expected,) = captured.graph_module(*inputs)
    (actual,) = rewrite(captured.graph_module, program, decisions)(*inputs)
    torch.testing.assert_close(actual, expected)


def test_keys_that_all_blocks_share_are_repeated_in_onnx() -> None:
    form = next(form for form in SPLIT.rows if form.name == "global_and_local_in_blocks")
    inputs, file = form.inputs, io.BytesIO()
    sizes = {name: {0: "batch"} if name == "blocks" else {0: "batch", 1: "past"} for name in inputs}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            form.module(), tuple(inputs.values()), file, dynamo=False, input_names=list(inputs), dynamic_axes=sizes
        )
    model = onnx_ir.from_proto(onnx.load_from_string(file.getvalue()))
    (outcome,) = rewrite_onnx(model, form.name, (), "cpu", "decomposed", False, ()).outcomes
    assert outcome.operator == "decomposition", outcome.reason
    session = onnxruntime.InferenceSession(onnx_ir.to_proto(model).SerializeToString())
    (actual,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    torch.testing.assert_close(torch.from_numpy(actual), form.module()(**inputs))
