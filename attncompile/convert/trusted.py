"""Which packages were made by this user on this machine, and so may run here without being asked about.

A package is machine code: opening it runs it. Hashes in its own folder only tell damage, since whoever forges a package
forges them too. So a conversion leaves the hash of what it made in the user's private cache.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from attncompile.codegen.triton.cache import cache_folder
from attncompile.frontends.errors import InputError


def file_digest(file: Path) -> str:
    """SHA-256 of a file. Raises InputError when it cannot be read."""
    try:
        with file.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    except OSError as error:
        reason = f"{file.name} cannot be read ({error.strerror})"
        raise InputError(reason, file.parent, "convert the model again") from error


def remember(digest: str) -> None:
    """Note that this user made a file with this hash."""
    (cache_folder("packages") / digest).touch()


def is_made_here(digest: str) -> bool:
    """Whether this user made a file with this hash on this machine."""
    return (cache_folder("packages") / digest).is_file()


__all__ = ["file_digest", "is_made_here", "remember"]
