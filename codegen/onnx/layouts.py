"""The two layouts of heads: ``[B, H, S, D]`` of a Spec and the flat ``[B, S, H*D]`` that projections and operators use.

A projection makes the flat one, the graph turns it with ``Reshape`` and ``Transpose``, and a fused operator wants it
flat again. Looking through the turn saves both copies.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from attncompile.codegen.onnx.values import Builder, constant, dimensions, known_axis, producer, redirect

TURN = (0, 2, 1, 3)
"""The axis order that takes ``[B, S, H, D]`` to ``[B, H, S, D]`` and back."""


@dataclass(frozen=True)
class Heads:
    """A tensor of heads seen flat: ``flat`` is ``[B, S, heads * channels]``."""

    flat: ir.Value
    heads: int
    channels: int


def _order(value: ir.Value | None) -> tuple[ir.Node, tuple[int, ...]] | None:
    node = producer(value, "Transpose")
    if node is None or "perm" not in node.attributes:
        return None
    return node, tuple(node.attributes["perm"].as_ints())


def heads_of(value: ir.Value) -> Heads | None:
    """The flat tensor behind a value of shape ``[B, H, S, D]`` that is a turned view of it."""
    turned = _order(value)
    if turned is None or turned[1] != TURN:
        return None
    split = producer(turned[0].inputs[0], "Reshape")
    if split is None or split.inputs[0] is None:
        return None
    flat, whole = split.inputs[0], split.outputs[0]
    heads, channels, width = known_axis(whole, 2), known_axis(whole, 3), known_axis(flat, 2)
    sizes, inner = dimensions(whole), dimensions(flat)
    if heads is None or channels is None or sizes is None or inner is None or len(inner) != 3:
        return None
    # the last axis alone is split: widths agree, and the sequence axis is the same one
    if width != heads * channels or inner[1] is None or inner[1] != sizes[1]:
        return None
    return Heads(flat, heads, channels)


def to_heads(build: Builder, view: Heads) -> ir.Value:
    """``[B, S, H*D]`` as ``[B, H, S, D]``."""
    split = build("Reshape", view.flat, build.constant([0, 0, view.heads, view.channels]))
    sizes = dimensions(view.flat) or (None, None, None)
    split.shape = ir.Shape((sizes[0], sizes[1], view.heads, view.channels))
    split.dtype = view.flat.dtype
    turned = build("Transpose", split, perm=TURN)
    turned.shape = ir.Shape((sizes[0], view.heads, sizes[1], view.channels))
    turned.dtype = view.flat.dtype
    return turned


def to_flat(build: Builder, value: ir.Value, heads: int, channels: int) -> ir.Value:
    """``[B, H, S, D]`` as ``[B, S, H*D]``; nothing is built when the value is a turned view of just that."""
    view = heads_of(value)
    if view is not None and (view.heads, view.channels) == (heads, channels):
        return view.flat
    turned = build("Transpose", value, perm=TURN)
    flat = build("Reshape", turned, build.constant([0, 0, heads * channels]))
    sizes = dimensions(value) or (None,) * 4
    flat.shape = ir.Shape((sizes[0], sizes[2], heads * channels))
    flat.dtype = value.dtype
    return flat


def drop_double_turns(model: ir.Model) -> int:
    """Remove ``Reshape(Transpose(heads))`` where the heads are a turned view of the same flat tensor; how many."""
    done = 0
    for node in list(model.graph):
        if node.domain or node.op_type != "Reshape":
            continue
        turned = _order(node.inputs[0])
        if turned is None or turned[1] != TURN or turned[0].inputs[0] is None:
            continue
        view = heads_of(turned[0].inputs[0])
        if view is None:
            continue
        target, result, flat = constant(node.inputs[1]), dimensions(node.outputs[0]), dimensions(view.flat)
        width = view.heads * view.channels
        keeps = target is not None and np.array_equal(target.reshape(-1), [0, 0, width])
        if keeps or (result is not None and flat is not None and None not in result and result == flat):
            redirect(node.outputs[0], view.flat)
            done += 1
    return done
