"""What Triton has to know once in a process, found out beside other work.

The key of its cache holds a hash of its own installation, some 400 MB: 0.4 s, more than all else that a first call
waits for when its kernel lies in the cache. Where that is empty, a C compiler makes what talks to the driver, which
takes 0.3 s. The first launch of any kernel imports Gluon, 0.1 s where Python may not keep what it compiles.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import threading
from collections.abc import Callable
from pathlib import Path

DEVICES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""Files of which one is there where a GPU is: asking its driver would keep the process from being forked."""

_threads: list[threading.Thread] = []


def get_ready() -> None:
    """Begin, unless there is no Triton or no GPU; returns at once, and does nothing from the second time on.

    To be called when tensors are on the GPU already: what concerns its driver is left out otherwise.
    """
    if _threads or importlib.util.find_spec("triton") is None or not any(Path(each).exists() for each in DEVICES):
        return
    import triton  # noqa: F401 - here, since two threads that import one package may see half of it

    _threads.append(threading.Thread(target=_find_out, name="attncompile-triton-key", daemon=True))
    _threads[0].start()


def wait_until_ready() -> None:
    """Wait for what has begun: two threads would both do it."""
    for thread in _threads:
        thread.join()


def _find_out() -> None:
    """Ask for everything that Triton remembers; what a release does not have is left to the first call."""
    for found in (_gluon, _driver, *(_remembered(module, name) for module, name in REMEMBERED)):
        with contextlib.suppress(Exception):  # what fails here fails again where it is needed, and is told there
            found()


REMEMBERED = (("triton.runtime.cache", "triton_key"), ("triton.runtime.build", "platform_key"))
"""Functions of Triton that compute once and remember."""


def _remembered(module: str, name: str) -> Callable[[], object]:
    return getattr(sys.modules.get(module), name, lambda: None)


def _gluon() -> object:
    """Whoever else imports a part of this package waits for the package first, so that nobody sees half of it."""
    return importlib.import_module("triton.experimental.gluon")


def _driver() -> object:
    import torch
    import triton

    return triton.runtime.driver.active.utils if torch.cuda.is_initialized() else None


__all__ = ["get_ready", "wait_until_ready"]
