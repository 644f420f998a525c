"""The table of what versions of ONNX Runtime do: in step with what makes it, and heeded by the lowering."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from attncompile.codegen.onnx import tried
from attncompile.codegen.onnx.capabilities import rows_for
from attncompile.codegen.onnx.choose import choose, row_named
from attncompile.codegen.onnx.emit import alone
from attncompile.codegen.onnx.tidy import wanted_opset
from benchmarks.onnx_capabilities import trial
from benchmarks.onnx_capabilities.__main__ import PAGE, TABLE, _exact_versions
from benchmarks.onnx_capabilities.attempt import Attempt, Case, one_node
from benchmarks.onnx_capabilities.page import page
from tests.cases import BY_NAME, CASES
from tests.cases import Case as Site

OLDEST, NEWEST = tried.versions()[0], tried.versions()[-1]


def test_the_table_has_every_attempt_and_nothing_else() -> None:
    wanted = {
        (one.domain, one.operator, one.feature, dtype) for one in trial.all_attempts() for dtype in one.dtypes
    }
    found = {(row.domain, row.operator, row.feature, row.dtype) for row in tried.table() if row.provider == "cpu"}
    assert found == wanted


def test_every_version_was_tried_with_everything_on_the_cpu() -> None:
    assert tried.versions() == tuple(f"1.{minor}" for minor in range(22, 33))
    assert all(set(row.outcomes) == set(tried.versions()) for row in tried.table() if row.provider == "cpu")


def test_the_page_is_made_of_the_table() -> None:
    versions = tried.versions()
    assert PAGE.read_text(encoding="utf-8") == page(tried.table(), versions, _exact_versions())
    assert TABLE.read_text(encoding="utf-8").count("\n") == len(tried.table()) + 3


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_table_knows_every_feature_that_a_site_needs(case: Site) -> None:
    for row in rows_for(case.spec):
        if row.features is None or row.beyond(case.spec) is not None:
            continue
        found, types = case.spec.attend() or case.spec.scan(), case.spec.types()
        known = {one.feature for one in tried.table() if (one.domain, one.operator) == (row.domain, row.operator)}
        assert set(row.features(found, types)) <= known  # type: ignore[arg-type]


@pytest.mark.parametrize("prefer", ["fastest", "fused"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_lowered_for_the_oldest_version_a_site_needs_nothing_newer(case: Site, prefer: str) -> None:
    opset = wanted_opset(OLDEST)
    chosen = choose(case.spec, prefer=prefer, opset=opset, version=OLDEST).row  # type: ignore[arg-type]
    assert chosen.why_not(case.spec, "cpu", OLDEST, opset) is None
    model = alone(case.spec, chosen, opset=opset)
    assert opset <= tried.newest_opset(OLDEST) and model.ir_version <= tried.newest_ir_version(OLDEST)
    for node in model.graph.all_nodes():
        if node.domain == "":
            onnx.defs.get_schema(node.op_type, opset, "")  # raises where the opset has no such operator


@pytest.mark.parametrize(
    "name,operator,version,says",
    [
        ("window", "GroupQueryAttention", "1.23", "wrong values"),
        ("full", "Attention", "1.22", "refuses"),
        ("causal-padding", "GroupQueryAttention", "1.27", "whole row"),
        ("scan", "LinearAttention", "1.24", "refuses"),
        ("window", "GroupQueryAttention", "1.21", "was not tried"),
    ],
)
def test_what_an_old_version_does_wrong_is_an_objection(name: str, operator: str, version: str, says: str) -> None:
    spec = BY_NAME[name].spec
    row = row_named(spec, operator)
    assert row.why_not(spec, "cpu", NEWEST) is None
    said = row.why_not(spec, "cpu", version)
    assert said is not None and says in said and version in said
    assert choose(spec, prefer="fused", version=version).row.operator != operator


def test_later_versions_count_as_the_newest_that_was_tried() -> None:
    assert tried.column("cpu", "1.99") == tried.column("cpu", "2.0") == NEWEST
    assert tried.column("cpu", "1.21") is None and tried.column("cuda", "1.30") is None
    assert tried.require_version("1.24.3") == "1.24"


@pytest.mark.parametrize("text,says", [("newest", "is no version"), ("1", "is no version"), ("1.20", "not tried")])
def test_versions_that_say_nothing_are_refused(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        tried.require_version(text)


def test_an_outcome_that_there_is_not_is_refused() -> None:
    text = re.sub(r"\tright\b", "\tprobably", TABLE.read_text(encoding="utf-8"), count=1)
    with pytest.raises(ValueError, match="probably"):
        tried.read(text)


# The trial itself


def attempt(operator: str, feature: str) -> Attempt:
    return next(one for one in trial.all_attempts() if (one.operator, one.feature) == (operator, feature))


def verdict(folder: Path, one: Attempt) -> trial.Verdict:
    rows = trial.prepare(folder, [dataclasses.replace(one, dtypes=("float32",))])
    return trial.judge(folder, rows, None, "cpu")[1][0]


def without(name: str, one: Attempt) -> Attempt:
    """The attempt with a model that lacks an attribute, as if ONNX Runtime did not look at it."""

    def model(case: Case) -> onnx.ModelProto:
        kept = {key: value for key, value in case.attributes.items() if key != name}
        return one_node(one.domain, one.operator, one.opset, dataclasses.replace(case, attributes=kept))

    return dataclasses.replace(one, whole=model)


def test_what_is_right_is_found_right(tmp_path: Path) -> None:
    assert verdict(tmp_path, attempt("GroupQueryAttention", "softcap")).outcome == "right"


def test_what_is_not_followed_is_found_ignored(tmp_path: Path) -> None:
    assert verdict(tmp_path, without("softcap", attempt("GroupQueryAttention", "softcap"))).outcome == "ignored"


def test_what_is_computed_otherwise_is_found_wrong(tmp_path: Path) -> None:
    one = attempt("GroupQueryAttention", "softcap")

    def model(case: Case) -> onnx.ModelProto:
        changed = dict(case.attributes) | {"softcap": 0.6}
        return one_node(one.domain, one.operator, one.opset, dataclasses.replace(case, attributes=changed))

    found = verdict(tmp_path, dataclasses.replace(one, whole=model))
    assert found.outcome == "wrong" and "off" in found.said


def test_an_error_is_a_refusal(tmp_path: Path) -> None:
    one = attempt("GroupQueryAttention", "channels that are no multiple of 8")
    assert verdict(tmp_path, one).outcome == "refused"


def test_a_process_that_ends_is_a_crash_and_the_rest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = tmp_path / "child.py"
    child.write_text(
        "import os, shutil, sys\nprint('version 1.2.3', flush=True)\n"
        "for number in range(int(sys.argv[3]), int(sys.argv[4])):\n    print(number, 'begins', flush=True)\n"
        "    if number == 1:\n        os._exit(139)\n    print(number, 'refused it', flush=True)\n"
    )
    monkeypatch.setattr(trial, "__file__", str(tmp_path / "trial.py"))
    version, said = trial._run_all(tmp_path, 4, None, "CPUExecutionProvider")
    assert version == "1.2.3"
    assert said == {0: "refused it", 1: "crashed", 2: "refused it", 3: "refused it"}


def test_results_that_differ_between_runs_are_unstable(tmp_path: Path) -> None:
    one = attempt("GroupQueryAttention", "softcap")
    prepared = one.cases("float32")[0]
    right = [None if part is None else part.right.float().numpy() for part in prepared.expected]
    arrays = {f"output_{place}": array for place, array in enumerate(right) if array is not None}
    np.savez(tmp_path / "0.out.npz", **arrays, **{f"again_{name}": array + 1 for name, array in arrays.items()})
    assert trial._verdict(prepared, "ran", tmp_path / "0.out.npz").outcome == "unstable"


def test_an_attempt_that_would_not_show_is_refused() -> None:
    one = attempt("GroupQueryAttention", "softcap")
    with pytest.raises(RuntimeError, match="would not show"):
        dataclasses.replace(one, without=one.make).cases("float32")


def test_rounding_of_the_reference_is_no_error() -> None:
    for part in attempt("GroupQueryAttention", "softcap").cases("float16")[0].expected:
        assert part is not None and part.right.dtype == torch.float64 and 0 <= part.bound < 1
