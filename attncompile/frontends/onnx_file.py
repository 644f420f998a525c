"""Read an `.onnx` file without trusting it: it must be a valid model, its external data inside its folder."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from attncompile.frontends.errors import CaptureError, InputError, first_cause, first_line, unreadable
from attncompile.frontends.onnx_schemas import register


def read_onnx_file(path: Path) -> onnx.ModelProto:
    """Parse ``path``, check it by the specification, and check its external data, which is not loaded.

    Raises:
        InputError: for a file that cannot be read, is truncated, no ONNX model or not a valid one (values that nothing
            makes, cycles, tensors that are larger or smaller than their shapes say, unknown versions), or whose
            external data is missing, too short, or outside the folder of ``path``.
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
    _check_opsets(model, path)
    for tensor in _tensors(model):
        _check_size(tensor, path)
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            _check_external_data(tensor, path)
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        negative = [dim.dim_value for dim in value.type.tensor_type.shape.dim if dim.dim_value < 0]
        if negative:
            raise InputError(f"the shape of {value.name!r} has the size {negative[0]}", path, _AGAIN)
    for node in _nodes(model):
        _check_outputs(node, path)
    # what has no type says nothing, which ONNX's check does not allow and ONNX Runtime does
    untyped = [value for value in model.graph.value_info if not value.HasField("type")]
    for value in untyped:
        model.graph.value_info.remove(value)
    if all(value.HasField("type") for value in (*model.graph.input, *model.graph.output)):
        _check_structure(model, path)
    return model


def load_onnx(path: Path) -> ir.Model:
    """The model of a file that was checked. Its standard operators are known by one name, where ONNX has two for their
    domain: none and ``ai.onnx``.
    """
    model = ir.load(path)
    for versions in (model.opset_imports, *(function.opset_imports for function in model.functions.values())):
        if "ai.onnx" in versions:
            versions.setdefault("", versions.pop("ai.onnx"))
    return model


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Around what is done with a file that has been checked: whatever it may hold that its check lets through is one
    sentence. Errors for a person, and a lack of memory, are passed on.

    Raises:
        InputError: for any other error.
    """
    try:
        yield
    except (InputError, CaptureError, MemoryError):
        raise
    except Exception as error:
        first = first_cause(error)
        raise InputError(
            f"cannot be read as a model ({type(first).__name__}: {first_line(first)[:200]})",
            path,
            "export it again, and report this if ONNX Runtime runs it",
        ) from error


def _check_structure(model: onnx.ModelProto, path: Path) -> None:
    """ONNX's own check: wiring, order, attributes, operators of known versions."""
    register()
    external = any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in _tensors(model))
    try:
        # from the file it finds the data beside it
        onnx.checker.check_model(path if external else model)
    except (onnx.checker.ValidationError, ValueError, UnicodeDecodeError) as error:
        first = str(error).strip().partition("\n")[0]
        raise InputError(f"not a valid ONNX model: {first[:300]}", path, _AGAIN) from error


_AGAIN = "export or download the file again"

MOST_AXES = 64
"""That an array of NumPy, or a tensor of PyTorch, can have."""


def _check_opsets(model: onnx.ModelProto, path: Path) -> None:
    """That the standard's operator set is one that is known: what operators mean in a later one nobody can say, and
    ONNX's own check takes them for what they were.
    """
    newest = onnx.defs.onnx_opset_version()
    for stated in (*model.opset_import, *(entry for function in model.functions for entry in function.opset_import)):
        if stated.domain in ("", "ai.onnx") and not 1 <= stated.version <= newest:
            known = f"known here are 1 to {newest} (onnx {onnx.__version__})"
            advice = "export it with one of these, or install a newer onnx"
            raise InputError(f"it has opset {stated.version}, and {known}", path, advice)


def _nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Every node of a model: in bodies and functions too."""
    stack = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    while stack:
        node = stack.pop()
        yield node
        for attribute in node.attribute:
            for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                stack += graph.node


def _check_outputs(node: onnx.NodeProto, path: Path) -> None:
    """That ``Split`` has as many outputs as it says: inferring shapes writes beyond its memory where there are more."""
    for attribute in node.attribute:
        if node.op_type == "Split" and attribute.name == "num_outputs" and attribute.i != len(node.output):
            told = f"node {node.name!r} (Split) says num_outputs {attribute.i} and has {len(node.output)} outputs"
            raise InputError(f"not a valid ONNX model: {told}", path, _AGAIN)


def _check_size(tensor: onnx.TensorProto, path: Path) -> None:
    """That a tensor's bytes are as many as its shape says: a small file may not ask for any amount of memory."""
    try:
        kind = ir.DataType(tensor.data_type)
        bits = 0 if kind is ir.DataType.STRING else kind.bitwidth
    except (ValueError, TypeError):  # no such type, or one without a size
        bits = None
    if bits is None or any(size < 0 for size in tensor.dims):
        what = "element type" if bits is None else "shape"
        raise InputError(f"the {what} of tensor {tensor.name!r} is not valid", path, _AGAIN)
    if len(tensor.dims) > MOST_AXES:
        told = f"{len(tensor.dims)} axes, and no array here has more than {MOST_AXES}"
        raise InputError(f"tensor {tensor.name!r} has {told}", path, _AGAIN)
    if tensor.HasField("raw_data"):
        expected = -(-math.prod(tensor.dims) * bits // 8)  # in whole numbers: a product of sizes may be any
        if len(tensor.raw_data) != expected:
            held = f"{len(tensor.raw_data)} bytes, where its shape says {expected}"
            raise InputError(f"tensor {tensor.name!r} holds {held}", path, _AGAIN)


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
    try:
        file = (folder / location).resolve()
        found = file.is_file()
    except (ValueError, RuntimeError, OSError) as error:  # a null byte, links in a circle, too long a name
        first = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(
            f"the external data of tensor {tensor.name!r} is at {location[:80]!r}, which is no file ({first})",
            path,
            "only use models whose data lies beside them",
        ) from error
    if not location or absolute or not file.is_relative_to(folder):
        raise InputError(
            f"the external data of tensor {tensor.name!r} is at {location!r}, outside the model's folder",
            path,
            "only use models whose data lies beside them",
        )
    if not found:
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
