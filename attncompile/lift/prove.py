"""Proof by numbers: a region's native nodes and its Spec are run in float64 on fresh random inputs and must
agree.

Symbolic sizes are instantiated small, so a proof is cheap; sites with the same structure share one. Inputs
include hidden rows (integer and boolean masks are random), and every size that the example had in common
stays common.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from attncompile.frontends.graph import Graph
from attncompile.ir import Expr, Refusal, Spec, TensorType
from attncompile.ir.evaluate import evaluate
from attncompile.ir.expr import TRUE, Apply, Const, Load, walk
from attncompile.ir.prologue import input_behind
from attncompile.ir.sample import bounded_draws
from attncompile.ir.types import DTYPES, concrete
from attncompile.lift.instances import INSTANCES, LARGEST_MAP, bound_sizes, instances
from attncompile.lift.masks import HIDDEN
from attncompile.lift.program import Layout, Proof, Region, Site
from attncompile.lift.shortened import shortenings

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
    sizes = {**values, **bound_sizes(spec, named, graph, values)}
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
    for number, values in enumerate(instances(graph, spec, region)):
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
            values = next(instances(inside, short, region))
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
