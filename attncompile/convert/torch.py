"""A model as a folder that PyTorch runs: weights, plan, generated kernels, and the evidence."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from attncompile.backend import attncompile
from attncompile.backend.choose import choose_lowering
from attncompile.backend.verified import certificates
from attncompile.codegen.lowering import Lowering
from attncompile.convert.artifact import Conversion
from attncompile.convert.comparison import DoesNotRunError, compare_runs
from attncompile.convert.evidence import make_certificate
from attncompile.convert.frame import Made, Options, conversion, plan_is_lossy
from attncompile.convert.kernels import require_kernels, write_kernels
from attncompile.convert.program import (
    CapturedModule,
    graph_run,
    module_run,
    operators_of,
    parameter_names,
    require_no_onnx_options,
    require_plan,
    rewritten,
    runs_of,
    text_changes,
)
from attncompile.convert.source import read_source, reopen, require_weights
from attncompile.frontends.capture import Captured, exported_program
from attncompile.frontends.checkpoint import OpenedModel, open_model, save_checkpoint
from attncompile.frontends.errors import InputError
from attncompile.ir import Spec
from attncompile.passes import PassCall, parse_passes
from attncompile.plan.schema import Plan
from attncompile.verify import Certificate

PROGRAM = "program.pt2"
"""The rewritten graph, for a model that has no configuration to be rebuilt from."""

_TENSORS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
"""PyTorch's switch that makes every `torch.load` refuse what is no tensor, whatever its caller asks for."""


def convert_torch(target: str | Path, out: Path, options: Options) -> Conversion:
    """Write a folder that :func:`load_torch` opens.

    ``options.prefer``, ``options.onnxruntime`` and ``options.cache`` have no meaning here; they must be ``fastest``,
    ``None`` and not ``True``.

    Raises:
        InputError: when the target is no PyTorch model, no site is found, or ``out`` cannot be written.
        ValueError: for passes that cannot be read.
    """
    require_no_onnx_options(target, options)

    def make(opened: OpenedModel, requested: tuple[PassCall, ...], folder: Path) -> Made:
        if opened.kind != "torch":
            raise InputError("an ONNX file has no PyTorch form here", opened.path, "use --target onnx")
        return _made(target, opened, requested, folder, options)

    return conversion(target, out, options, "torch", "sdpa", make)


def _made(
    target: str | Path, opened: OpenedModel, requested: tuple[PassCall, ...], folder: Path, options: Options
) -> Made:
    options.progress("finding attention")
    made = rewritten(opened, opened.name, requested, options.allow_untrained, target, _on_cpu)
    options.progress("checking every site")
    sites = certificates(made.decisions)
    options.progress("comparing with the original")
    outcomes = made.outcomes
    runs = runs_of(opened, made.captured, graph_run(made.result))
    try:
        compared = compare_runs(
            opened, runs, lossy=any(outcome.lossy for outcome in outcomes), budget=options.budget
        )
    except DoesNotRunError as error:
        raise InputError(
            f"the rewritten model does not run: {error}",
            opened.name,
            "nothing was written; please report this model",
        ) from error
    changes, told = text_changes(opened, made.captured, outcomes)
    options.progress("writing")
    fixed = _write_weights(opened, made.result, folder)
    specs = [d.spec for d in made.decisions if d.spec is not None and d.lowering is not None]
    write_kernels(specs, folder)
    kernels = f"generated kernels in kernels/ run on CUDA devices; on a CPU {operators_of(outcomes)} runs"
    return Made(made.program, outcomes, tuple(sites), compared, changes, notes=(kernels, *fixed, *told))


def _on_cpu(spec: Spec) -> Lowering:
    return choose_lowering(spec, "cpu")


def _write_weights(opened: OpenedModel, rewritten: Captured, folder: Path) -> tuple[str, ...]:
    """A checkpoint where the model can be rebuilt from its configuration; its rewritten graph otherwise, and what there
    is to say about that: sizes that it fixes.
    """
    if opened.config is not None and opened.path.is_dir():
        save_checkpoint(opened.model, folder, tokenizer_from=opened.path)
        return ()
    args, kwargs = opened.example()
    with torch.no_grad():
        names = parameter_names(opened.model, len(args))
        program, notes = exported_program(CapturedModule(rewritten, names).eval(), args, kwargs)
    torch.export.save(program, folder / PROGRAM)
    return notes


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
    made = rewritten(opened, plan.model, parse_passes(plan.passes), plan.allow_untrained, folder, _on_cpu)
    require_plan(plan, made.decisions, folder)
    converted = module_run(_load_program(folder / PROGRAM)) if saved else graph_run(made.result)
    runs = runs_of(opened, made.captured, converted)
    try:
        compared = compare_runs(opened, runs, lossy=plan_is_lossy(plan), shift=shift, budget=plan.budget)
    except DoesNotRunError as error:
        raise InputError(f"the model does not run: {error}", folder, "convert the model again") from error
    return make_certificate(plan, certificates(made.decisions), compared.entries)


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

