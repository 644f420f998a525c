"""How large keys and values become in each channel while a language model reads text, for a cache in integers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx_ir

from attncompile.codegen.onnx.stored import KEY_PAST, VALUE_PAST, Bits, caching_nodes, special_features, why_not_stored
from attncompile.convert.calibration import Call
from attncompile.convert.memory import release
from attncompile.convert.precision import NotStoredError
from attncompile.convert.providers import kernels_of
from attncompile.convert.runtime import CACHED, feeds, results, session
from attncompile.frontends.errors import InputError


def cached_ranges(
    file: Path, calls: Iterable[Call], bits: Bits, provider: str, version: str | None, dtype: str, where: object
) -> dict[str, np.ndarray]:
    """The largest element of keys or values in each channel, ``[G, D]``, by the name of the model's input.

    Args:
        file: a float32 model on buffers; calls: what it reads, without padding.
        bits: of an element of the cache that is to be written.
        provider, version: where that will run; dtype: of queries in it.
        where: the model, for errors.

    Raises:
        NotStoredError: when a layer's cache is not written by ``GroupQueryAttention``.
        InputError: when that cannot keep it in integers.
    """
    model = onnx_ir.load(file)
    nodes = caching_nodes(model)
    caches = [value for value in model.graph.inputs if (value.name or "").startswith(CACHED)]
    if 2 * len(nodes) < len(caches):
        layers = f"{len(caches) // 2 - len(nodes)} of {len(caches) // 2} layers"
        what = f"the cache of {layers} is kept by plain operators, and GroupQueryAttention alone keeps one in integers"
        raise NotStoredError(what, where, _ADVICE)
    special = {name for node in nodes for name in special_features(node)}
    reason = why_not_stored(bits, kernels_of(provider), version, dtype, sorted(special))
    if reason is not None:
        raise InputError(reason, where, _ADVICE)
    pasts = {
        str(node.outputs[place - KEY_PAST + 1].name): str(past.name)
        for node in nodes
        for place in (KEY_PAST, VALUE_PAST)
        if (past := node.inputs[place]) is not None
    }
    del model
    loaded, found = session(file, provider, lean=True), dict[str, np.ndarray]()
    for call in calls:
        count = call.kwargs["attention_mask"].shape[1]
        for name, tensor in results(loaded, feeds(loaded, call), list(pasts)).items():
            most = np.abs(tensor.numpy()[:, :, :count]).max(axis=(0, 2))
            known = found.get(pasts[name])
            found[pasts[name]] = most if known is None else np.maximum(known, most)
    del loaded
    release()
    return found


_ADVICE = "leave cache= of --precision out"

__all__ = ["cached_ranges"]
