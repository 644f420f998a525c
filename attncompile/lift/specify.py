"""From a statement to a Spec: which tensors are the operands, which heads share keys, and what things are
called.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from attncompile.frontends.graph import (
    Graph,
)
from attncompile.ir import (
    Attend,
    Cache,
    Expr,
    Index,
    Kind,
    Spec,
    Value,
    simplify,
)
from attncompile.ir.attend import HIDING_NOTHING
from attncompile.ir.expr import (
    ONE,
    ZERO,
    Apply,
    Const,
    apply,
    symbols,
)
from attncompile.ir.simplify import polynomial
from attncompile.lift.loaded import loaded_numbers
from attncompile.lift.masks import scale_score, split_mask, split_zeros
from attncompile.lift.naming import Naming
from attncompile.lift.operands import Operand, layout_of
from attncompile.lift.parts import PartedOperand, piecewise, tensors
from attncompile.lift.program import Binding, Layout, Region
from attncompile.lift.statement import BATCH, CHANNEL, HEAD, KEY, QUERY, VALUE_CHANNEL, Statement, refuse


def _kv_head(operand: Operand) -> Expr:
    """The KV head of query head ``h``, as the operand's indices say: ``h`` itself where several axes make up the heads,
    if they do; the layout will tell.
    """
    found: set[Expr] = set()
    for index in operand.indices:
        for mono in polynomial(index):
            found |= {atom for atom in mono if HEAD in symbols(atom)}
    if not found:
        return ZERO
    return found.pop() if len(found) == 1 else HEAD


def _kv_heads(kv_head: Expr, heads: Expr) -> Expr | None:
    """How many KV heads there are."""
    match kv_head:
        case Index("h"):
            return heads
        case Const(0):
            return ONE
        case Apply("floordiv", (Index("h"), repeat)):
            return simplify(heads // repeat)
        case Apply("mod", (Index("h"), count)):
            return count
    return None


_POSITION = ("p", "i")
"""The axis of the keys in the first part of an operand and in the others, as ``cache`` calls them."""


@dataclass(frozen=True)
class _Chosen:
    """Tensors that hold a tensor of the Spec, one behind the other along the keys; nearly always one.

    Attributes:
        operands: the tensors; layouts: where the axes of the Spec are in each; lengths: how many keys each has.
        factor: what the product multiplies them with, over the key ``j`` where they differ in it.
    """

    operands: tuple[Operand, ...]
    layouts: tuple[Layout, ...]
    lengths: tuple[Expr, ...]
    factor: Expr


def _choose(
    candidates: Sequence[Operand], axes: Mapping[str, tuple[Expr, Expr]], graph: Graph, kv_head: Expr | None = None
) -> _Chosen | None:
    """The farthest operand that holds exactly the Spec tensor, whose heads are ``kv_head`` or one for all."""
    for operand in reversed(candidates):
        if isinstance(operand, PartedOperand):
            chosen = _choose_parts(operand, axes, graph, kv_head)
            if chosen is not None:
                return chosen
            continue
        if kv_head is not None and _kv_head(operand) not in (kv_head, ZERO):
            continue
        layout = layout_of(graph, operand.indices, graph.infos[operand.value].shape, axes)
        if layout is not None:
            length = axes["j"][1] if "j" in axes else ONE
            return _Chosen((operand,), (layout,), (length,), operand.factor)
    return None


def _choose_parts(
    operand: PartedOperand, axes: Mapping[str, tuple[Expr, Expr]], graph: Graph, kv_head: Expr | None
) -> _Chosen | None:
    """For every part the farthest tensor that holds exactly its keys."""
    found: list[_Chosen] = []
    for number, (part, length) in enumerate(zip(operand.parts, operand.lengths, strict=True)):
        named = {_POSITION[number > 0] if name == "j" else name: axis for name, axis in axes.items()}
        named[_POSITION[number > 0]] = (KEY, length)
        chosen = _choose(part, named, graph, kv_head)
        if chosen is None:
            return None
        found.append(chosen)
    return _Chosen(
        tuple(chosen.operands[0] for chosen in found),
        tuple(chosen.layouts[0] for chosen in found),
        operand.lengths,
        piecewise([chosen.factor for chosen in found], operand.lengths),
    )


def _choose_kv(
    graph: Graph, statement: Statement, extents: dict[str, Expr]
) -> tuple[_Chosen, _Chosen, Expr, Expr] | None:
    """Key and value that agree on the KV heads, farthest first."""
    heads = extents["h"]
    options = [_kv_head(o) for o in tensors((*reversed(statement.key), *reversed(statement.value)))]
    if heads == ONE:
        options = [HEAD]
    for kv_head in dict.fromkeys(options):
        groups = _kv_heads(kv_head, heads)
        if groups is None:
            continue
        found = []
        for candidates, channel in ((statement.key, CHANNEL), (statement.value, VALUE_CHANNEL)):
            symbol = kv_head if kv_head != ZERO else Index("g")
            axes = {
                "b": (BATCH, extents["b"]),
                "g": (symbol, groups),
                "j": (KEY, extents["j"]),
                channel.name: (channel, extents[channel.name]),
            }
            found.append(_choose(candidates, axes, graph, None if heads == ONE else kv_head))
        if found[0] is not None and found[1] is not None:
            return found[0], found[1], kv_head, groups
    return None


def specify(graph: Graph, name: str, statement: Statement) -> tuple[Spec, Region]:
    """The Spec of a statement, and the native tensors it is bound to.

    Raises:
        RefusalError: when no tensors of the graph hold exactly the operands or the output.
    """
    extents = dict(statement.extents)
    if not graph.is_native(statement.output):
        raise refuse(
            graph,
            "inner-output",
            "the product with the values is only part of a native operation",
            statement.output,
        )
    axes = {
        "b": (BATCH, extents["b"]),
        "h": (HEAD, extents["h"]),
        "i": (QUERY, extents["i"]),
        "d": (CHANNEL, extents["d"]),
    }
    query = _choose(statement.query, axes, graph)
    if query is None:
        raise refuse(graph, "operand-layout", "no tensor on the way holds exactly the queries", statement.output)
    chosen = _choose_kv(graph, statement, extents)
    if chosen is None:
        raise refuse(
            graph,
            "operand-layout",
            "no tensors on the way hold exactly the keys and values",
            statement.output,
        )
    key, value, kv_head, groups = chosen
    output_axes = {
        "b": (BATCH, extents["b"]),
        "h": (HEAD, extents["h"]),
        "i": (QUERY, extents["i"]),
        "e": (VALUE_CHANNEL, extents["e"]),
    }
    output = layout_of(graph, statement.output_indices, graph.infos[statement.output].shape, output_axes)
    if output is None:
        raise refuse(
            graph,
            "output-layout",
            "the output's axes mix batch, heads and queries in a way that is not understood",
            statement.output,
        )
    outputs = (Binding("out", statement.output, output), *_log_sum(graph, statement, output_axes))
    simplifier = graph.simplifier(extents)
    factor = simplifier(apply("mul", query.factor, key.factor))
    logits = simplifier(scale_score(statement.logits, factor))
    weight = simplifier(apply("mul", value.factor, statement.weight))
    linear = statement.normalizer.kind in HIDING_NOTHING
    score, mask, fill = split_zeros(logits) if linear else split_mask(logits, loaded_numbers(graph, logits))
    parted = len(key.operands) + len(value.operands) > 2
    named = [("B", extents["b"]), ("I", extents["i"]), ("J", extents["j"])]
    if parted:  # heads may be the blocks of a sequence here, which are as many as its length says
        each = [size for chosen in (key, value) if len(chosen.operands) > 1 for size in chosen.lengths]
        parts = [(f"P{n}", size) for n, size in enumerate(dict.fromkeys(each))]
        named = [named[0], ("H", extents["h"]), named[1], *parts]
    naming = Naming(graph, named, extents)
    groups_sizes = {**extents, "g": groups}
    bound = [
        _bind(name, letters, chosen, groups_sizes, naming)
        for name, letters, chosen in (("q", "bhid", query), ("k", "bgjd", key), ("v", "bgje", value))
    ]
    # in the order in which the operations read them: what is put together first
    operands = [entry for found in sorted(bound, key=lambda found: len(found) == 1) for entry in found]
    attend = Attend(
        "q",
        "k",
        "v",
        naming.expr(_real(score)),
        naming.expr(mask),
        naming.expr(_real(fill)),
        naming.expr(weight),
        naming.expr(_real(statement.sink)),
        kv_head,
        statement.normalizer,
        naming.expr(_real(statement.divisor)),
        lse="lse" if statement.lse else "",
    )
    captured = naming.captured()
    spec = Spec(
        name,
        (*(entry.value for entry in operands), *(v for v, _ in captured)),
        (*_behind_each_other("k", len(key.operands)), *_behind_each_other("v", len(value.operands)), attend),
        tuple(o.name for o in outputs),
    )
    try:
        spec.verify()
    except ValueError as error:
        raise refuse(graph, "ill-typed", str(error).splitlines()[0], statement.output) from None
    inner = {graph.owner.get(v, v) for v in statement.inner} | {
        graph.owner.get(output.value, output.value) for output in outputs
    }
    order = sorted(inner & graph.native_order.keys(), key=graph.native_order.__getitem__)
    region = Region(
        (
            *(entry.binding for entry in operands),
            *(Binding(v.name, n, None) for v, n in captured),
        ),
        outputs,
        tuple(order),
    )
    return spec, region


@dataclass(frozen=True)
class _Bound:
    """An operand of the Spec and where it is in the graph."""

    value: Value
    binding: Binding


def _bind(name: str, letters: str, chosen: _Chosen, sizes: Mapping[str, Expr], naming: Naming) -> list[_Bound]:
    """The inputs of a Spec that make its query, key or value: one, or one for each part."""
    if len(chosen.operands) == 1:
        native = chosen.operands[0].value
        kind = naming.type(letters, [sizes[letter] for letter in letters], native)
        return [_Bound(Value(name, kind), Binding(name, native, chosen.layouts[0]))]
    found = []
    for number, (operand, layout, length) in enumerate(
        zip(chosen.operands, chosen.layouts, chosen.lengths, strict=True)
    ):
        own = letters.replace("j", _POSITION[number > 0])
        kind = naming.type(own, (sizes["b"], sizes["g"], length, sizes[letters[3]]), operand.value)
        found.append(_Bound(Value(f"{name}{number}", kind), Binding(f"{name}{number}", operand.value, layout)))
    return found


def _behind_each_other(name: str, parts: int) -> list[Cache]:
    """The operations that put the parts of an operand one behind the other."""
    steps: list[Cache] = []
    for number in range(1, parts):
        past = steps[-1].out if steps else f"{name}0"
        steps.append(Cache(past, f"{name}{number}", name if number == parts - 1 else f"{name}0_{number}"))
    return steps


def _log_sum(graph: Graph, statement: Statement, axes: Mapping[str, tuple[Expr, Expr]]) -> tuple[Binding, ...]:
    """The second result, where there is one."""
    if not statement.lse:
        return ()
    rows = {name: axis for name, axis in axes.items() if name != "e"}
    layout = layout_of(graph, statement.lse_indices, graph.infos[statement.lse].shape, rows)
    if layout is None:
        raise refuse(
            graph,
            "output-layout",
            "the log-sum-exp mixes batch, heads and queries in a way that is not understood",
            statement.lse,
        )
    return (Binding("lse", statement.lse, layout),)


def _real(expr: Expr) -> Expr:
    if expr.kind is Kind.FLOAT:
        return expr
    return Const(float(expr.value)) if isinstance(expr, Const) else apply("float", expr)
