"""Giving memory back between the models of a conversion."""

from __future__ import annotations

from unittest import mock

import pytest

from attncompile.convert import memory


@pytest.mark.parametrize(
    ("sizes", "collections"),
    (
        ((0,), 1),
        ((0, memory.GROWN - 1), 1),
        ((0, memory.GROWN), 2),
        ((memory.GROWN, 0, memory.GROWN), 2),
        ((0, None), 2),
    ),
    ids=("first", "hardly-grown", "grown", "shrunk-between", "nothing-known"),
)
def test_only_a_process_that_has_grown_looks_for_garbage(
    sizes: tuple[int | None, ...], collections: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = 1 << 30
    monkeypatch.setattr(memory, "_held", 0)
    with mock.patch.object(memory.gc, "collect") as collect:
        for size in sizes:
            resident = None if size is None else base + size
            with mock.patch.object(memory, "_resident", return_value=resident):
                memory.release()
    assert collect.call_count == collections


def test_the_resident_memory_is_that_of_the_process() -> None:
    before = memory._resident()
    if before is None:
        pytest.skip("no file says what this process has")
    held = bytearray(b"x") * (1 << 27)
    after = memory._resident()
    assert after is not None and len(held) <= 1.1 * (after - before)


SMAPS = """\
55d0c8a00000-55d0c8a21000 rw-p 00000000 00:00 0                          [heap]
Rss:                 132 kB
Private_Dirty:       132 kB
Anonymous:           132 kB
Swap:                  0 kB
7f0000000000-7f0000400000 rw-p 00000000 08:01 131                        /models/model.safetensors
Size:               4096 kB
Rss:                4096 kB
Shared_Dirty:          0 kB
Private_Clean:      4096 kB
Private_Dirty:         0 kB
Anonymous:             0 kB
Swap:                  0 kB
SwapPss:               0 kB
VmFlags: rd wr mr mw me sd
7f0000400000-7f0000401000 r--p 00000000 08:01 132                        /usr/lib/libc.so.6
Private_Dirty:         0 kB
Swap:                  0 kB
"""
"""What Linux says of a process: its heap, weights that are mapped and were not written to, and a library."""


def test_weights_that_were_only_read_are_given_back() -> None:
    assert memory._unwritten(SMAPS) == [(0x7F0000000000, 0x400000)]


@pytest.mark.parametrize("pages", ["Anonymous", "Private_Dirty", "Shared_Dirty", "Swap"])
def test_weights_that_were_written_to_stay(pages: str) -> None:
    """A page that was changed and put out of memory is in no file, and is no longer counted as dirty."""
    before, line, after = SMAPS.partition("model.safetensors")
    name = f"\n{pages}:"
    start = after.index(name) + len(name)
    end = after.index("\n", start)
    written = before + line + after[:start] + " 4 kB" + after[end:]
    assert memory._unwritten(written) == []


def test_no_weights_are_mapped_where_no_file_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.Path, "read_text", mock.Mock(side_effect=OSError))
    assert memory._mapped() == []
