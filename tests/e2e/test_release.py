"""Giving memory back between the models of a conversion."""

from __future__ import annotations

from unittest import mock

import pytest

from attncompile.convert import runtime


@pytest.mark.parametrize(
    ("sizes", "collections"),
    (
        ((0,), 1),
        ((0, runtime.GROWN - 1), 1),
        ((0, runtime.GROWN), 2),
        ((runtime.GROWN, 0, runtime.GROWN), 2),
        ((0, None), 2),
    ),
    ids=("first", "hardly-grown", "grown", "shrunk-between", "nothing-known"),
)
def test_only_a_process_that_has_grown_looks_for_garbage(
    sizes: tuple[int | None, ...], collections: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = 1 << 30
    monkeypatch.setattr(runtime, "_held", 0)
    with mock.patch.object(runtime.gc, "collect") as collect:
        for size in sizes:
            resident = None if size is None else base + size
            with mock.patch.object(runtime, "_resident", return_value=resident):
                runtime.release()
    assert collect.call_count == collections


def test_the_resident_memory_is_that_of_the_process() -> None:
    before = runtime._resident()
    if before is None:
        pytest.skip("no file says what this process has")
    held = bytearray(b"x") * (1 << 27)
    after = runtime._resident()
    assert after is not None and len(held) <= 1.1 * (after - before)
