"""Rotary maps as part of a site: its Spec then reads queries and keys before they are rotated.

A map is pulled in where nothing but the site needs what it makes: a rotated key that is also written to a cache is made
anyway. Whatever is pulled in is proven with the site, as the site was: the larger region and the larger Spec are run on
random inputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from attncompile.frontends.graph import Cast, Graph, Indices, Move
from attncompile.ir import Axis, Expr, Index, Load, Size, Spec, TensorType, Value, simplify
from attncompile.ir.expr import Const, loads, rewrite, substitute, symbols
from attncompile.ir.prologue import Prologue, with_positions
from attncompile.lift.block import ROLES, operand_element, operand_extents
from attncompile.lift.operands import layout_of
from attncompile.lift.program import Binding, Layout, Region, Site
from attncompile.lift.prove import Prover
from attncompile.lift.rotated import Rotation, rotations

_LONGEST = 16
"""Movements and casts between a rotary map and an operand, or before the map."""


@dataclass(frozen=True)
class RotatedSite:
    """A site with its rotary maps.

    Attributes:
        site: whose Spec states the maps; the site as it was where none could be pulled in.
        prologue: the maps, and why others stay outside.
    """

    site: Site
    prologue: Prologue


@dataclass(frozen=True)
class _Pulled:
    """A rotary map of one operand.

    Attributes:
        name: of the operand in the Spec.
        rotation: the map, over values and sizes of the graph.
        source: the value that is read instead; layout: where the operand's axes are in it; dtype: of it.
        inside: values that are made between the two.
    """

    name: str
    rotation: Rotation
    source: str
    layout: Layout
    dtype: str
    inside: frozenset[str]


@dataclass
class RotaryMaps:
    """Pulls rotary maps into the sites of one graph; sites of one structure share a proof."""

    graph: Graph
    prover: Prover = field(init=False)

    def __post_init__(self) -> None:
        self.prover = Prover(self.graph, {})

    def of(self, site: Site) -> RotatedSite:
        """A lifted site with the rotary maps of its queries and keys, as far as they can be pulled in and proven."""
        spec, region = site.spec, site.region
        attend = spec.attend() if spec is not None else None
        if spec is None or region is None or attend is None:
            return RotatedSite(site, Prologue())
        pulled: list[_Pulled] = []
        refused: list[tuple[str, str]] = []
        for binding in region.inputs:
            if binding.name not in (attend.query, attend.key) or binding.layout is None:
                continue
            found = _pull(self.graph, spec, region, binding)
            if isinstance(found, _Pulled):
                pulled.append(found)
            else:
                refused.append((binding.name, f"{binding.name}: {found}"))
        dtypes = {name: spec.types()[name].dtype for name in (attend.query, attend.key, attend.value)}
        if len(set((dtypes | {each.name: each.dtype for each in pulled}).values())) > 1:
            # products are of one type: a map that changes it takes the others along, or stays
            changing = [each for each in pulled if each.dtype != dtypes[each.name]]
            pulled = [each for each in pulled if each not in changing]
            refused += [(each.name, f"{each.name}: it is {each.dtype} before its rotary map and {dtypes[each.name]} "
                         "after it, and other operands are not") for each in changing]  # fmt: skip
        if not pulled:
            return RotatedSite(site, Prologue(refused=tuple(refused)))
        return self._proven(site, spec, region, pulled, tuple(refused))

    def _proven(
        self, site: Site, spec: Spec, region: Region, pulled: list[_Pulled], refused: tuple[tuple[str, str], ...]
    ) -> RotatedSite:
        try:
            prologue, tables = _stated(self.graph, spec, region, pulled)
            whole = with_positions(spec, prologue)
        except ValueError as error:
            reason = f"the rotary map does not fit the Spec: {str(error).splitlines()[0]}"
            return RotatedSite(site, Prologue(refused=(*refused, *((each.name, reason) for each in pulled))))
        hidden = whole.undetermined_sizes()
        if hidden:
            reason = f"no shape tells the size {', '.join(sorted(hidden))} in the angles"
            return RotatedSite(site, Prologue(refused=(*refused, *((each.name, reason) for each in pulled))))
        larger = dataclasses.replace(site, spec=whole, region=_larger(self.graph, region, pulled, tables), proof=None)
        found = self.prover.prove(larger)
        if found.refusal is not None or found.proof is None:
            reason = f"the site with its rotary maps is not proven: {found.refusal.reason if found.refusal else ''}"
            return RotatedSite(site, Prologue(refused=(*refused, *((each.name, reason) for each in pulled))))
        return RotatedSite(found, dataclasses.replace(prologue, refused=refused))


# --- finding ------------------------------------------------------------------------------------------------


def _pull(graph: Graph, spec: Spec, region: Region, binding: Binding) -> _Pulled | str:
    """The rotary map of an operand, or why it stays outside."""
    kind = spec.types()[binding.name]
    extents = {name: simplify(size) for name, size in operand_extents(graph, kind, binding).items()}
    if not isinstance(extents["d"], Const):
        return f"it has {extents['d']} channels, which is no constant number"
    passed = {binding.value}
    value, indices = binding.value, operand_element(graph, kind, binding)
    reason = "no rotary map makes it"
    wanted = tuple(dict.fromkeys((_value_dtype(spec), kind.dtype)))
    for _ in range(_LONGEST):
        for rotation in rotations(graph, value, indices, extents, tables=True):
            found = _before(graph, kind, rotation, extents, value, wanted)
            if isinstance(found, str):
                reason = found
                continue
            made = (graph.descendants(rotation.source, value) & graph.ancestors([value])) - {rotation.source}
            inside = frozenset(passed | made)
            return _needed_elsewhere(graph, region, passed) or _Pulled(binding.name, rotation, *found, inside)
        node = graph.producer.get(value)
        if not isinstance(node, Move | Cast):
            break
        simplifier = graph.simplifier(extents)
        if isinstance(node, Move):
            indices = tuple(simplifier(index) for index in node.index_map(indices))
        value = node.source
        passed.add(value)
    return reason


def _before(
    graph: Graph, kind: TensorType, rotation: Rotation, extents: Mapping[str, Expr], rotated: str, wanted: Sequence[str]
) -> tuple[str, Layout, str] | str:
    """The tensor before a rotary map, its layout and its dtype; or why there is none.

    Args:
        graph: the graph; kind: type of the operand; extents: of its axes.
        rotation: the map.
        rotated: what it makes.
        wanted: dtypes that the tensor may have, the better ones first.
    """
    position = rotation.position
    tables = {load.tensor for expr in (position.cos, position.sin) for load in loads(expr)}
    names = [axis.name for axis in kind.axes]
    axes = {name: (Index(ROLES.get(name, name)), extents[ROLES.get(name, name)]) for name in names}
    behind = [(value, indices) for value, indices in _behind(graph, rotation, extents) if graph.is_readable(value)]
    found = "no tensor before its rotary map holds exactly what is rotated"
    for dtype in wanted:
        for value, indices in (each for each in behind if graph.infos[each[0]].dtype == dtype):
            layout = layout_of(graph, indices, graph.infos[value].shape, axes)
            if layout is not None and _is_made_of(graph, rotated, {value, *tables}):
                return value, layout, dtype
    kinds = {graph.infos[value].dtype for value, _ in behind}
    return found if kinds & set(wanted) else f"it is {', '.join(sorted(kinds))} before its rotary map, not {kind.dtype}"


def _value_dtype(spec: Spec) -> str:
    attend = spec.attend()
    return spec.types()[attend.value].dtype if attend is not None else ""


def _behind(graph: Graph, rotation: Rotation, extents: Mapping[str, Expr]) -> Iterator[tuple[str, Indices]]:
    """The source of a map and what it was before movements and casts, nearest first."""
    value, indices = rotation.source, rotation.indices
    simplifier = graph.simplifier(extents)
    for _ in range(_LONGEST):
        yield value, indices
        node = graph.producer.get(value)
        if not isinstance(node, Move | Cast):
            return
        if isinstance(node, Move):
            indices = tuple(simplifier(index) for index in node.index_map(indices))
        value = node.source


def _is_made_of(graph: Graph, value: str, given: set[str]) -> bool:
    """Whether some values and constants are all that the graph makes a value of."""
    seen, stack = {value}, [value]
    while stack:
        name = stack.pop()
        if name in given:
            continue
        if name not in graph.producer:
            known = graph.inputs.get(name)
            if known is None or known.value is None:
                return False
            continue
        fresh = [read for read in graph.producer[name].inputs if read not in seen]
        seen.update(fresh)
        stack += fresh
    return True


def _needed_elsewhere(graph: Graph, region: Region, rotated: set[str]) -> str:
    """Who else needs a rotated tensor, so that it is made anyway; empty where nobody does.

    A movement or a cast of it is rotated too and needs nothing for itself: what is named reads one of these.
    """
    needed = _needed_without(graph, frozenset(binding.value for binding in region.outputs))
    stack, seen = sorted(rotated & needed, reverse=True), set(rotated)
    while stack:
        value = stack.pop()
        if value in graph.outputs:
            return "the model returns it rotated, so it is made anyway"
        if value in graph.effects:
            return "the model writes it rotated to a tensor of the caller's, so it is made anyway"
        for user in graph.users.get(value, ()):
            if user.output not in needed:
                continue
            if not isinstance(user, Move | Cast):
                reader = graph.describe(user.output)
                return f"{reader.name} ({reader.what}) needs it rotated too, so it is made anyway"
            if user.output not in seen:
                seen.add(user.output)
                stack.append(user.output)
    return ""


def _needed_without(graph: Graph, replaced: frozenset[str]) -> set[str]:
    """What the graph has to compute when it is given some values."""
    found = {*graph.outputs, *graph.effects}
    stack = list(found)
    while stack:
        name = stack.pop()
        if name in replaced or name not in graph.producer:
            continue
        for read in graph.producer[name].inputs:
            if read not in found:
                found.add(read)
                stack.append(read)
    return found


# --- stating ------------------------------------------------------------------------------------------------


def _stated(
    graph: Graph, spec: Spec, region: Region, pulled: list[_Pulled]
) -> tuple[Prologue, tuple[Binding, ...]]:
    """The maps under the names of a Spec, and the tables that it does not have yet."""
    sizes = _sizes(graph, spec, region)
    known = {binding.value: binding.name for binding in region.inputs if binding.layout is None}
    taken = {*spec.types(), *(binding.name for binding in region.inputs)}
    tables: list[Binding] = []

    # called by what they hold, not as in the graph: layers with tables of their own then share a kernel
    for each in pulled:
        position = each.rotation.position
        cosines, sines = ([load.tensor for load in loads(expr)] for expr in (position.cos, position.sin))
        for value in dict.fromkeys((*cosines, *sines)):
            if value in known:
                continue
            held = "angles" if value in cosines and value in sines else "cos" if value in cosines else "sin"
            name = held if held not in taken else f"{held}_{each.name}"
            while name in taken:
                name += "_"
            taken.add(name)
            known[value] = name
            tables.append(Binding(name, value, None))

    def named(expr: Expr) -> Expr:
        def renamed(node: Expr) -> Expr | None:
            if isinstance(node, Load):
                return Load(known[node.tensor], node.indices, node.element)  # whose indices are renamed already
            return sizes.get(node)

        return simplify(rewrite(expr, renamed))

    positions = [
        dataclasses.replace(
            each.rotation.position,
            tensor=each.name,
            cos=named(each.rotation.position.cos),
            sin=named(each.rotation.position.sin),
        )
        for each in pulled
    ]
    types = spec.types()
    inputs = [Value(each.name, dataclasses.replace(types[each.name], dtype=each.dtype)) for each in pulled]
    for table in tables:
        info = graph.infos[table.value]
        axes = tuple(Axis(f"a{n}", simplify(substitute(size, sizes))) for n, size in enumerate(info.shape))
        inputs.append(Value(table.name, TensorType(axes, info.dtype)))
    return Prologue(tuple(positions), tuple(inputs)), tuple(tables)


def _sizes(graph: Graph, spec: Spec, region: Region) -> dict[Expr, Expr]:
    """What sizes of the graph are called in a Spec, as far as the shapes of its inputs tell.

    A size of the graph that has no name there keeps its own, with another spelling where the Spec has taken that.
    """
    types, found = spec.types(), dict[Expr, Expr]()
    for binding in region.inputs:
        shape, kind = graph.infos[binding.value].shape, types[binding.name]
        if binding.layout is None:
            pairs = list(zip(shape, kind.sizes, strict=True))
        else:
            groups = zip(binding.layout.groups, binding.layout.places(), strict=True)
            pairs = [(shape[start], kind.size(group[0])) for group, (start, stop) in groups
                     if len(group) == 1 and stop == start + 1]  # fmt: skip
        for native, own in pairs:
            if not isinstance(native, Const):
                found.setdefault(native, own)
    own_names = {node.name for value in spec.inputs for size in value.type.sizes for node in symbols(size)
                 if isinstance(node, Size)}  # fmt: skip
    for name in sorted(graph.size_names & own_names):
        found.setdefault(Size(name), Size(f"{name}_native"))
    return found


def _larger(graph: Graph, region: Region, pulled: list[_Pulled], tables: tuple[Binding, ...]) -> Region:
    """The region with what the maps compute; it reads their sources, and the tables."""
    sources = {each.name: Binding(each.name, each.source, each.layout) for each in pulled}
    inputs = (*(sources.get(binding.name, binding) for binding in region.inputs), *tables)
    values = frozenset().union(*(each.inside for each in pulled))
    nodes = {*region.nodes, *(graph.owner.get(value, value) for value in values)}
    ordered = sorted(nodes & graph.native_order.keys(), key=graph.native_order.__getitem__)
    return Region(inputs, region.outputs, tuple(ordered))


__all__ = ["RotaryMaps", "RotatedSite"]
