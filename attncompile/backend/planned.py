"""Which passes a plan gives the sites of a graph."""

from __future__ import annotations

from collections.abc import Sequence

from attncompile.passes import PassCall, parse_passes
from attncompile.plan.schema import Plan, SitePlan

Planned = tuple[PassCall, ...] | str
"""The passes of a site, or why it is left as it was."""


def planned_sites(plan: Plan, names: Sequence[str]) -> dict[str, Planned]:
    """What a plan says of the sites with these names; those that it does not name are not in the result.

    A plan names sites from the model's root, a compiled function from what it was given: one name may be the end of
    the other (``model.layers.0.self_attn`` and ``layers.0.self_attn``), as long as only one entry of the plan fits.
    """
    found: dict[str, Planned] = {}
    for name in names:
        exact = [entry for entry in plan.sites if entry.site == name]
        fitting = exact or [entry for entry in plan.sites if _ends(entry.site, name) or _ends(name, entry.site)]
        if len(fitting) == 1:
            found[name] = _planned(fitting[0])
    return found


def _ends(name: str, end: str) -> bool:
    return name.endswith(f".{end}")


def _planned(entry: SitePlan) -> Planned:
    if entry.operator == "original":
        return f"the plan leaves it as it was: {entry.reason}"
    return tuple(call for text in entry.applied for call in parse_passes(text))


__all__ = ["Planned", "planned_sites"]
