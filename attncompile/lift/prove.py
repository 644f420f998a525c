"""Proof by numbers: a region's native nodes and its Spec are run in float64 on fresh random inputs and must
agree.

Symbolic sizes are instantiated small, so a proof is cheap; sites with the same structure share one. Inputs
include hidden rows (integer and boolean masks are random), and every size that the example had in common
stays common.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from attncompile.frontends.graph import Graph
from attncompile.ir import Expr, Refusal, Size, Spec, TensorType
from attncompile.ir.evaluate import Environment, evaluate, index_grid
from attncompile.ir.expr import TRUE, Apply, Const, Load, loads, walk
from attncompile.ir.prologue import input_behind
from attncompile.ir.sample import bounded_draws
from attncompile.ir.types import DTYPES, concrete
from attncompile.lift.masks import HIDDEN
from attncompile.lift.program import Binding, Layout, Proof, Region, Site
from attncompile.lift.shortened import shortenings

INSTANCES = ((2, 5, 7, 11, 3, 13), (3, 6, 4, 9, 5, 8))
"""Values given to the symbolic sizes, one per distinct example size, in ascending order of the example sizes.
"""

GROWN = (4, 16, 64)
"""Factors of the small values where those do not run (a convolution leaves nothing of a short sequence), or where
some number of blocks would be 1 in every instance, which hides the order of blocks and rows.
"""

SEARCHED = range(2, 14)
"""Values tried for sizes that only data decide."""

LARGEST_MAP = 10**8
"""Elements of the attention map (all rows and heads) up to which a proof is computed."""

ENOUGH = 10**7
"""Elements of the attention map from which one instance is enough: its sizes are those of the model."""

SWALLOWS = 2.0**62
"""A number this large, added to a score, leaves nothing of it in float64."""

LOOSEST = 1e-5
"""Beyond this two results do not agree, whatever numbers they are made of."""

AGREEMENT = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-1}
"""Largest relative difference by the dtype that the region was run in: the rounding over the few hundred
terms of a small instance stays far below it. Anything but float64 is run only where a fused native operator
has no other form.
"""


def canonical(native: torch.Tensor, layout: Layout, kind: TensorType, sizes: Mapping[str, int]) -> torch.Tensor:
    """A native tensor in the axis order of its Spec type; axes that the native tensor lacks are expanded."""
    names = [axis.name for axis in kind.axes]
    lengths = {axis.name: concrete(axis.size, sizes) for axis in kind.axes}
    split = native.reshape([lengths[name] for name in layout.axes])
    missing = [name for name in names if name not in layout.axes]
    ordered = [name for name in names if name in layout.axes]
    result = split.permute([layout.axes.index(name) for name in ordered])
    for name in missing:
        result = result.unsqueeze(names.index(name))
    return result.expand([lengths[name] for name in names])


def _size_values(graph: Graph, exprs: list[Expr], instance: tuple[int, ...]) -> dict[str, int]:
    """Small values for the symbolic sizes that keep the example's coincidences.

    Sizes with one example value get one value here; a size that in the example equals a compound size of the
    graph (the length of a mask and ``cache + 1``) follows that compound size.
    """
    symbols = {node.name for expr in exprs for node in walk(expr) if isinstance(node, Size)}
    values = _plain_values(graph, symbols, instance)
    hints = {name: hint for name in symbols if (hint := graph.size_hints.get(name)) is not None}
    compound = [
        e
        for e in dict.fromkeys(exprs)
        if not isinstance(e, Size | Const) and all(n.name in hints for n in walk(e) if isinstance(n, Size))
    ]
    for name, hint in hints.items():
        for expr in compound:
            inside = {n.name for n in walk(expr) if isinstance(n, Size)}
            if name not in inside and concrete(expr, hints) == hint:
                values[name] = concrete(expr, values)
    return values


def _plain_values(graph: Graph, symbols: set[str], instance: tuple[int, ...]) -> dict[str, int]:
    hints = {name: graph.size_hints.get(name) for name in symbols}
    distinct = sorted({hint for hint in hints.values() if hint is not None})
    values = {hint: instance[n % len(instance)] + 10 * (n // len(instance)) for n, hint in enumerate(distinct)}
    free = iter(range(len(distinct), len(distinct) + len(symbols)))
    return {
        name: values[hint] if hint is not None else instance[next(free) % len(instance)]
        for name, hint in sorted(hints.items())
    }


def _random(kind: str, shape: list[int], generator: torch.Generator, compared: bool, longest: int) -> torch.Tensor:
    """Random values of a dtype; those that a mask compares are sometimes 0, and on the first of several rows
    always.

    A mask of truth values or numbers so has visible and hidden positions and a row that sees nothing. One
    number is the longest axis: where they are lengths, some row is as long as it may be.
    """
    dtype = DTYPES[kind]
    if dtype.is_floating_point and not compared:
        return torch.randn(shape, dtype=torch.float64, generator=generator)
    shown = torch.rand(shape, generator=generator) < 0.7
    if len(shape) > 1 and shown.numel() > shape[-1] > 1:
        shown.view(-1, shape[-1])[0] = False
    if dtype.is_floating_point:
        return torch.randn(shape, dtype=torch.float64, generator=generator) * shown
    if not compared:
        return shown.to(dtype)
    numbers = torch.randint(1, 4, shape, generator=generator) * shown
    if numbers.numel():
        numbers.view(-1)[-1] = min(longest, torch.iinfo(dtype).max if dtype is not torch.bool else 1)
    return numbers.to(dtype)


def _compared(spec: Spec) -> frozenset[str]:
    """The captured tensors that are only compared, never used as a number or as a position."""
    inside: set[str] = set()
    elsewhere: set[str] = set()

    def visit(expr: Expr, comparing: bool) -> None:
        if isinstance(expr, Load):
            (inside if comparing else elsewhere).add(expr.tensor)
        below = isinstance(expr, Apply) and (
            expr.operator in ("lt", "le", "gt", "ge", "eq", "ne") or (comparing and expr.operator != "where")
        )
        for child in expr.children:
            visit(child, below)

    for operation in spec.operations:
        for expr in operation.expressions():
            visit(expr, False)
    return frozenset(inside - elsewhere)


@dataclass(frozen=True)
class Prover:
    """Proves the sites of one graph, each structure once."""

    graph: Graph
    known: dict[str, tuple[str, Proof | Refusal]]

    def prove(self, site: Site) -> Site:
        """The site with its proof, or refused when region and Spec differ."""
        if site.spec is None or site.region is None:
            return site
        key = _structure(self.graph, site)
        if key in self.known:
            name, found = self.known[key]
            found = replace(found, shared_with=name) if isinstance(found, Proof) else found
        else:
            found = _compare(self.graph, site.spec, site.region, site.anchor, site.source)
            self.known[key] = (site.name, found)
        if isinstance(found, Refusal):
            return replace(site, status="refused", spec=None, region=None, refusal=found)
        return replace(site, proof=found)


def _structure(graph: Graph, site: Site) -> str:
    """Hash of the Spec and of everything between its inputs and its output, names left out."""
    region = site.region
    assert region is not None and site.spec is not None
    fed = {binding.value for binding in region.inputs}
    numbers: dict[str, int] = {name: n for n, name in enumerate(dict.fromkeys(b.value for b in region.inputs))}
    text = [site.spec.fingerprint()] + [f"{b.name} {b.layout} {numbers[b.value]}" for b in region.inputs]
    needed, stack = set(), [b.value for b in region.outputs]
    while stack:
        name = stack.pop()
        if name in needed or name in fed:
            continue
        needed.add(name)
        stack += graph.native_inputs.get(name, ())
    for name in sorted(needed & graph.stated_order.keys(), key=graph.stated_order.__getitem__):
        numbers[name] = len(numbers)
        shape = graph.infos[name].shape if name in graph.infos else ()
        reads = [numbers.get(r, r) for r in graph.native_inputs.get(name, ())]
        text.append(f"{graph.signature.get(name, name)} {reads} {shape}")
    text += [f"{b.layout} {numbers.get(b.value)}" for b in region.outputs]
    return hashlib.sha256("\n".join(text).encode()).hexdigest()


def _all_sizes(graph: Graph, spec: Spec, region: Region) -> list[Expr]:
    """Every axis size in and around a region, and the graph's sizes that the Spec's expressions read."""
    exprs: list[Expr] = [s for b in (*region.inputs, *region.outputs) for s in graph.infos[b.value].shape]
    stated = [e for operation in spec.operations for e in operation.expressions()]
    stated += [size for value in spec.inputs for size in value.type.sizes]
    exprs += {node for e in stated for node in walk(e) if isinstance(node, Size) and node.name in graph.size_hints}
    inside = set(region.nodes)
    for value, info in graph.infos.items():
        if graph.owner.get(value) in inside:
            exprs += info.shape
    return exprs


def _bound_sizes(
    spec: Spec, feeds: Mapping[str, tuple[Binding, torch.Tensor]], graph: Graph, values: Mapping[str, int]
) -> dict[str, int]:
    """Values of the Spec's sizes, read off native shapes: an operand's axis has the native axes' size."""
    found: dict[str, int] = {}
    joined: list[tuple[list[Expr], int]] = []
    for value in spec.inputs:
        binding, tensor = feeds[value.name]
        if binding.layout is None:
            joined += [([axis.size], int(n)) for axis, n in zip(value.type.axes, tensor.shape, strict=False)]
        else:
            axes = [[value.type.size(name) for name in group] for group in binding.layout.groups]
            joined += zip(axes, binding.layout.extents(tensor.shape), strict=True)
    for group, extent in sorted(joined, key=lambda entry: len(entry[0])):
        open_sizes = [size for size in group if isinstance(size, Size) and size.name not in found]
        rest = [size for size in group if size not in open_sizes]
        if len(open_sizes) != 1 or any(n.name not in found for s in rest for n in walk(s) if isinstance(n, Size)):
            continue
        known = math.prod(concrete(size, found) for size in rest)
        if known and extent % known == 0:
            found[open_sizes[0].name] = extent // known
    return found


