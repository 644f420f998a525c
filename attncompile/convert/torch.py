"""A model as a folder that PyTorch runs: weights, plan, generated kernels, and the evidence."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from attncompile.backend import attncompile
from attncompile.backend.choose import choose_lowering
from attncompile.backend.rewrite import Decision, decide, rewrite
from attncompile.backend.verified import certificates
from attncompile.convert.artifact import Conversion
from attncompile.convert.calibration import Call, text_call
from attncompile.convert.change import Change, changes_in_torch
from attncompile.convert.comparison import DoesNotRunError, Run, Runs, compare_runs, in_float64, outputs_of
from attncompile.convert.evidence import Outcome, make_certificate
from attncompile.convert.frame import Made, Options, conversion, lossy_rewrites, plan_is_lossy, require_sites
from attncompile.convert.kernels import require_kernels, write_kernels
from attncompile.convert.source import read_source, reopen, require_weights
from attncompile.frontends.aten import aten_graph
from attncompile.frontends.capture import Captured, capture_export, exported_program
from attncompile.frontends.checkpoint import OpenedModel, open_model, save_checkpoint
from attncompile.frontends.errors import InputError
from attncompile.frontends.torch_internals import unflatten
from attncompile.lift import Program, lift_graph
from attncompile.passes import PassCall, parse_passes
from attncompile.plan.schema import Plan
from attncompile.verify import Certificate

PROGRAM = "program.pt2"
"""The rewritten graph, for a model that has no configuration to be rebuilt from."""

_TENSORS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
"""PyTorch's switch that makes every `torch.load` refuse what is no tensor, whatever its caller asks for."""


def convert_torch(target: str | Path, out: Path, options: Options) -> Conversion:
    """Write a folder that :func:`load_torch` opens. ``options.prefer`` has no meaning here and must be ``fastest``.

    Raises:
        InputError: when the target is no PyTorch model, no site is found, or ``out`` cannot be written.
        ValueError: for passes that cannot be read.
    """
    if options.prefer != "fastest":
        raise InputError(
            f"prefer={options.prefer!r} chooses among ONNX operators",
            str(target),
            "use --target onnx, or leave it out",
        )

    def make(opened: OpenedModel, requested: tuple[PassCall, ...], folder: Path) -> Made:
        if opened.kind != "torch":
            raise InputError("an ONNX file has no PyTorch form here", opened.path, "use --target onnx")
        return _made(target, opened, requested, folder, options)

    return conversion(target, out, options, "torch", "sdpa", make)


@dataclasses.dataclass(frozen=True)
class _Rewritten:
    """A model's graph, what was lifted from it, what was decided, and the graph after that."""

    captured: Captured
    program: Program
    decisions: tuple[Decision, ...]
    result: Captured


def _rewritten(
    opened: OpenedModel, name: str, requested: tuple[PassCall, ...], allow_untrained: bool, target: str | Path
) -> _Rewritten:
    args, kwargs = opened.example()
    captured = capture_export(opened.model, args, kwargs)
    program = lift_graph(aten_graph(captured), name, (*opened.notes, *captured.notes))
    require_sites(program, target)
    decisions = decide(program, requested, lambda spec: choose_lowering(spec, "cpu"), allow_untrained=allow_untrained)
    module = rewrite(captured.graph_module, program, decisions)
    return _Rewritten(captured, program, decisions, dataclasses.replace(captured, graph_module=module))


def _runs(opened: OpenedModel, captured: Captured, converted: Run) -> Runs:
    return Runs(
        original=lambda call: outputs_of(opened.model(*call.args, **call.kwargs)),
        converted=converted,
        unrewritten=_graph_run(captured),
        exact=in_float64(opened.model),
    )


def _graph_run(captured: Captured) -> Run:
    return lambda call: outputs_of(captured.run(call.args, call.kwargs))


def _made(
    target: str | Path, opened: OpenedModel, requested: tuple[PassCall, ...], folder: Path, options: Options
) -> Made:
    options.progress("finding attention")
    rewritten = _rewritten(opened, opened.name, requested, options.allow_untrained, target)
    options.progress("checking every site")
    sites = certificates(rewritten.decisions)
    options.progress("comparing with the original")
    outcomes = tuple(_outcome(decision) for decision in rewritten.decisions)
    runs = _runs(opened, rewritten.captured, _graph_run(rewritten.result))
    try:
        compared = compare_runs(opened, runs, lossy=any(outcome.lossy for outcome in outcomes))
    except DoesNotRunError as error:
        raise InputError(
            f"the rewritten model does not run: {error}",
            opened.name,
            "nothing was written; please report this model",
        ) from error
    changes, told = _changes(opened, rewritten.captured, outcomes)
    options.progress("writing")
    _write_weights(opened, rewritten.result, folder)
    specs = [d.spec for d in rewritten.decisions if d.spec is not None and d.lowering is not None]
    write_kernels(specs, folder)
    kernels = f"generated kernels in kernels/ run on CUDA devices; on a CPU {_operators(outcomes)} runs"
    return Made(rewritten.program, outcomes, tuple(sites), compared, changes, notes=(kernels, *told))


