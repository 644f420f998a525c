"""What was done at each attention site of compiled graphs, and what each costs, as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from attncompile.backend.compilation import Compilation, ExplainedSite
from attncompile.backend.verified import named


@dataclass(frozen=True)
class Explanation:
    """What was done in each compiled graph; prints as text.

    Attributes:
        compilations: the graphs, in the order in which they were compiled.
    """

    compilations: tuple[Compilation, ...]

    @property
    def sites(self) -> tuple[ExplainedSite, ...]:
        """The sites of all graphs."""
        return tuple(site for compilation in self.compilations for site in compilation.sites)

    def __str__(self) -> str:
        if not self.compilations:
            return (
                "no compiled graph: call the model first, or it has been reset since; for a model that was loaded with "
                "attn_implementation='attncompile' see attncompile.hf.explain"
            )
        without = [compilation for compilation in self.compilations if compilation.operations]
        parts = [_lines(compilation) for compilation in self.compilations if not compilation.operations]
        return "\n\n".join("\n".join(lines) for lines in (*parts, _lines_without(without)) if lines)


def _lines(compilation: Compilation) -> list[str]:
    count = len(compilation.sites)
    lines = [
        f"graph {compilation.number} on {compilation.device}: {count} attention site{'s' * (count != 1)}, "
        f"found and rewritten in {compilation.seconds:.1f} s"
    ]
    if compilation.again:
        lines.append(f"  compiled again: {compilation.again}")
    lines += [f"  {line}" for line in site_lines(compilation.sites)]
    return [*lines, *(f"  warning: {text}" for text in compilation.said)]


def _lines_without(compilations: Sequence[Compilation]) -> list[str]:
    """The graphs in which no attention was found, and what could have been some; a graph break leaves many of them."""
    if not compilations:
        return []
    numbers = [str(compilation.number) for compilation in compilations]
    graphs = f"graph {numbers[0]}" if len(numbers) == 1 else f"graphs {named(numbers)}"
    devices = ", ".join(dict.fromkeys(compilation.device for compilation in compilations))
    operations = sum(compilation.operations for compilation in compilations)
    seen = dict.fromkeys(text for compilation in compilations for text in compilation.passed_over)
    return [
        f"{graphs} on {devices}: no attention found among {operations} operations",
        *(f"  no attention: {text}" for text in seen),
    ]


def site_lines(sites: Iterable[ExplainedSite]) -> list[str]:
    """What became of sites, those that differ in their names alone told once."""
    return [line for alike in _alike(sites) for line in _site_lines(alike)]


def _alike(sites: Iterable[ExplainedSite]) -> list[list[ExplainedSite]]:
    """Sites that differ in their names alone, such as the layers of a model."""
    found: dict[tuple[object, ...], list[ExplainedSite]] = {}
    for site in sites:
        texts = (_body(site.before), _body(site.after), site.applied, site.refused, site.runs, site.reason)
        sizes = None if site.sizes is None else tuple(sorted(site.sizes.items()))
        found.setdefault((site.status, *texts, sizes), []).append(site)
    return list(found.values())


def _body(spec: str) -> str:
    """A Spec without its name."""
    return spec.partition("   ")[2]


def _site_lines(alike: list[ExplainedSite]) -> list[str]:
    site = alike[0]
    names = site.name if len(alike) == 1 else f"{site.name} and {len(alike) - 1} more like it"
    lines = [f"{names}: {site.runs}", f"  why: {site.reason}"]
    if site.source:
        lines.append(f"  at: {site.source}")
    lines += [f"  | {line}" for line in (site.after or site.before).splitlines()]
    if site.after and site.after != site.before:
        lines += ["  before the passes", *(f"  | {line}" for line in site.before.splitlines())]
    lines += [f"  pass {call}" for call in site.applied]
    lines += [f"  pass {call} does not apply: {reason}" for call, reason in site.refused]
    cost = site.cost()
    if cost is not None:
        sizes = ", ".join(f"{name} {value}" for name, value in sorted(cost.sizes.items()))
        lines.append(
            f"  costs {_short(cost.after.flops)}FLOP and {_short(cost.after.bytes)}B at {sizes or 'its fixed sizes'}; "
            f"{100 * cost.after.density:.3g} % of the map is visible"
        )
        if cost.after.flops != cost.before.flops:
            lines.append(f"  before the passes {_short(cost.before.flops)}FLOP and {_short(cost.before.bytes)}B")
    return lines


def _short(number: float) -> str:
    for unit in ("", "k", "M", "G", "T"):
        if abs(number) < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} P"


__all__ = ["Explanation", "site_lines"]
