"""A model as a folder that PyTorch runs: weights, plan, generated kernels, and the evidence."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from attncompile.backend import attncompile
from attncompile.backend.choose import choose_lowering
from attncompile.backend.rewrite import Decision, decide, rewrite
from attncompile.codegen.triton import generate
from attncompile.codegen.triton.structure import why_not_spec
from attncompile.convert.artifact import Conversion, NoSiteError, Progress, new_folder, silent
from attncompile.convert.calibration import calls, text_call
from attncompile.convert.evidence import (
    Outcome,
    distances,
    in_float64,
    make_certificate,
    make_plan,
    make_report,
    on_text,
    outputs_of,
    run_exact,
)
from attncompile.frontends.aten import aten_graph
from attncompile.frontends.capture import Captured, capture_export, exported_program
from attncompile.frontends.checkpoint import AttentionImplementation, OpenedModel, open_model, save_checkpoint
from attncompile.frontends.errors import InputError
from attncompile.lift import lift_graph
from attncompile.passes import parse_passes
from attncompile.plan.schema import Plan, load_plan, save_plan
from attncompile.report import write_report
from attncompile.verify import (
    Certificate,
    EndToEnd,
    SiteCertificate,
    check_site,
    refused_site,
    save_certificate,
)

PROGRAM = "program.pt2"
"""The rewritten graph, for a model that has no configuration to be rebuilt from."""


def convert_torch(
    target: str | Path,
    out: Path,
    *,
    provider: str = "cpu",
    prefer: str = "fastest",
    passes: str = "fuse",
    allow_untrained: bool = False,
    attn_implementation: AttentionImplementation | None = None,
    allow_pickle: bool = False,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Conversion:
    """Write a folder that :func:`load_torch` opens.

    The arguments are those of :func:`attncompile.convert`. ``prefer`` has no meaning here and must be ``fastest``.

    Raises:
        InputError: when the target is no PyTorch model, no site is found, or ``out`` cannot be written.
        ValueError: for passes that cannot be read.
    """
    requested = parse_passes(passes)
    if prefer != "fastest":
        raise InputError(
            f"prefer={prefer!r} chooses among ONNX operators",
            str(target),
            "use --target onnx, or leave it out",
        )
    with new_folder(out, overwrite=overwrite) as folder:
        progress("opening")
        opened = open_model(
            target, attn_implementation=attn_implementation or "sdpa", allow_pickle=allow_pickle
        )
        if opened.kind != "torch":
            raise InputError("an ONNX file has no PyTorch form here", opened.path, "use --target onnx")
        opened.model.eval()
        progress("capturing the graph")
        args, kwargs = opened.example()
        captured = capture_export(opened.model, args, kwargs)
        progress("finding attention")
        program = lift_graph(aten_graph(captured), opened.name, (*opened.notes, *captured.notes))
        if not program.sites:
            raise NoSiteError(str(target))
        decisions = decide(
            program, requested, lambda spec: choose_lowering(spec, "cpu"), allow_untrained=allow_untrained
        )
        progress("checking every site")
        sites = _site_certificates(decisions)
        rewritten = dataclasses.replace(
            captured, graph_module=rewrite(captured.graph_module, program, decisions)
        )
        progress("comparing with the original")
        outcomes = [_outcome(decision) for decision in decisions]
        end_to_end = _compare(opened, captured, rewritten, any(outcome.lossy for outcome in outcomes))
        progress("writing")
        plan = make_plan(program, "torch", provider, passes, allow_untrained, outcomes)
        certificate = make_certificate(plan, sites, end_to_end)
        if not certificate.passed:
            raise InputError(
                f"the rewritten model does not agree with the original: {certificate.failures()[0]}",
                str(target),
                "nothing was written; please report this model",
            )
        notes = [f"generated kernels in kernels/ run on CUDA devices; on a CPU {_operators(outcomes)} runs"]
        report = make_report(program, plan, outcomes, certificate, (), notes)
        _write_weights(opened, rewritten, folder)
        _write_kernels(decisions, folder / "kernels")
        save_plan(plan, folder / "plan.json")
        save_certificate(certificate, folder / "certificate.json")
        write_report(report, folder)
    return Conversion(out, "torch", report, certificate)


def _operators(outcomes: list[Outcome]) -> str:
    return " and ".join(sorted({outcome.operator for outcome in outcomes}))


def _outcome(decision: Decision) -> Outcome:
    operator = decision.lowering.operator if decision.lowering else "original"
    return Outcome(decision.site, decision.passes, operator, decision.reason)


def _site_certificates(decisions: tuple[Decision, ...]) -> list[SiteCertificate]:
    """One entry per site; equal Specs are run once."""
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
                original=decision.site.spec if lossy else None,
            )
        made.append(known[key].model_copy(update={"site": decision.site.name, "spec": str(spec)}))
    return made


def _compare(opened: OpenedModel, captured: Captured, rewritten: Captured, lossy: bool) -> list[EndToEnd]:
    """Original and rewritten graph on fresh calls and on running text."""
    found: list[EndToEnd] = []
    wide = in_float64(opened.model)
    with torch.no_grad():
        for call in calls(opened):
            try:
                before = outputs_of(opened.model(*call.args, **call.kwargs))
                after = outputs_of(rewritten.run(call.args, call.kwargs))
            except (ValueError, RuntimeError) as error:
                if found:
                    continue  # sizes that the captured graph has fixed
                raise InputError(
                    f"the rewritten model does not run: {str(error).splitlines()[0]}",
                    opened.name,
                    "nothing was written; please report this model",
                ) from error
            found += distances(call, before, after, run_exact(wide, call), judged=not lossy)
        text = text_call(opened)
        if text is not None and lossy:
            found += on_text(
                text,
                outputs_of(opened.model(*text.args, **text.kwargs)),
                outputs_of(rewritten.run(text.args, text.kwargs)),
            )
    return found


class _Program(torch.nn.Module):
    """A captured graph as a module: what it was given as values are its buffers."""

    def __init__(self, captured: Captured) -> None:
        super().__init__()
        self.graph_module, self.captured = captured.graph_module, captured
        self.names: list[str | None] = []
        for number, entry in enumerate(captured.inputs):
            held = entry.role != "user" and isinstance(entry.value, torch.Tensor)
            self.names.append(f"value_{number}" if held else None)
            if held:
                self.register_buffer(f"value_{number}", entry.value.detach())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        flat = self.captured.flat_inputs(args, kwargs)
        flat = [getattr(self, name) if name else value for name, value in zip(self.names, flat, strict=True)]
        results = self.graph_module(*flat)
        return torch.utils._pytree.tree_unflatten(list(results), self.captured.output_structure)


def _write_weights(opened: OpenedModel, rewritten: Captured, folder: Path) -> None:
    """A checkpoint where the model can be rebuilt from its configuration; its rewritten graph otherwise."""
    if opened.config is not None and opened.path.is_dir():
        save_checkpoint(opened.model, folder, tokenizer_from=opened.path)
        return
    args, kwargs = opened.example()
    with torch.no_grad():
        program, _ = exported_program(_Program(rewritten).eval(), args, kwargs)
    torch.export.save(program, folder / PROGRAM)


def _write_kernels(decisions: tuple[Decision, ...], folder: Path) -> None:
    """One generated Triton module for each Spec that has one, named by the Spec's fingerprint."""
    folder.mkdir()
    for spec in {
        d.spec.fingerprint(): d.spec for d in decisions if d.spec is not None and d.lowering is not None
    }.values():
        if why_not_spec(spec) is None:
            (folder / f"attend_{spec.fingerprint()}.py").write_text(generate(spec).source, encoding="utf-8")


