"""What computes each site, run against the site's definition before it is used."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from attncompile.backend.rewrite import Decision
from attncompile.codegen.pytorch.autocast import autocast_dtype
from attncompile.ir import Spec
from attncompile.ir.sample import example_sizes
from attncompile.ir.some_rows import rows_that_fit
from attncompile.ir.types import DTYPES
from attncompile.verify import SiteCertificate, check_site, refused_site
from attncompile.verify.sites import DRAWS, LARGEST, Draw


def certificates(
    decisions: Sequence[Decision],
    device: str = "cpu",
    dtype: torch.dtype | None = torch.float32,
    draws: Sequence[Draw] = DRAWS,
) -> list[SiteCertificate]:
    """What every site's replacement gives on random inputs, against its Spec in float64; equal Specs are run once.

    Args:
        decisions: one per site.
        device: where the replacements run.
        dtype: of the real inputs; ``None`` is what each Spec says.
        draws: how inputs are drawn.
    """
    known: dict[str, SiteCertificate] = {}
    made = []
    for decision in decisions:
        spec, lowering = decision.spec, decision.lowering
        if spec is None or lowering is None:
            made.append(refused_site(decision.site.name, decision.reason, decision.site.spec))
            continue
        key = spec.fingerprint()
        if key not in known:
            lossy = decision.passes is not None and decision.passes.lossy
            known[key] = check_site(
                decision.site.name,
                spec,
                lowering.run,
                operator=lowering.operator,
                device=device,
                dtype=dtype or dtype_of(spec),
                original=decision.site.spec if lossy else None,
                draws=draws,
            )
        made.append(known[key].model_copy(update={"site": decision.site.name, "spec": str(spec)}))
    return made


def verified(
    decisions: tuple[Decision, ...],
    device: str,
    *,
    checks: bool,
    budget: float | None,
    exact: Callable[[Decision], Decision],
) -> tuple[tuple[Decision, ...], tuple[str, ...]]:
    """The decisions that hold, and what there is to say about the others.

    Args:
        decisions: one per site.
        device: where they run.
        checks: whether a replacement that differs from its Spec goes back to the original.
        budget: the largest relative change that lossy passes may bring, or ``None``.
        exact: a decision for the same site without its lossy passes.

    Returns:
        The decisions, which say themselves why an original stays, and a sentence for whatever else was not done.
    """
    said: list[tuple[str, str]] = []
    seen: dict[str, SiteCertificate | None] = {}
    made = []
    for decision in decisions:
        lossy = decision.passes is not None and decision.passes.lossy
        if decision.lowering is not None and decision.spec is not None and (checks or (lossy and budget is not None)):
            decision = _verified(decision, device, checks, budget if lossy else None, exact, seen, said)
        made.append(decision)
    reasons = dict.fromkeys(reason for _, reason in said)
    return tuple(made), tuple(f"{named([n for n, r in said if r == reason])}: {reason}" for reason in reasons)


def _verified(
    decision: Decision,
    device: str,
    checks: bool,
    budget: float | None,
    exact: Callable[[Decision], Decision],
    seen: dict[str, SiteCertificate | None],
    said: list[tuple[str, str]],
) -> Decision:
    name, certificate = decision.site.name, _certificate(decision, device, seen)
    if certificate is None:
        if budget is not None:
            said.append((name, f"exact passes alone, since a map of over {LARGEST:,} elements is not measured"))
            return _verified(exact(decision), device, checks, None, exact, seen, said) if checks else exact(decision)
        said.append((name, f"not verified, since at its fixed sizes a map has more than {LARGEST:,} elements"))
        return decision
    change = max((case.change or 0.0 for case in certificate.cases), default=0.0)
    if budget is not None and not change <= budget:
        said.append((name, f"exact passes alone, since its output would change by {change:.2g}, budget {budget:g}"))
        return _verified(exact(decision), device, checks, None, exact, seen, said) if checks else exact(decision)
    wrong = next((case for case in certificate.cases if not case.passed), None)
    if not checks or wrong is None:
        return decision
    reason = (
        f"{certificate.operator} is off by {wrong.max_abs:.3g} at {wrong.sizes}, where {wrong.tolerance:.3g} is "
        "allowed; please report this"
    )
    return dataclasses.replace(decision, passes=None, lowering=None, reason=reason)


def _certificate(
    decision: Decision, device: str, seen: dict[str, SiteCertificate | None]
) -> SiteCertificate | None:
    assert decision.spec is not None
    key = decision.spec.fingerprint()
    if key not in seen:
        rows = rows_that_fit(decision.spec, example_sizes(decision.spec, DRAWS[-1].length), LARGEST)
        draws = DRAWS if rows is None else DRAWS[-2:]  # what is large takes long, and its sizes do not differ
        # what autocast makes of operands is what will run; the operator is inside autocast here too
        narrow = autocast_dtype(torch.empty(0, dtype=dtype_of(decision.spec), device=device))
        seen[key] = certificates([decision], device, narrow, draws)[0] if rows != 0 else None
    return seen[key]


def named(names: Sequence[str]) -> str:
    """The first names of sites, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def dtype_of(spec: Spec) -> torch.dtype:
    """The dtype of a Spec's first real input: of its queries, as a rule."""
    real = (DTYPES[value.type.dtype] for value in spec.inputs)
    return next((dtype for dtype in real if dtype.is_floating_point), torch.float32)


__all__ = ["certificates", "named", "verified"]
