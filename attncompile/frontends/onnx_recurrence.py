"""Linear attention as one ONNX call: ``LinearAttention`` of opset 27, and of ONNX Runtime's own set."""

from __future__ import annotations

from attncompile.frontends.graph import FusedScan, Indices
from attncompile.frontends.onnx_builder import AttentionRefused, Builder
from attncompile.ir import Expr, simplify
from attncompile.ir.expr import Const

RULES = ("linear", "gated", "delta", "gated_delta")
"""Update rules, each with a gate where its name has one, and a rate under the delta rule."""


def linear_attention(b: Builder) -> str:
    """The call as a scan; both operator sets define it alike.

    Raises:
        AttentionRefused: for what the definition does not hold, or a window of states.
    """
    query, key, value = b.tensor(0), b.tensor(1), b.tensor(2)
    heads, groups = int(b.attribute("q_num_heads", 0)), int(b.attribute("kv_num_heads", 0))
    rule = str(b.attribute("update_rule", "gated_delta"))
    if rule not in RULES:
        raise AttentionRefused(f"its update_rule is {rule!r}, which is none of {', '.join(RULES)}")
    if heads < 1 or groups < 1 or heads % groups:
        raise AttentionRefused(f"its {heads} query heads are no positive multiple of its {groups} KV heads")
    if b.attribute("state_window", 0):
        raise AttentionRefused("it keeps a window of states (state_window)")
    names = {what: b.tensor(n) if b.input(n) is not None else None for n, what in _OPTIONAL.items()}
    for what, part in (("decay", "gated"), ("beta", "delta")):
        if (names[what] is not None) != (part in rule):
            raise AttentionRefused(f"its update_rule {rule!r} and its input {what} do not go together")
    for name in (query, key, value, names["decay"], names["beta"]):
        if name is not None and len(b.shape(name)) != 3:
            raise AttentionRefused(f"{name} has {len(b.shape(name))} axes, where it should have 3")
    channels, wide = _part(b, query, heads), _part(b, value, groups)
    if _part(b, key, groups) != channels:
        raise AttentionRefused("query and key differ in their channels")
    batch, length, _ = b.shape(query)
    for name in (key, value):
        b.sizes.prove_equal(batch, b.shape(name)[0])
        b.sizes.prove_equal(length, b.shape(name)[1])
    state: Indices = (batch, Const(groups), Const(channels), Const(wide))
    past = names["past_state"]
    if past is not None and not _may_be(b.shape(past), state):
        raise AttentionRefused(f"its past_state is {_shown(b.shape(past))}, where it should be {_shown(state)}")
    second = b.node.outputs[1] if len(b.node.outputs) > 1 else None
    read = second is not None and bool(second.name) and (second.uses() or second.is_graph_output())
    reads = tuple(dict.fromkeys(name for name in (query, key, value, *names.values()) if name is not None))
    return b.emit(
        lambda name: FusedScan(
            name,
            reads,
            b.node.op_type,
            query,
            key,
            value,
            (batch, Const(heads), Const(groups), length, Const(channels), Const(wide)),
            float(b.attribute("scale", 0.0)) or channels**-0.5,
            names["decay"],
            _width(b, names["decay"], (groups * channels, groups)) == groups and channels > 1,
            names["beta"],
            _width(b, names["beta"], (groups, 1)) == 1 and groups > 1,
            past,
            second.name or "" if second is not None and read else "",
        ),
        (batch, length, simplify(Const(heads * wide))),
        b.dtype(query),
    )


_OPTIONAL = {3: "past_state", 4: "decay", 5: "beta"}


def _part(b: Builder, tensor: str, parts: int) -> int:
    """The last axis divided by a number of heads."""
    size = b.shape(tensor)[2]
    if not isinstance(size, Const) or int(size.value) % parts or int(size.value) < parts:
        raise AttentionRefused(f"the channels of {tensor} ({size}) are not a fixed multiple of its {parts} heads")
    return int(size.value) // parts


def _width(b: Builder, tensor: str | None, allowed: tuple[int, ...]) -> int:
    """The last axis of an input that may have one of several widths."""
    if tensor is None:
        return 0
    size = b.shape(tensor)[2]
    if not isinstance(size, Const) or int(size.value) not in allowed:
        raise AttentionRefused(f"{tensor} has {size} channels, where it should have {' or '.join(map(str, allowed))}")
    return int(size.value)


def _may_be(shape: Indices, wanted: Indices) -> bool:
    def fits(one: Expr, other: Expr) -> bool:
        return not (isinstance(one, Const) and isinstance(other, Const)) or one == other

    return len(shape) == len(wanted) and all(map(fits, shape, wanted))


def _shown(shape: Indices) -> str:
    return f"[{', '.join(map(str, shape))}]"


def state_info(b: Builder) -> tuple[Indices, str]:
    """Shape and dtype of the state that a call gives as its second output.

    Raises:
        AttentionRefused: as :func:`linear_attention`.
    """
    groups = int(b.attribute("kv_num_heads", 0)) or 1
    channels, wide = (Const(_part(b, b.tensor(n), groups)) for n in (1, 2))
    dtype = b.dtype(b.tensor(3)) if b.input(3) is not None else b.dtype(b.tensor(0))
    return (b.shape(b.tensor(0))[0], Const(groups), channels, wide), dtype


__all__ = ["RULES", "linear_attention", "state_info"]
