"""Files of an operator set that ONNX Runtime does not run yet are converted, by the definitions of the standard."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx.backend.test.case import node as onnx_cases
from onnx.backend.test.case.node import linear_attention

import attncompile

REGISTERED = (linear_attention,)
CASES = {case.name: case for case in onnx_cases._NodeTestCases}


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
