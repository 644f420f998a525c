"""A model in ONNX Runtime: its file, a session on a provider, and calls of a PyTorch model as its inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import torch

from attncompile.codegen.onnx.stored import Codes, codes_of
from attncompile.convert.calibration import Call
from attncompile.convert.providers import IN_FULL, session_providers
from attncompile.frontends.errors import InputError
from attncompile.frontends.torch_internals import flatten, leaf_paths

LARGEST_FILE = 1 << 28
"""Bytes of weights beyond which they go into a file beside the model: that one is mapped, where a protobuf is read and
written through two copies of all that it holds, and holds two gigabytes at most."""


def save(model: onnx_ir.Model, path: Path, *, largest: int = LARGEST_FILE) -> None:
    """Write a model, large weights beside it, small ones in it, wherever they were before.

    Args:
        model: the model; path: its file.
        largest: bytes of weights that may be in the file itself.
    """
    tensors = (value.const_value for value in model.graph.initializers.values())
    size = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    beside: dict[str, Any] = {"external_data": f"{path.name}.data"} if size > largest else {}
    if not beside:
        # a model that was read from a file with weights beside it would go on naming that other file
        for graph in model.graphs():
            for value in graph.initializers.values():
                if isinstance(value.const_value, onnx_ir.ExternalTensor):
                    held = value.const_value
                    value.const_value = onnx_ir.Tensor(held.numpy(), dtype=held.dtype, name=held.name)
    onnx_ir.save(model, path, **beside)


class LoadError(InputError):
    """ONNX Runtime does not load a model."""


class Session(onnxruntime.InferenceSession):
    """A session that knows how the model keeps its cache.

    Attributes:
        codes: of a cache in integers, by the names of inputs and outputs; calls have it in floats.
    """

    codes: Mapping[str, Codes] = {}


def session(
    model: Path | bytes, provider: str, threads: int | None = None, *, lean: bool = False, defaults: bool = False
) -> Session:
    """A session on the provider, for a file or for a model's bytes.

    It computes in the dtypes that the model says: what a provider rounds on its own, as CUDA does float32 products to
    TF32, would hide what is compared.

    Args:
        model: the file or bytes; provider: where; threads: how many, ONNX Runtime's choice where it is left out.
        lean: keep no memory between runs, for results that are wanted once: the same values, a little later.
        defaults: leave the provider's options as they are, for what is timed.

    Raises:
        InputError: when the provider is not installed; a LoadError when ONNX Runtime cannot load the model.
    """
    names = session_providers(provider)
    chosen = [{} if defaults else dict(IN_FULL.get(name, {})) for name in names]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if not defaults:  # nobody waits for it by the microsecond, and threads that spin take the processor from others
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if lean:
        options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        given = str(model) if isinstance(model, Path) else model
        loaded = Session(given, options, providers=list(names), provider_options=chosen)
    except Exception as error:
        name, said = model if isinstance(model, Path) else "the model", str(error).splitlines()[0]
        if isinstance(model, Path):
            said = said.replace(str(model), model.name)  # the whole path follows, and would be kept in reports
        raise LoadError(f"ONNX Runtime cannot load it: {said}", name, _advice(given, names)) from error
    if names[0] not in loaded.get_providers():  # ONNX Runtime says so in its log and goes on with the next one
        raise InputError(
            f"{names[0]} cannot be used here: its libraries or its device are missing",
            f"onnxruntime {onnxruntime.__version__}",
            "what is missing stands in ONNX Runtime's log; install it, or choose --provider cpu",
        )
    if any(entry.type in _INTEGERS and entry.name.startswith(CACHED) for entry in loaded.get_inputs()):
        kept = onnx_ir.load(model) if isinstance(model, Path) else onnx_ir.from_proto(onnx.load_from_string(model))
        loaded.codes = codes_of(kept)
    return loaded


def _advice(model: str | bytes, names: Sequence[str]) -> str:
    """What helps with a model that does not load: it may be ONNX Runtime's own optimiser that fails."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        Session(model, options, providers=list(names))
    except Exception:  # its errors have no base of their own
        return "please report this"
    return (
        "it is ONNX Runtime's own optimiser that fails, without which the model loads. INT8 codes lose their type in "
        "it from opset 21 on (1.31): write such a file at opset 20, or round to UINT8; report others to ONNX Runtime"
    )


