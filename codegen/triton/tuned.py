"""What was measured to be fastest on a device, kept in the user's cache folder.

A file for each Spec, device and set of versions holds a choice for each *bucket*: the sizes of a call, each rounded up
to a power of two, and the element type of its operands. Only :mod:`attncompile.codegen.triton.tuning` writes them. A
choice says how a kernel is launched and never what it computes; one that does not run is left aside with a warning.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import torch
from pydantic import TypeAdapter, ValidationError

from attncompile.codegen.triton.cache import cache_folder, write_whole
from attncompile.codegen.triton.tiles import TunedTile
from attncompile.ir.expr import Size
from attncompile.kernels.hopper import HopperTile
from attncompile.kernels.operators import parsed


@dataclass(frozen=True)
class Choice:
    """What computes a Spec in one bucket.

    Attributes:
        target: generated in plain Triton or in Gluon, PyTorch's own operator, or whatever the tables say.
        tile: how the kernel in Triton is launched, when not as the table says.
        hopper: how the kernel in Gluon divides its work, when not as the table says.
        milliseconds: of a call; instead: of what would have been called without this.
        untried: alternatives that the time did not reach: with some, tuning goes on the next time.
    """

    target: Literal["table", "triton", "gluon", "sdpa"]
    tile: TunedTile | None = None
    hopper: HopperTile | None = None
    milliseconds: float = 0.0
    instead: float = 0.0
    untried: int = 0

    def describe(self) -> str:
        """Target and tile in a few words."""
        if self.hopper is not None:
            fields = dataclasses.asdict(self.hopper)
            return "gluon " + " ".join(f"{name}={value}" for name, value in fields.items() if value is not False)
        if self.tile is not None:
            tile = self.tile.tile
            rows = "" if self.tile.kernel == "decode" else f"{tile.queries} x "
            return f"triton {rows}{tile.keys}, {tile.warps} warps, {tile.stages} stages"
        return {"table": "as the tables say", "sdpa": "sdpa"}.get(self.target, f"{self.target} as the tables say")


@dataclass(frozen=True)
class _Kept:
    """What a file holds."""

    device: str
    versions: dict[str, str]
    choices: dict[str, Choice]


@functools.cache
def _file() -> TypeAdapter[_Kept]:
    return TypeAdapter(_Kept)


@functools.lru_cache(maxsize=1024)
def _places(text: str) -> tuple[tuple[str, int, int], ...]:
    """Each size symbol of a Spec with an input and an axis of that which have it."""
    places: dict[str, tuple[str, int, int]] = {}
    for number, value in enumerate(parsed(text).inputs):
        for axis, each in enumerate(value.type.axes):
            if isinstance(each.size, Size):
                places.setdefault(each.size.name, (each.size.name, number, axis))
    return tuple(places[name] for name in sorted(places))


def bucket(text: str, inputs: Sequence[torch.Tensor]) -> str:
    """The sizes of a call, each rounded up to a power of two, and the element type of its first real input."""
    real = next((each.dtype for each in inputs if each.is_floating_point()), inputs[0].dtype)
    sizes = ((name, inputs[number].shape[axis]) for name, number, axis in _places(text))
    rounded = [f"{name}{1 << (size - 1).bit_length() if size else 0}" for name, size in sizes]
    return " ".join([*rounded, str(real).removeprefix("torch.")])


@functools.cache
def _versions() -> dict[str, str]:
    found = {}
    for name in ("attncompile", "torch", "triton"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "?"
    return found


def _path(text: str, device: str) -> Path:
    setting = hashlib.sha256(repr((device, sorted(_versions().items()))).encode()).hexdigest()[:16]
    return cache_folder("tuning") / f"{parsed(text).fingerprint()}_{setting}.json"


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def read_choices(text: str, device: torch.device) -> dict[str, Choice]:
    """The choices of a Spec on a device, by bucket; none where nothing was measured.

    A file that cannot be read is told of in a warning and left aside.
    """
    if not any(cache_folder("tuning").iterdir()):  # as nearly everywhere; the rest takes longer
        return {}
    path = _path(text, _name(device))
    try:
        kept = _file().validate_json(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValidationError) as error:
        first = str(error).splitlines()[0]
        warnings.warn(f"{path} is left aside: {first}; remove it to tune again", RuntimeWarning, stacklevel=2)
        return {}
    return dict(kept.choices)


def keep_choices(text: str, device: torch.device, choices: Mapping[str, Choice]) -> Path:
    """Write the choices of a Spec on a device, beside those that are there already, atomically."""
    path = _path(text, _name(device))
    kept = _Kept(_name(device), _versions(), {**read_choices(text, device), **choices})
    write_whole(path, _file().dump_json(kept, indent=2) + b"\n")
    return path


__all__ = ["Choice", "bucket", "keep_choices", "read_choices"]
