"""Lowerings of attention that are wrong at some sites, in the ways in which a lowering can be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import onnx_ir as ir
import pytest

from attncompile.codegen.onnx import emit as emitting
from attncompile.codegen.onnx.capabilities import Capability
from attncompile.codegen.onnx.values import MICROSOFT, Builder
from attncompile.convert import onnx_rewrite
from attncompile.ir import Spec

Change = Callable[[Builder, ir.Value], ir.Value]
"""What is made of a site's result."""


def scaled(build: Builder, value: ir.Value) -> ir.Value:
    """Finite, and wrong."""
    return _like(value, build("Mul", value, build.constant(1.25, "float32")))


def not_a_number(build: Builder, value: ir.Value) -> ir.Value:
    """NaN in every element."""
    return _like(value, build("Mul", value, build.constant(float("nan"), "float32")))


def unknown_operator(build: Builder, value: ir.Value) -> ir.Value:
    """An operator that no runtime has."""
    return _like(value, build("NoSuchAttention", value, domain=MICROSOFT))


def scaled_behind_a_cache(build: Builder, value: ir.Value) -> ir.Value:
    """Wrong in calls of one position only."""
    one, factor = build.constant([1]), build.constant(1.25, "float32")
    step = build("Equal", build("Shape", value, start=2, end=3), one)  # of ``[B, H, I, D]``
    return _like(value, build("Where", step, build("Mul", value, factor), value))


def of_another_shape(build: Builder, value: ir.Value) -> ir.Value:
    """The same value, of which the file says that it has more channels."""
    assert value.shape is not None
    made = _like(value, build("Identity", value))
    made.shape = ir.Shape([*value.shape[:-1], 4321])
    return made


def too_small_for_float16(build: Builder, value: ir.Value) -> ir.Value:
    """The same value, by way of a factor that float16 does not have."""
    small = _like(value, build("Mul", value, build.constant(2.0**-30, "float32")))
    return _like(value, build("Div", small, build.constant(2.0**-30, "float32")))


CHANGES: Mapping[str, Change] = {
    "wrong values": scaled,
    "NaN": not_a_number,
    "an operator that is not loaded": unknown_operator,
}


def tamper(
    monkeypatch: pytest.MonkeyPatch, change: Change, where: Callable[[str, Spec, Capability], bool], *, alone: bool
) -> None:
    """Change the result of sites that are told by name, Spec and operator.

    Args:
        monkeypatch: undoes it.
        change: of the result.
        where: tells the sites.
        alone: whether a site that is run by itself is changed too; its name is then ``site``.
    """
    emit = emitting.emit

    def wrongly(spec: Spec, inputs: Any, outputs: Any, row: Capability, build: Builder, shared: Any) -> Any:
        made = emit(spec, inputs, outputs, row, build, shared)
        name = build.fresh("named").rsplit(".named.", 1)[0]
        return {key: change(build, value) for key, value in made.items()} if where(name, spec, row) else made

    monkeypatch.setattr(onnx_rewrite, "emit", wrongly)
    if alone:
        monkeypatch.setattr(emitting, "emit", wrongly)


def _like(value: ir.Value, made: ir.Value) -> ir.Value:
    made.shape, made.dtype = value.shape, value.dtype
    return made
