"""From what was done at each site to the three files that say so: plan, certificate and report."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from attncompile.convert.calibration import Call, named_outputs, text_metrics, without_padding
from attncompile.lift import Program, Site
from attncompile.passes import PassResult
from attncompile.plan.schema import Plan, Refused, SitePlan
from attncompile.report import Measurement, PassOutcome, Report, SiteReport
from attncompile.verify import Certificate, EndToEnd, SiteCertificate, compare, measured

ABSOLUTE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest absolute difference of a whole model's outputs after exact rewrites, by dtype."""

Outputs = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Outcome:
    """What became of one site, whatever the target.

    Attributes:
        site: as lifted.
        passes: the outcome of the passes; ``None`` where the original computation stays.
        operator: what computes it now; ``original`` where it stays.
        reason: why.
    """

    site: Site
    passes: PassResult | None
    operator: str
    reason: str

    @property
    def lossy(self) -> bool:
        """Whether the site may now compute something else."""
        return self.passes is not None and self.passes.lossy


def make_plan(
    program: Program,
    target: Literal["onnx", "torch"],
    provider: str,
    passes: str,
    allow_untrained: bool,
    outcomes: Sequence[Outcome],
) -> Plan:
    """The plan that these outcomes are."""
    return Plan(
        schema=1,
        model=program.model,
        target=target,
        provider=provider,
        passes=passes,
        allow_untrained=allow_untrained,
        sites=tuple(_site_plan(outcome) for outcome in outcomes),
    )


def _site_plan(outcome: Outcome) -> SitePlan:
    before, result = outcome.site.spec, outcome.passes
    return SitePlan(
        site=outcome.site.name,
        fingerprint=before.fingerprint() if before else "",
        before=str(before) if before else "",
        after=str(result.spec) if result else str(before) if before else "",
        operator=outcome.operator,
        reason=outcome.reason,
        applied=result.applied if result else (),
        refused=tuple(Refused(call=call, reason=reason) for call, reason in result.refused) if result else (),
    )


def distances(
    call: Call, before: Outputs, after: Outputs, exact: Outputs | None, judged: bool
) -> list[EndToEnd]:
    """How far every output is from the original, padded positions left out.

    A large float32 model is itself off by more than :data:`ABSOLUTE` from what it would give in exact arithmetic, so
    two correct orders of its sums differ by that much. Where the original can be run in float64, what is judged is
    therefore that its error does not grow by more than :data:`ABSOLUTE`, and the plain difference is reported beside
    it; elsewhere the plain difference is judged.

    Args:
        call: what all were run on.
        before, after: outputs by name.
        exact: outputs of the original in float64, where there are any.
        judged: whether to judge at all; otherwise everything is only reported.

    Raises:
        ValueError: when an output is missing or has another shape.
    """
    kept = call.kept()
    found: list[EndToEnd] = []

    def distance(one: torch.Tensor, other: torch.Tensor) -> float:
        comparison = compare(without_padding(one, kept), without_padding(other, kept))
        return comparison.max_abs if not comparison.misplaced else math.inf

    for name, reference in before.items():
        if name not in after:
            raise ValueError(f"the result has no output {name!r}; it has {', '.join(after)}")
        allowed = ABSOLUTE.get(reference.dtype, ABSOLUTE[torch.float32]) if judged else None
        truth = exact.get(name) if exact is not None else None
        apart = distance(after[name], reference)
        if truth is None or not without_padding(truth, kept).isfinite().all():
            found.append(measured(f"largest difference of {name}", None, apart, call.what, allowed))
            continue
        found.append(measured(f"largest difference of {name}", None, apart, call.what, None))
        found.append(
            measured(
                f"error of {name} against float64",
                distance(reference, truth),
                distance(after[name], truth),
                call.what,
                allowed,
            )
        )
    return found


def in_float64(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of a model in float64. A Hugging Face model uses SDPA there: its rows without a visible key are no NaN."""
    wide = copy.deepcopy(model).double().eval()
    choose_attention = getattr(wide, "set_attn_implementation", None)
    if callable(choose_attention):
        choose_attention("sdpa")
    return wide


def run_exact(model: torch.nn.Module, call: Call) -> dict[str, torch.Tensor]:
    """The outputs of a float64 model for a call."""
    args, kwargs = torch.utils._pytree.tree_map(
        lambda leaf: leaf.double() if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf,
        (call.args, dict(call.kwargs)),
    )
    with torch.no_grad():
        return outputs_of(model(*args, **kwargs))


def on_text(call: Call, before: Outputs, after: Outputs) -> list[EndToEnd]:
    """Perplexity and cosine similarity on running text; reported, not judged."""
    return [measured(name, old, new, call.what, None) for name, new, old in text_metrics(call, before, after)]


def make_certificate(
    plan: Plan, sites: Sequence[SiteCertificate], end_to_end: Sequence[EndToEnd]
) -> Certificate:
    """The certificate of a conversion."""
    return Certificate(
        schema=1,
        model=plan.model,
        target=plan.target,
        plan=plan.digest(),
        sites=tuple(sites),
        end_to_end=tuple(end_to_end),
    )


def make_report(
    program: Program,
    plan: Plan,
    outcomes: Sequence[Outcome],
    certificate: Certificate,
    measurements: Sequence[Measurement],
    notes: Sequence[str],
) -> Report:
    """The report of a conversion: what was done at each site and why, with the measured errors."""
    evidence = {entry.site: entry for entry in certificate.sites}
    errors = [
        Measurement(
            name=f"{entry.metric}, {entry.inputs}",
            before=entry.before,
            after=entry.after,
            note="judged" if entry.tolerance is not None else "reported",
        )
        for entry in certificate.end_to_end
    ]
    return Report(
        model=plan.model,
        target=plan.target,
        provider=plan.provider,
        passes=plan.passes,
        sites=tuple(_site_report(outcome, evidence.get(outcome.site.name)) for outcome in outcomes),
        measurements=(*errors, *measurements),
        notes=(*program.notes, *notes),
    )


def _site_report(outcome: Outcome, evidence: SiteCertificate | None) -> SiteReport:
    site, result = outcome.site, outcome.passes
    applied = [PassOutcome(name=call, applied=True) for call in result.applied] if result else []
    refused = (
        [PassOutcome(name=call, applied=False, reason=why) for call, why in result.refused] if result else []
    )
    cases = evidence.cases if evidence else ()
    changes = [case.change for case in cases if case.change is not None]
    replaced = outcome.operator != "original"
    return SiteReport(
        name=site.name,
        status=site.status,
        spec=str(site.spec) if site.spec else "",
        spec_after=str(result.spec) if result and replaced else "",
        passes=(*applied, *refused),
        operator=outcome.operator if replaced else "",
        why=outcome.reason,
        max_error=max((case.max_abs for case in cases), default=None),
        relative_error=max((case.max_rel for case in cases), default=None),
        change=max(changes, default=None),
        change_inputs="random inputs" if changes else "",
        source=site.source,
        reason=site.refusal.reason if site.refusal else "",
        hint=site.refusal.hint if site.refusal else "",
    )


def outputs_of(result: object) -> dict[str, torch.Tensor]:
    """A model's float outputs by name, detached, on the CPU."""
    return {name: tensor.detach().cpu() for name, tensor in named_outputs(result).items()}
