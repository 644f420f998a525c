"""The parts of a Spec whose tokens are moved to other places, attended to, and moved back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from attncompile.ir import Attend, Regroup, Spec, Value, simplify
from attncompile.ir.expr import Const


@dataclass(frozen=True)
class Regrouped:
    """A Spec whose tokens are moved, attended to and moved back.

    Attributes:
        attention: the attention alone; its operands are the moved ones.
        before: how its query, key and value come about, by name.
        after: how its result is moved back.
    """

    attention: Spec
    before: Mapping[str, Regroup]
    after: Regroup


def regrouped_parts(spec: Spec) -> Regrouped | None:
    """The parts of such a Spec, or ``None`` when it is no such one."""
    operations = spec.operations
    if [operation.keyword for operation in operations] != ["regroup", "regroup", "regroup", "attend", "regroup"]:
        return None
    attend, after = operations[3], operations[4]
    before = {each.out: each for each in operations[:3] if isinstance(each, Regroup)}
    if not isinstance(attend, Attend) or not isinstance(after, Regroup) or after.tensor != attend.out:
        return None
    given = {value.name for value in spec.inputs}
    known = {attend.query, attend.key, attend.value} == set(before) and spec.outputs == (after.out,)
    if not known or not {each.tensor for each in before.values()} <= given:
        return None
    if any(not isinstance(simplify(each.size), Const) for each in (*before.values(), after)):
        return None
    types = spec.types()
    operands = tuple(Value(name, types[name]) for name in (attend.query, attend.key, attend.value))
    read = {load.tensor for load in attend.captured()}
    captured = tuple(value for value in spec.inputs if value.name in read)
    return Regrouped(Spec(spec.name, (*operands, *captured), (attend,), (attend.out,)), before, after)


__all__ = ["Regrouped", "regrouped_parts"]
