"""What a form of a model gave on some calls, kept in files: the form itself need not stay in memory to be compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from attncompile.convert.artifact import Progress, silent
from attncompile.convert.calibration import Call


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
        run: a form of a model; calls: told apart by what they are called.
        folder: for the files; it must outlive what is returned.
        progress: told each call as it begins.
    """
    folder.mkdir()
    found: dict[str, dict[str, _Kept] | Exception] = {}
    for number, call in enumerate(calls):
        progress(f"{call.what} ({number + 1} of {len(calls)})")
        try:
            results = run(call)
        except (ValueError, RuntimeError) as error:
            found[call.what] = error.with_traceback(None)  # its frames hold the results so far
            continue
        kept: dict[str, _Kept] = {}
        for place, (name, tensor) in enumerate(results.items()):
            kept[name] = _Kept(folder / f"{number}-{place}", tensor.shape, tensor.dtype)
            tensor.contiguous().flatten().view(torch.uint8).numpy().tofile(kept[name].file)
        found[call.what] = kept

    def again(call: Call) -> Mapping[str, torch.Tensor]:
        known = found[call.what]
        if isinstance(known, Exception):
            raise known
        return {name: one.read() for name, one in known.items()}

    return again


__all__ = ["recorded"]
