"""The files of a conversion to ONNX: what each computes, and its export before any site was replaced."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnx_ir

from attncompile.convert.runtime import save
from attncompile.convert.unrewritten import UNREWRITTEN, load_unrewritten, save_unrewritten
from attncompile.frontends.checkpoint import OpenedModel

MODEL = "model.onnx"


@dataclass(frozen=True)
class Part:
    """What one file is made from.

    Attributes:
        file: its name.
        opened: the model, or the function of a model, that it computes.
    """

    file: str
    opened: OpenedModel

    @property
    def name(self) -> str:
        """What it is of the whole model; "" for all of it."""
        return "" if self.file == MODEL else self.file.removesuffix(".onnx")

    @property
    def doing(self) -> str:
        """The same behind what is done to it, for progress."""
        return f" of the {self.name}" if self.name else ""

    @property
    def before(self) -> str:
        """The file with its export, while the conversion runs."""
        return f"before_{self.file}"

    @property
    def unrewritten(self) -> str:
        """The file that keeps its export for a verification."""
        return f"{Path(UNREWRITTEN).stem}_{self.file}" if self.name else UNREWRITTEN


def finish_part(part: Part, folder: Path, scratch: Path) -> None:
    """Keep the export, which lies in ``scratch``, without its weights, where they are the original's."""
    if part.opened.kind == "torch":
        save_unrewritten(onnx_ir.load(scratch / part.before), part.opened, folder / part.unrewritten)


@contextmanager
def kept_export(part: Part, folder: Path) -> Iterator[Path]:
    """A part before any site was replaced, as a file for as long as the block runs.

    Raises:
        InputError: when what the conversion kept of it is missing or damaged.
    """
    if part.opened.kind == "onnx":
        yield part.opened.path
        return
    with tempfile.TemporaryDirectory(prefix="attncompile-") as scratch:
        file = Path(scratch) / part.before
        save(load_unrewritten(folder / part.unrewritten, part.opened), file, largest=0)
        yield file


__all__ = ["MODEL", "Part", "finish_part", "kept_export"]
