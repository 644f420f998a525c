"""How the keys and values of an attention are stored, and which Specs the decode kernel computes."""

from __future__ import annotations

from dataclasses import dataclass

from attncompile.codegen.triton.expressions import refusal
from attncompile.ir import Attend, Dequantize, Gather, Spec, simplify
from attncompile.ir.expr import Const, Expr, Index, Size, substitute, symbols, walk
from attncompile.ir.types import concrete

STORING = (Gather.keyword, Dequantize.keyword)
"""Operations that read a store; only the decode kernel has them."""


@dataclass(frozen=True)
class Storage:
    """The way from an input to keys or values.

    Attributes:
        name: the input.
        gather, dequantize: what is done to it, in this order, or ``None``.
    """

    name: str
    gather: Gather | None = None
    dequantize: Dequantize | None = None

    def expressions(self) -> tuple[Expr, ...]:
        """Expressions that the kernel evaluates to read it."""
        terms = (self.dequantize.scale, self.dequantize.shift) if self.dequantize else ()
        return (*(self.gather.at if self.gather else ()), *terms)


@dataclass(frozen=True)
class Group:
    """Query heads that share a KV head: how many, and whether they follow each other."""

    heads: int
    contiguous: bool


def storage_of(spec: Spec, name: str) -> Storage | None:
    """How an operand is stored; ``None`` when other operations make it."""
    makers = {result: op for op in spec.operations for result in op.results()}
    maker, dequantize, gather = makers.get(name), None, None
    if isinstance(maker, Dequantize):
        dequantize, name = maker, maker.code
        maker = makers.get(name)
    if isinstance(maker, Gather):
        gather, name = maker, maker.store
    if name not in {value.name for value in spec.inputs}:
        return None
    return Storage(name, gather, dequantize)


def reads_storage(spec: Spec) -> bool:
    """Whether the Spec has operations that only the decode kernel computes."""
    return any(operation.keyword in STORING for operation in spec.operations)


def group_of(attend: Attend, heads: Expr, key_heads: Expr) -> Group | None:
    """The query heads of one KV head, or ``None`` when they have no such form."""
    if simplify(attend.kv_head) == Index("h"):
        return Group(1, True)
    total, count = simplify(heads), simplify(key_heads)
    if not (isinstance(total, Const) and isinstance(count, Const)) or total.value % count.value:
        return None
    if any(isinstance(node, Size) for node in walk(attend.kv_head)):
        return None
    size, groups = int(total.value // count.value), int(count.value)
    found = [concrete(substitute(attend.kv_head, {Index("h"): Const(h)}), {}) for h in range(int(total.value))]
    for contiguous in (True, False):
        if found == [h // size if contiguous else h % groups for h in range(len(found))]:
            return Group(size, contiguous)
    return None


def storage_reason(spec: Spec) -> str | None:
    """Why the decode kernel does not compute a Spec that has a store, or ``None``."""
    attend = spec.attend()
    if attend is None or any(op.keyword not in (*STORING, attend.keyword) for op in spec.operations):
        names = ", ".join(operation.keyword for operation in spec.operations)
        return f"the decode kernel computes one attend behind gather and dequantize, not {names}"
    made = {result for op in spec.operations if op is not attend for result in op.results()}
    if attend.query in made or made & {load.tensor for op in spec.operations for load in op.captured()}:
        return "the decode kernel reads keys and values from a store, nothing else"
    for name in (attend.key, attend.value):
        storage = storage_of(spec, name)
        if storage is None:
            return f"{name} is not an input behind at most one gather and one dequantize"
        if storage.gather is not None:
            by_channel = [at for at in storage.gather.at if Index("d") in symbols(at)]
            if by_channel != [Index("d")]:
                return f"{storage.name} should be read at d along one axis, not at {', '.join(map(str, by_channel))}"
        if storage.dequantize is not None:
            stored = simplify(spec.types()[storage.dequantize.code].sizes[3])
            if not isinstance(stored, Const) or stored.value % 2:
                return f"{storage.name} has rows of {stored} bytes; the kernel reads two at a time"
        for expr in storage.expressions():
            reason = refusal(simplify(expr))
            if reason:
                return reason
    return decode_reason(spec)


def decode_reason(spec: Spec) -> str | None:
    """Why the decode kernel does not compute a Spec that another kernel may compute, or ``None``."""
    attend = spec.attend()
    if attend is None or any(op.keyword not in (*STORING, attend.keyword) for op in spec.operations):
        return "the decode kernel computes one attend"
    if not attend.norm.plain_softmax:
        return f"the decode kernel normalises by softmax, not by {attend.norm}"
    if attend.taps:
        return f"the decode kernel does not give {', '.join(attend.taps)}"
    types = spec.types()
    if group_of(attend, types[attend.query].sizes[1], types[attend.key].sizes[1]) is None:
        return f"the query heads of kv_head {attend.kv_head} are neither neighbours nor equally far apart"
    return None


__all__ = [
    "STORING",
    "Group",
    "Storage",
    "decode_reason",
    "group_of",
    "reads_storage",
    "storage_of",
    "storage_reason",
]
