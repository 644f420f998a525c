"""Attention that a file rounds inside is stated without its roundings, and observed."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest

from attncompile.frontends.onnx import onnx_graph
from attncompile.lift import Site, lift_graph
from attncompile.lift.render import render_site
from attncompile.lift.rounded import described, without_roundings
from tests.frontends.onnx_reference import parsed
from tests.quantised_attention import FORMS, PACKED, REWRITTEN, attention_model, quantised_file

PARTS = {
    "qdq": "q, k, v, the scores, the weights to int8",
    "qdq-everything": "mask, q, k, v, the scores, the weights to uint8",
    "qoperator": "q, k, v, the scores, the weights to int8",
    "qoperator-everything": "mask, q, k, v, the scores, the weights to int8",
    "dynamic": "q, k, v, the weights to uint8 by scales of each call",
    "qdq-everything, saved by the runtime": "k, q, the scores, mask, the weights, v to uint8",
    "qoperator-everything, saved by the runtime": "mask, q, k, v, the scores, the weights to int8",
    "dynamic, saved by the runtime": "k, q, v, the weights to uint8 by scales of each call",
    "packed qoperator-everything": "mask, q, k, v, the scores, the weights to int8",
    "packed qdq, ONNX Runtime's own pairs": "mask, q, k, v, the scores, the weights to int8",
    "packed qdq, ONNX Runtime's own pairs, saved by the runtime": "q, k, v, the scores, mask, the weights to uint8",
}


def only_site(model: ir.Model) -> Site:
    (site,) = lift_graph(onnx_graph(model)).sites
    return site


@pytest.mark.parametrize("form", [*FORMS, *REWRITTEN])
def test_every_quantised_form_states_the_attention_of_the_float_model(form: str, tmp_path: Path) -> None:
    plain = only_site(ir.from_proto(attention_model(packed=form.startswith(PACKED))))
    site = only_site(ir.load(quantised_file(form, tmp_path)))
    assert plain.status == "lifted" and not plain.roundings
    assert site.status == "observed" and site.refusal is not None and site.refusal.kind == "rounded-values"
    assert site.proof is not None and site.proof.max_error < 1e-9
    assert plain.spec is not None and site.spec is not None
    assert [v.type.sizes for v in site.spec.inputs] == [v.type.sizes for v in plain.spec.inputs]
    mine, wanted = (spec.attend() for spec in (site.spec, plain.spec))
    assert mine is not None and wanted is not None
    assert (mine.mask, mine.norm) == (wanted.mask, wanted.norm)
    assert "mask[b, 0, 0, j]" in str(site.spec) and "0.35355" in str(site.spec)
    assert described(site.roundings) == PARTS[form]
    assert PARTS[form] in render_site(site) and "unround" in render_site(site)
    allowed = without_roundings(site)
    assert allowed.status == "lifted" and allowed.refusal is None and allowed.spec == site.spec


def lifted(body: str, returned: str = "y") -> Site:
    text = f"""g (float[B,4,I,8] q, float[B,4,8,J] k, float[B,4,J,8] v) => ({returned})
        <float a = {{0.1}}, float b = {{0.2}}, uint8 z = {{128}}> {{ {body} }}"""
    return only_site(parsed(text))


def test_operands_that_are_rounded_alone_leave_attention_lifted_as_it_is() -> None:
    site = lifted("""qc = QuantizeLinear(q, a, z)  qd = DequantizeLinear(qc, a, z)
        s = MatMul(qd, k)  w = Softmax(s)  y = MatMul(w, v)""")
    assert site.status == "lifted" and not site.roundings and site.region is not None
    assert site.region.inputs[0].value == "qd"


def test_one_rounding_inside_takes_the_operands_before_they_are_rounded() -> None:
    site = lifted("""qc = QuantizeLinear(q, a, z)  qd = DequantizeLinear(qc, a, z)
        s = MatMul(qd, k)  sc = QuantizeLinear(s, a, z)  sd = DequantizeLinear(sc, a, z)
        w = Softmax(sd)  y = MatMul(w, v)""")
    assert site.status == "observed" and described(site.roundings) == "q, the scores to uint8"
    assert site.region is not None and site.region.inputs[0].value == "q"


def test_scores_that_are_read_back_as_something_else_are_refused_aloud() -> None:
    site = lifted("""s = MatMul(q, k)  sc = QuantizeLinear(s, a, z)  sd = DequantizeLinear(sc, b, z)
        w = Softmax(sd)  y = MatMul(w, v)""")
    assert site.status == "refused" and site.refusal is not None
    assert "DequantizeLinear lies between the scores and the normaliser" in site.refusal.reason


@pytest.mark.parametrize(("scale", "status"), [("qs, ks", "lifted"), ("qs, qs", "refused")])
def test_a_product_of_codes_is_one_of_rounded_operands_or_is_refused_aloud(scale: str, status: str) -> None:
    """Scores of rounded queries and keys are not rounded themselves: that is attention as it is."""
    site = lifted(f"""qc, qs, qz = DynamicQuantizeLinear(q)  kc, ks, kz = DynamicQuantizeLinear(k)
        p = MatMulInteger(qc, kc, qz, kz)  f = Cast<to=1>(p)  t = Mul({scale})  s = Mul(f, t)
        w = Softmax(s)  y = MatMul(w, v)""")
    assert site.status == status
    if site.refusal is not None:
        assert "MatMulInteger lies between the scores and the normaliser" in site.refusal.reason


def test_weights_that_are_returned_are_the_reason_before_roundings() -> None:
    site = lifted("""s = MatMul(q, k)  w = Softmax(s)  wc = QuantizeLinear(w, a, z)  wd = DequantizeLinear(wc, a, z)
        y = MatMul(wd, v)""", "y, wc")  # fmt: skip
    assert site.status == "observed" and site.refusal is not None and site.refusal.kind == "escaping-value"
    assert described(site.roundings) == "the weights to uint8"
    assert "  rounds the weights to uint8" in render_site(site).splitlines()
    assert without_roundings(site) == site


def test_what_is_no_attention_without_roundings_is_refused_for_that() -> None:
    site = lifted("""s = MatMul(q, k)  sc = QuantizeLinear(s, a, z)  sd = DequantizeLinear(sc, a, z)
        u = LpNormalization(sd)  w = Softmax(u)  y = MatMul(w, v)""")
    assert site.status == "refused" and site.refusal is not None
    assert "LpNormalization" in site.refusal.reason
