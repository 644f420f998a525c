"""What the sanitizer benchmark reads off a tool's output."""

from __future__ import annotations

from benchmarks.sanitize import SAMPLES, case_of, merged, read, said
from benchmarks.sanitizer_controls import CONTROLS

OUTPUT = """========= COMPUTE-SANITIZER
begin dense/causal
end dense/causal right
begin dense/full
========= Invalid __global__ read of size 2 bytes
=========     at attend_forward+0x230
=========     by thread (3,0,0) in block (1,0,0)
=========
end dense/full right
a line of the program
========= ERROR SUMMARY: 1 error
"""


def test_reports_belong_to_the_sample_that_ran() -> None:
    row = merged("memcheck", [{**read(OUTPUT), "ending": "exit code 0", "seconds": 1.0}])
    assert row["summaries"] == ["1 error"] and row["outside"] == []
    assert row["samples"]["dense/causal"] == {"results": "right", "reports": 0, "first": []}
    assert row["samples"]["dense/full"]["reports"] == 1
    assert row["samples"]["dense/full"]["first"][:2] == [
        "Invalid __global__ read of size 2 bytes",
        "at attend_forward+0x230",
    ]
    assert said(row).endswith("2 samples, not clean: dense/full: right, 1")


def test_a_sample_that_never_ended_has_no_result() -> None:
    found = read("begin dense/full\n========= Program hit an error\n")
    assert found["samples"]["dense/full"]["results"] == "no result"


def test_every_sample_is_a_row_of_the_tests() -> None:
    names = [sample.name for sample in SAMPLES]
    assert len(set(names)) == len(names)
    for sample in SAMPLES:
        if sample.kind == "control":
            assert sample.row in CONTROLS
            continue
        case = case_of(sample)
        assert case.name == sample.row and case.sizes
