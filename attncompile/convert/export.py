"""A PyTorch model as an ONNX model, through torch's own exporter, with the names people expect."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import onnx_ir
import torch

from attncompile.convert.experts import separate, translations
from attncompile.convert.exporter import functions_listed_once, without_searches
from attncompile.frontends.capture import exported_program
from attncompile.frontends.checkpoint import FUNCTION_ADVICE, OpenedModel
from attncompile.frontends.errors import CaptureError, InputError, first_cause, first_line
from attncompile.frontends.torch_internals import flatten, forget_export, leaf_paths


def export_onnx(opened: OpenedModel) -> tuple[onnx_ir.Model, tuple[str, ...]]:
    """The model as torch exports it, with dynamic batch and sequence axes, and what there is to say about it.

    Raises:
        CaptureError: when torch cannot export it.
        InputError: when the inputs that were made for it are none that it takes.
    """
    args, kwargs = opened.example()
    axes = opened.axes(args, kwargs)
    try:
        program, notes = exported_program(opened.model, args, kwargs, axes)
    except CaptureError:
        _require_run(opened, args, kwargs)
        raise
    with torch.no_grad(), _quiet():
        result = opened.model(*args, **kwargs)
        paths, leaves = leaf_paths(result), flatten(result)[0]
        names = [path or "output" for path, leaf in zip(paths, leaves, strict=True) if isinstance(leaf, torch.Tensor)]
        try:
            with without_searches(), functions_listed_once():
                table = dict(translations())
                exported = torch.onnx.export(program, dynamo=True, verbose=False, custom_translation_table=table)
        except Exception as error:
            raise CaptureError(
                "torch.onnx",
                opened.name,
                first_line(first_cause(error)),
                "convert it with --target torch instead",
            ) from error
        finally:
            forget_export(program)
    assert exported is not None
    model = exported.model
    separate(model)
    for value, name in zip(model.graph.outputs, names, strict=False):
        value.name = name
    spelled = {path.replace(".", "_"): path for path in leaf_paths(kwargs)}
    for value in model.graph.inputs:
        value.name = spelled.get(value.name or "", value.name)
    _name_axes(model, axes)
    if opened.scope:
        _leave_scope(model, opened.scope)
    return model, notes


def _require_run(opened: OpenedModel, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raises InputError for a model that does not run by itself either: it is not the export that it lacks."""
    try:
        with torch.no_grad():
            opened.model(*args, **kwargs)
    except Exception as error:
        said = first_line(error)
        what = "the given inputs" if opened.given is not None else f"inputs made for it: {', '.join(kwargs)}"
        raise InputError(f"it does not run on {what} ({said})", opened.name, FUNCTION_ADVICE) from error


def _leave_scope(model: onnx_ir.Model, scope: str) -> None:
    """Tell weights and modules by the names that they have in the model that was opened."""
    for name, value in list(model.graph.initializers.items()):
        if name.startswith(scope):
            value.name = name.removeprefix(scope)
    quoted = re.compile(rf"(?<=['\"]){re.escape(scope)}")
    for node in model.graph.all_nodes():
        stated = node.metadata_props.get(_SCOPES)
        if stated is not None:
            node.metadata_props[_SCOPES] = quoted.sub("", stated)


_SCOPES = "pkg.torch.onnx.name_scopes"


def _name_axes(model: onnx_ir.Model, axes: tuple[dict[int, str], ...]) -> None:
    """Call symbolic sizes by what they are (``batch``, ``length``) instead of ``s53``."""
    names: dict[str, str] = {}
    for value, named in zip(model.graph.inputs, axes, strict=False):
        for axis, name in named.items():
            size = value.shape[axis] if value.shape is not None else None
            if isinstance(size, onnx_ir.SymbolicDim) and size.value and size.value not in names:
                taken = name in names.values()
                names[str(size.value)] = f"{name}_{size.value}" if taken else name
    if not names:
        return
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, names)) + r")\b")
    values = [*model.graph.inputs, *(output for node in model.graph for output in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = onnx_ir.Shape(
                [
                    pattern.sub(lambda m: names[m[1]], str(size.value))
                    if isinstance(size, onnx_ir.SymbolicDim) and size.value
                    else size
                    for size in value.shape
                ]
            )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's progress and its warnings about packages that it does not need here."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)


__all__ = ["export_onnx"]
