"""Read an `.onnx` file without trusting it: it must parse, and its external data must be inside its
folder."""

from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from attncompile.frontends.errors import InputError, unreadable


def read_onnx_file(path: Path) -> onnx.ModelProto:
    """Parse ``path`` and check its external data. The data itself is not loaded.

    Raises InputError for a file that cannot be read, is truncated or no ONNX model, or whose external data is
    missing, too short, or outside the folder of ``path``.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except PermissionError as error:
        raise unreadable(path) from error
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", path, "check the path") from error
    except (DecodeError, ValueError) as error:
        raise InputError(
            "not an ONNX model, or a truncated one", path, "export or download the file again"
        ) from error
    # A few bytes of anything can parse as an empty message, so what every model has is asked for.
    if not model.ir_version or not model.opset_import or not model.graph.node:
        raise InputError("not an ONNX model (it holds no graph)", path, "export or download the file again")
    for tensor in _tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            _check_external_data(tensor, path)
    return model


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor stored in a model: initialisers and attributes, in subgraphs and functions too."""
    yield from _graph_tensors(model.graph)
    for function in model.functions:
        yield from _node_tensors(function.node)


def _graph_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _node_tensors(graph.node)


def _node_tensors(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for graph in (attribute.g, *attribute.graphs):
                yield from _graph_tensors(graph)


def _check_external_data(tensor: onnx.TensorProto, path: Path) -> None:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    # Both spellings of an absolute path are refused on every system: the file may be used on another one.
    absolute = PurePosixPath(location).is_absolute() or PureWindowsPath(location).is_absolute()
    folder = path.parent.resolve()
    file = (folder / location).resolve()
    if not location or absolute or not file.is_relative_to(folder):
        raise InputError(
            f"the external data of tensor {tensor.name!r} is at {location!r}, outside the model's folder",
            path,
            "only use models whose data lies beside them",
        )
    if not file.is_file():
        raise InputError(
            f"the external data file {location!r} of tensor {tensor.name!r} is missing",
            path,
            "put it beside the model",
        )
    try:
        end = int(entries.get("offset", 0)) + int(entries.get("length", 0))
    except ValueError as error:
        raise InputError(
            f"the external data of tensor {tensor.name!r} has an offset or length that is no number",
            path,
            "export the model again",
        ) from error
    if end > file.stat().st_size:
        raise InputError(
            f"the external data file {location!r} ends before tensor {tensor.name!r} does",
            path,
            "download it again",
        )
