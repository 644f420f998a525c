"""What was done in each compiled graph, kept as long as the graph is: the source of ``attncompile.explain``."""

from __future__ import annotations

import itertools
import threading
import types
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attncompile.backend.rewrite import Decision
from attncompile.backend.site_module import spec_tensors
from attncompile.ir import Spec, parse_spec
from attncompile.ir.sample import symbolic_sizes
from attncompile.ir.types import concrete, solved_size
from attncompile.lift import Program
from attncompile.plan.cost import CostRow, cost_row


@dataclass(frozen=True)
class ExplainedSite:
    """What became of one site of a compiled graph.

    Attributes:
        name: its path in the model.
        status: ``lifted``, ``observed`` or ``refused``; ``stated`` for a call through transformers' interface.
        before: the Spec as it was lifted, as text; empty where none was.
        after: the Spec that runs, as text; empty where the original stays.
        applied: passes that were applied.
        refused: passes that were asked for and do not apply, each with the reason.
        operator: what computes it now; ``original`` where that stays.
        reason: why.
        source: line of the model's code.
        sizes: of the Spec's symbols in the call that was compiled, or in the first call of its kind; empty where the
            graph fixes all of them, ``None`` where they are not known.
    """

    name: str
    status: str
    before: str
    after: str
    applied: tuple[str, ...]
    refused: tuple[tuple[str, str], ...]
    operator: str
    reason: str
    source: str
    sizes: Mapping[str, int] | None

    @property
    def runs(self) -> str:
        """What computes it now, in words."""
        return self.operator

    def cost(self) -> CostRow | None:
        """Modelled work before and after, at the sizes that are known; the same twice where the original stays.
        ``None`` where there is no Spec, or a size is not known.
        """
        if not self.before or self.sizes is None:
            return None
        return cost_row(parse_spec(self.before), parse_spec(self.after or self.before), self.sizes)


@dataclass(frozen=True, eq=False)
class Compilation:
    """One compiled graph.

    Attributes:
        number: counted in this process.
        device: where it runs.
        sites: every attention site found.
        said: what the user was warned of.
        parameters: shapes of the module parameters that the graph reads, by dotted name.
        seconds: how long finding and rewriting the attention took.
        again: why Dynamo compiled the code again, which is the guard that an earlier graph failed; else empty.
        operations: how many nodes a graph has in which no attention was found; 0 for any other.
        passed_over: what could have been attention there, a sentence each.
    """

    number: int
    device: str
    sites: tuple[ExplainedSite, ...]
    said: tuple[str, ...]
    parameters: Mapping[str, tuple[Any, ...]]
    seconds: float
    again: str = ""
    operations: int = 0
    passed_over: tuple[str, ...] = ()

    def serves(self, module: torch.nn.Module) -> bool:
        """Whether the graph reads parameters that the module has, by name and shape: such modules share a graph."""
        own = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
        return bool(self.parameters) and all(_found(own, name) == shape for name, shape in self.parameters.items())


def _found(own: Mapping[str, tuple[int, ...]], name: str) -> tuple[int, ...] | None:
    """The shape of a parameter by its name, with or without what a compiled function calls the module."""
    parts = name.split(".")
    return next((own[rest] for n in range(len(parts)) if (rest := ".".join(parts[n:])) in own), None)


_NUMBERS = itertools.count(1)
_ALIVE: weakref.WeakSet[Compilation] = weakref.WeakSet()
_LOCK = threading.Lock()


def note(
    program: Program,
    decisions: Iterable[Decision],
    device: str,
    said: tuple[str, ...],
    parameters: Mapping[str, tuple[Any, ...]],
    seconds: float,
    again: str,
) -> Compilation:
    """A record of a compilation; whoever holds the compiled graph has to hold it too."""
    sites = tuple(_explained(program, decision) for decision in decisions)
    return _noted(device, sites, said, parameters, seconds, again)


def note_unread(device: str, said: str, seconds: float) -> Compilation:
    """A record of a graph whose attention was not looked at, with the reason."""
    return _noted(device, (), (said,), {}, seconds)


def note_none(
    device: str,
    operations: int,
    passed_over: tuple[str, ...] = (),
    parameters: Mapping[str, tuple[Any, ...]] | None = None,
    seconds: float = 0.0,
    again: str = "",
) -> Compilation:
    """A record of a graph without attention."""
    return _noted(device, (), (), parameters or {}, seconds, again, operations, passed_over)


def _noted(*fields: Any) -> Compilation:
    """A record with the next number; ``fields`` are those behind it, in order."""
    with _LOCK:
        made = Compilation(next(_NUMBERS), *fields)
        _ALIVE.add(made)
    return made


def alive() -> tuple[Compilation, ...]:
    """The graphs that are compiled and not yet dropped, in the order of their compilation."""
    with _LOCK:
        return tuple(sorted(_ALIVE, key=lambda compilation: compilation.number))


def held_by(compiled: Callable[..., Any], compilation: Compilation) -> Callable[..., Any]:
    """The compiled graph, which holds the record from now on.

    A function is wrapped: Dynamo looks through one that ahead-of-time autograd made and drops it, with what it holds.
    """
    if isinstance(compiled, types.FunctionType | types.MethodType) and not hasattr(compiled, _RECORD):

        def run(*args: Any) -> Any:
            return compiled(*args)

        return _with_record(run, compilation)
    return _with_record(compiled, compilation)


_RECORD = "attncompile_compilations"


def _with_record(compiled: Callable[..., Any], compilation: Compilation) -> Callable[..., Any]:
    """The same object, with one record more."""
    setattr(compiled, _RECORD, (*getattr(compiled, _RECORD, ()), compilation))
    return compiled


def _explained(program: Program, decision: Decision) -> ExplainedSite:
    site, lowering = decision.site, decision.lowering
    before, after = site.spec, decision.spec if lowering is not None else None
    return ExplainedSite(
        site.name,
        site.status,
        str(before) if before is not None else "",
        str(after) if after is not None else "",
        decision.passes.applied if decision.passes else (),
        decision.passes.refused if decision.passes else (),
        lowering.operator if lowering is not None else "original",
        decision.reason,
        site.source,
        _sizes(program, decision),
    )


def _sizes(program: Program, decision: Decision) -> dict[str, int] | None:
    """The Spec's symbolic sizes in the call that was compiled, none where all are fixed.

    ``None`` where there is no Spec, or the graph does not tell all of them.
    """
    site = decision.site
    spec = decision.spec if decision.lowering is not None else site.spec
    if spec is None or site.region is None:
        return None
    given = [program.graph.infos[binding.value] for binding in site.region.inputs]
    try:
        shapes = [[concrete(size, program.graph.size_hints) for size in info.shape] for info in given]
        native = [torch.empty(shape, device="meta") for shape in shapes]
        return solved_sizes(spec, [tensor.shape for tensor in spec_tensors(site.region, spec.types(), (), native)])
    except (ValueError, RuntimeError):  # a size that only data decide
        return None


def solved_sizes(spec: Spec, shapes: Sequence[Sequence[int]]) -> dict[str, int] | None:
    """A Spec's symbolic sizes where its inputs have these shapes; ``None`` where they do not tell all of them."""
    found: dict[str, int] = {}
    for value, shape in zip(spec.inputs, shapes, strict=True):
        for size, extent in zip(value.type.sizes, shape, strict=True):
            found |= solved_size(size, extent, found)
    return found if found.keys() >= {*symbolic_sizes(spec), *spec.undetermined_sizes()} else None


__all__ = ["Compilation", "ExplainedSite", "alive", "held_by", "note", "note_none", "note_unread", "solved_sizes"]
