"""What lifting returns: a program is the native graph and its attention sites, each stated as a Spec or
refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from attncompile.frontends.graph import Rounding
from attncompile.ir import Operation, Refusal, Spec
from attncompile.lift.guard import Guard
from attncompile.lift.step import Step

Status = Literal["lifted", "observed", "refused"]


@dataclass(frozen=True)
class Layout:
    """How a native tensor holds the axes of a Spec tensor.

    Attributes:
        groups: for each native axis, or run of native axes, the Spec axes it is made of, outermost first:
            ``(("b",), ("i",), ("h", "d"))`` is a ``[B, I, H·D]`` tensor. An empty group is an axis of size 1. A Spec
            axis in no group has size 1, or (``b h g`` of an operand) is the same for all.
        runs: for each group how many native axes it stands for, empty where each stands for one:
            ``(("b",), ("h",), ("i",), ("d",))`` with ``(1, 2, 1, 1)`` is a ``[B, G, R, I, D]`` tensor of ``G·R`` heads.
    """

    groups: tuple[tuple[str, ...], ...]
    runs: tuple[int, ...] = ()

    @property
    def axes(self) -> tuple[str, ...]:
        """The Spec axes in native order."""
        return tuple(axis for group in self.groups for axis in group)

    @property
    def plain(self) -> bool:
        """Whether every native axis is one Spec axis."""
        return not self.runs and all(len(group) == 1 for group in self.groups)

    def places(self) -> tuple[tuple[int, int], ...]:
        """First native axis of each group, and the one behind its last."""
        counts = self.runs or (1,) * len(self.groups)
        return tuple((sum(counts[:n]), sum(counts[: n + 1])) for n in range(len(counts)))

    def extents(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The size of each group in a tensor of a native shape."""
        return tuple(math.prod(shape[start:stop]) for start, stop in self.places())


@dataclass(frozen=True)
class Binding:
    """A tensor of the Spec in the native graph.

    Attributes:
        name: the tensor's name in the Spec.
        value: name of the native value (FX node or ONNX value).
        layout: where its axes are; operands only. A captured tensor is taken as it is.
    """

    name: str
    value: str
    layout: Layout | None


@dataclass(frozen=True)
class Region:
    """The part of the native graph that a site replaces.

    Attributes:
        inputs: one binding per Spec input.
        outputs: one binding per Spec output; their native values are replaced.
        nodes: names of the native nodes inside, in graph order.
    """

    inputs: tuple[Binding, ...]
    outputs: tuple[Binding, ...]
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Proof:
    """Evidence that region and Spec agree.

    Attributes:
        cases: sizes of the random instances compared.
        max_error: largest absolute difference in float64, over outputs of order one.
        shared_with: name of an earlier site with the same structure, whose proof serves both, or empty.
    """

    cases: tuple[str, ...]
    max_error: float
    shared_with: str = ""


@dataclass(frozen=True)
class RoundedPart:
    """A rounding inside an attention.

    Attributes:
        of: what is rounded: a tensor of the Spec, ``the scores``, ``the weights`` or ``the result``.
        rounding: of which native value, and how.
    """

    of: str
    rounding: Rounding


@dataclass(frozen=True)
class Site:
    """One attention site.

    Attributes:
        name: path of the module it belongs to, or of the anchor node.
        status: ``lifted``, ``observed`` (described, but its weights are read elsewhere, or the model rounds inside) or
            ``refused``.
        spec: what it computes, unless refused.
        refusal: why it was refused, or what makes it only observed.
        source: source line of the anchor.
        block: what surrounds it and was recognised: projections, position maps, caches.
        region: the nodes it stands for, unless refused.
        proof: numerical evidence, unless refused.
        anchor: name of the native node where it was found.
        steps: every operation around it that was recognised, in the order of data flow.
        guarded: the mask that terms of its score are under facts about data, where there are such.
        nearest: of a refused site, the nearest thing that was recognised.
        swallows: whether the model adds to hidden scores a finite number that swallows them, where the Spec has that
            number alone: a query that sees no key then passes gradients on in the model, and none in the Spec.
        roundings: what the model rounds to a narrow type between operands and results; the Spec does without that.
        numbers: whether its logits load real numbers that may hide positions, as a mask that is added does.
    """

    name: str
    status: Status
    spec: Spec | None = None
    refusal: Refusal | None = None
    source: str = ""
    block: tuple[Operation, ...] = ()
    region: Region | None = None
    proof: Proof | None = None
    anchor: str = ""
    steps: tuple[Step, ...] = ()
    guarded: Guard | None = None
    nearest: str = ""
    swallows: bool = False
    roundings: tuple[RoundedPart, ...] = ()
    numbers: bool = False


@dataclass(frozen=True)
class Program:
    """A model whose attention has been stated.

    Attributes:
        model: name of the model or path it came from.
        graph: the native graph view (:class:`attncompile.frontends.graph.Graph`); ``None`` where the model was captured
            in pieces, each of which had its own.
        sites: every attention site found, in graph order.
        notes: what the reader should know about the capture.
        length: positions that its text states densities for, or ``None`` for the usual number.
    """

    model: str
    graph: Any
    sites: tuple[Site, ...]
    notes: tuple[str, ...] = field(default=())
    length: int | None = None

    def count(self, status: Status) -> int:
        """Number of sites of a status."""
        return sum(site.status == status for site in self.sites)

    def __str__(self) -> str:
        from attncompile.lift.render import SEQUENCE, render_program  # rendering reads programs: imported late

        return render_program(self, self.length or SEQUENCE)


def join_programs(model: str, programs: Sequence[Program], notes: tuple[str, ...]) -> Program:
    """One program with the sites of several graphs, in order; a name that comes again gets a number."""
    seen: dict[str, int] = {}
    sites = []
    for site in (site for program in programs for site in program.sites):
        seen[site.name] = seen.get(site.name, 0) + 1
        name = site.name if seen[site.name] == 1 else f"{site.name}.{seen[site.name]}"
        sites.append(replace(site, name=name, spec=replace(site.spec, name=name) if site.spec else None))
    told = dict.fromkeys((*notes, *(note for program in programs for note in program.notes)))
    return Program(model, programs[0].graph if len(programs) == 1 else None, tuple(sites), tuple(told))
