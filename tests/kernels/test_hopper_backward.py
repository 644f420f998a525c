"""The kernels before and after the backward kernel for Hopper GPUs, in Triton's interpreter."""

from __future__ import annotations

import pytest

from tests.kernels.interpreter import Interpreter


@pytest.mark.parametrize("name", ("values-of-their-own", "log-sum-exp", "narrower", "window-56"))
def test_row_values_and_sums_in_the_order_of_registers(name: str, interpreter: Interpreter) -> None:
    answer = interpreter.ask(hopper_backward=name)
    assert "failure" not in answer, answer["failure"]
    assert answer["passed"] == [True, True, True]
