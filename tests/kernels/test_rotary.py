"""From a module to the kernels that rotate and round: lifted, rewritten, generated, interpreted."""

from __future__ import annotations

import pytest

from attncompile.codegen.triton.structure import why_not_spec
from attncompile.ir import Position, Quantize, print_spec
from tests.kernels.interpreter import Interpreter
from tests.lift.rotary_models import Shape, decided_site

KERNELS = {
    "half-fp8": (Shape(), "fuse.rotary, quantize.fp8"),
    "interleaved-int8": (Shape(pairs="interleaved"), "fuse.rotary, quantize.int8"),
    "partial-int8": (Shape(rotated=6, heads=2), "fuse.rotary, quantize.int8"),
    "two-maps-fp8": (Shape(own_angles=True), "fuse.rotary, quantize.fp8(values=false)"),
    "queries-alone-int8": (Shape(keys="cached"), "fuse.rotary, quantize.int8(block=48)"),
}


@pytest.mark.parametrize("name", KERNELS)
def test_a_lifted_site_as_generated_kernels(name: str, interpreter: Interpreter) -> None:
    """From a module to the kernels that rotate and round, interpreted, against the Spec in float64."""
    decision = decided_site(*KERNELS[name])
    spec = decision.spec
    assert spec is not None and decision.passes is not None and len(decision.passes.applied) == 2
    assert why_not_spec(spec) is None
    rounded = {step.tensor for step in spec.operations if isinstance(step, Quantize)}
    rotated = {step.out for step in spec.operations if isinstance(step, Position)}
    assert rotated <= rounded and len(rotated) == (1 if "alone" in name else 2)
    sizes = {size: length for size, length in (("B", 2), ("I", 37), ("J", 50)) if f"{size}" in print_spec(spec)}
    answer = interpreter.ask(text=print_spec(spec), sizes=sizes, dtype="float32")
    assert "failure" not in answer, answer["failure"]
    for output, error, limit, passed in answer["outcomes"]:
        assert passed, f"{output} is off by {error:.3g}, allowed is {limit:.3g}"
