"""What checkers say against a model, taken apart: each fault with its node, in words that a conversion leaves alone.

A conversion raises the operator set, names nodes anew and replaces them; what was wrong with a file before is wrong
with the result in other words. Sizes that contradict each other are one fault whichever operator they were seen at and
whichever tool saw them.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong.

    Attributes:
        kind: what, without names of nodes and versions; node: where, "" where it has no name or none is said.
        said: the same in the tool's own words.
    """

    kind: str
    node: str
    said: str

    def is_known(self, before: Collection[Fault], nodes_before: Collection[str], nodes: Collection[str]) -> bool:
        """Whether it is among the faults of what a file was made from: at the same node, or at one of another name.

        Args:
            before: the faults; nodes_before: names of the nodes there; nodes: of those in the file.
        """
        own_is_new = self.node not in nodes_before
        return any(
            self.node == other.node or own_is_new or (other.node != "" and other.node not in nodes)
            for other in before
            if self.kind == other.kind
        )


_INFERRED = re.compile(r"\(op_type:(?P<operator>[^,)]*)(?:, node name: (?P<node>[^)]*))?\): (?P<said>[^\n]*)")
"""A line of shape inference, which tells every fault that it finds."""

_PLACED = (
    re.compile(r"(?P<said>.*?) ==> Context: Bad node spec for node\. Name: ?(?P<node>.*?) OpType: (?P<operator>\S+)"),
    re.compile(r"Node: ?(?P<node>.*?) Output:(?P<value>\S*) (?P<said>.*)"),
    re.compile(r"Node \((?P<node>.*?)\) Op \((?P<operator>.*?)\) (?P<said>.*)"),
    re.compile(r'In Node, \("(?P<node>.*?)", (?P<operator>\w+), .*?\) :.*, Error (?P<said>.*)'),
)
"""How onnx.checker and ONNX Runtime, which tell the first fault, say where it is."""

_SIZES = (
    (re.compile(r"differ in dimension (?P<axis>\d+): \((?P<one>\d+)\) vs \((?P<other>\d+)\)"), "axis"),
    (re.compile(r"Inferred=(?P<one>\d+) Declared=(?P<other>\d+) Dimension=(?P<axis>\d+)"), "axis"),
    (re.compile(r"differ in rank: \((?P<one>\d+)\) vs \((?P<other>\d+)\)"), "rank"),
    (re.compile(r"inferred=(?P<one>\d+) declared=(?P<other>\d+)"), "rank"),
)
"""Contradictions between what is declared of a value and what follows."""

_CHANGING = re.compile(
    r"\[ONNXRuntimeError\] : \d+ : \w+ : |Load model from .*? failed: ?|This is an invalid model\. |"
    r"\[\w*Error\] |(?<=domain_version of )\d+|\(-?\d+\)(?= is not a registered)"
)
"""What a tool says that depends on the file's name and operator set, or only says of what kind it is."""


def faults(said: str) -> tuple[Fault, ...]:
    """The faults in all that a tool said of a file."""
    inferred = [_fault(found) for found in _INFERRED.finditer(said)]
    if inferred:
        return tuple(inferred)
    line = " ".join(said.split())
    found = next(filter(None, (placed.search(line) for placed in _PLACED)), None)
    return (_fault(found) if found else Fault(_CHANGING.sub("", line), "", line),)


def _fault(found: re.Match[str]) -> Fault:
    parts = found.groupdict()
    operator, node = parts.get("operator") or "", parts.get("node") or ""
    return Fault(_contradiction(parts["said"]) or f"{operator}: {_CHANGING.sub('', parts['said'])}", node, found[0])


def _contradiction(said: str) -> str:
    """Two sizes of one axis, whichever of them was declared; "" for something else."""
    for pattern, what in _SIZES:
        found = pattern.search(said)
        if found:
            sizes = sorted((int(found["one"]), int(found["other"])))
            return f"{what} {found['axis'] if what == 'axis' else ''}: {sizes[0]} and {sizes[1]}"
    return ""


__all__ = ["Fault", "faults"]
