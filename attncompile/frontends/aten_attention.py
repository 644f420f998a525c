"""Whole attentions that are one ATen call."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from attncompile.frontends import movement
from attncompile.frontends.aten_builder import Builder, Row, Unstated
from attncompile.frontends.aten_sizes import broadcast_shapes
from attncompile.frontends.graph import FusedAttention, Indices
from attncompile.ir import Expr, simplify
from attncompile.ir.expr import ONE, ZERO, Const, Index, apply


def _scaled_dot_product(b: Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    query, key, value = (b.tensor(given[n]) for n in names[:3])
    if given.get("dropout_p", 0.0):
        raise Unstated("it drops weights at random, as in training")
    shapes = [b.shape(t) for t in (query, key, value)]
    rank = len(shapes[0])
    if rank < 3 or any(len(shape) != rank for shape in shapes) or (rank != 4 and given.get("enable_gqa")):
        raise Unstated(f"its operands have ranks {[len(shape) for shape in shapes]}")
    b.equate(shapes[0][-1], shapes[1][-1])
    b.equate(shapes[1][-2], shapes[2][-2])
    channels, scale = shapes[0][-1], given.get("scale")
    if scale is None:
        if not isinstance(channels, Const):
            raise Unstated(f"its scale depends on a symbolic number of channels, {channels}")
        scale = 1.0 / math.sqrt(channels.value)
    # all axes before the last two are batch-like: the first is b, the others together are h
    outer = broadcast_shapes([shape[:-2] for shape in shapes]) if not given.get("enable_gqa") else shapes[0][:-2]
    batch, inner = (outer[0], outer[1:])
    repeat = simplify(outer[1] // shapes[1][1]) if given.get("enable_gqa") else None
    heads: Expr = ONE
    for size in inner:
        heads = simplify(heads * size)

    def element(shape: Indices) -> Callable[[Indices], Indices]:
        grouped = repeat is not None and shape is not shapes[0]

        def index_map(indices: Indices) -> Indices:
            head = apply("floordiv", indices[1], repeat) if grouped and repeat is not None else indices[1]
            place = [indices[0], *_unravelled(head, inner)]
            return (
                *(
                    ZERO if size == ONE != outer[n] and not grouped else at
                    for n, (size, at) in enumerate(zip(shape[:-2], place, strict=True))
                ),
                *indices[2:],
            )

        return index_map

    mask = b.tensor(given["attn_mask"]) if given.get("attn_mask") is not None else None
    full = (*outer, shapes[0][-2], shapes[1][-2])
    for whole, size in zip(reversed(full), reversed(b.shape(mask) if mask is not None else ()), strict=False):
        if ONE not in (whole, size):
            b.equate(whole, size)

    def mask_element(indices: Indices) -> Indices:
        assert mask is not None
        return movement.broadcast(b.shape(mask), full)((indices[0], *_unravelled(indices[1], inner), *indices[2:]))

    output = (Index("b"), *_unravelled(Index("h"), inner), Index("i"), Index("e"))
    return b.emit(
        FusedAttention(
            b.name(),
            query,
            key,
            value,
            element(shapes[0]),
            element(shapes[1]),
            element(shapes[2]),
            mask,
            mask_element if mask else None,
            Index("j") <= Index("i") if given.get("is_causal") else None,
            float(scale),
            (batch, heads, shapes[0][-2], shapes[1][-2], channels, shapes[2][-1]),
            (),
            b.out.dtype,
            output_indices=output,
        ),
        b.out,
    )


def _unravelled(position: Expr, sizes: Indices) -> list[Expr]:
    """The indices of a row-major position on axes of these sizes."""
    found: list[Expr] = []
    for size in reversed(sizes[1:]):
        found.append(simplify(apply("mod", position, size)))
        position = simplify(apply("floordiv", position, size))
    return [position, *reversed(found)] if sizes else []


def is_attention(operation: str) -> bool:
    """Whether an operator is a whole attention, by the names that torch gives to its own."""
    return any(
        part in operation
        for part in (
            "scaled_dot_product",
            "flex_attention",
            "multi_head_attention",
            "transformer_encoder_layer",
        )
    )


ATTENTION: dict[str, Row] = {
    "scaled_dot_product_attention": _scaled_dot_product,
}
"""Whole attentions; one that has no row is refused by name."""
