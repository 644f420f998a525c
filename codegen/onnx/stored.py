"""A language model's cache in integers, written and read by ``GroupQueryAttention``.

A cached key or value ``x`` of channel ``d`` of KV head ``g`` is kept as ``round(x / scale[g, d])``, at most 127 in
eight bits and at most 7 in four, of which two stand in a byte (the even channel in the lower half, 8 standing for 0).
The operator rounds what is new, and attends to what it kept: a prompt sees the same numbers as every step after it.
Scales are fixed when the model is written; a value beyond what they hold becomes the largest one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from attncompile.codegen.onnx.tried import why_not
from attncompile.codegen.onnx.values import MICROSOFT, constant

Bits = Literal[4, 8]
KEY_PAST, VALUE_PAST = 3, 4
"""Inputs of ``GroupQueryAttention`` that hold what is cached; results 1 and 2 are the same with what is new."""

KEY_SCALE, VALUE_SCALE = 12, 13
"""Inputs of it that hold the scales."""

BITS, GRANULARITY = "kv_cache_bit_width", ("k_quant_type", "v_quant_type")
PER_CHANNEL = "PER_CHANNEL"
FEATURES = (
    "a prompt with an empty cache",
    "a step behind a cache",
    "several queries behind a cache, one row",
    "a cache written in place",
)
"""What is done with every cache, as the table of tried features has it for one in integers."""


@dataclass(frozen=True)
class Codes:
    """How keys or values of one layer are kept.

    Attributes:
        scale: ``[G, D]`` float32; bits: of each element.
    """

    scale: np.ndarray
    bits: Bits

    @property
    def largest(self) -> int:
        """The largest code; the smallest is one further from zero."""
        return int(2 ** (self.bits - 1)) - 1

    def encode(self, values: np.ndarray) -> np.ndarray:
        """``[B, G, P, D]`` as codes, int8; or uint8 ``[B, G, P, D/2]`` of two codes each."""
        whole = np.rint(values.astype(np.float32) / self.scale[None, :, None]).clip(-self.largest - 1, self.largest)
        if self.bits == 8:
            return whole.astype(np.int8)
        parts = (whole + 8).astype(np.uint8)
        return np.asarray(parts[..., 0::2] | (parts[..., 1::2] << 4))

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """What codes stand for, float32 ``[B, G, P, D]``."""
        if self.bits == 4:
            pairs = np.stack([codes & 15, codes >> 4], axis=-1)
            codes = pairs.reshape(*codes.shape[:-1], 2 * codes.shape[-1]).astype(np.int16) - 8
        return codes.astype(np.float32) * self.scale[None, :, None]


def feature(name: str, bits: Bits) -> str:
    """A feature with a cache in integers, as the table calls it."""
    return f"{name}, cache in int{bits} {PER_CHANNEL}"


def why_not_stored(bits: Bits, provider: str, version: str | None, dtype: str, more: Sequence[str] = ()) -> str | None:
    """Why a version of ONNX Runtime cannot keep a cache in so many bits, ``None`` where it was found right.

    Args:
        bits: of an element; provider: where it runs; version: of ONNX Runtime, the installed one if none.
        dtype: of queries; more: features that a model's attention has besides.
    """
    needed = [feature(name, bits) for name in (*FEATURES, *more)]
    return why_not(MICROSOFT, "GroupQueryAttention", needed, dtype, version=version, provider=provider)


def caching_nodes(model: ir.Model) -> list[ir.Node]:
    """The ``GroupQueryAttention`` nodes whose past is an input of the model and whose present is a result of it."""
    outputs = set(model.graph.outputs)
    return [
        node
        for node in model.graph
        if (node.domain, node.op_type) == (MICROSOFT, "GroupQueryAttention")
        and len(node.outputs) > 2
        and all(len(node.inputs) > place and _is_input(node.inputs[place]) for place in (KEY_PAST, VALUE_PAST))
        and all(value in outputs for value in node.outputs[1:3])
    ]


def _is_input(value: ir.Value | None) -> bool:
    return value is not None and value.is_graph_input()


def special_features(node: ir.Node) -> list[str]:
    """What a node does besides, as the table calls it."""
    found = []
    if node.attributes.get_int("do_rotary", 0):
        found.append("rotary")
    if len(node.inputs) > 1 and node.inputs[1] is None:
        found.append("packed query, key and value")
    if node.attributes.get_int("local_window_size", -1) > 0:
        found.append("window")
    if node.attributes.get_float("softcap", 0.0):
        found.append("softcap")
    if len(node.inputs) > 11 and node.inputs[11] is not None:
        found.append("sink of each head")
    if len(node.inputs) > 10 and node.inputs[10] is not None:
        found.append("attention_bias")
    return found


def store_narrow(model: ir.Model, ranges: Mapping[str, np.ndarray], bits: Bits) -> int:
    """Keep the cache of every ``GroupQueryAttention`` in integers, in place; how many nodes.

    Args:
        model: changed in place; its caches become ``int8``, or ``uint8`` of half as many channels.
        ranges: the largest element of keys or values of each channel ``[G, D]``, by the name of the model's input.
        bits: of an element.

    Raises:
        ValueError: for a range that is not finite, naming the input.
    """
    nodes = caching_nodes(model)
    for node in nodes:
        node.resize_inputs(max(len(node.inputs), VALUE_SCALE + 1))
        for place, scale_place in ((KEY_PAST, KEY_SCALE), (VALUE_PAST, VALUE_SCALE)):
            past, present = node.inputs[place], node.outputs[place - KEY_PAST + 1]
            assert past is not None  # as caching_nodes has seen
            try:
                scale = scale_of(ranges[str(past.name)], bits)
            except ValueError as error:
                raise ValueError(f"{past.name}: {error}") from error
            node.replace_input_with(scale_place, _stored(model, f"{past.name}.scale", scale[None, :, None]))
            for value in (past, present):
                value.dtype = ir.DataType.INT8 if bits == 8 else ir.DataType.UINT8
                if bits == 4 and value.shape is not None:
                    value.shape = ir.Shape([*value.shape[:-1], scale.shape[-1] // 2])
        for name in GRANULARITY:
            node.attributes[name] = ir.AttrString(name, PER_CHANNEL)
        node.attributes[BITS] = ir.AttrInt64(BITS, bits)
    return len(nodes)


ROOM: Mapping[Bits, float] = {8: 1.25, 4: 1.0}
"""How far beyond the largest element that was seen the largest code lies: eight bits have steps to spare, four not."""


def scale_of(largest: np.ndarray, bits: Bits) -> np.ndarray:
    """Scales for channels in which elements up to these were seen; of a channel that is always zero any does.

    Raises:
        ValueError: for an element that is not finite, which no scale holds.
    """
    if not np.isfinite(largest).all():
        found = largest[~np.isfinite(largest)].flat[0]
        raise ValueError(f"among the elements that were seen is {found}, and no integers stand for that")
    return np.where(largest > 0, ROOM[bits] * largest, 1).astype(np.float32) / np.float32(2 ** (bits - 1) - 1)


def _stored(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    made = ir.Value(
        name=name,
        shape=ir.Shape(array.shape),
        type=ir.TensorType(ir.DataType.FLOAT),
        const_value=ir.tensor(array, name=name),
    )
    model.graph.register_initializer(made)
    return made


def codes_of(model: ir.Model) -> dict[str, Codes]:
    """How each cached input and result of a model is kept, by name; none where the cache is not in integers."""
    found: dict[str, Codes] = {}
    for node in caching_nodes(model):
        bits = node.attributes.get_int(BITS, 0)
        if bits not in (4, 8) or len(node.inputs) <= VALUE_SCALE:
            continue
        for place, scale_place in ((KEY_PAST, KEY_SCALE), (VALUE_PAST, VALUE_SCALE)):
            scale, past = constant(node.inputs[scale_place]), node.inputs[place]
            if scale is None or past is None:
                continue
            codes = Codes(scale.reshape(scale.shape[-3], scale.shape[-1]), 8 if bits == 8 else 4)
            found[str(past.name)] = found[str(node.outputs[place - KEY_PAST + 1].name)] = codes
    return found


__all__ = [
    "Bits",
    "Codes",
    "caching_nodes",
    "codes_of",
    "scale_of",
    "special_features",
    "store_narrow",
    "why_not_stored",
]
