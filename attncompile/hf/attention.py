"""The attention interface: one call of a layer, as a Spec, on the target that computes it fastest."""

from __future__ import annotations

import functools
import logging
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from attncompile.backend.choose import SUPPORTED
from attncompile.backend.stated import computed, lowered
from attncompile.codegen.pytorch.tracing import being_compiled
from attncompile.frontends.torch_internals import fix_value
from attncompile.hf.mask import StatedMask, added
from attncompile.hf.models import NUMBERS, handling, reads_beyond
from attncompile.hf.sites import Seen, note, note_class, say_kept
from attncompile.hf.specify import (
    ADDED,
    BIAS,
    KEY_OFFSET,
    ONE_ROW,
    QUERY_OFFSET,
    SELECTED,
    SINKS,
    Call,
    Tensor,
    specify,
)
from attncompile.ir.types import NAMES

log = logging.getLogger("attncompile")

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: StatedMask | torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of one layer, for transformers' ``AttentionInterface``.

    Args:
        module: the layer; its ``is_causal`` counts where there is no mask.
        query: ``[b,h,i,d]``; key: ``[b,g,j,d]``; value: ``[b,g,j,e]``.
        attention_mask: what the model was given by the mask interface, or a map of its own.
        options: ``scaling``, ``dropout``, ``is_causal``, ``softcap``, ``s_aux`` (sinks), ``position_bias`` and
            ``indices`` (keys chosen for each query) as transformers gives them; others say nothing beyond the mask.

    Returns:
        The output ``[b,i,h,e]``, and the weights where the model's own function computes them.

    Raises:
        ValueError: for a choice of blocks of keys, which this interface gives without saying how large they are.
    """
    site, traced = type(module).__name__, being_compiled(query)
    if options.get("block_indices") is not None:
        raise ValueError(
            f"{site} chooses blocks of keys, whose size its call of attention does not say: load this model with "
            'attn_implementation="sdpa" and compile it with torch.compile(model, backend="attncompile")'
        )
    beyond = reads_beyond(module, options)
    reason = f"its own attention reads {beyond}" if beyond else _why_not(query, key, value, attention_mask, options)
    if reason:
        return _kept(module, query, key, value, attention_mask, options, reason, traced)
    if query.shape[0] != key.shape[0]:  # queries that all rows share
        query = query.expand(key.shape[0], -1, -1, -1)
    sizes = {"B": query.shape[0], "H": query.shape[1], "I": query.shape[2], "J": key.shape[2]}
    text, offset, key_offset, names, tensors, why_read = _mask_of(module, query, attention_mask, sizes, options)
    indices = options.get("indices")
    if indices is not None:
        names, tensors = (*names, SELECTED), (*tensors, _selected(indices, key.shape[2]))
    bias, sinks = options.get("position_bias"), options.get("s_aux")
    if bias is not None:
        names, tensors = (*names, BIAS), (*tensors, bias)
    if sinks is not None:
        names, tensors = (*names, SINKS), (*tensors, sinks.reshape(-1))
    scaling = options.get("scaling")
    softcap = options.get("softcap")
    # a size or a float of the model may be a symbol of the trace, which decides no text
    number = fix_value if traced else _same
    square = False
    if sizes["I"] == sizes["J"]:  # a branch, which decides a size that is a symbol
        square = True
    facts = (
        site,
        (number(sizes["H"]), number(key.shape[1]), number(query.shape[3]), number(value.shape[3])),
        query.dtype,
        square,
        text,
        tuple((name, tensor.dtype, _fitting(tensor, sizes)) for name, tensor in zip(names, tensors, strict=True)),
        offset,
        key_offset,
        1.0 / math.sqrt(number(query.shape[3])) if scaling is None else number(scaling),
        None if softcap is None else number(softcap),
    )
    said = _specified(facts, query.device.type, why_read, traced)
    if said.startswith(_BEHIND):
        return _kept(module, query, key, value, attention_mask, options, said.removeprefix(_BEHIND), traced)
    program, read = said.split(_BEHIND)
    wanted = read.split(",")
    given = [tensor for name, tensor in zip(names, tensors, strict=True) if name in wanted]
    if QUERY_OFFSET in wanted and isinstance(attention_mask, StatedMask):
        given.append(_one_number(attention_mask.offsets[0], query.device))
    if KEY_OFFSET in wanted and isinstance(attention_mask, StatedMask):
        given.append(_one_number(attention_mask.offsets[1], query.device))
    if not traced:
        note(module, Seen(site, program, query.device.type, why_read), query, key, value, *given)
    made = computed(program, query, key, value, *given)
    assert isinstance(made, torch.Tensor)  # of a Spec with one output
    return made.transpose(1, 2).contiguous(), None


# --- what can not be stated -------------------------------------------------------------------------------------------


def _why_not(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: StatedMask | torch.Tensor | None,
    options: dict[str, Any],
) -> str:
    """Why a call is left to the model's own functions, or nothing."""
    if options.get("dropout", 0.0):
        return "weights are dropped at random in training"
    if options.get("output_attentions"):
        return "its weights are asked for"
    if options.get("head_mask") is not None:
        return "weights are multiplied by a head mask"
    if options.get("cache") is not None:
        return "its cache has pages"
    if query.device.type not in SUPPORTED:
        return f"device {query.device.type} is not supported ({', '.join(SUPPORTED)} are)"
    if query.dtype not in FLOATS or key.dtype != query.dtype or value.dtype != query.dtype:
        return f"query, key and value have the dtypes {query.dtype}, {key.dtype}, {value.dtype}"
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4:
        return f"query, key and value have {query.dim()}, {key.dim()} and {value.dim()} axes, not 4"
    if query.shape[1] % key.shape[1] != 0 or value.shape[1] != key.shape[1] or key.shape[3] != query.shape[3]:
        return "the heads of query, key and value do not fit together"
    if key.shape[2] != value.shape[2] or key.shape[0] != value.shape[0]:
        return "keys and values are not equally many"
    if query.shape[0] != key.shape[0] and query.shape[0] != 1:
        return "queries and keys have different batch sizes"
    if query.shape[2] == 0 or key.shape[2] == 0 or key.shape[0] == 0:
        return "it is empty"
    if options.get("scaling") is not None and not isinstance(options["scaling"], float | int):
        return "its scale is a tensor"
    whole = (query.shape[0] if query.shape[0] != 1 else key.shape[0], query.shape[1], query.shape[2], key.shape[2])
    if isinstance(mask, StatedMask):
        if mask.shape[0] not in (1, whole[0]) or mask.shape[2] not in (1, whole[2]) or mask.shape[3] != whole[3]:
            return "its mask is of another size"
        mask = None
    for name, tensor in (("mask", mask), ("position bias", options.get("position_bias"))):
        if tensor is None:
            continue
        if not isinstance(tensor, torch.Tensor) or tensor.dim() != 4:
            return f"its {name} is no tensor of 4 axes"
        if tensor.dtype is not torch.bool and tensor.dtype != query.dtype:
            return f"its {name} is of dtype {tensor.dtype}"
        for axis in range(4):
            if tensor.shape[axis] != whole[axis] and tensor.shape[axis] != 1:
                return f"its {name} is of another size"
    indices = options.get("indices")
    if indices is not None and (indices.dim() != 3 or indices.shape[:2] != (key.shape[0], query.shape[2])):
        return "its indices are not those of the keys of each query"
    sinks = options.get("s_aux")
    if sinks is not None and (sinks.numel() != query.shape[1] or sinks.dtype not in FLOATS):
        return "its sinks are not one for each head"
    return ""


