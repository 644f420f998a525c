"""Generated modules as files: Triton reads a kernel's source from the file that defines it.

The files lie in the user's cache folder, which nobody else may write, named by the hash of their content,
written whole or not at all.
"""

from __future__ import annotations

import importlib.util
import os
import stat
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from attncompile.codegen.triton.generate import GeneratedModule
from attncompile.codegen.triton.ready import wait_until_ready


def cache_folder(what: str = "triton") -> Path:
    """The private folder for one kind of file, generated modules unless said, made when needed.

    ``$ATTNCOMPILE_CACHE`` or ``$XDG_CACHE_HOME/attncompile`` or ``~/.cache/attncompile``, then ``what``.
    Where that cannot be made, or others may write to it, a new temporary folder serves this process.
    """
    chosen = os.environ.get("ATTNCOMPILE_CACHE")
    base = (
        Path(chosen)
        if chosen
        else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "attncompile"
    )
    folder = base / what
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if _private(folder):
            return folder
    except OSError:
        pass  # a read-only home is common in containers
    return _temporary_folder(what)


def _private(folder: Path) -> bool:
    status = folder.stat()
    if hasattr(os, "getuid") and status.st_uid != os.getuid():
        return False
    if status.st_mode & 0o077:
        os.chmod(folder, 0o700)
    return stat.S_IMODE(folder.stat().st_mode) & 0o022 == 0 and os.access(folder, os.W_OK | os.X_OK)


_temporary: dict[str, Path] = {}


def _temporary_folder(what: str) -> Path:
    if what not in _temporary:
        _temporary[what] = Path(tempfile.mkdtemp(prefix=f"attncompile-{what}-"))
    return _temporary[what]


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that nobody ever sees a part of it: beside its place first, and then in one step there.

    Raises:
        OSError: when the folder takes no file; nothing is left behind.
    """
    descriptor, name = tempfile.mkstemp(prefix=".writing-", suffix=path.suffix, dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write(module: GeneratedModule, folder: Path) -> Path:
    """Write the module's file, atomically; a file that is there with the same text is left alone."""
    path = folder / f"{module.name}_{module.digest[:16]}.py"
    if path.is_file() and not path.is_symlink() and path.read_bytes() == module.source.encode():
        return path
    write_whole(path, module.source.encode())
    return path


_modules: dict[str, ModuleType] = {}


def load_module(module: GeneratedModule) -> ModuleType:
    """The module, imported from its file in the cache folder.

    Raises:
        ImportError: when Triton is not installed.
    """
    found = _modules.get(module.digest)
    if found is None:
        wait_until_ready()
        path = write(module, cache_folder())
        name = f"attncompile_generated.{module.name}_{module.digest[:16]}"
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise ImportError(f"cannot import {path}")
        found = importlib.util.module_from_spec(spec)
        sys.modules[name] = found  # torch and pickle look modules up by name
        try:
            spec.loader.exec_module(found)
        except BaseException:
            del sys.modules[name]
            raise
        _modules[module.digest] = found
    return found


def load(module: GeneratedModule) -> Callable[..., Any]:
    """The module's ``attend``: takes the Spec's inputs in order, returns its outputs; forward only."""
    return load_module(module).attend
