"""What a form of a model gave on some calls, kept in files: the form itself need not stay in memory to be compared."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from attncompile.convert.artifact import Progress, silent
from attncompile.convert.calibration import Call
from attncompile.convert.memory import RESULT, let_go_of_much
from attncompile.frontends.torch_internals import flatten


@dataclass(frozen=True)
class _Kept:
    """A tensor in a file."""

    file: Path
    shape: torch.Size
    dtype: torch.dtype

    def read(self) -> torch.Tensor:
        """The tensor; the file is mapped, not read, and is not changed through it."""
        if not self.shape.numel():
            return torch.empty(self.shape, dtype=self.dtype)
        mapped = torch.from_file(str(self.file), shared=False, size=self.shape.numel(), dtype=self.dtype)
        return mapped.reshape(self.shape)


def recorded(
    run: Callable[[Call], Mapping[str, torch.Tensor]],
    calls: Sequence[Call],
    folder: Path,
    progress: Progress = silent,
) -> Callable[[Call], Mapping[str, torch.Tensor]]:
    """Run all calls now; what is returned gives back what each gave, or raises what it raised.

    Args:
        run: a form of a model; calls: told apart by what they are called and by their arguments.
        folder: for the files; it must outlive what is returned.
        progress: told each call as it begins.
    """
    folder.mkdir()
    found: dict[tuple[str, bytes], dict[str, _Kept] | Exception] = {}
    for number, call in enumerate(calls):
        progress(f"{call.what} ({number + 1} of {len(calls)})")
        which = _identity(call)
        let_go_of_much()  # what was free when the form was loaded, and behind the call before
        try:
            found[which] = _written(run(call), folder, number)
        except (ValueError, RuntimeError) as error:
            found[which] = error.with_traceback(None)  # its frames hold the results so far

    def again(call: Call) -> Mapping[str, torch.Tensor]:
        known = found[_identity(call)]
        if isinstance(known, Exception):
            raise known
        return {name: one.read() for name, one in known.items()}

    return again


def _written(results: Mapping[str, torch.Tensor], folder: Path, number: int) -> dict[str, _Kept]:
    """The results of a call in files of their own."""
    kept: dict[str, _Kept] = {}
    for place, (name, tensor) in enumerate(results.items()):
        kept[name] = _Kept(folder / f"{number}-{place}{RESULT}", tensor.shape, tensor.dtype)
        _bytes(tensor).tofile(kept[name].file)
    return kept


def _identity(call: Call) -> tuple[str, bytes]:
    """What a call is called, and a digest of its arguments: several pieces of text are called the same."""
    digest = hashlib.blake2b()
    for leaf in flatten((call.args, dict(call.kwargs)))[0]:
        if isinstance(leaf, torch.Tensor):
            digest.update(f"{leaf.dtype} {tuple(leaf.shape)} ".encode())
            digest.update(_bytes(leaf).tobytes())
        else:
            digest.update(f"{leaf!r} ".encode())
    return call.what, digest.digest()


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


__all__ = ["recorded"]
