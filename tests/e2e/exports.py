"""Exports that are made once for all tests: PyTorch's exporter takes most of the time of a small conversion.

What is remembered is the export of a model that is described completely: its modules with their settings, every weight,
and the inputs that it is exported with. The first test of each exports it, the others read what that has written. What
happens before and behind the exporter is not touched.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx_ir
import torch
import transformers

from attncompile.frontends.checkpoint import OpenedModel

Export = Callable[[OpenedModel], tuple[onnx_ir.Model, tuple[str, ...]]]

LARGEST = 16 << 20
"""Bytes of the weights of a model that is remembered; real ones are larger."""

KNOWN = ("torch", "transformers", "attncompile")
"""Packages whose classes are what their names say: a test may write another class of the same name."""

APART = frozenset({"path", "name", "name_or_path", "_name_or_path", "generation_config"})
"""What says where a model came from, and how tokens are chosen: nothing in the export of one call depends on it."""

PLAIN = (str, int, float, bool, bytes, type(None), torch.dtype, torch.device, torch.Size, enum.Enum)


class UndescribedError(Exception):
    """Something of which a text does not say what it is."""


def remembering(export: Export, folder: Path) -> Export:
    """The same function, that reads from a folder what was exported before."""

    def remembered(opened: OpenedModel) -> tuple[onnx_ir.Model, tuple[str, ...]]:
        try:
            kept = folder / fingerprint(opened)
        except UndescribedError:
            return export(opened)
        if not kept.exists():
            model, notes = export(opened)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                onnx_ir.save(model, Path(scratch) / "model.onnx")
                (Path(scratch) / "notes.json").write_text(json.dumps(notes))
                _moved(Path(scratch), kept)
        return onnx_ir.load(kept / "model.onnx"), tuple(json.loads((kept / "notes.json").read_text()))

    return remembered


def _moved(made: Path, kept: Path) -> None:
    """A folder under its name, unless another process was faster."""
    copy = made.with_name(f"{made.name}.copy")
    shutil.copytree(made, copy)
    try:
        os.rename(copy, kept)
    except OSError:
        shutil.rmtree(copy)


def fingerprint(opened: OpenedModel) -> str:
    """A number for all that an export can depend on. Raises UndescribedError where something is not known so well."""
    if opened.kind != "torch" or not isinstance(opened.model, torch.nn.Module):
        raise UndescribedError
    if sum(tensor.nbytes for tensor in opened.model.state_dict().values()) > LARGEST:
        raise UndescribedError
    digest, seen = hashlib.sha256(), dict[int, int]()
    for part in _described((opened, opened.example()), seen):
        digest.update(part)
    return digest.hexdigest()


def _described(value: Any, seen: dict[int, int]) -> Iterator[bytes]:
    yield f"<{type(value).__module__}.{type(value).__qualname__}>".encode()
    if isinstance(value, PLAIN):
        yield repr(value).encode()
        return
    if isinstance(value, transformers.PreTrainedTokenizerBase):
        return  # what it makes of texts is among the inputs
    if id(value) in seen:
        yield f"again {seen[id(value)]}".encode()
        return
    seen[id(value)] = len(seen)
    if isinstance(value, torch.Tensor):
        yield f"{value.dtype} {tuple(value.shape)} {value.stride()} {value.requires_grad}".encode()
        yield value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    elif isinstance(value, Mapping):
        for key, one in value.items():
            yield from _described(key, seen)
            yield from _described(one, seen)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _described(one, seen)
    elif isinstance(value, set | frozenset):
        for text in sorted(map(repr, value)):
            yield text.encode()
    elif type(value).__module__.partition(".")[0] in KNOWN and hasattr(value, "__dict__"):
        for name, one in vars(value).items():
            if name not in APART:
                yield name.encode()
                yield from _described(one, seen)
    elif isinstance(value, functools.partial):
        for one in (value.func, value.args, value.keywords):
            yield from _described(one, seen)
    elif callable(value) and (value.__module__ or "").partition(".")[0] in KNOWN:
        yield value.__qualname__.encode()
    else:
        raise UndescribedError(type(value))
