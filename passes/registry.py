"""All passes by name: ours, and those that other distributions offer as entry points
``attncompile.passes``.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable
from importlib.metadata import entry_points

from attncompile.passes import fuse, linearize, quantize, regroup, rotary, sparsify, unround
from attncompile.passes.frame import Options, Pass

GROUP = "attncompile.passes"

OURS: tuple[Pass, ...] = (
    fuse.FUSE,
    rotary.ROTARY,
    sparsify.WINDOW,
    quantize.INT8,
    quantize.FP8,
    unround.UNROUND,
    linearize.DECAY,
    regroup.BOXES,
)


@functools.cache
def all_passes() -> dict[str, Pass]:
    """Every pass by name, ours first.

    Raises:
        ValueError: when an entry point is no pass, is badly declared, or takes a name that is in use.
    """
    found: dict[str, Pass] = {}
    for rewrite in OURS:
        register(found, rewrite, "attncompile")
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        register(found, point.load(), f"entry point {point.name} = {point.value}")
    return found


def register(known: dict[str, Pass], rewrite: object, origin: str) -> None:
    """Add a pass, once it is checked.

    Raises:
        ValueError: for what is no :class:`Pass`, an option without a description, or a name in use.
    """
    if not isinstance(rewrite, Pass):
        raise ValueError(f"{origin} is {type(rewrite).__name__}, not an attncompile.passes.Pass")
    if not (isinstance(rewrite.options, type) and issubclass(rewrite.options, Options)):
        raise ValueError(f"{origin}: options of {rewrite.name} must be a subclass of {GROUP}.Options")
    if rewrite.name in known:
        raise ValueError(f"{origin}: there is already a pass {rewrite.name!r}")
    for name, field in rewrite.options.model_fields.items():
        if not field.description:
            raise ValueError(f"{origin}: option {name!r} of {rewrite.name} has no description")
    known[rewrite.name] = rewrite


def find_pass(name: str) -> Pass:
    """The pass of a name.

    Raises:
        ValueError: for an unknown name; proposes the nearest one.
    """
    passes = all_passes()
    if name in passes:
        return passes[name]
    raise ValueError(f"unknown pass {name!r}{nearest(name, passes)}; the passes are {', '.join(passes)}")


def nearest(word: str, known: Iterable[str]) -> str:
    """`` (did you mean …?)`` where a known word is near."""
    close = difflib.get_close_matches(word, list(known), 1)
    return f" (did you mean {close[0]!r}?)" if close else ""
