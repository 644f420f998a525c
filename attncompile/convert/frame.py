"""What conversions have in common, whatever the target: open, make, judge, report, write."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from attncompile.convert.artifact import Conversion, NoSiteError, Progress, new_folder, silent
from attncompile.convert.change import Change, Rewrite
from attncompile.convert.comparison import Compared
from attncompile.convert.evidence import Outcome, make_certificate, make_plan, make_report
from attncompile.convert.quality import over_budget
from attncompile.convert.source import write_source
from attncompile.frontends.checkpoint import AttentionImplementation, OpenedModel, open_model
from attncompile.frontends.errors import InputError
from attncompile.lift import Program
from attncompile.passes import PassCall, parse_passes
from attncompile.plan.schema import Plan, SitePlan, save_plan
from attncompile.report import Measurement, write_report
from attncompile.verify import SiteCertificate, save_certificate


@dataclass(frozen=True)
class Options:
    """How to convert; the fields are arguments of :func:`attncompile.convert`.

    Attributes:
        provider: where it will run.
        prefer: how ONNX operators are chosen.
        onnxruntime: the version that operators are chosen for, such as ``1.24``; ``None`` for the installed one.
        passes: what to do at each site, as :func:`attncompile.passes.parse_passes` reads it.
        allow_untrained: allow passes that ruin a model that was not trained for them.
        cache: whether a language model becomes one for prompts and steps, with its cache as inputs and outputs;
            ``None`` does so where it can.
        shared_buffer: whether past and present of a language model's cache are one buffer.
        last_logits: whether a language model gives the logits of each row's last token alone.
        precision: element types of the result, as :func:`attncompile.convert.precision.parse_precision` reads it;
            ``None`` keeps the model's own.
        budget: the largest relative change of an output that lossy passes and a precision may bring; ``None`` takes
            that of the precision.
        text: file of running text to calibrate and judge with.
        attn_implementation: how a Hugging Face folder is loaded; ``None`` lets the target choose.
        allow_pickle: read weights that only exist as pickle.
        overwrite: replace an earlier conversion.
        progress: told each stage as it begins.
    """

    provider: str = "cpu"
    prefer: Literal["fastest", "fused", "decomposed"] = "fastest"
    onnxruntime: str | None = None
    passes: str = "fuse"
    allow_untrained: bool = False
    cache: bool | None = None
    shared_buffer: bool = False
    last_logits: bool = False
    precision: str | None = None
    budget: float | None = None
    text: Path | None = None
    attn_implementation: AttentionImplementation | None = None
    allow_pickle: bool = False
    overwrite: bool = False
    progress: Progress = silent


@dataclass(frozen=True)
class Made:
    """What a target made of a model, with its evidence.

    Attributes:
        program: what was lifted; outcomes: one per site.
        sites: their certificates.
        compared: the whole model against the original.
        changes: how far lossy passes moved each site, by name.
        measurements: sizes and latencies.
        notes: what the reader should know.
        files: hashes by name of the files that run, for the certificate.
        cache, shared: whether its cache is among its inputs and outputs, and in one buffer; last_logits: whether it
            gives the logits of each row's last token alone.
        precision, budget, kept: how it was rounded, by what it is judged, and what was left in float32.
    """

    program: Program
    outcomes: tuple[Outcome, ...]
    sites: tuple[SiteCertificate, ...]
    compared: Compared
    changes: Mapping[str, Change] = field(default_factory=dict)
    measurements: tuple[Measurement, ...] = ()
    notes: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    cache: bool = False
    shared: bool = False
    last_logits: bool = False
    precision: str = ""
    budget: float | None = None
    kept: tuple[str, ...] = ()


Make = Callable[[OpenedModel, tuple[PassCall, ...], Path], Made]
"""Writes a model to a folder: the original, the passes that were asked for, the folder."""


def conversion(
    target: str | Path,
    out: Path,
    options: Options,
    kind: Literal["onnx", "torch", "pt2"],
    attention: AttentionImplementation,
    make: Make,
) -> Conversion:
    """Open a model, let a target make its files, and write them with plan, certificate and report; or nothing.

    Args:
        target: what to open; out: the folder to write.
        options: how.
        kind: of the target.
        attention: how a Hugging Face folder is loaded unless the options say.
        make: the target.

    Raises:
        InputError: when the target cannot be opened, the result does not agree with it, or ``out`` cannot be written.
        ValueError: for passes that cannot be read.
    """
    requested = parse_passes(options.passes)
    attention = options.attn_implementation or attention
    with new_folder(out, overwrite=options.overwrite) as folder:
        options.progress("opening")
        opened = open_model(target, attn_implementation=attention, allow_pickle=options.allow_pickle)
        if opened.kind == "torch":
            opened.model.eval()
        made = make(opened, requested, folder)
        plan = make_plan(made.program, kind, options.provider, options.passes, options.allow_untrained, made.outcomes)
        budget = made.budget if made.budget is not None else _budget(options, made)
        plan = plan.model_copy(update={"precision": made.precision, "budget": budget, "kept": made.kept})
        certificate = make_certificate(plan, made.sites, made.compared.entries, made.files)
        beyond = over_budget(certificate.end_to_end)
        if beyond is not None:
            advice = "nothing was written; allow more with --budget, or ask for less"
            raise InputError(beyond, str(target), advice)
        if not certificate.passed:
            raise disagreement(certificate.failures()[0], target)
        notes = (*made.notes, *made.compared.notes)
        report = make_report(made.program, plan, made.outcomes, certificate, made.changes, made.measurements, notes)
        save_plan(plan, folder / "plan.json")
        save_certificate(certificate, folder / "certificate.json")
        write_report(report, folder)
        write_source(
            target,
            opened,
            attention,
            options.allow_pickle,
            folder,
            cache=made.cache,
            shared=made.shared,
            last_logits=made.last_logits,
            text=options.text,
        )
    return Conversion(out, kind, report, certificate)


def _budget(options: Options, made: Made) -> float | None:
    """The budget that was set, where something lossy was done."""
    return options.budget if any(outcome.lossy for outcome in made.outcomes) else None


def disagreement(said: str, target: str | Path) -> InputError:
    """The error for a result that is not what the original computes."""
    return InputError(
        f"the rewritten model does not agree with the original: {said}",
        str(target),
        "nothing was written; please report this model",
    )


def require_sites(program: Program, target: str | Path) -> None:
    """Raises NoSiteError for a program without attention."""
    if not program.sites:
        raise NoSiteError(str(target))


def lossy_rewrites(outcomes: Sequence[Outcome]) -> list[Rewrite]:
    """The sites that may now compute something else."""
    return [
        Rewrite(outcome.site, outcome.passes.spec)
        for outcome in outcomes
        if outcome.lossy and outcome.passes is not None
    ]


def plan_is_lossy(plan: Plan) -> bool:
    """Whether a plan changed what some site computes."""
    return any(is_lossy(site) for site in plan.sites)


def is_lossy(site: SitePlan) -> bool:
    """Whether a site may compute something else than before."""
    calls = [call for text in site.applied for call in parse_passes(text)]
    return site.operator != "original" and any(call.rewrite.contract != "exact" for call in calls)
