"""From what was done at each site to the three files that say so: plan, certificate and report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from attncompile.convert.change import Change
from attncompile.lift import Program, Site
from attncompile.lift.refusals import failed_check
from attncompile.lift.step import drawn as drawn_block
from attncompile.passes import PassResult
from attncompile.plan.schema import Plan, Refused, SitePlan
from attncompile.report import Measurement, PassOutcome, Report, SiteReport
from attncompile.verify import Certificate, EndToEnd, SiteCertificate


@dataclass(frozen=True)
class Outcome:
    """What became of one site, whatever the target.

    Attributes:
        site: as lifted.
        passes: the outcome of the passes; ``None`` where the original computation stays.
        operator: what computes it now; ``original`` where it stays.
        reason: why.
        rolled_back: it was rewritten, and what was written failed: the original computation was put back.
    """

    site: Site
    passes: PassResult | None
    operator: str
    reason: str
    rolled_back: bool = False

    @property
    def lossy(self) -> bool:
        """Whether the site may now compute something else."""
        return self.passes is not None and self.passes.lossy


def make_plan(
    program: Program,
    target: Literal["onnx", "torch", "pt2"],
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
        rolled_back=outcome.rolled_back,
        applied=result.applied if result else (),
        refused=tuple(Refused(call=call, reason=reason) for call, reason in result.refused) if result else (),
    )


def make_certificate(
    plan: Plan,
    sites: Sequence[SiteCertificate],
    end_to_end: Sequence[EndToEnd],
    files: Mapping[str, str] | None = None,
) -> Certificate:
    """The certificate of a conversion; ``files`` are hashes by name of the files that run."""
    return Certificate(
        schema=1,
        model=plan.model,
        target=plan.target,
        plan=plan.digest(),
        sites=tuple(sites),
        end_to_end=tuple(end_to_end),
        files=dict(files or {}),
    )


def make_report(
    program: Program,
    plan: Plan,
    outcomes: Sequence[Outcome],
    certificate: Certificate,
    changes: Mapping[str, Change],
    measurements: Sequence[Measurement],
    notes: Sequence[str],
) -> Report:
    """The report of a conversion: what was done at each site and why, with the measured errors.

    ``changes`` says by site how far lossy passes moved its output on real operands; a site that is not among them
    is reported on the random inputs of the certificate.
    """
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
        sites=tuple(
            _site_report(outcome, evidence.get(outcome.site.name), changes.get(outcome.site.name))
            for outcome in outcomes
        ),
        measurements=(*errors, *measurements),
        notes=(*program.notes, *notes),
    )


def _site_report(outcome: Outcome, evidence: SiteCertificate | None, change: Change | None) -> SiteReport:
    site, result = outcome.site, outcome.passes
    applied = [PassOutcome(name=call, applied=True) for call in result.applied] if result else []
    refused = [PassOutcome(name=call, applied=False, reason=why) for call, why in result.refused] if result else []
    cases = evidence.cases if evidence else ()
    if change is None:
        drawn = [case.change for case in cases if case.change is not None]
        change = Change(None, max(drawn), "random inputs") if drawn else None
    replaced = outcome.operator != "original"
    return SiteReport(
        name=site.name,
        status=site.status,
        spec=str(site.spec) if site.spec else "",
        spec_after=str(result.spec) if result and replaced else "",
        passes=(*applied, *refused),
        operator=outcome.operator if replaced else "",
        why=outcome.reason,
        rolled_back=outcome.rolled_back,
        max_error=max((case.max_abs for case in cases), default=None),
        relative_error=max((case.max_rel for case in cases), default=None),
        change=change.relative if change else None,
        change_max=change.largest if change else None,
        change_inputs=change.inputs if change else "",
        source=site.source,
        reason=site.refusal.reason if site.refusal else "",
        hint=site.refusal.hint if site.refusal else "",
        nearest=site.nearest,
        check=failed_check(site.refusal) if site.refusal else "",
        block=tuple(drawn_block(site.steps)) if site.steps else (),
    )
