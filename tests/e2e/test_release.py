"""Giving memory back between the models of a conversion."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch

from attncompile.convert import memory
from attncompile.convert.calibration import Call
from attncompile.convert.recorded import recorded

ON_LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems do not say what is mapped")


@pytest.mark.parametrize(
    ("sizes", "times"),
    (
        ((0,), 1),
        ((0, 1 - 1e-9), 1),
        ((0, 1), 2),
        ((1, 0, 1), 2),
        ((0, None), 2),
    ),
    ids=("first", "hardly-grown", "grown", "shrunk-between", "nothing-known"),
)
@pytest.mark.parametrize("function", [memory.release, memory.let_go_of_much], ids=lambda function: function.__name__)
def test_only_a_process_that_has_grown_looks_for_what_is_free(
    function: Callable[[], None], sizes: tuple[float | None, ...], times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To look for garbage takes longer than to look through mappings, so it waits for more. Sizes are in that unit."""
    much = {memory.release: memory.GROWN, memory.let_go_of_much: memory.SOME}[function]
    assert memory.SOME < memory.GROWN
    base, look = 1 << 30, {memory.release: (memory.gc, "collect"), memory.let_go_of_much: (memory, "_mapped")}
    for name in ("_collected", "_let_go"):
        monkeypatch.setattr(memory, name, memory.Watermark())
    monkeypatch.setattr(memory.gc, "collect", mock.Mock())
    with mock.patch.object(*look[function], return_value=[]) as looked:
        for size in sizes:
            resident = None if size is None else base + int(size * much)
            with mock.patch.object(memory, "_resident", return_value=resident):
                function()
    assert looked.call_count == times


def test_calls_of_a_small_model_do_not_look_through_the_mappings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That takes a tenth of a second in a process with many libraries, longer than the call."""
    looked, sizes = mock.Mock(return_value=[]), [1 << 30]
    monkeypatch.setattr(memory, "_mapped", looked)
    monkeypatch.setattr(memory, "_resident", lambda: sizes[-1])
    memory.let_go()
    looked.reset_mock()
    calls = [Call((torch.tensor(number),), {}, f"call {number}") for number in range(6)]
    recorded(lambda call: {"x": call.args[0]}, calls, tmp_path / "small")
    assert looked.call_count == 0

    def grows(call: Call) -> dict[str, torch.Tensor]:
        sizes.append(sizes[-1] + memory.SOME)
        return {"x": call.args[0]}

    recorded(grows, calls, tmp_path / "large")
    assert looked.call_count == len(calls) - 1  # in front of each but the first


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


@pytest.mark.parametrize(("pages", "stays"), [("Anonymous", True), ("Swap", True), ("Private_Dirty", False)])
def test_weights_that_were_written_to_stay(pages: str, stays: bool) -> None:
    """A page that was changed is in no file, in memory or out of it. One that is dirty alone is that of a file."""
    before, line, after = SMAPS.partition("model.safetensors")
    name = f"\n{pages}:"
    start = after.index(name) + len(name)
    end = after.index("\n", start)
    written = before + line + after[:start] + " 4 kB" + after[end:]
    assert memory._unwritten(written) == ([] if stays else [(0x7F0000000000, 0x400000)])


def test_no_weights_are_mapped_where_no_file_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.Path, "read_text", mock.Mock(side_effect=OSError))
    assert memory._mapped() == []


ELEMENTS = 1 << 24


def mapped(file: Path) -> torch.Tensor:
    """Ones in float32, in a file that is mapped."""
    torch.ones(ELEMENTS).numpy().tofile(file)
    return torch.from_file(str(file), shared=False, size=ELEMENTS)


def resident(file: Path) -> int:
    """Bytes of a mapped file that are in the memory of the process."""
    _, _, behind = Path("/proc/self/smaps").read_text().partition(str(file))
    return 1024 * int(behind.partition("Rss:")[2].split()[0])


@ON_LINUX
def test_pages_of_a_file_that_was_just_written_are_let_go(tmp_path: Path) -> None:
    file = tmp_path / f"x{memory.RESULT}"
    tensor = mapped(file)
    assert tensor.sum() == ELEMENTS
    assert resident(file) == tensor.nbytes
    memory.let_go()
    assert resident(file) == 0
    assert tensor.sum() == ELEMENTS


@ON_LINUX
def test_what_was_written_to_pages_of_a_file_is_not_lost(tmp_path: Path) -> None:
    file = tmp_path / f"x{memory.RESULT}"
    tensor = mapped(file)
    tensor[1234567] = 5.0
    memory.let_go()
    assert tensor[1234567] == 5.0 and tensor.sum() == ELEMENTS + 4


@ON_LINUX
def test_a_model_keeps_few_pages_of_its_weights_while_it_runs(tmp_path: Path) -> None:
    """Sixteen modules of a file, of which two are read between two looks."""
    file = tmp_path / "x.safetensors"
    tensor = mapped(file)
    width, most = 1024, []
    layers = [torch.nn.Linear(width, width, bias=False) for _ in range(ELEMENTS // width**2)]
    for layer, weight in zip(layers, tensor.split(width**2), strict=True):
        layer.weight = torch.nn.Parameter(weight.reshape(width, width), requires_grad=False)
    model = torch.nn.Sequential(*layers)
    for layer in layers:
        layer.register_forward_pre_hook(lambda *_: most.append(resident(file)))
    states = torch.full((1, width), 1e-3)
    expected = model(states)
    most.clear()
    memory.let_go()
    with memory.read_by_modules(model, 2 * layers[0].weight.nbytes):
        assert torch.equal(model(states), expected)
    assert len(most) == len(layers)
    assert max(most) <= 4 * layers[0].weight.nbytes  # twice as many: the system maps pages around those that are wanted
    most.clear()
    model(states)
    assert max(most) > 10 * layers[0].weight.nbytes  # behind the block nothing is let go


class Heap(ctypes.Structure):
    """glibc's ``mallinfo2``."""

    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd")]
    _fields_ += [(name, ctypes.c_size_t) for name in ("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]


def large_blocks() -> tuple[bool, bool]:
    """Whether a block of 8 MB is mapped by itself while a conversion runs, and whether one is behind it."""
    library = ctypes.CDLL(None)
    library.mallinfo2.restype, library.malloc.restype = Heap, ctypes.c_void_p
    size = 8 << 20

    def mapped() -> bool:
        before = library.mallinfo2().hblkhd
        block = ctypes.c_void_p(library.malloc(size))
        by_itself = bool(library.mallinfo2().hblkhd - before >= size)
        library.free(block)
        return by_itself

    with memory.large_blocks_given_back():
        during = mapped()
    return during, mapped()


@ON_LINUX
def test_while_a_conversion_runs_large_blocks_are_mapped_by_themselves() -> None:
    """So they go back to the system when they are freed, whatever was allocated behind them.

    In a process of its own: where others have left a free block of that size, it is taken instead.
    """
    if not hasattr(ctypes.CDLL(None), "mallinfo2"):
        pytest.skip("another C library")
    code = "from tests.e2e.test_release import large_blocks; print(large_blocks())"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.split("\n")[0] == str((True, False)), "behind it as the allocator comes to it by itself"
