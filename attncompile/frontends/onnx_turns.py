"""Rotary positions inside an attention call, in operators of the ONNX standard (Su et al. 2021, arXiv:2104.09864)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from attncompile.frontends.onnx_cache import Cache, Positions
from attncompile.frontends.onnx_scores import Body


@dataclass(frozen=True)
class Turn:
    """How the channels of a head are turned.

    Attributes:
        channels: of a head. half: pairs that are turned; channels behind ``2·half`` stay as they are.
        interleaved: whether channels ``2·r`` and ``2·r + 1`` are a pair, and not ``r`` and ``half + r``.
    """

    channels: int
    half: int
    interleaved: bool


def turned(
    body: Body, turn: Turn, states: ir.Value, positions: Positions, cache: Cache, given: Mapping[str, ir.Value]
) -> ir.Value:
    """Queries or keys ``[B, n, S, D]``, turned by the angles of their positions.

    Args:
        body: of the definition. turn: how. states: what is turned. positions, cache: of the call.
        given: its inputs, with ``cos_cache`` and ``sin_cache`` ``[positions, half]``.
    """
    at = _angles_at(body, positions, cache, given)
    cos, sin = (body.unsqueezed(body("Gather", given[name], at, axis=0), 1) for name in ("cos_cache", "sin_cache"))
    size = 2 * turn.half
    whole = states if size == turn.channels else body.sliced(states, 0, size, 3)
    first, second = _pairs(body, turn, whole)
    left = body("Sub", body("Mul", first, cos), body("Mul", second, sin))
    right = body("Add", body("Mul", first, sin), body("Mul", second, cos))
    if turn.interleaved:
        stacked = body("Concat", body.unsqueezed(left, 4), body.unsqueezed(right, 4), axis=4)
        made = [body("Reshape", stacked, body.constant([0, 0, 0, size]))]
    else:
        made = [left, right]
    if size != turn.channels:
        made.append(body.sliced(states, size, turn.channels, 3))
    return body("Concat", *made, axis=3) if len(made) > 1 else made[0]


def _pairs(body: Body, turn: Turn, states: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The first and the second channels of the pairs ``[B, n, S, half]``."""
    if not turn.interleaved:
        return body.sliced(states, 0, turn.half, 3), body.sliced(states, turn.half, 2 * turn.half, 3)
    apart = body("Reshape", states, body.constant([0, 0, 0, turn.half, 2]))
    return body("Gather", apart, body.constant(0), axis=4), body("Gather", apart, body.constant(1), axis=4)


def _angles_at(body: Body, positions: Positions, cache: Cache, given: Mapping[str, ir.Value]) -> ir.Value:
    """Rows of the angles ``[B, S]``, or ``[1, S]`` where all rows are alike."""
    if "position_ids" not in given:
        return positions.own
    ids = given["position_ids"]
    first = body("Gather", body("Reshape", ids, body.constant([-1])), body.constant([0]), axis=0)
    counted = body("Add", first, body.unsqueezed(body.range(body.constant([0]), positions.count), 0))
    if cache.past is None:
        return counted
    return body("Where", body("Equal", cache.total, positions.count), counted, ids)


__all__ = ["Turn", "turned"]
