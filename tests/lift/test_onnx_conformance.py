"""ONNX's own conformance cases for ``Attention`` and ``FlexAttention``: every one is one site, and its Spec gives the
published result.

Both forms count: the single operator, and the function of plain operators that the standard defines it by. A case
that also returns the scores or the weights is ``observed``: stated and proven, but not to be replaced.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx.backend.test.case import node as onnx_cases
from onnx.backend.test.case.node import attention, flexattention

from attncompile.frontends.graph import Graph
from attncompile.frontends.onnx import onnx_graph
from attncompile.ir.types import NAMES, concrete
from attncompile.lift import Site, lift_graph
from attncompile.lift.program import Layout
from attncompile.lift.prove import canonical
from attncompile.verify import derive_tolerance

# ONNX registers a module's cases when it is imported; collecting by its function would make those of all operators
REGISTERED = (attention, flexattention)
CASES = {case.name: case for case in onnx_cases._NodeTestCases if "_attention_" in case.name or "flex" in case.name}
CASES = {name: case for name, case in CASES.items() if "linear" not in name}


def floats(case: Any) -> bool:
    """Whether the operands are floats, as all of ONNX 1.23's are."""
    return ir.from_proto(case.model).graph.inputs[0].dtype.is_floating_point()


def tensor(array: np.ndarray) -> torch.Tensor:
    """NumPy's array, also one of a type that only ONNX has in NumPy."""
    if array.dtype.kind in "fiub":
        return torch.from_numpy(np.ascontiguousarray(array))
    return torch.from_numpy(array.astype(np.float32)).bfloat16()


def native(stated: torch.Tensor, axes: list[str], layout: Layout, shape: list[int]) -> torch.Tensor:
    """A Spec's result in the layout of the native value: what :func:`canonical` does, backwards."""
    kept = stated.permute([axes.index(axis) for axis in layout.axes])
    return kept.reshape(shape)


def stated_result(
    graph: Graph, site: Site, feeds: dict[str, torch.Tensor], dtype: torch.dtype
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The Spec on a case's data, computed in a dtype: its result, and the native value it stands for."""
    assert site.spec is not None and site.region is not None
    types, needed = site.spec.types(), [binding.value for binding in site.region.inputs]
    given = {**feeds, **graph.evaluate([name for name in needed if name not in feeds], feeds, {})}
    tensors = {
        b.name: canonical(given[b.value], b.layout, types[b.name], {}) if b.layout else given[b.value]
        for b in site.region.inputs
    }
    tensors = {name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors.items()}
    (result,) = site.spec.interpret(tensors, dtype)
    (out,) = site.region.outputs
    assert out.layout is not None
    shape = [concrete(size, {}) for size in graph.infos[out.value].shape]
    axes = [axis.name for axis in types[out.name].axes]
    return result, {out.value: native(result, axes, out.layout, shape).double()}


@pytest.mark.parametrize("name", CASES)
def test_case(name: str) -> None:
    case = CASES[name]
    assert floats(case)
    model = ir.from_proto(case.model)
    names = [value.name or "" for value in model.graph.inputs]
    outputs = [value.name or "" for value in model.graph.outputs]
    graph = onnx_graph(model)
    (site,) = lift_graph(graph, blocks=False).sites
    returns_scores = "qk_matmul_output" in outputs
    assert site.status == ("observed" if returns_scores else "lifted"), str(site.refusal)
    ((arrays, wanted),) = case.data_sets
    feeds = {key: tensor(array) for key, array in zip(names, arrays, strict=True)}
    expected = tensor(wanted[0])
    wide = {key: value.double() if value.is_floating_point() else value for key, value in feeds.items()}
    exact, value = stated_result(graph, site, wide, torch.float64)
    found = graph.evaluate(outputs[:1], {**wide, **value}, {})[outputs[0]]
    assert found.shape == expected.shape
    plain, _ = stated_result(graph, site, wide, expected.dtype)
    length = concrete(site.spec.types()[site.spec.attend().key].sizes[2], {})  # type: ignore[union-attr]
    bound = derive_tolerance(exact, plain, length, expected.dtype).bound
    assert torch.equal(found.isnan(), expected.isnan())
    difference = (found - expected.double())[~expected.isnan()].abs()
    assert NAMES[expected.dtype].startswith(("float", "bfloat"))
    assert float(difference.max()) <= bound, f"{float(difference.max()):.3g} beyond {bound:.3g}"