def _changes(
    opened: OpenedModel, captured: Captured, outcomes: Sequence[Outcome]
) -> tuple[dict[str, Change], list[str]]:
    """How far lossy passes moved each site on running text, and what there is to say about it."""
    rewrites = lossy_rewrites(outcomes)
    text = text_call(opened) if rewrites else None
    if text is not None:
        return changes_in_torch(captured, text, rewrites), []
    said = "the model takes no text, so the change of each site is measured on random inputs only"
    return {}, [said] if rewrites else []


def _operators(outcomes: Sequence[Outcome]) -> str:
    return " and ".join(sorted({outcome.operator for outcome in outcomes}))


def _outcome(decision: Decision) -> Outcome:
    operator = decision.lowering.operator if decision.lowering else "original"
    return Outcome(decision.site, decision.passes, operator, decision.reason)


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
        return unflatten(results, self.captured.output_structure)


def _write_weights(opened: OpenedModel, rewritten: Captured, folder: Path) -> None:
    """A checkpoint where the model can be rebuilt from its configuration; its rewritten graph otherwise."""
    if opened.config is not None and opened.path.is_dir():
        save_checkpoint(opened.model, folder, tokenizer_from=opened.path)
        return
    args, kwargs = opened.example()
    with torch.no_grad():
        program, _ = exported_program(_Program(rewritten).eval(), args, kwargs)
    torch.export.save(program, folder / PROGRAM)


def load_torch(folder: Path, plan: Plan, *, rest: str = "eager", device: str | None = None) -> torch.nn.Module:
    """Open what :func:`convert_torch` wrote. Kernels are generated again; those in the folder are only compared.

    Args:
        folder: the folder; plan: its plan.
        rest: what compiles everything but attention: ``eager`` or ``inductor``.
        device: where to put the model; stays on the CPU when ``None``.

    Returns:
        The model. Its ``forward`` is compiled with the plan's passes; ``generate`` and everything else is its own.

    Raises:
        InputError: when the folder cannot be opened, or a kernel in it is not what would run.
    """
    require_kernels(plan, folder)
    if (folder / PROGRAM).is_file():
        return _load_program(folder / PROGRAM)
    model = open_model(folder, attn_implementation="sdpa").model.eval()
    if device is not None:
        model = model.to(device)
    options: dict[str, Any] = {"rest": rest, "passes": plan.passes, "allow_untrained": plan.allow_untrained}
    model.forward = torch.compile(model.forward, backend=attncompile, dynamic=True, options=options)
    return model


def verify_torch(folder: Path, plan: Plan, shift: int, *, allow_pickle: bool = False) -> Certificate:
    """The certificate of a folder, computed again on other inputs than the conversion saw.

    A checkpoint is its own original, and its weights are compared with those that were converted by their hash. A
    saved program is compared with the model that it was made from, which is opened again.

    Raises:
        InputError: when the folder cannot be opened, or the original is no longer there or has changed.
    """
    require_kernels(plan, folder)
    saved = (folder / PROGRAM).is_file()
    if saved:
        opened = reopen(folder, allow_pickle=allow_pickle)
    else:
        opened = open_model(folder, attn_implementation="sdpa")
        opened.model.eval()
        require_weights(read_source(folder), opened, folder)
    rewritten = _rewritten(opened, plan.model, parse_passes(plan.passes), plan.allow_untrained, folder)
    _require_plan(plan, rewritten.decisions, folder)
    converted = _program_run(folder / PROGRAM) if saved else _graph_run(rewritten.result)
    runs = _runs(opened, rewritten.captured, converted)
    try:
        compared = compare_runs(opened, runs, lossy=plan_is_lossy(plan), shift=shift)
    except DoesNotRunError as error:
        raise InputError(f"the model does not run: {error}", folder, "convert the model again") from error
    return make_certificate(plan, certificates(rewritten.decisions), compared.entries)


def _load_program(file: Path) -> torch.nn.Module:
    """A saved program. PyTorch's reader would fall back to unpickling anything; here it may only read tensors.

    Raises:
        InputError: when the file is damaged, or holds more than tensors.
    """
    before = os.environ.get(_TENSORS_ONLY)
    os.environ[_TENSORS_ONLY] = "1"
    try:
        return torch.export.load(file).module()
    except Exception as error:
        reason = f"this program is damaged or holds more than tensors ({type(error).__name__})"
        raise InputError(reason, file, "convert the model again") from error
    finally:
        if before is None:
            del os.environ[_TENSORS_ONLY]
        else:
            os.environ[_TENSORS_ONLY] = before


def _program_run(file: Path) -> Run:
    """A saved program."""
    module = _load_program(file)

    def run(call: Call) -> dict[str, torch.Tensor]:
        return outputs_of(module(*call.args, **call.kwargs))

    return run


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
