"""Python's garbage collector put aside for the length of a call.

A captured model is a heap of millions of objects that live on, and the collector walks over all of it again and again
while a graph is read, which makes few cycles of its own: a third of the time with 64 layers.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """No collection inside; on again behind it if it was on before."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
