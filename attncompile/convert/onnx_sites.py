"""Every site of a conversion to ONNX as a model of its own in ONNX Runtime, compared with its Spec."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import onnx_ir
import torch

from attncompile.codegen.onnx.choose import Choice, row_named, threshold_of
from attncompile.codegen.onnx.emit import alone
from attncompile.convert.frame import is_lossy
from attncompile.convert.onnx_rewrite import Rewritten
from attncompile.convert.runtime import session
from attncompile.ir import Spec, parse_spec
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


def site_certificates(rewritten: Rewritten, provider: str) -> list[SiteCertificate]:
    """One entry per site, each distinct Spec run once as a model of its own.

    Args:
        rewritten: the model; provider: where it runs.
    """
    known: dict[tuple[str, str], SiteCertificate] = {}
    made = []
    for outcome in rewritten.outcomes:
        name, result = outcome.site.name, outcome.passes
        if result is None or name not in rewritten.choices:
            made.append(refused_site(name, outcome.reason, outcome.site.spec))
            continue
        original = outcome.site.spec if result.lossy else None
        made.append(_checked(name, result.spec, rewritten.choices[name], provider, known, original))
    return made


def verified_sites(plan: Plan, provider: str) -> list[SiteCertificate]:
    """The sites of a plan, run again, as :func:`site_certificates` runs them.

    Raises:
        ValueError: when the plan names an operator that is not known.
    """
    known: dict[tuple[str, str], SiteCertificate] = {}
    made = []
    for site in plan.sites:
        if site.operator == "original" or not site.after:
            spec = parse_spec(site.before) if site.before else None
            made.append(refused_site(site.site, site.reason, spec))
            continue
        spec = parse_spec(site.after)
        choice = Choice(row_named(spec, site.operator), site.reason, ())
        original = parse_spec(site.before) if site.before and is_lossy(site) else None
        made.append(_checked(site.site, spec, choice, provider, known, original))
    return made


def _checked(
    name: str,
    spec: Spec,
    choice: Choice,
    provider: str,
    known: dict[tuple[str, str], SiteCertificate],
    original: Spec | None,
) -> SiteCertificate:
    """A site compared with its Spec, once for equal Specs and operators."""
    key = (spec.fingerprint(), choice.row.operator)
    if key not in known:
        runner = _site_runner(spec, choice, provider)
        draws: tuple[Draw, ...] = (*DRAWS, *long_draws(choice.row.operator))
        if choice.row.alone_or_first:  # it refuses the others
            draws = tuple(replace(draw, batch=1) for draw in draws)
        known[key] = check_site(name, spec, runner, operator=choice.row.operator, original=original, draws=draws)
    return known[key].model_copy(update={"site": name, "spec": str(spec)})


def _site_runner(
    spec: Spec, choice: Choice, provider: str
) -> Callable[..., tuple[torch.Tensor, ...]]:
    """A site alone, as a model in ONNX Runtime."""
    loaded = session(onnx_ir.to_proto(alone(spec, choice.row)).SerializeToString(), provider)
    wanted = {entry.name for entry in loaded.get_inputs()}

    def computed(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        fed = {v.name: t.numpy() for v, t in zip(spec.inputs, tensors, strict=True) if v.name in wanted}
        return tuple(torch.from_numpy(array) for array in loaded.run(None, fed))

    return computed
