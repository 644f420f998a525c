"""What onnx.checker, shape inference and ONNX Runtime say against a file is noticed."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

import attncompile
from attncompile.convert import clean
from attncompile.convert.clean import Before, complaints, judged
from tests.onnx_files import assert_clean

CHECKER, INFERENCE, LOADING = "onnx.checker", "shape inference", "ONNX Runtime, loading strictly"


@dataclass(frozen=True)
class Case:
    """A file with a fault, and the tools that refuse it; the words of a warning where there is one."""

    refused: frozenset[str] = frozenset()
    warning: str = ""
    inner: tuple[int, ...] = (2, 3)
    outer: tuple[int, ...] = (2, 3)
    operator: str = "Add"
    domain: str = ""
    unused: bool = False


EVERY = frozenset({CHECKER, INFERENCE, LOADING})
CASES = {
    "clean": Case(),
    "an output of another size": Case(EVERY, outer=(2, 4)),
    "an inner value of another size": Case(EVERY, inner=(2, 4)),
    "an unknown operator": Case(frozenset({CHECKER, LOADING}), operator="Nope"),
    "an unknown contributed operator": Case(frozenset({LOADING}), operator="Nope", domain="com.microsoft"),
    "an unused initialiser": Case(warning="Removing initializer 'unused'", unused=True),
}


def written(case: Case, file: Path) -> Path:
    nodes = [
        helper.make_node(case.operator, ["x", "y"], ["inner"], domain=case.domain),
        helper.make_node("Relu", ["inner"], ["outer"]),
    ]
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (2, 3)) for name in ("x", "y")]
    output = helper.make_tensor_value_info("outer", TensorProto.FLOAT, case.outer)
    inner = helper.make_tensor_value_info("inner", TensorProto.FLOAT, case.inner)
    unused = [helper.make_tensor("unused", TensorProto.FLOAT, [1], [1.0])] if case.unused else []
    graph = helper.make_graph(nodes, "g", inputs, [output], unused, value_info=[inner])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), file)
    return file


@pytest.mark.parametrize("name", CASES)
def test_complaints_are_collected(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    case = CASES[name]
    found = complaints(written(CASES[name], tmp_path / "model.onnx"), "cpu")
    assert {one.tool for one in found if one.refused} == case.refused
    assert [one.said[: len(case.warning)] for one in found if not one.refused] == [case.warning] * bool(case.warning)
    assert not any(str(tmp_path) in one.said for one in found)
    assert "onnxruntime" not in capfd.readouterr().err


def test_what_others_write_meanwhile_goes_on_its_way(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make = clean.onnxruntime.InferenceSession

    def loud(*given: object, **options: object) -> object:
        print("somebody else", file=sys.stderr, flush=True)
        return make(*given, **options)

    monkeypatch.setattr(clean.onnxruntime, "InferenceSession", loud)
    (found,) = complaints(written(CASES["an unused initialiser"], tmp_path / "model.onnx"), "cpu")
    assert "unused" in found.said and "somebody else" in capfd.readouterr().err


def test_what_was_wrong_before_is_told_and_not_held_against_a_result(tmp_path: Path) -> None:
    right = written(CASES["clean"], tmp_path / "right.onnx")
    wrong = written(CASES["an output of another size"], tmp_path / "wrong.onnx")
    warned = written(CASES["an unused initialiser"], tmp_path / "warned.onnx")
    assert judged(right, Before(wrong, "cpu")).problem is None and not judged(right, Before(wrong, "cpu")).notes
    assert (judged(wrong, Before(right, "cpu")).problem or "").startswith(CHECKER)
    same = judged(wrong, Before(wrong, "cpu"))
    assert same.problem is None and all("(so it was before)" in note for note in same.notes) and len(same.notes) == 3
    only = judged(warned, Before(right, "cpu"))
    assert only.problem is None and "warned.onnx is not clean: ONNX Runtime: Removing" in only.notes[0]


def test_a_damaged_file_is_no_crash(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"this is no protobuf")
    assert {one.tool for one in complaints(tmp_path / "model.onnx", "cpu")} == {CHECKER, LOADING}


@pytest.mark.parametrize("prefer", ["fused", "decomposed"])
@pytest.mark.parametrize("name", ["minilm-int8", "paraphrase-minilm-l3"])
@pytest.mark.slow
def test_results_of_third_party_files_are_clean(
    name: str, prefer: str, onnx_files: dict[str, Path], tmp_path: Path
) -> None:
    made = attncompile.convert(onnx_files[name], tmp_path / "out", prefer=prefer)
    assert_clean(tmp_path / "out")
    assert not any("is not clean" in note for note in made.report.notes)


def test_a_contradiction_that_an_operator_of_the_runtimes_own_hid_from_onnx_is_no_fault(tmp_path: Path) -> None:
    """The export has it, and strict loading says so; in standard operators onnx sees it too."""

    def file(name: str, operator: str, domain: str) -> Path:
        behind = helper.make_tensor_value_info("inner", TensorProto.FLOAT, (2, 4))
        nodes = [
            helper.make_node(operator, ["x"], ["first"], domain=domain),
            helper.make_node("Add", ["first", "x"], ["inner"]),
            helper.make_node("Relu", ["inner"], ["outer"]),
        ]
        x, outer = (helper.make_tensor_value_info(name, TensorProto.FLOAT, (2, 3)) for name in ("x", "outer"))
        graph = helper.make_graph(nodes, "g", [x], [outer], value_info=[behind])
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / name)
        return tmp_path / name

    before, after = file("before.onnx", "Gelu", "com.microsoft"), file("after.onnx", "Gelu", "")
    assert {one.tool for one in complaints(before, "cpu")} == {LOADING}
    assert {one.tool for one in complaints(after, "cpu")} == {CHECKER, INFERENCE, LOADING}
    found = judged(after, Before(before, "cpu"))
    assert found.problem is None and all("(so it was before)" in note for note in found.notes)


def chain(file: Path, names: str, declared: dict[str, tuple[int, int]], opset: int = 20, last: str = "Relu") -> Path:
    """Nodes of these names behind each other, the first values of which are declared with sizes that may be wrong."""
    nodes = [helper.make_node("Relu", [f"v{n}"], [f"v{n + 1}"], name=name) for n, name in enumerate(names)]
    nodes.append(helper.make_node(last, [f"v{len(names)}"], ["out"], name="last"))
    given, out = (helper.make_tensor_value_info(name, TensorProto.FLOAT, (2, 3)) for name in ("v0", "out"))
    inner = [helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes) for name, sizes in declared.items()]
    graph = helper.make_graph(nodes, "g", [given], [out], value_info=inner)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), file)
    return file


def test_another_complaint_of_the_same_tool_is_held_against_a_result(tmp_path: Path) -> None:
    before = chain(tmp_path / "before.onnx", "abcd", {"v1": (2, 4)})
    more = chain(tmp_path / "more.onnx", "abcd", {"v1": (2, 4), "v3": (5, 3)})
    found = judged(more, Before(before, "cpu"))
    assert found.problem is not None and found.problem.startswith(f"{CHECKER}: (op_type:Relu, node name: c)")
    assert "dimension 0: (2) vs (5)" in found.problem and "node name: a" not in found.problem
    elsewhere = chain(tmp_path / "elsewhere.onnx", "abcd", {"v3": (2, 4)})
    assert "node name: c" in (judged(elsewhere, Before(before, "cpu")).problem or "")


def test_a_complaint_is_the_same_at_nodes_of_other_names(tmp_path: Path) -> None:
    before = Before(chain(tmp_path / "before.onnx", "abcd", {"v1": (2, 4)}), "cpu")
    renamed = chain(tmp_path / "renamed.onnx", "wxyz", {"v1": (2, 4)})
    fewer = chain(tmp_path / "fewer.onnx", "cd", {"v1": (2, 4)})  # another node makes that value
    for file in (renamed, fewer):
        found = judged(file, before)
        assert found.problem is None and all("(so it was before)" in note for note in found.notes) and found.notes


def test_a_complaint_is_the_same_in_another_operator_set(tmp_path: Path) -> None:
    older = chain(tmp_path / "older.onnx", "a", {}, opset=18, last="Nope")
    newer = chain(tmp_path / "newer.onnx", "b", {}, opset=23, last="Nope")
    assert {one.tool for one in complaints(older, "cpu")} == {CHECKER, LOADING}
    found = judged(newer, Before(older, "cpu"))
    assert found.problem is None and len(found.notes) == 2
    other = judged(chain(tmp_path / "other.onnx", "b", {}, opset=23, last="Nopes"), Before(older, "cpu"))
    assert "Nopes" in (other.problem or "")
