"""Operands in parts: keys or values of which no single tensor holds all, but several do one behind the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from attncompile.frontends.graph import Concatenate, Indices
from attncompile.ir import Expr, Index, simplify
from attncompile.ir.expr import ONE, ZERO, Const, apply, substitute, symbols
from attncompile.lift.axes import BATCH, HEAD, KEY, digits
from attncompile.lift.interpret import Interpreter
from attncompile.lift.operands import Operand, trace_operand


@dataclass(frozen=True)
class PartedOperand(Operand):
    """An operand whose positions ``j`` lie in several tensors, one behind the other.

    Attributes:
        parts: for each part the tensors that could be said to hold it, nearest first, over its own position ``j``.
        lengths: how many positions each part has.
    """

    parts: tuple[tuple[Operand, ...], ...]
    lengths: tuple[Expr, ...]

    def each(self, change: Callable[[Operand], Operand]) -> PartedOperand:
        """The operand with its tensors changed."""
        return replace(self, parts=tuple(tuple(change(operand) for operand in part) for part in self.parts))


def trace_parts(interpreter: Interpreter, value: str, indices: Indices, summed: frozenset[Expr]) -> list[Operand]:
    """The tensors that a product could be said to read, nearest first, as :func:`trace_operand` finds them.

    Where the product reads keys or values that are no value of the graph but stand in several, those come first; what
    the parts are slices of follows, if it is one tensor.
    """
    graph = interpreter.graph
    node = graph.producer.get(value)
    if not isinstance(node, Concatenate) or graph.is_native(value) or indices[node.axis] != KEY:
        return trace_operand(interpreter, value, indices, summed)
    parts: list[tuple[Operand, ...]] = []
    lengths: list[Expr] = []
    whole: list[Operand] = []
    begin: Expr = ZERO
    for part in node.parts:
        length = graph.infos[part].shape[node.axis]
        local = Interpreter(graph, {}, interpreter.dependent, {**interpreter.extents, "j": length})
        found = tuple(trace_operand(local, part, indices, summed))
        if not found:
            return []
        back: Mapping[Expr, Expr] = {KEY: simplify(KEY - begin)}
        seen = [_over(operand, back, interpreter.simplifier) for operand in found]
        whole = [operand for operand in whole if operand in seen] if parts else seen
        parts.append(found)
        lengths.append(length)
        begin = simplify(begin + length)
    return [PartedOperand(value, indices, Const(1.0), tuple(parts), tuple(lengths)), *whole]


def _over(operand: Operand, values: Mapping[Expr, Expr], simplifier: Callable[[Expr], Expr]) -> Operand:
    indices = tuple(simplifier(substitute(index, values)) for index in operand.indices)
    return Operand(operand.value, indices, simplifier(substitute(operand.factor, values)))


def tensors(operands: Sequence[Operand]) -> Iterator[Operand]:
    """The operands, with those of every part in the place of one that is in parts."""
    for operand in operands:
        if isinstance(operand, PartedOperand):
            for part in operand.parts:
                yield from part
        else:
            yield operand


def piecewise(values: Sequence[Expr], lengths: Sequence[Expr]) -> Expr:
    """The value of the part that the key ``j`` lies in; each value is over the position in its part."""
    starts: list[Expr] = [ZERO]
    for length in lengths[:-1]:
        starts.append(simplify(starts[-1] + length))
    moved = [simplify(substitute(value, {KEY: KEY - start})) for value, start in zip(values, starts, strict=True)]
    result = moved[-1]
    for value, end in zip(reversed(moved[:-1]), reversed(starts[1:]), strict=True):
        result = value if value == result else apply("where", end > KEY, value, result)
    return result


def batch_of_all_parts(
    batch: Sequence[Index],
    extents: Mapping[str, Expr],
    renaming: Mapping[Expr, Expr],
    operands: Sequence[Operand],
) -> tuple[dict[Expr, Expr], dict[str, Expr]] | None:
    """Another division of the batch-like axes of the output, where some part runs over a few of its heads' axes only.

    Keys that all blocks of a sequence share run over batch and heads, but not over the blocks. A Spec has one axis of
    heads, and a part has it or not: the batch is then what all parts run over, the heads are the rest.

    Args:
        batch: the axes of the output.
        extents: their sizes.
        renaming: the division that was chosen.
        operands: the operands of the site.

    Returns:
        The division as :func:`attncompile.lift.axes.batch_and_heads` gives it; ``None`` where the chosen one will do.
    """
    wide = [axis for axis in batch if extents[axis.name] != ONE]
    parts = [part[0] for operand in operands if isinstance(operand, PartedOperand) for part in operand.parts]
    if len(wide) < 2 or not parts:
        return None
    read = [{axis for axis in wide if any(axis in symbols(x) for x in part.indices)} for part in parts]
    groups = [[axis for axis in wide if symbol in symbols(renaming[axis])] for symbol in (BATCH, HEAD)]
    if all(len(found.intersection(group)) in (0, len(group)) for found in read for group in groups):
        return None
    outer = [axis for axis in batch if all(axis in found for found in read)]
    inner = [axis for axis in batch if axis not in outer]
    if not outer:
        return None
    first, rows = digits(BATCH, outer, extents)
    second, heads = digits(HEAD, inner, extents)
    return {**first, **second}, {"b": rows, "h": heads}


__all__ = ["PartedOperand", "batch_of_all_parts", "piecewise", "tensors", "trace_parts"]