@dataclass(frozen=True)
class _Comparison:
    """Region and Spec on one random instance.

    Attributes:
        error: largest relative difference of an output.
        seeing: the same over the rows that see a key, where a mask tells which they are.
        told: whether some output held a number that is no NaN.
        elements: of the attention map.
        sizes: of the axes.
    """

    error: float
    seeing: float
    told: bool
    elements: int
    sizes: Mapping[str, int]

    def __str__(self) -> str:
        return " ".join(f"{k}={v}" for k, v in sorted(self.sizes.items()) if k in ("B", "I", "J")) or "fixed sizes"


class _TooLarge(Exception):
    """The map has more elements than a proof computes."""


def _feeds(
    graph: Graph, spec: Spec, region: Region, values: Mapping[str, int], generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Random operands. Integers that no input decides, such as the buckets of relative positions, are computed: they
    may be positions in a table, which random numbers could leave.
    """
    compared = _compared(spec)
    feeds: dict[str, torch.Tensor] = {}
    shapes = [graph.infos[binding.value].shape for binding in region.inputs]
    longest = max((concrete(size, values) for shape in shapes for size in shape), default=1)
    bounded = bounded_draws(spec)
    for binding in region.inputs:
        info = graph.infos[binding.value]
        if binding.value in feeds:
            continue
        integer = not DTYPES[info.dtype].is_floating_point and info.dtype != "bool"
        if binding.layout is None and integer and binding.value not in graph.varying:
            feeds.update(graph.evaluate([binding.value], {}, values))
        else:
            shape = [concrete(s, values) for s in info.shape]
            drawn = _random(info.dtype, shape, generator, binding.name in compared, longest)
            feeds[binding.value] = bounded[binding.name](drawn) if binding.name in bounded else drawn
    return feeds


def _run_both(graph: Graph, spec: Spec, region: Region, values: Mapping[str, int], seed: int) -> _Comparison:
    """Run both sides on one random instance.

    Raises:
        _TooLarge: with the number of elements of the map.
        ValueError, RuntimeError, IndexError, KeyError: when a side can not be run at these sizes.
    """
    feeds = _feeds(graph, spec, region, values, torch.Generator().manual_seed(seed))
    named = {b.name: (b, feeds[b.value]) for b in region.inputs}
    sizes = {**values, **_bound_sizes(spec, named, graph, values)}
    types = spec.types()
    attend = spec.attend()
    elements = attend.map_elements(types, sizes) if attend is not None else 0
    if elements > LARGEST_MAP:
        raise _TooLarge(elements)
    native = graph.evaluate([b.value for b in region.outputs], feeds, values)
    tensors = {name: canonical(t, b.layout, types[name], sizes) if b.layout else t for name, (b, t) in named.items()}
    stated = spec.interpret(tensors)
    actuals = [canonical(native[b.value], b.layout, types[b.name], sizes) for b in region.outputs if b.layout]
    rows = _rows_that_see(spec, tensors, sizes)
    pairs = list(zip(actuals, stated, strict=True))
    error = max(difference(actual, expected) for actual, expected in pairs)
    return _Comparison(
        error,
        error if rows is None else max(difference(actual[rows], expected[rows]) for actual, expected in pairs),
        any(not bool(expected.isnan().all()) for expected in stated),
        elements,
        sizes,
    )


def _rows_that_see(spec: Spec, tensors: Mapping[str, torch.Tensor], sizes: Mapping[str, int]) -> torch.Tensor | None:
    """Which rows ``[b,h,i]`` see a key, which is one whose logit no number hides (:data:`HIDDEN`).

    ``None`` where no number of the Spec is that large and every row sees one, or where keys are put together first.
    """
    attend = spec.attend()
    if attend is None or (attend.mask == TRUE and _largest_number(spec) < -HIDDEN):
        return None
    attend = replace(attend, query=input_behind(spec, attend.query), key=input_behind(spec, attend.key))
    if not {attend.query, attend.key} <= set(tensors):
        return None
    query, key = tensors[attend.query], tensors[attend.key]
    zero = torch.zeros((), dtype=torch.float64)  # of which what is added to it is left
    environment = attend.environment(tensors, sizes, torch.float64, score=zero)
    seen = evaluate(attend.mask, environment) & (evaluate(attend.score, environment) > HIDDEN)
    return seen.expand(*query.shape[:3], key.shape[2]).any(dim=-1)


def _instances(graph: Graph, spec: Spec, region: Region) -> Iterator[dict[str, int]]:
    """Values of the symbolic sizes to run on: small ones first, then such as may fit together where those do not.

    The sizes of the example surely do. Sizes that only data decide have no example; two at most are searched, because
    the graph asks that they multiply to some other size, for instance. A number that no shape shows, such as the width
    of a window, is what it was in the example.
    """
    for values in _shown_sizes(graph, spec, region):
        yield {**graph.size_hints, **values}


def _shown_sizes(graph: Graph, spec: Spec, region: Region) -> Iterator[dict[str, int]]:
    """Values of the sizes that shapes show."""
    exprs = _all_sizes(graph, spec, region)
    names = sorted({node.name for expr in exprs for node in walk(expr) if isinstance(node, Size)})
    small = [_size_values(graph, exprs, instance) for instance in (INSTANCES if names else INSTANCES[:1])]
    grown = (_size_values(graph, exprs, tuple(factor * size for size in INSTANCES[-1])) for factor in GROWN)
    if len(small) > 1 and _single_blocks(exprs, small[-1]):
        small[-1] = next((values for values in grown if not _single_blocks(exprs, values)), small[-1])
    yield from small
    hinted = {name: graph.size_hints[name] for name in names if name in graph.size_hints}
    searched = [name for name in names if name not in hinted]
    if hinted and not searched:
        yield {**small[0], **hinted}
        for factor in GROWN:
            yield _size_values(graph, exprs, tuple(factor * size for size in INSTANCES[0]))
    elif 0 < len(searched) <= 2:
        for found in itertools.product(SEARCHED, repeat=len(searched)):
            yield {**small[0], **dict(zip(searched, found, strict=True))}
    for values in small:
        try:
            reached = _reaching(graph, spec, region, values)
        except (ValueError, RuntimeError):  # a size that no shape tells, or none at all
            continue
        yield reached


def _reaching(graph: Graph, spec: Spec, region: Region, values: Mapping[str, int]) -> dict[str, int]:
    """The values, with every captured tensor at least as long as the Spec reads it.

    Nothing in a graph relates the length of a mask of which every hundredth element is read to the number of keys.
    """
    attend = spec.attend()
    bindings = {binding.name: binding for binding in region.inputs}
    if attend is None or not {attend.query, attend.key} <= bindings.keys():
        return dict(values)
    shapes = {name: graph.infos[binding.value].shape for name, binding in bindings.items()}
    stored = {name: torch.empty([concrete(s, values) for s in shape], device="meta") for name, shape in shapes.items()}
    sizes = {**values, **_bound_sizes(spec, {n: (b, stored[n]) for n, b in bindings.items()}, graph, values)}
    types = spec.types()
    extents = [*types[attend.query].sizes[:3], types[attend.key].sizes[2]]
    lengths = [concrete(size, sizes) for size in extents]
    if max(lengths) > LARGEST_MAP:
        return dict(values)
    grid = index_grid(dict(zip("bhij", lengths, strict=True)), "cpu")
    reached = dict(values)
    for load in (node for expr in attend.expressions() for node in walk(expr) if isinstance(node, Load)):
        for index, size in zip(load.indices, shapes.get(load.tensor, ()), strict=False):
            if isinstance(size, Size) and not loads(index):
                last = int(evaluate(index, Environment(grid, sizes)).max())
                reached[size.name] = max(reached.get(size.name, 0), last + 1)
    return reached


def _single_blocks(exprs: Sequence[Expr], values: Mapping[str, int]) -> bool:
    """Whether a compound size, such as a number of blocks, is at most 1."""
    compound = [expr for expr in dict.fromkeys(exprs) if not isinstance(expr, Size | Const)]
    known = [expr for expr in compound if all(n.name in values for n in walk(expr) if isinstance(n, Size))]
    return any(concrete(expr, values) <= 1 for expr in known)


def _allowed(spec: Spec, precision: torch.dtype) -> float:
    """The largest difference that rounding may make in a row that sees no key (:func:`_rows_that_see`).

    Such a row is a softmax of ``s − 1e10``, whose last digit is 2e-6 in float64: there the order of the additions
    shows. From :data:`SWALLOWS` on nothing is left of the score, and all its logits are equal.
    """
    return max(AGREEMENT[precision], min(4 * torch.finfo(precision).eps * _largest_number(spec), LOOSEST))


def _largest_number(spec: Spec) -> float:
    """The size of the largest constant of a Spec that leaves something of a score."""
    constants = (
        abs(float(node.value))
        for operation in spec.operations
        for expr in operation.expressions()
        for node in walk(expr)
        if isinstance(node, Const) and not isinstance(node.value, bool)
    )
    return max((size for size in constants if size < SWALLOWS), default=0.0)


def _compare(graph: Graph, spec: Spec, region: Region, anchor: str, source: str) -> Proof | Refusal:
    """Run both sides on random instances: two small ones, and the example's sizes where a small one does not run."""

    def refusal(kind: str, reason: str, hint: str) -> Refusal:
        return Refusal(kind, reason, anchor, source, hint)

    precision = torch.float64
    if graph.precision:
        precision = graph.precision([b.value for b in region.outputs], [b.value for b in region.inputs])
    allowed = _allowed(spec, precision)
    shortened = _compare_shortened(graph, spec, region, allowed, precision)
    if shortened is not None:
        return shortened
    done: list[_Comparison] = []
    problem = ""
    for number, values in enumerate(_instances(graph, spec, region)):
        if number >= len(INSTANCES) and done:
            break
        try:
            found = _run_both(graph, spec, region, values, number)
        except _TooLarge as error:
            if done:
                break
            return refusal(
                "unproven",
                f"the attention map has {error.args[0]:.2g} elements and its sizes are fixed, too many to compare",
                "capture the model with a dynamic or shorter length",
            )
        except (ValueError, RuntimeError, IndexError, KeyError) as error:
            problem = str(error).splitlines()[0]
            continue
        if not (found.error <= allowed and found.seeing <= AGREEMENT[precision]):
            return refusal(
                "disproved",
                f"region and Spec differ by {found.error:.3g} on random inputs",
                "report this model: the lifted expression is wrong for it",
            )
        done.append(found)
        if found.elements > ENOUGH:
            break
    if not done:
        return refusal(
            "unproven",
            f"region and Spec could not be compared: {problem}",
            "report this model: the lifted expression does not fit its region",
        )
    if not any(found.told for found in done):
        return refusal(
            "unproven",
            "no random input gave a result that is a number",
            "report this model: nothing was compared",
        )
    return Proof(tuple(str(found) for found in done), max(found.error for found in done))


def _compare_shortened(
    graph: Graph, spec: Spec, region: Region, allowed: float, precision: torch.dtype
) -> Proof | None:
    """A proof at short lengths of a graph that fixes long ones; ``None`` where its own lengths have to be run."""
    done: list[tuple[_Comparison, str]] = []
    for seed, shorter in enumerate(shortenings(spec, graph.size_hints, ENOUGH)):
        try:
            short = shorter.spec(spec)
            inside = shorter.graph(graph, region, short)
            values = next(_instances(inside, short, region))
            found = _run_both(inside, short, region, values, seed)
        except (_TooLarge, ValueError, RuntimeError, IndexError, KeyError):
            continue
        if not (found.error <= allowed and found.seeing <= AGREEMENT[precision] and found.told):
            return None
        done.append((found, str(shorter)))
        if len(done) == len(INSTANCES):
            return Proof(tuple(said for _, said in done), max(found.error for found, _ in done))
    return None


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute difference over the larger of 1 and the largest value; infinite where only one side is
    NaN.
    """
    if actual.shape != expected.shape or bool((actual.isnan() != expected.isnan()).any()):
        return math.inf
    both = ~expected.isnan()
    if not bool(both.any()):
        return 0.0
    scale = max(1.0, float(expected[both].abs().max()))
    return float((actual[both].double() - expected[both].double()).abs().max()) / scale
