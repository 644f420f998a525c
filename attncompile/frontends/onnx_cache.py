"""Keys behind a cache whose rows are of different length, in operators of the ONNX standard.

Row ``b`` has ``past[b]`` cached keys, whatever its cache has room for, and ``S`` new ones behind them; query ``i`` is
where its own key is, at ``past[b] + i``. See :mod:`attncompile.frontends.onnx_group_query`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from attncompile.frontends.onnx_scores import Body


@dataclass(frozen=True)
class Cache:
    """What a call is given.

    Attributes:
        last: the last key of each row ``[B]`` int64. total: keys of the longest row ``[1]`` int64.
        past: cached keys and values ``[B, G, P, D]``, ``None`` in a call that has none.
    """

    last: ir.Value
    total: ir.Value
    past: tuple[ir.Value, ir.Value] | None

    @classmethod
    def of(cls, body: Body, given: Mapping[str, ir.Value]) -> Cache:
        """The cache of a call, from ``seqlens_k``, ``total_sequence_length``, ``past_key`` and ``past_value``."""
        last, total = (
            body("Cast", body("Reshape", given[name], body.constant([size])), to=ir.DataType.INT64.value)
            for name, size in (("seqlens_k", -1), ("total_sequence_length", 1))
        )
        return cls(last, total, (given["past_key"], given["past_value"]) if "past_key" in given else None)


@dataclass(frozen=True)
class Positions:
    """Where the queries of a call are among its keys, int64.

    Attributes:
        past: cached keys of each row ``[B, 1]``, 0 (a scalar) in a call without a cache.
        own: of each query ``[B, S]``, or ``[1, S]`` where all rows are alike.
        last: the last key of each row ``[B]``. count: how many queries there are ``[1]``.
    """

    past: ir.Value
    own: ir.Value
    last: ir.Value
    count: ir.Value


def positions_of(body: Body, cache: Cache, query: ir.Value) -> Positions:
    """Where queries ``[B, n, S, D]`` are."""
    count, zero = body.size(query, 2), body.constant(0)
    steps = body.unsqueezed(body.range(body.constant([0]), count), 0)
    if cache.past is None:
        return Positions(zero, steps, cache.last, count)
    rest = body("Sub", body("Add", cache.last, body.constant(1)), count)
    past = body.unsqueezed(body("Max", rest, zero), 1)
    return Positions(past, body("Add", past, steps), cache.last, count)


def joined(body: Body, cache: Cache, positions: Positions, new: Sequence[ir.Value]) -> list[ir.Value]:
    """All keys and values ``[B, G, T, D]``, of the past ones and the new ``[B, G, S, D]``; behind the end of a row is
    its last one again.
    """
    assert cache.past is not None
    room = body.size(cache.past[0], 2)
    places = body.range(body.constant([0]), body("Max", cache.total, room))
    newest = body("Sub", positions.count, body.constant(1))
    behind = body("Add", room, body("Min", body("Sub", places, positions.past), newest))
    at = body("Where", body("Less", places, positions.past), places, behind)
    sizes = [body.constant([1]), body.size(new[0], 1), body.constant([1]), body.constant([1])]
    index = body("Expand", body.unsqueezed(at, 1, 3), body("Concat", *sizes, axis=0))
    pairs = zip(cache.past, new, strict=True)
    return [body("GatherND", body("Concat", *pair, axis=2), index, batch_dims=2) for pair in pairs]


def within(body: Body, cache: Cache, present: Sequence[ir.Value]) -> list[ir.Value]:
    """The keys and values up to the end of the longest row: a buffer may have room for more."""
    places = body.range(body.constant([0]), cache.total)
    return [body("Gather", each, places, axis=2) for each in present]


__all__ = ["Cache", "Positions", "joined", "positions_of", "within"]
