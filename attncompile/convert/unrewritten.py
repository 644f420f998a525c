"""``unrewritten.onnx``: the export before any site was replaced, without the weights of the original.

A verification compares with it in the same runtime. Exporting again takes minutes for a large model, a second copy of
the weights doubles the artefact, and sharing them with the result would hide damage to them. So weights become inputs
of the graph, each marked with its parameter; a verification fills them from the original, which it opens anyway.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir
import torch

from attncompile.convert.memory import Reading
from attncompile.convert.runtime import save
from attncompile.frontends.checkpoint import OpenedModel
from attncompile.frontends.errors import InputError

UNREWRITTEN = "unrewritten.onnx"
PARAMETER, TRANSPOSED = "attncompile.parameter", "attncompile.transposed"
"""Marks of an input that stands for a weight: the parameter's name, and ``yes`` for its transpose."""

SMALLEST = 1024
"""Bytes from which a weight is left out."""


def save_unrewritten(model: onnx_ir.Model, opened: OpenedModel, path: Path) -> None:
    """Write a model with every weight that the original has as a marked input; ``model`` is used up by this."""
    known = _digests(opened.model)
    graph, reading = model.graph, Reading()
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.nbytes < SMALLEST:
            continue
        found = known.get(_digest(tensor.numpy()))
        reading.read(tensor)
        if found is None:
            continue  # computed by the exporter, so it is kept
        parameter, transposed = found
        value.type, value.shape = onnx_ir.TensorType(tensor.dtype), onnx_ir.Shape(tensor.numpy().shape)
        value.metadata_props[PARAMETER] = parameter
        value.metadata_props[TRANSPOSED] = "yes" if transposed else "no"
        del graph.initializers[name]
        value.const_value = None
        graph.inputs.append(value)
    save(model, path)  # what is left must not name the file of weights that the export was read from


def load_unrewritten(path: Path, opened: OpenedModel) -> onnx_ir.Model:
    """The model of a file that :func:`save_unrewritten` wrote, with the weights of the original.

    Raises:
        InputError: when the file is missing or damaged, or asks for a weight that the original does not have.
    """
    try:
        model = onnx_ir.load(path)
    except Exception as error:  # protobuf and onnx-ir raise errors of many kinds
        reason = f"{path.name} is missing or damaged ({type(error).__name__})"
        raise InputError(reason, path.parent, "convert the model again") from error
    tensors = _tensors(opened.model)
    graph = model.graph
    for value in [value for value in graph.inputs if PARAMETER in value.metadata_props]:
        name = value.metadata_props[PARAMETER]
        if name not in tensors:
            raise InputError(
                f"{path.name} asks for the weight {name!r}, which the original does not have",
                path.parent,
                "convert the model again",
            )
        tensor = tensors[name]
        turned = tensor.t() if value.metadata_props.get(TRANSPOSED) == "yes" else tensor
        graph.inputs.remove(value)
        value.const_value = onnx_ir.Tensor(_array(turned), dtype=value.dtype, name=value.name)
        graph.initializers.add(value)
    return model


def _tensors(model: torch.nn.Module) -> Mapping[str, torch.Tensor]:
    return {**dict(model.named_buffers()), **dict(model.named_parameters())}


def _digests(model: torch.nn.Module) -> dict[bytes, tuple[str, bool]]:
    """Content of every weight, and of its transpose, to its name and whether it is the transpose."""
    known: dict[bytes, tuple[str, bool]] = {}
    reading = Reading()
    for name, tensor in _tensors(model).items():
        if tensor.numel() * tensor.element_size() < SMALLEST:
            continue
        if tensor.dim() == 2:
            known.setdefault(_digest(_array(tensor.t())), (name, True))
        known[_digest(_array(tensor))] = (name, False)
        reading.read(tensor)
    return known


def _digest(array: np.ndarray) -> bytes:
    whole = np.ascontiguousarray(array)
    digest = hashlib.sha256(f"{whole.dtype} {whole.shape}".encode())
    digest.update(whole.view(np.uint8).data)
    return digest.digest()


def _array(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype is torch.bfloat16:  # numpy has none of its own
        return tensor.view(torch.int16).numpy().view(onnx_ir.DataType.BFLOAT16.numpy())
    return tensor.numpy()


__all__ = ["UNREWRITTEN", "load_unrewritten", "save_unrewritten"]
