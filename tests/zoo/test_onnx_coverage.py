"""What the sites of exported models end in is counted in the model that comes out, and equal to what it was."""

from __future__ import annotations

import onnx_ir
import pytest

from attncompile.convert.calibration import Call
from benchmarks.coverage import read_table
from benchmarks.onnx_coverage import PLAIN, judged, one_operator, stratified, summary
from benchmarks.zoo.build import build
from benchmarks.zoo.captures import CLOSE, torchscript_onnx
from benchmarks.zoo.processes import Row

ENDINGS = {
    "layoutlm": {"Attention": 2},  # its mask is a sum
    "gemma2": {"Attention": 2},  # a soft cap beside padding, rows that see no key
    "mimo_v2_flash": {"Attention": 1, "GroupQueryAttention": 1},  # weights times 0.707, sinks beside padding
    "flava": {"Attention": 6},  # an encoder whose keys are 37 fewer than another's
    "jetmoe": {PLAIN: 2},  # KV heads are shared in another order than any operator has
    "glm4v_vision": {"Attention": 4},  # values without a rank near a norm
    "exaone4_5_vision": {"Attention": 4},  # sizes that divide by zero at two
}


def row_of(kind: str) -> Row:
    model, args, kwargs = build(kind, "eager")
    stored = onnx_ir.to_proto(torchscript_onnx(model, args, kwargs)).SerializeToString()
    return judged(stored, Call(tuple(args), kwargs, "example"))


@pytest.mark.parametrize("kind", ENDINGS)
def test_sites_end_in_one_operator_and_are_equal(kind: str) -> None:
    row = row_of(kind)
    assert row["operators"] == ENDINGS[kind], row["plain"]
    assert row["unequal"] == [] and row["error_end_to_end"] <= CLOSE
    assert one_operator(row) + sum(entry["sites"] for entry in row["plain"]) == row["lifted"]


def test_a_sample_has_every_modality_and_is_the_same_each_time() -> None:
    table = read_table()
    sample = stratified(table, 40)
    assert sample == stratified(table, 40) and len(set(sample)) == 40
    assert {table[kind]["modality"] for kind in sample} == {row["modality"] for row in table.values()}


def test_models_that_fail_are_counted_and_not_left_out() -> None:
    good = {"lifted": 2, "operators": {"Attention": 1, PLAIN: 1}, "plain": [{"reason": "why", "sites": 1}],
            "unequal": [], "error_end_to_end": 0.0}  # fmt: skip
    told = summary([good, {"error": "boom"}, {"error": "no", "stage": "export"}])
    assert (told["models"], told["failed"], told["not exported"], told["share"]) == (3, 1, 1, 0.5)
    assert told["why plain operators"] == {"why": 1}
