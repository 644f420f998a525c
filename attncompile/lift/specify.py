"""From a statement to a Spec: which tensors are the operands, which heads share keys, and what things are
called.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from attncompile.frontends.graph import (
    Graph,
)
from attncompile.ir import (
    Attend,
    Axis,
    Expr,
    Index,
    Kind,
    Load,
    Size,
    Spec,
    TensorType,
    Value,
    simplify,
)
from attncompile.ir.expr import (
    ONE,
    TOTAL,
    TRUE,
    WEIGHT,
    ZERO,
    Apply,
    Const,
    apply,
    loads,
    rewrite,
    substitute,
    symbols,
    walk,
)
from attncompile.ir.ops import HIDING_NOTHING
from attncompile.ir.simplify import polynomial
from attncompile.lift.masks import scale_score, split_mask, split_zeros
from attncompile.lift.operands import Operand, layout_of
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


@dataclass(frozen=True)
class _Chosen:
    operand: Operand
    layout: Layout


def _choose(candidates: Sequence[Operand], axes: Mapping[str, tuple[Expr, Expr]], graph: Graph) -> _Chosen | None:
    """The farthest operand that holds exactly the Spec tensor."""
    for operand in reversed(candidates):
        layout = layout_of(graph, operand.indices, graph.infos[operand.value].shape, axes)
        if layout is not None:
            return _Chosen(operand, layout)
    return None


def _choose_kv(
    graph: Graph, statement: Statement, extents: dict[str, Expr]
) -> tuple[_Chosen, _Chosen, Expr, Expr] | None:
    """Key and value that agree on the KV heads, farthest first."""
    heads = extents["h"]
    options = [_kv_head(o) for o in (*reversed(statement.key), *reversed(statement.value))]
    if heads == ONE:
        options = [HEAD]
    for kv_head in dict.fromkeys(options):
        groups = _kv_heads(kv_head, heads)
        if groups is None:
            continue
        found = []
        for candidates, channel in ((statement.key, CHANNEL), (statement.value, VALUE_CHANNEL)):
            matching = [o for o in candidates if heads == ONE or _kv_head(o) in (kv_head, ZERO)]
            symbol = kv_head if kv_head != ZERO else Index("g")
            axes = {
                "b": (BATCH, extents["b"]),
                "g": (symbol, groups),
                "j": (KEY, extents["j"]),
                channel.name: (channel, extents[channel.name]),
            }
            found.append(_choose(matching, axes, graph))
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
    factor = simplifier(apply("mul", query.operand.factor, key.operand.factor))
    logits = simplifier(scale_score(statement.logits, factor))
    weight = simplifier(apply("mul", value.operand.factor, statement.weight))
    linear = statement.normalizer.kind in HIDING_NOTHING
    score, mask, fill = split_zeros(logits) if linear else split_mask(logits)
    naming = _Naming(graph, extents)
    types = {
        "q": naming.type("bhid", (extents["b"], extents["h"], extents["i"], extents["d"]), query.operand.value),
        "k": naming.type("bgjd", (extents["b"], groups, extents["j"], extents["d"]), key.operand.value),
        "v": naming.type("bgje", (extents["b"], groups, extents["j"], extents["e"]), value.operand.value),
    }
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
        (*(Value(n, t) for n, t in types.items()), *(v for v, _ in captured)),
        (attend,),
        tuple(o.name for o in outputs),
    )
    try:
        spec.verify()
    except ValueError as error:
        raise refuse(graph, "ill-typed", str(error).splitlines()[0], statement.output) from None
    inner = {graph.owner.get(v, v) for v in statement.inner} | {
        graph.owner.get(output.value, output.value) for output in outputs
    }
    order = [n for n in graph.natives if n in inner]
    region = Region(
        (
            Binding("q", query.operand.value, query.layout),
            Binding("k", key.operand.value, key.layout),
            Binding("v", value.operand.value, value.layout),
            *(Binding(v.name, n, None) for v, n in captured),
        ),
        outputs,
        tuple(order),
    )
    return spec, region


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


class _Naming:
    """Names of sizes and captured tensors as they appear in a Spec."""

    def __init__(self, graph: Graph, extents: Mapping[str, Expr]) -> None:
        self.graph = graph
        # a native size that is called as an axis of the Spec is set apart first
        self.sizes: dict[Expr, Expr] = {Size(n): Size(f"{n}0") for n in "BIJ" if n in graph.size_names}
        named: set[Expr] = set()
        for axis, name in (("b", "B"), ("i", "I"), ("j", "J")):
            size = simplify(substitute(extents[axis], self.sizes))
            free = [node for node in walk(size) if isinstance(node, Size) and node not in named]
            if isinstance(size, Const) or not free:
                continue
            named.add(Size(name))
            poly = polynomial(size)
            atoms = [*free, *(mono[0] for mono in poly if len(mono) == 1 and isinstance(mono[0], Apply))]
            for atom in atoms:
                if poly.get((atom,)) == 1 and not any(atom in mono for mono in poly if mono != (atom,)):
                    # past and new keys: J is what the tensor shows, the part without a name is what remains; of
                    # S // 8 + 1 it is the quotient that has a name
                    self._call(atom, simplify(Size(name) - (size - atom)))
                    break
            else:
                self._call(extents[axis], Size(name))
        self.tensors: dict[str, str] = {}

    def _call(self, size: Expr, name: Expr) -> None:
        """Write a size by a name from now on, also where it was set apart before."""
        self.sizes = {native: simplify(substitute(shown, {size: name})) for native, shown in self.sizes.items()}
        self.sizes[size] = name

    def size(self, size: Expr) -> Expr:
        return simplify(substitute(size, self.sizes))

    def type(self, letters: str, sizes: Sequence[Expr], native: str) -> TensorType:
        axes = tuple(Axis(letter, self.size(size)) for letter, size in zip(letters, sizes, strict=True))
        return TensorType(axes, self.graph.infos[native].dtype)

    def expr(self, expr: Expr) -> Expr:
        for load in loads(expr):
            if load.tensor not in self.tensors:
                self.tensors[load.tensor] = self._name(load.tensor)

        def renamed(node: Expr) -> Expr | None:
            if isinstance(node, Load) and node.tensor in self.tensors:
                return Load(self.tensors[node.tensor], node.indices, node.element)
            return self.sizes.get(node)

        return simplify(rewrite(expr, renamed)) if expr not in (TRUE, WEIGHT, TOTAL) else expr

    def _name(self, native: str) -> str:
        given = self.graph.inputs.get(native)
        name = re.sub(r"[^\w.]", "_", given.name if given else native)
        name = name if re.match(r"[A-Za-z_]", name) else f"t_{name}"
        while name in self.tensors.values() or name in (
            "q",
            "k",
            "v",
            "out",
            "s",
            "w",
            "t",
            "true",
            "false",
            "inf",
            "nan",
        ):
            name += "_"
        return name

    def captured(self) -> list[tuple[Value, str]]:
        found = []
        for native, name in self.tensors.items():
            info = self.graph.infos[native]
            axes = tuple(Axis(f"a{n}", self.size(size)) for n, size in enumerate(info.shape))
            found.append((Value(name, TensorType(axes, info.dtype)), native))
        return found
