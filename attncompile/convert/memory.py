"""Memory of a conversion: what is free goes back to the system, and pages that files hold are dropped.

Weights lie in files that are mapped: a checkpoint's, and those of an export. So do results that are compared. A page of
a file that was read stays in memory until something drops it, so whoever reads many of them tells
:class:`Reading` how much that was.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnx_ir
import torch

GROWN = 1 << 26
"""Bytes that are worth looking for: the garbage collector looks through all objects of a process, which takes half a
second where many libraries are loaded, fifty times in a conversion."""

BLOCK, LARGEST_BLOCK = 1 << 20, 1 << 25
"""Bytes from which on glibc's allocator maps a block by itself while a conversion runs; and what it comes to by itself
in a process that has given back a block of that size."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of glibc: free bytes at the end of its memory that it keeps, and bytes from which on a block is mapped by itself."""


@contextmanager
def large_blocks_given_back() -> Iterator[None]:
    """While the block runs, what is freed of a megabyte or more goes back to the system at once.

    As it comes, glibc's allocator keeps blocks of up to 32 MB for the next one as soon as one of that size was freed,
    and between them lies what is in use: a session of ONNX Runtime then takes a tenth more than its tensors. How it was
    set cannot be asked for, so behind the block it is what a process that has freed such blocks has come to.
    """
    _keep_blocks_below(BLOCK)
    try:
        yield
    finally:
        _keep_blocks_below(LARGEST_BLOCK)


def _keep_blocks_below(size: int) -> None:
    with contextlib.suppress(OSError, AttributeError):  # another C library, which has no such function
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_THRESHOLD, size)
        library.mallopt(M_TRIM_THRESHOLD, 2 * size)


SOME = 1 << 24
"""Bytes that are worth looking through the mappings of the process for, which takes some forty milliseconds."""


@dataclass
class Watermark:
    """How much memory a process had when something was done about it.

    Attributes:
        lowest: bytes then, or the least since.
    """

    lowest: int = 0

    def grown(self, much: int = GROWN) -> bool:
        """Whether the process has grown by this much; so it has where no file says what it has."""
        resident = _resident()
        if resident is None or resident >= self.lowest + much:
            return True
        self.lowest = min(self.lowest, resident)
        return False

    def settle(self) -> None:
        """Something was done."""
        self.lowest = _resident() or 0


_collected, _let_go = Watermark(), Watermark()
"""Of the last :func:`release` that did something, and of the last :func:`let_go`."""


def release() -> None:
    """Look for garbage, and :func:`let_go`. Where the process has not grown by :data:`GROWN` since the last time,
    nothing is done.
    """
    if _collected.grown():
        gc.collect()
        let_go()
        _collected.settle()


def let_go() -> None:
    """Give the system back what is free: the allocator of glibc keeps it, after a session as much as its weights. Pages
    of :data:`MAPPED` files go too; they are read again where they are wanted.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library, which has no such functions
        library = ctypes.CDLL(None, use_errno=True)
        library.malloc_trim(0)
        for start, size in _mapped():
            library.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), MADV_DONTNEED)
    _let_go.settle()


def let_go_of_much() -> None:
    """:func:`let_go`, where the process has grown by :data:`SOME` since the last time: to look through the mappings
    takes as long as a small model takes for a call.
    """
    if _let_go.grown(SOME):
        let_go()


MOST = 1 << 27
"""Bytes of files that are read before their pages are let go: to look through the mappings of a process takes some
forty milliseconds."""


class Reading:
    """Counts what is read of mapped files, and lets their pages go before they are many.

    Args:
        most: bytes that are read in between.
    """

    def __init__(self, most: int = MOST) -> None:
        self._most, self._read = most, 0

    def read(self, *tensors: torch.Tensor | onnx_ir.TensorProtocol) -> None:
        """Some tensors were read, which may lie in such files."""
        self._read += sum(tensor.nbytes for tensor in tensors)
        if self._read >= self._most:
            self._read = 0
            let_go()


@contextmanager
def read_by_modules(model: torch.nn.Module, most: int = MOST) -> Iterator[None]:
    """While the block runs, pages of a model's weights are let go behind the modules that have read them.

    Args:
        model: its weights may lie in mapped files; most: as of :class:`Reading`.
    """
    reading = Reading(most)
    owning = [(module, list(module.parameters(recurse=False))) for module in model.modules()]
    hooks = [
        module.register_forward_hook(lambda *_, owned=owned: reading.read(*owned)) for module, owned in owning if owned
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _resident() -> int | None:
    """Bytes of memory that the process has now; ``None`` where no file says so."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None


RESULT = ".result"
"""How files end that hold what a form of a model gave."""

MAPPED = (".safetensors", ".data", RESULT)
"""How files end that are mapped: weights, and results."""

MADV_DONTNEED = 4
"""Of Linux: pages of the range are dropped; those of a file are read again from it."""


def _mapped() -> list[tuple[int, int]]:
    """Address and size of the mappings of such files of which no page was written to: all of those is in the files."""
    try:
        return _unwritten(Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace"))
    except OSError:  # another system
        return []


WRITTEN = ("Anonymous:", "Swap:")
"""What Linux calls pages of a mapping that were written to and belong to no file any more: in memory, and those that it
has put out of memory. A dirty page that is none of these is one of a file that is still to be written to the disk; the
system keeps it until then, mapped or not."""


def _unwritten(text: str) -> list[tuple[int, int]]:
    """What :func:`_mapped` gives, of such a file's text."""
    found: list[tuple[int, int]] = []
    current = False
    for line in text.splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):
            start, _, end = name.partition("-")
            current = rest[-1].endswith(MAPPED)
            if current:
                found.append((int(start, 16), int(end, 16) - int(start, 16)))
        elif current and name in WRITTEN and rest[0] != "0":
            found.pop()
            current = False
    return found
