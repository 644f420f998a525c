"""Every site of a conversion to ONNX as a model of its own in ONNX Runtime, compared with its Spec."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import onnx_ir
import torch

from attncompile.codegen.onnx.choose import Choice, row_named, threshold_of
from attncompile.codegen.onnx.emit import alone
from attncompile.convert.comparison import DoesNotRunError
from attncompile.convert.frame import is_lossy
from attncompile.convert.onnx_rewrite import Rewritten
from attncompile.convert.runtime import results, session
from attncompile.frontends.errors import InputError
from attncompile.ir import RefusalError, Spec, parse_spec
from attncompile.plan.schema import Plan
from attncompile.verify import DRAWS, Draw, SiteCertificate, check_site, refused_site

LONGER = 760
"""Positions of the longest inputs of a site, where no operator is chosen that gives way to another beyond."""

BEYOND = 12
"""By how much inputs are longer than the length at which an operator gives way to another."""


def long_draws(operator: str) -> tuple[Draw, ...]:
    """More random inputs for a site: above the length at which its operator gives way to another, and a single row
    without padding, which some operators take behind a cache alone.
    """
    length = max(LONGER, threshold_of(operator) + BEYOND)
    return Draw(length, "random", 5), Draw(33, "ones", 6, batch=1), Draw(length, "ones", 7, batch=1)


@dataclass(frozen=True)
class Checked:
    """What came of running sites alone.

    Attributes:
        certificates: one for each site that could be run, in the order of the model.
        failures: why a site failed, by name, those that could not be run among them.
    """

    certificates: tuple[SiteCertificate, ...]
    failures: Mapping[str, str]


Known = dict[tuple[str, str], "SiteCertificate | InputError | DoesNotRunError"]
"""What came of running a Spec in an operator, by the fingerprint and the name."""


def checked_sites(rewritten: Rewritten, provider: str, known: Known | None = None) -> Checked:
    """Every site against its Spec, each distinct Spec run once as a model of its own.

    Args:
        rewritten: the model; provider: where it runs.
        known: what was run before; what is run now is added.
    """
    known = {} if known is None else known
    made: list[SiteCertificate] = []
    failures: dict[str, str] = {}
    for outcome in rewritten.outcomes:
        name, result = outcome.site.name, outcome.passes
        if result is None or name not in rewritten.choices:
            back = outcome.rolled_back
            made.append(refused_site(name, outcome.reason, outcome.site.spec, rolled_back=back))
            continue
        changed = result.lossy and outcome.site.spec != result.spec
        original, choice = outcome.site.spec if changed else None, rewritten.choices[name]
        try:
            made.append(_checked(name, result.spec, choice, provider, known, original))
        except (InputError, DoesNotRunError) as error:
            failures[name] = f"{choice.row.operator} alone: {error.what if isinstance(error, InputError) else error}"
            continue
        failure = _failure(made[-1])
        if failure is not None:
            failures[name] = failure
    return Checked(tuple(made), failures)


def _failure(site: SiteCertificate) -> str | None:
    """What is wrong with a site that is beyond its tolerance, in words."""
    failed = [case for case in site.cases if not case.passed]
    if not failed:
        return None
    worst = max(failed, key=lambda case: (case.misplaced, case.max_abs - case.tolerance))
    lost = f" and {worst.misplaced} elements are NaN or infinite on one side only" if worst.misplaced else ""
    return (
        f"{site.operator} alone is off from its Spec by {worst.max_abs:.2g}, where {worst.tolerance:.2g} is allowed"
        f"{lost}, in {len(failed)} of {len(site.cases)} cases"
    )


def site_certificates(rewritten: Rewritten, provider: str) -> list[SiteCertificate]:
    """One entry per site, as :func:`checked_sites` runs them.

    Raises:
        DoesNotRunError: when a site cannot be run.
    """
    checked = checked_sites(rewritten, provider)
    if len(checked.certificates) < len(rewritten.outcomes):
        raise DoesNotRunError("; ".join(f"{site}: {why}" for site, why in checked.failures.items()))
    return list(checked.certificates)


def verified_sites(plan: Plan, provider: str) -> list[SiteCertificate]:
    """The sites of a plan, run again, as :func:`checked_sites` runs them.

    Raises:
        ValueError: when the plan names an operator that is not known.
    """
    known: Known = {}
    made = []
    for site in plan.sites:
        if site.operator == "original" or not site.after:
            spec = parse_spec(site.before) if site.before else None
            made.append(refused_site(site.site, site.reason, spec, rolled_back=site.rolled_back))
            continue
        spec = parse_spec(site.after)
        choice = Choice(row_named(spec, site.operator), site.reason, ())
        changed = is_lossy(site) and site.before != site.after
        original = parse_spec(site.before) if site.before and changed else None
        made.append(_checked(site.site, spec, choice, provider, known, original))
    return made


def _checked(
    name: str,
    spec: Spec,
    choice: Choice,
    provider: str,
    known: Known,
    original: Spec | None,
) -> SiteCertificate:
    """A site compared with its Spec, once for equal Specs and operators.

    Raises:
        InputError: when ONNX Runtime cannot load it.
        DoesNotRunError: when it cannot be written alone, or ONNX Runtime does not run it.
    """
    key = (spec.fingerprint(), choice.row.operator)
    if key not in known:
        try:
            known[key] = _compared(name, spec, choice, provider, original)
        except (InputError, DoesNotRunError) as error:
            known[key] = error
    found = known[key]
    if not isinstance(found, SiteCertificate):
        raise found
    return found.model_copy(update={"site": name, "spec": str(spec)})


def _compared(name: str, spec: Spec, choice: Choice, provider: str, original: Spec | None) -> SiteCertificate:
    runner = _site_runner(spec, choice, provider)
    draws: tuple[Draw, ...] = (*DRAWS, *long_draws(choice.row.operator))
    if choice.row.alone_or_first:  # it refuses the others
        draws = tuple(replace(draw, batch=1) for draw in draws)
    try:
        return check_site(name, spec, runner, operator=choice.row.operator, original=original, draws=draws)
    except DoesNotRunError:
        raise
    except ValueError as error:
        raise DoesNotRunError(f"its result has another shape: {error}") from error


def _site_runner(spec: Spec, choice: Choice, provider: str) -> Callable[..., tuple[torch.Tensor, ...]]:
    """A site alone, as a model in ONNX Runtime."""
    try:
        model = alone(spec, choice.row)
    except RefusalError as error:
        raise DoesNotRunError(f"it can not be written: {error}") from error
    loaded = session(onnx_ir.to_proto(model).SerializeToString(), provider)
    wanted = {entry.name for entry in loaded.get_inputs()}

    def computed(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = {v.name: t for v, t in zip(spec.inputs, tensors, strict=True) if v.name in wanted}
        fed = {name: (t.float() if t.dtype is torch.bfloat16 else t).numpy() for name, t in given.items()}
        try:
            made = results(loaded, fed)
        except Exception as error:  # ONNX Runtime's own share no other base
            raise DoesNotRunError(f"ONNX Runtime does not run it: {str(error).splitlines()[0]}") from error
        return tuple(made.values())

    return computed


__all__ = ["Checked", "Known", "checked_sites", "long_draws", "site_certificates", "verified_sites"]
