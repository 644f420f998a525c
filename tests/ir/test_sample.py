"""Inputs on which two computations are compared leave something to compare."""

from __future__ import annotations

import pytest
import torch

from attncompile.ir.sample import random_tensors
from attncompile.ir.scan import Scan
from tests.cases import CASES, Case

SCANS = [case for case in CASES if any(isinstance(operation, Scan) for operation in case.spec.operations)]


@pytest.mark.parametrize("case", SCANS, ids=lambda case: case.name)
def test_the_state_of_a_scan_stays_bounded(case: Case) -> None:
    """Features that are all positive and a rate near 1 would multiply a state by their squared length in each step."""
    sizes = {"B": 2, "I": 300}
    for seed in range(3):
        tensors = random_tensors(case.spec, sizes, seed, torch.float64, case.ranges)
        largest = max(float(result.abs().max()) for result in case.spec.interpret(tensors))
        keys = 300 * 64  # what a state without decay or rate adds up: numbers of a few, times features of a few
        assert largest < keys, f"seed {seed}"