def _kept(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: StatedMask | torch.Tensor | None,
    options: dict[str, Any],
    reason: str,
    traced: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A call that is left to the model, said and remembered."""
    site = type(module).__name__
    say_kept(site, reason, traced)
    if not traced:
        note(module, Seen(site, "", "", reason))
    return _as_the_model_does(module, query, key, value, mask, options)


def _as_the_model_does(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: StatedMask | torch.Tensor | None,
    options: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The model's own attention where it alone does what is asked, else transformers' call of SDPA."""
    if isinstance(mask, StatedMask):
        mask = mask.visible()
    eager = _eager_function(module)
    named = ("output_attentions", "head_mask", "softcap", "s_aux")
    plain = all(options.get(name) is None or options.get(name) is False for name in named)
    if eager is None or (plain and not reads_beyond(module, options)):
        return sdpa_attention_forward(module, query, key, value, mask, **options)
    if mask is None and _is_causal(module, query, options):
        places = torch.arange(max(query.shape[2], key.shape[2]), device=query.device)
        mask = (places[None, : key.shape[2]] <= places[: query.shape[2], None])[None, None]
    if mask is not None and mask.dtype is torch.bool:
        mask = added(mask, query.dtype)
    return eager(module, query, key, value, mask, **options)


def _eager_function(module: torch.nn.Module) -> Callable[..., Any] | None:
    """The attention that the file of a layer spells out, which transformers calls ``eager``."""
    return getattr(sys.modules.get(type(module).__module__), "eager_attention_forward", None)


def _is_causal(module: torch.nn.Module, query: torch.Tensor, options: dict[str, Any]) -> bool:
    """Whether a call without a mask is causal, as transformers' own call of SDPA decides.

    Where a model does not know SDPA, no mask means none.
    """
    asked = options.get("is_causal")
    if query.shape[2] == 1 or NUMBERS in handling(type(module).__module__):
        return False
    return bool(getattr(module, "is_causal", True) if asked is None else asked)


# --- what is stated ---------------------------------------------------------------------------------------------------


def _mask_of(
    module: torch.nn.Module,
    query: torch.Tensor,
    mask: StatedMask | torch.Tensor | None,
    sizes: dict[str, Any],
    options: dict[str, Any],
) -> tuple[str, str, bool, tuple[str, ...], tuple[torch.Tensor, ...], str]:
    """Text of the mask, how the first query's position follows, whether the first key's is not 0, names and tensors
    of what the text reads, and why a map is read."""
    if mask is None:
        return ("j ≤ i" if _is_causal(module, query, options) else ""), "zero", False, (), (), ""
    if isinstance(mask, torch.Tensor):
        why = "the model hands over a mask as a tensor"
        if mask.dtype is torch.bool:
            return "t0[b, h, i, j]", "zero", False, ("mask",), (mask,), why
        return "", "zero", False, (ADDED,), (mask,), why
    first_query, first_key = mask.offsets
    shared = False
    if mask.shape[2] != sizes["I"]:  # one row for all queries
        shared = True
    known = not isinstance(first_query, torch.Tensor) and not isinstance(first_key, torch.Tensor)
    moved, offset = False, "tensor"
    if isinstance(first_key, torch.Tensor) or first_key != 0:
        moved = True
    if not isinstance(first_query, torch.Tensor) and first_query == 0:
        offset = "zero"
    elif known and not shared and first_query - first_key == sizes["J"] - sizes["I"]:
        offset = "sizes"
    return f"{mask.text}{ONE_ROW}" if shared else mask.text, offset, moved, mask.names, mask.tensors, mask.reason


def _selected(indices: torch.Tensor, keys: int) -> torch.Tensor:
    """Truth values ``[b, 1, i, j]`` of the keys ``[b, i, n]`` that a model has chosen for each query."""
    hidden = torch.zeros((*indices.shape[:2], keys), dtype=torch.bool, device=indices.device)
    return hidden.scatter(-1, indices.long(), True).unsqueeze(1)


def _fitting(tensor: torch.Tensor, sizes: dict[str, Any]) -> tuple[str, ...]:
    """For each axis the letters of the sizes that it has, see :class:`attncompile.hf.specify.Tensor`."""
    found = []
    for extent in tensor.shape:
        letters = "1" if extent == 1 else ""
        for letter, size in sizes.items():
            if extent == size:
                letters = letters + letter
        found.append(letters)
    return tuple(found)


def _one_number(value: Any, device: torch.device) -> torch.Tensor:
    """A number as a tensor of one element."""
    if isinstance(value, torch.Tensor):
        return value.to(device=device, dtype=torch.int64).reshape(1)
    return torch.full((1,), value, dtype=torch.int64, device=device)


def _same(value: Any) -> Any:
    return value


_BEHIND = "\0"

Facts = tuple[
    str,
    tuple[int, int, int, int],
    torch.dtype,
    bool,
    str,
    tuple[tuple[str, torch.dtype, tuple[str, ...]], ...],
    str,
    bool,
    float,
    float | None,
]
"""The attributes of a :class:`attncompile.hf.specify.Call` in order, of types that Dynamo takes for constants."""


@torch.compiler.assume_constant_result
def _specified(facts: Facts, device: str, why_read: str, traced: bool) -> str:
    """Text of a call's Spec, and the names of the captured tensors it reads; or why there is none, behind a mark.

    Dynamo takes it as a constant.
    """
    try:
        said = _remembered(facts, device)
    except Exception as error:  # a defect of ours must not take the user's model down
        log.debug("attncompile failed", exc_info=True)
        return f"{_BEHIND}an internal error: {type(error).__name__}: {error}. Please report this"
    if traced:
        note_class(Seen(facts[0], said.split(_BEHIND)[0], device, why_read))
    return said


@functools.lru_cache(maxsize=4096)
def _remembered(facts: Facts, device: str) -> str:
    site, operands, dtype, square, mask, tensors, offset, key_offset, scale, softcap = facts
    captured = tuple(Tensor(name, NAMES[kind], extents) for name, kind, extents in tensors)
    capped = None if softcap is None else float(softcap)
    call = Call(site, *operands, NAMES[dtype], square, mask, captured, offset, key_offset, float(scale), capped)
    spec = specify(call)
    text = str(spec)
    lowered(text, device)  # now, and not while shapes are traced
    return _BEHIND.join((text, ",".join(value.name for value in spec.inputs[3:])))


__all__ = ["attention_forward"]
