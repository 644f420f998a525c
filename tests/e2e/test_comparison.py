"""What is judged when a result runs in another runtime: growth over the unrewritten export there, and the export."""

from __future__ import annotations

import pytest
import torch

from attncompile.convert.calibration import Call
from attncompile.convert.comparison import (
    ABSOLUTE,
    DoesNotRunError,
    Inputs,
    Outputs,
    Runs,
    compare_on,
    distances,
    runtime_notes,
)
from attncompile.frontends.errors import InputError

ALLOWED = ABSOLUTE[torch.float32]
CALL = Call((), {}, "a call")
EXACT = torch.linspace(-10, 10, 64, dtype=torch.float64)


def off_by(error: float) -> Outputs:
    """The output with one element off by that much."""
    moved = EXACT.clone()
    moved[7] += error
    return {"hidden": moved.float()}


def failures(converted: float, unrewritten: float, original: float = 0.0, runtime: str = "ONNX Runtime") -> list[str]:
    """Metrics that are beyond their tolerance, for results with these errors."""
    runs = Runs(
        original=lambda call: off_by(original),
        converted=lambda call: off_by(converted),
        unrewritten=lambda call: off_by(unrewritten),
        exact=lambda call: {"hidden": EXACT},
        runtime=runtime,
    )
    found = distances(CALL, runs, runs.converted(CALL), judged=True)
    return [entry.metric for entry in found if not entry.passed]


@pytest.mark.parametrize("converted", [0.0, 5 * ALLOWED, 10 * ALLOWED, 10.9 * ALLOWED])
def test_an_error_of_the_runtime_may_stay_or_shrink(converted: float) -> None:
    """An error that shrinks by more than the limit is no failure either."""
    assert failures(converted, unrewritten=10 * ALLOWED) == []


def test_canary_an_error_that_grows_fails() -> None:
    assert failures(11.5 * ALLOWED, unrewritten=10 * ALLOWED) == [
        "error of hidden against float64 in ONNX Runtime before and after rewriting"
    ]
    assert failures(1.5 * ALLOWED, unrewritten=0.0) != []


def test_canary_the_export_is_no_excuse_for_the_rewrite_in_one_runtime() -> None:
    """Without another runtime the original itself is the yardstick, whatever the graph does."""
    assert failures(1.5 * ALLOWED, unrewritten=1.5 * ALLOWED, runtime="") == ["error of hidden against float64"]
    assert failures(0.0, unrewritten=0.0, original=5 * ALLOWED, runtime="") == []


def test_canary_a_wrong_export_is_no_rounding() -> None:
    """Beyond half of the digits of float32 the export does not compute the model."""
    limit = float(torch.finfo(torch.float32).eps ** 0.5 * EXACT.abs().max())
    assert failures(0.9 * limit, unrewritten=0.9 * limit) == []
    assert failures(1.1 * limit, unrewritten=1.1 * limit) == [
        "error of hidden against float64 in PyTorch and in the unrewritten export"
    ]


@pytest.mark.parametrize(("unrewritten", "said"), [(0.5 * ALLOWED, 0), (10 * ALLOWED, 1)])
def test_what_the_runtime_rounds_by_itself_is_said(unrewritten: float, said: int) -> None:
    runs = Runs(
        original=lambda call: off_by(0.0),
        converted=lambda call: off_by(0.0),
        unrewritten=lambda call: off_by(unrewritten),
        exact=lambda call: {"hidden": EXACT},
        runtime="ONNX Runtime",
    )
    notes = runtime_notes(distances(CALL, runs, runs.converted(CALL), judged=True), runs.runtime)
    assert len(notes) == said
    assert all("ONNX Runtime's own rounding of this model, unrewritten: the error of hidden" in note for note in notes)


def strict(call: Call) -> Outputs:
    """A given file that does not take every call."""
    if call is not CALL:
        raise RuntimeError("ONNX Runtime: an axis that does not broadcast")
    return off_by(0.0)


def test_a_call_that_the_given_file_does_not_take_is_not_compared() -> None:
    """An operator in the result may be more lenient than what it stands for."""
    other = Call((), {}, "another call")
    runs = Runs(original=strict, converted=lambda call: off_by(0.0), unrewritten=strict)
    found = compare_on(Inputs((CALL, other)), runs, None)
    assert [entry.inputs for entry in found.entries] == ["a call"]
    assert any("another call was not compared: the given model does not take it" in note for note in found.notes)
    with pytest.raises(DoesNotRunError, match="does not take it"):
        compare_on(Inputs((other,)), runs, None)


def test_an_export_that_takes_no_call_is_not_said_to_disagree() -> None:
    """It has the sizes of the example alone."""
    other = Call((), {}, "another call")
    runs = Runs(original=lambda call: off_by(0.0), converted=strict, unrewritten=strict, runtime="ONNX Runtime")
    with pytest.raises(InputError, match=r"has fixed sizes, and takes none of the calls .*: another call; export it"):
        compare_on(Inputs((other,)), runs, None)


def test_an_original_that_fails_in_float64_is_compared_without() -> None:
    """A number of its code is too large for float32 there."""

    def fails(call: Call) -> Outputs:
        raise RuntimeError("value cannot be converted to type float without overflow")

    def runs(error: float) -> Runs:
        return Runs(lambda call: off_by(0.0), lambda call: off_by(error), lambda call: off_by(0.0), fails, "elsewhere")

    found = compare_on(Inputs((CALL, CALL)), runs(0.5 * ALLOWED))
    assert [entry.passed for entry in found.entries] == [True, True] and found.problem() is None
    (note,) = found.notes
    assert note.startswith("not compared with float64, in which the original fails: value cannot be converted")
    assert "and 0.0001 is allowed" in (compare_on(Inputs((CALL,)), runs(1.5 * ALLOWED)).problem() or "")
