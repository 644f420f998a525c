"""What torch's exporter does once for a process instead of once for an export."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from attncompile.convert.exporter import functions_listed_once

lazy: Any = pytest.importorskip(
    "torch.onnx._internal._lazy_import", reason="this torch keeps its list of operators elsewhere: nothing is left out"
)


def exported() -> str:
    """A small module as ONNX, as text."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.GELU()).eval()
    program = torch.export.export(module, (torch.ones(2, 3),))
    made = torch.onnx.export(program, dynamo=True, verbose=False)
    assert made is not None
    return "\n".join(f"{node.op_type} {list(node.attributes)}" for node in made.model.graph)


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_the_functions_are_listed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And both exports are those of a listing of their own."""
    framework = importlib.import_module(lazy.onnxscript_apis._name)
    listing, made = framework.get_torchlib_ops, list[int]()

    def counted() -> list[Any]:
        found: list[Any] = listing()
        made.append(len(found))
        return found

    monkeypatch.setattr(framework, "get_torchlib_ops", counted)
    alone = exported()
    for _ in range(2):
        with functions_listed_once():
            assert exported() == alone
        assert "get_torchlib_ops" not in vars(lazy.onnxscript_apis)
    assert len(made) == 2 and made[0] == made[1] > 100  # alone, and for both of the others


def test_other_names_leave_all_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(lazy, "onnxscript_apis")
    with functions_listed_once():
        pass


def test_what_is_listed_is_not_changed_by_an_export() -> None:
    """Who changes the list has one of his own."""
    with functions_listed_once():
        first = lazy.onnxscript_apis.get_torchlib_ops()
        functions = list(first)
        first.clear()
        assert [entry.function for entry in lazy.onnxscript_apis.get_torchlib_ops()] == [e.function for e in functions]
