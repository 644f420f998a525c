"""What a folder of kernels holds: as data for ``kernels.json``, and as a table for people."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from attncompile import __version__

ASSUMED = (
    "tensors begin at multiples of 16 bytes, lie contiguous along their last axis, and have strides along the others "
    "that are multiples of 16 elements; behind the arguments Triton passes two pointers of its own, null here"
)
"""What a binary takes for granted; modules look before they launch."""


@dataclass(frozen=True)
class Binary:
    """A compiled kernel in the folder.

    Attributes:
        file: its name; kernel: that of the function in the module; symbol: that of the function in the binary.
        target, dtype: what it was compiled for.
        bytes: size of the file.
        threads: of a program.
        shared: bytes of shared memory of a program.
        registers: of a thread; spills: bytes of its stack, where registers that did not fit are kept. ``None`` where
            the binary does not tell.
        arguments: Triton's type of each argument by name, in order.
        constants: what it was compiled with.
    """

    file: str
    kernel: str
    symbol: str
    target: str
    dtype: str
    bytes: int
    threads: int
    shared: int
    registers: int | None
    spills: int | None
    arguments: dict[str, str]
    constants: dict[str, object]


@dataclass(frozen=True)
class Missing:
    """A binary that there is not.

    Attributes:
        target, dtype: what it would have been for.
        reason: why; failed: whether that is a failure, not something that the module is not made for.
    """

    target: str
    dtype: str
    reason: str
    failed: bool


@dataclass(frozen=True)
class KernelFile:
    """A generated module in the folder.

    Attributes:
        file: its name.
        language: ``triton`` or ``gluon``.
        binaries, missing: what it was compiled to, and what not.
    """

    file: str
    language: str
    binaries: tuple[Binary, ...]
    missing: tuple[Missing, ...]


@dataclass(frozen=True)
class SpecKernels:
    """The kernels of one computation.

    Attributes:
        shown: the sites in short, such as ``model.layers.0–29.self_attn``.
        sites: all their names; observed: those where something else reads the weights, so that the model keeps its own.
        spec: the Spec as text; fingerprint: its hash.
        files: the modules.
    """

    shown: tuple[str, ...]
    sites: tuple[str, ...]
    observed: tuple[str, ...]
    spec: str
    fingerprint: str
    files: tuple[KernelFile, ...]


@dataclass(frozen=True)
class WithoutKernel:
    """Sites that have no kernel, and why."""

    shown: str
    sites: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class KernelFolder:
    """What was written.

    Attributes:
        model: whose kernels.
        targets, dtypes: asked for; without dtypes, each Spec's own.
        kernels: by computation, in the order of the model.
        without: sites that have none.
    """

    model: str
    targets: tuple[str, ...]
    dtypes: tuple[str, ...]
    kernels: tuple[SpecKernels, ...]
    without: tuple[WithoutKernel, ...]

    @property
    def failures(self) -> tuple[Missing, ...]:
        """Binaries that should be there and are not."""
        files = [file for made in self.kernels for file in made.files]
        return tuple(missing for file in files for missing in file.missing if missing.failed)

    def __str__(self) -> str:
        return "\n\n".join(_lines(self))


def index_data(found: KernelFolder, triton: str) -> dict[str, Any]:
    """The content of ``kernels.json``; ``triton`` is the release that compiled."""
    return {
        "schema": 1,
        "model": found.model,
        "versions": {"attncompile": __version__, "triton": triton},
        "targets": found.targets,
        "assumed": ASSUMED,
        "kernels": [{key: value for key, value in asdict(each).items() if key != "shown"} for each in found.kernels],
        "without": [{"sites": each.sites, "reason": each.reason} for each in found.without],
    }


def _lines(found: KernelFolder) -> list[str]:
    """A paragraph for each computation with a table of its binaries, then what is missing."""
    rows: list[tuple[str, ...]] = [("", "kernel", "target", "dtype", "registers", "shared", "spilled", "size")]
    for made in found.kernels:
        for file in made.files:
            for number, each in enumerate(file.binaries):
                told = ["–" if value is None else str(value) for value in (each.registers, each.spills)]
                sizes = (told[0], _kibibytes(each.shared), told[1], _kibibytes(each.bytes))
                rows.append((file.file if number == 0 else "", each.kernel, each.target, each.dtype, *sizes))
            if not file.binaries:
                rows.append((file.file, *[""] * 7))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = iter("  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    parts = [f"kernels of {found.model}", next(lines)]
    for made in found.kernels:
        taken = sum(max(1, len(file.binaries)) for file in made.files)
        parts.append("\n".join([", ".join(made.shown), *(next(lines) for _ in range(taken)), *_notes(made)]))
    if found.without:
        parts.append("\n".join(["without a kernel", *(f"  {each.shown}   {each.reason}" for each in found.without)]))
    return parts


def _notes(made: SpecKernels) -> list[str]:
    """What there is to say under a table: binaries that are missing, by file and reason; sites that are observed."""
    groups: dict[tuple[bool, str, str], list[str]] = {}
    for file in made.files:
        for each in file.missing:
            groups.setdefault((each.failed, file.file, each.reason), []).append(f"{each.target} {each.dtype}")
    notes = [
        f"  {'FAILED' if failed else 'no binary'} of {file} for {', '.join(wanted)}: {reason}"
        for (failed, file, reason), wanted in groups.items()
    ]
    if made.observed:
        names = ", ".join(made.observed)
        notes.append(f"  something else reads the weights, so the model keeps its own computation: {names}")
    return notes


def _kibibytes(count: int) -> str:
    return f"{count / 1024:.1f} KiB"
