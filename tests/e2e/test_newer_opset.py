"""Files of an operator set that ONNX Runtime does not run yet are converted, by the definitions of the standard."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx.backend.test.case import node as onnx_cases
from onnx.backend.test.case.node import linear_attention

import attncompile
from attncompile.codegen.onnx.tried import installed, newest_ir_version, newest_opset
from attncompile.convert.onnx_rewrite import ROLLED_BACK

REGISTERED = (linear_attention,)
NEWEST = newest_opset(installed(), "cpu")
"""The newest opset that the installed ONNX Runtime runs: 26 in 1.31, 28 in 1.32."""

of_28 = pytest.mark.skipif(NEWEST >= 28, reason="the installed ONNX Runtime runs opset 28 as it is")

CASES = {case.name: case for case in onnx_cases._NodeTestCases}


@pytest.mark.skipif(NEWEST >= 27, reason="the installed ONNX Runtime runs opset 27 as it is")
@pytest.mark.parametrize(
    ("name", "operator"),
    [("test_linear_attention_gated_delta_gqa", "LinearAttention"),
     ("test_linear_attention_gated_delta_gqa_expanded", "original")],
)  # fmt: skip
def test_linear_attention_of_opset_27(name: str, operator: str, tmp_path: Path) -> None:
    onnx.save(CASES[name].model, tmp_path / "given.onnx")
    made = attncompile.convert(tmp_path / "given.onnx", tmp_path / "out")
    written = onnx.load(tmp_path / "out" / "model.onnx")
    assert {entry.domain: entry.version for entry in written.opset_import}[""] == 26
    assert [site.operator for site in made.certificate.sites] == [operator]
    assert "written by its definition" in str(made)
    assert attncompile.verify(tmp_path / "out").passed


@pytest.mark.parametrize("opset", [26, 27])
def test_the_newest_file_format(opset: int, tmp_path: Path) -> None:
    """What the installed onnx writes by itself; a rollback that an earlier conversion told of is none of this one's."""
    assert newest_ir_version() < onnx.IR_VERSION
    model = onnx.parser.parse_model(
        f"""<ir_version: {onnx.IR_VERSION}, opset_import: ["" : {opset}]>
        g (float[B,S,8] x) => (float[B,S,8] y) {{ y = Attention<q_num_heads = 2, kv_num_heads = 2>(x, x, x) }}"""
    )
    model.metadata_props.add(key=f"{ROLLED_BACK}.once", value="a fault of then")
    onnx.save(model, tmp_path / "given.onnx")
    assert attncompile.convert(tmp_path / "given.onnx", tmp_path / "out", prefer="fused").certificate.passed
    written = onnx.load(tmp_path / "out" / "model.onnx")
    assert written.ir_version == newest_ir_version()
    assert not [entry.key for entry in written.metadata_props if entry.key.startswith(ROLLED_BACK)]


def newer(operator: str, kind: str = "float", opset: int = 28) -> onnx.ModelProto:
    """Attention, and beside it a call of an operator of the opset."""
    return onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : {opset}]>
        g (float[B,S,8] x, {kind}[2,4,6,6] w) => (float[B,S,8] y, {kind}[A,C,D,E] z) {{
            y = Attention<q_num_heads = 2, kv_num_heads = 2>(x, x, x)
            [beside] z = {operator}
        }}"""
    )


@of_28
@pytest.mark.parametrize(
    "operator", ["Celu(w)", "DepthToSpace<blocksize = 2>(w)", 'Einsum<equation = "abcd->abdc">(w)']
)
def test_operators_that_changed_for_types_alone(operator: str, tmp_path: Path) -> None:
    onnx.save(newer(operator), tmp_path / "given.onnx")
    made = attncompile.convert(tmp_path / "given.onnx", tmp_path / "out")
    assert made.certificate.passed and attncompile.verify(tmp_path / "out").passed
    written = onnx.load(tmp_path / "out" / "model.onnx")
    assert {entry.domain: entry.version for entry in written.opset_import}[""] == 26
    assert operator.partition("<")[0].partition("(")[0] in {node.op_type for node in written.graph.node}


@of_28
@pytest.mark.parametrize(
    ("operator", "kind", "said"),
    [("Celu(w)", "float16", "Celu takes tensor(float16) since opset 28 alone (node 'beside')"),
     ("Mod(w, w)", "int32", "Mod was defined anew in opset 28 (node 'beside')")],
)  # fmt: skip
def test_what_no_older_opset_can_say_is_named(operator: str, kind: str, said: str, tmp_path: Path) -> None:
    onnx.save(newer(operator, kind), tmp_path / "given.onnx")
    with pytest.raises(attncompile.InputError) as raised:
        attncompile.convert(tmp_path / "given.onnx", tmp_path / "out")
    assert said in str(raised.value) and "export it with opset 26" in str(raised.value)
    assert "please report" not in str(raised.value) and "before_" not in str(raised.value)
    assert not (tmp_path / "out").exists()