def load_torch(
    folder: Path, plan: Plan, *, rest: str = "eager", device: str | None = None
) -> torch.nn.Module:
    """Open what :func:`convert_torch` wrote.

    Args:
        folder: the folder; plan: its plan.
        rest: what compiles everything but attention: ``eager`` or ``inductor``.
        device: where to put the model; stays on the CPU when ``None``.

    Returns:
        The model. Its ``forward`` is compiled with the plan's passes; ``generate`` and everything else is its own.
    """
    if (folder / PROGRAM).is_file():
        return torch.export.load(folder / PROGRAM).module()
    model = open_model(folder, attn_implementation="sdpa").model.eval()
    if device is not None:
        model = model.to(device)
    options: dict[str, Any] = {"rest": rest, "passes": plan.passes, "allow_untrained": plan.allow_untrained}
    model.forward = torch.compile(model.forward, backend=attncompile, dynamic=True, options=options)
    return model


def verify_torch(folder: Path, plan: Plan, shift: int) -> Certificate:
    """The certificate of a folder, computed again on other inputs than the conversion saw.

    Raises:
        InputError: when the folder cannot be opened.
    """
    if (folder / PROGRAM).is_file():
        raise InputError(
            "a saved program has no original beside it to compare with",
            folder,
            "verify the conversion of a checkpoint folder",
        )
    opened = open_model(folder, attn_implementation="sdpa")
    opened.model.eval()
    args, kwargs = opened.example()
    captured = capture_export(opened.model, args, kwargs)
    program = lift_graph(aten_graph(captured), plan.model, captured.notes)
    decisions = decide(
        program,
        parse_passes(plan.passes),
        lambda spec: choose_lowering(spec, "cpu"),
        allow_untrained=plan.allow_untrained,
    )
    _require_plan(plan, decisions, folder)
    rewritten = dataclasses.replace(captured, graph_module=rewrite(captured.graph_module, program, decisions))
    lossy = any(decision.passes is not None and decision.passes.lossy for decision in decisions)
    found: list[EndToEnd] = []
    wide = in_float64(opened.model)
    with torch.no_grad():
        for call in calls(opened, shift):
            found += distances(
                call,
                outputs_of(opened.model(*call.args, **call.kwargs)),
                outputs_of(rewritten.run(call.args, call.kwargs)),
                run_exact(wide, call),
                judged=not lossy,
            )
    return make_certificate(plan, _site_certificates(decisions), found)


def _require_plan(plan: Plan, decisions: tuple[Decision, ...], folder: Path) -> None:
    """Raises InputError when the checkpoint's attention is not what the plan was made for."""
    found = {d.site.name: d.site.spec.fingerprint() if d.site.spec else "" for d in decisions}
    planned = {site.site: site.fingerprint for site in plan.sites}
    if found != planned:
        names = sorted(set(found) ^ set(planned)) or [n for n in planned if planned[n] != found[n]]
        raise InputError(
            f"the plan does not fit the checkpoint beside it: the site {names[0]} differs",
            folder,
            "convert the model again",
        )


__all__ = ["convert_torch", "load_plan", "load_torch", "verify_torch"]