CACHED = "past_key_values."
"""How inputs of the cache begin."""

_INTEGERS = ("tensor(int8)", "tensor(uint8)")


_NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}
"""Float types of inputs that NumPy has too."""


def feeds(loaded: onnxruntime.InferenceSession, call: Call) -> dict[str, np.ndarray]:
    """The arguments of a call as an ONNX model takes them: by name where names agree, else by order.

    Floats get the type that the model asks for; bfloat16, which NumPy does not have, stays float32 until
    :func:`results` hands it over.
    """
    kwargs = dict(call.kwargs)
    named = zip(leaf_paths(kwargs), flatten(kwargs)[0], strict=True)
    tensors = {name: value for name, value in named if isinstance(value, torch.Tensor)}
    leaves = [leaf for leaf in flatten((call.args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
    entries = {entry.name: entry.type for entry in loaded.get_inputs()}
    by_name = all(name in tensors for name in entries)
    given = {
        name: (tensors[name] if by_name else leaf).detach().cpu()
        for name, leaf in zip(entries, leaves if not by_name else entries, strict=False)
    }
    codes = loaded.codes if isinstance(loaded, Session) else {}
    return {
        name: codes[name].encode(tensor.float().numpy()) if name in codes else _array(tensor, entries[name])
        for name, tensor in given.items()
    }


def _array(tensor: torch.Tensor, kind: str) -> np.ndarray:
    if not tensor.is_floating_point():
        return tensor.numpy()
    array = tensor.float().numpy() if tensor.dtype is torch.bfloat16 else tensor.numpy()
    return array.astype(_NUMPY[kind], copy=False) if kind in _NUMPY else array


def results(
    loaded: onnxruntime.InferenceSession, fed: Mapping[str, np.ndarray], names: Sequence[str] | None = None
) -> dict[str, torch.Tensor]:
    """The tensors that a model gives for inputs, by name; all of its outputs unless some are named."""
    wanted = [entry for entry in loaded.get_outputs() if names is None or entry.name in names]
    if _BFLOAT16 not in {entry.type for entry in (*loaded.get_inputs(), *wanted)}:
        arrays = loaded.run([entry.name for entry in wanted], dict(fed))
        pairs = zip(wanted, arrays, strict=True)
        return {entry.name: torch.from_numpy(array) for entry, array in pairs if isinstance(array, np.ndarray)}
    kinds = {entry.name: entry.type for entry in loaded.get_inputs()}
    values = {name: _value(array, kinds[name]) for name, array in fed.items()}
    made = loaded.run_with_ort_values([entry.name for entry in wanted], values)
    pairs = zip(wanted, made, strict=True)
    return {entry.name: torch.from_dlpack(value._ortvalue.to_dlpack()) for entry, value in pairs}


_BFLOAT16 = "tensor(bfloat16)"


def _value(array: np.ndarray, kind: str) -> onnxruntime.OrtValue:
    if kind != _BFLOAT16:
        return onnxruntime.OrtValue.ortvalue_from_numpy(array)
    bits = torch.from_numpy(np.ascontiguousarray(array)).bfloat16().view(torch.int16).numpy()
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, int(onnx_ir.DataType.BFLOAT16))


def run(loaded: onnxruntime.InferenceSession, call: Call, *, integers: bool = False) -> dict[str, torch.Tensor]:
    """The float outputs of a model in ONNX Runtime, by name; a cache in integers as the floats that it stands for.

    Args:
        loaded: the model; call: its inputs; integers: whether outputs that are integers, a mask for one, are given too.

    Raises:
        RuntimeError: when ONNX Runtime does not run the call; its own errors share no other base.
    """
    try:
        found = results(loaded, feeds(loaded, call))
    except Exception as error:
        raise RuntimeError(f"ONNX Runtime: {str(error).splitlines()[0]}") from error
    codes = loaded.codes if isinstance(loaded, Session) else {}
    for name in codes.keys() & found.keys():
        found[name] = torch.from_numpy(codes[name].decode(found[name].numpy()))
    return {name: tensor for name, tensor in found.items() if integers or tensor.is_floating_point()}
