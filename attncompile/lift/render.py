"""Programs and sites as plain text, for people: what `inspect` prints and what ``str(program)`` gives."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from attncompile.ir import Attend, Expr, Index, Project, Size, Spec, print_expr, print_spec
from attncompile.ir.blocks import visible_share
from attncompile.ir.expr import TRUE, Const, conjunction, conjuncts, loads, symbols, walk
from attncompile.ir.intervals import Interval
from attncompile.ir.picture import Tiles, drawn_text, mask_tiles
from attncompile.ir.simplify import simplify
from attncompile.ir.types import concrete
from attncompile.lift.guard import Guard
from attncompile.lift.program import Program, Site
from attncompile.lift.refusals import failed_check
from attncompile.lift.rounded import described, only_rounds
from attncompile.lift.step import drawn

DIGITS = 4
"""Significant digits of real constants in text for people."""

SEQUENCE = 2048
"""Positions that densities and pictures are stated for unless somebody asks for others."""


@dataclass(frozen=True)
class Density:
    """Share of the attention map that is visible.

    Attributes:
        share: between 0 and 1.
        bound: whether the mask also reads tensors, so that less may be visible.
        queries, keys: the size of the map.
        exact: whether every position was counted, not only a choice of them.
    """

    share: float
    bound: bool
    queries: int
    keys: int
    exact: bool = True

    def __str__(self) -> str:
        lengths = f"{self.queries}" if self.queries == self.keys else f"{self.queries} × {self.keys}"
        sign = "≤ " if self.bound else "" if self.exact else "≈ "
        return f"density {sign}{100 * self.share:.4g} % at {lengths}"


def map_sizes(spec: Spec, sequence: int) -> dict[str, int]:
    """A value for every size that a Spec leaves open: 1 for its batch, ``sequence`` for all others.

    Where an axis is a difference of sizes (all positions less the cached ones), that would leave nothing of it: one of
    them is then half as long.
    """
    exprs: list[Expr] = [size for value in spec.inputs for size in value.type.sizes]
    exprs += [expr for operation in spec.operations for expr in operation.expressions()]
    names = {node.name for expr in exprs for node in walk(expr) if isinstance(node, Size)}
    batches = {
        axis.size.name
        for value in spec.inputs
        for axis in value.type.axes
        if axis.name == "b" and isinstance(axis.size, Size)
    }
    sizes = {name: 1 if name in batches else sequence for name in sorted(names)}
    shorter = ({**sizes, name: max(1, sequence // 2)} for name in sizes if name not in batches)
    extents = [size for kind in spec.types().values() for size in kind.sizes]
    return next((one for one in (sizes, *shorter) if all(concrete(size, one) > 0 for size in extents)), sizes)


Tensors = Mapping[str, torch.Tensor]
"""Example values of the tensors that masks read, by the names in ``given``."""


def site_density(
    spec: Spec, sequence: int = SEQUENCE, *, guard: Guard | None = None, values: Tensors | None = None
) -> Density | None:
    """How much of its map a site sees at a length, on average over batch and heads; None for a Spec that is not one
    attention.

    Axes of fixed size keep it. What the mask reads from tensors counts as visible unless ``values`` says what they
    hold; what a ``guard`` hides counts as hidden.

    Raises:
        ValueError: when values do not fit the tensors of the Spec.
    """
    attend = spec.attend()
    if attend is None:
        return None
    mask, known = _whole_mask(attend, guard), _fitting(spec, values)
    queries, keys, sizes = _map(spec, attend, sequence, known)
    rows, heads = (concrete(size, sizes) for size in spec.types()[attend.query].sizes[:2])
    read = symbols(mask)
    places = [
        {"b": b, "h": h}
        for b in range(rows if Index("b") in read and known else 1)
        for h in range(heads if Index("h") in read else 1)
    ]
    shares = [visible_share(mask, queries, keys, sizes=sizes, tensors=known, at=at) for at in places]
    bound = any(load.tensor not in known for load in loads(mask))
    share = sum(found.value for found in shares) / len(shares)
    return Density(share, bound, queries, keys, all(found.exact for found in shares))


def mask_tiles_of(
    spec: Spec,
    sequence: int = SEQUENCE,
    *,
    guard: Guard | None = None,
    values: Tensors | None = None,
    columns: int = 32,
) -> Tiles | None:
    """The mask of the first batch row and head as tiles, queries downward; what it reads from tensors without
    values counts as visible.

    None where every key is visible, and for a Spec that is not one attention.
    """
    attend = spec.attend()
    if attend is None:
        return None
    known = _fitting(spec, values)
    parts = conjuncts(_whole_mask(attend, guard))
    stated = conjunction([part for part in parts if all(load.tensor in known for load in loads(part))])
    queries, keys, sizes = _map(spec, attend, sequence, known)
    numbers = {**sizes, "b": 0, "h": 0}
    ranges = {name: Interval(value, value) for name, value in numbers.items()}
    tiles = mask_tiles(stated, queries, keys, columns=columns, ranges=ranges, tensors=known)
    return tiles if stated != TRUE else None


def mask_picture(
    spec: Spec, sequence: int = SEQUENCE, *, guard: Guard | None = None, values: Tensors | None = None
) -> str:
    """The tiles of :func:`mask_tiles_of` as text; empty where there are none."""
    tiles = mask_tiles_of(spec, sequence, guard=guard, values=values)
    return "" if tiles is None else drawn_text(tiles)


def _whole_mask(attend: Attend, guard: Guard | None) -> Expr:
    return attend.mask if guard is None else simplify(conjunction([*conjuncts(attend.mask), *conjuncts(guard.mask)]))


def _fitting(spec: Spec, values: Tensors | None) -> dict[str, torch.Tensor]:
    """The values that a Spec reads; a tensor of another rank is no value of it."""
    types = {value.name: value.type for value in spec.captured()}
    found = {name: tensor for name, tensor in (values or {}).items() if name in types}
    for name, tensor in found.items():
        if tensor.dim() != len(types[name].axes):
            raise ValueError(
                f"the tensor {name!r} has shape {tuple(tensor.shape)}, but {spec.name} reads {name}{types[name]}"
            )
    return found


def _map(
    spec: Spec, attend: Attend, sequence: int, known: Mapping[str, torch.Tensor]
) -> tuple[int, int, dict[str, int]]:
    """Queries, keys and sizes of a map; example values bring their own sizes."""
    sizes, types = map_sizes(spec, sequence), spec.types()
    for name, tensor in known.items():
        for size, extent in zip(types[name].sizes, tensor.shape, strict=True):
            if isinstance(size, Size):
                sizes[size.name] = int(extent)
    return concrete(types[attend.query].sizes[2], sizes), concrete(types[attend.key].sizes[2], sizes), sizes


# --- one site -----------------------------------------------------------------------------------------------


def render_site(
    site: Site,
    sequence: int = SEQUENCE,
    *,
    name: str = "",
    count: int = 1,
    block: bool = False,
    picture: bool = False,
    values: Tensors | None = None,
) -> str:
    """A site as a few lines: its Spec, what surrounds it, density, status and source.

    Args:
        site: the site.
        sequence: length that the density is stated for.
        name: what to call it instead of its own name.
        count: how many sites the text stands for.
        block: print every operation around it, in the order of data flow.
        picture: draw the mask.
        values: example values of tensors that masks read.
    """
    name = name or site.name
    shown = f"{count} sites {site.status}" if count > 1 else site.status
    if site.spec is None:
        lines = [f"{name}   {shown}"]
    else:
        head, *rest = print_spec(site.spec, DIGITS).splitlines()
        lines = [head.replace(site.spec.name, name, 1) + f"   {shown}", *rest]
        found = site_density(site.spec, sequence, guard=site.guarded, values=values)
        lines += [f"  {key:<6} {text}" for key, text in _facts(site)]
        if found:
            lines = [line + f"      {found}" if line.startswith("  norm ") else line for line in lines]
    if block and site.steps:
        lines += [f"  {'block' if number == 0 else '':<6} {line}" for number, line in enumerate(drawn(site.steps))]
    if site.nearest:
        lines.append(f"  found  {site.nearest}")
    if site.refusal is not None:
        where = f" (at {site.refusal.node})" if site.refusal.node else ""
        lines.append(f"  why    {site.refusal.reason}{where}")
        check = failed_check(site.refusal)
        lines += [f"  check  {check}"] if check else []
        lines += [f"  hint   {site.refusal.hint}"] if site.refusal.hint else []
    if site.refusal is not None and site.refusal.source and site.refusal.source != site.source:
        lines.append(f"  line   {site.refusal.source}")
    if site.source:
        lines.append(f"  source {site.source}")
    if picture and site.spec is not None:
        drawing = mask_picture(site.spec, sequence, guard=site.guarded, values=values)
        lines += [f"    {row}".rstrip() for row in drawing.splitlines()]
    return "\n".join(lines)


def _facts(site: Site) -> list[tuple[str, str]]:
    """What a reader would otherwise have to work out from the Spec and its block."""
    assert site.spec is not None
    facts = []
    if site.guarded is not None:
        facts.append(("guard", str(site.guarded)))
    if site.roundings and not only_rounds(site):
        facts.append(("rounds", described(site.roundings)))
    attend = site.spec.attend()
    if attend is not None:
        types = site.spec.types()
        heads, shared = (simplify(types[name].sizes[1]) for name in (attend.query, attend.key))
        if heads != shared:
            facts.append(("heads", _sharing(heads, shared)))
    rotated: dict[str, list[str]] = {}
    for step in site.steps:
        if step.kind == "rotary":
            rotated.setdefault(str(step), []).append(step.operand)
    facts += [("rope", f"{', '.join(names)}: {text}") for text, names in rotated.items()]
    projections = [operation for operation in site.block if isinstance(operation, Project)]
    if projections:
        facts.append(("from", _projection_text(projections)))
    return facts


def _sharing(heads: Expr, shared: Expr) -> str:
    if shared == Const(1):
        return f"multi-query: {print_expr(heads)} query heads share one KV head"
    if isinstance(heads, Const) and isinstance(shared, Const) and heads.value % shared.value == 0:
        each = int(heads.value) // int(shared.value)
        return f"grouped-query: each of {shared.value} KV heads serves {each} query heads"
    return f"grouped-query: {print_expr(heads)} query heads over {print_expr(shared)} KV heads"


_ORDINALS = ("one input", "another", "a third")


def _projection_text(projections: Sequence[Project]) -> str:
    """Which operands are linear maps, and of how many inputs: cross-attention has two."""
    states = list(dict.fromkeys(operation.tensor for operation in projections))
    maps: dict[str, list[str]] = {}
    for operation in projections:
        bias = ", with bias," if operation.bias else ""
        kind = f"linear map{bias} of {_ORDINALS[states.index(operation.tensor)]}"
        maps.setdefault(kind, []).append(operation.out)
    return "; ".join(f"{', '.join(names)}: {kind}" for kind, names in maps.items())


# --- a program ----------------------------------------------------------------------------------------------


def render_program(
    program: Program,
    sequence: int = SEQUENCE,
    *,
    every: bool = False,
    block: bool = False,
    picture: bool = False,
    values: Tensors | None = None,
) -> str:
    """A program as text: its sites, alike ones together, and one line that counts them.

    Args:
        program: what lifting returned.
        sequence: length that densities are stated for.
        every: print each site, also when it is like another.
        block: print every operation around the sites.
        picture: draw the masks.
        values: example values of tensors that masks read.
    """
    groups = [(site.name, (site,)) for site in program.sites] if every else alike(program.sites)
    parts = [
        render_site(sites[0], sequence, name=name, count=len(sites), block=block, picture=picture, values=values)
        for name, sites in groups
    ]
    parts += [f"note: {note}" for note in program.notes]
    return "\n\n".join([*parts, summary(program)])


def summary(program: Program) -> str:
    """One line: how many sites, and how many of each status."""
    total = len(program.sites)
    if not total:
        return f"{program.model}: NO ATTENTION SITE FOUND"
    counts = [f"{program.count(status)} {status}" for status in ("lifted", "observed", "refused")]
    return f"{program.model}: {total} attention site{'' if total == 1 else 's'}, {', '.join(counts)}"


_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
_NUMBER_ANYWHERE = re.compile(r"\d+")


def alike(sites: Sequence[Site]) -> list[tuple[str, tuple[Site, ...]]]:
    """Sites that differ only by a number in their names, in order of first appearance.

    Each group is named by its numbers, ``model.layers.0–29.self_attn``.
    """
    groups: dict[object, list[Site]] = {}
    for site in sites:
        groups.setdefault((_NUMBER.sub("·", site.name), _likeness(site)), []).append(site)
    found = [part for group in groups.values() for part in _by_one_number(group)]
    order = {id(site): position for position, site in enumerate(sites)}
    return sorted(found, key=lambda part: order[id(part[1][0])])


def _likeness(site: Site) -> object:
    """Equal for sites that one text can stand for."""
    refusal = site.refusal and (site.refusal.kind, site.refusal.reason, site.refusal.hint)
    stated = site.spec and (site.spec.fingerprint(), tuple(_facts(site)))
    # the nodes of a graph without source lines are numbered, as its layers are
    source = _NUMBER_ANYWHERE.sub("·", site.source) if site.source.startswith("node ") else site.source
    return site.status, refusal, stated, source


def _by_one_number(sites: Sequence[Site]) -> list[tuple[str, tuple[Site, ...]]]:
    """Groups in which at most one number of the name differs: the one that takes the most values."""
    rows = [_NUMBER.findall(site.name) for site in sites]
    varying = max(range(len(rows[0])), key=lambda at: len({row[at] for row in rows}), default=None)
    if varying is None:
        return [(site.name, (site,)) for site in sites]
    groups: dict[tuple[str, ...], list[tuple[int, Site]]] = {}
    for row, site in zip(rows, sites, strict=True):
        rest = (*row[:varying], *row[varying + 1 :])
        groups.setdefault(rest, []).append((int(row[varying]), site))
    named = []
    for rest, members in groups.items():
        numbers = iter((*rest[:varying], ranges(sorted(number for number, _ in members)), *rest[varying:]))
        name = _NUMBER.sub(lambda _, given=numbers: next(given), sites[0].name)  # type: ignore[misc]
        named.append((name, tuple(site for _, site in members)))
    return named


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers in short: ``0–3,7,9–10``."""
    if not numbers:
        return ""
    starts = [numbers[0], *(b for a, b in pairwise(numbers) if b != a + 1)]
    ends = [*(a for a, b in pairwise(numbers) if b != a + 1), numbers[-1]]
    return ",".join(str(a) if a == b else f"{a}–{b}" for a, b in zip(starts, ends, strict=True))
