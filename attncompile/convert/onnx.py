"""A model as an ONNX file with rewritten attention: exported, lifted, lowered, loaded, compared."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import onnxruntime
import torch

from attncompile.codegen.onnx.capabilities import Provider
from attncompile.codegen.onnx.choose import Choice, Prefer, choose, row_named
from attncompile.codegen.onnx.emit import emit
from attncompile.codegen.onnx.expressions import Scopes
from attncompile.codegen.onnx.layouts import Operand, single_groups
from attncompile.codegen.onnx.quantize import quantize_projections
from attncompile.codegen.onnx.tidy import raise_opset, tidy
from attncompile.codegen.onnx.values import NUMPY_TYPES, Builder, redirect
from attncompile.convert.artifact import Conversion, NoSiteError, Progress, new_folder, silent
from attncompile.convert.calibration import Call, calls, text_call
from attncompile.convert.evidence import (
    Outcome,
    Outputs,
    distances,
    in_float64,
    make_certificate,
    make_plan,
    make_report,
    on_text,
    outputs_of,
    run_exact,
)
from attncompile.convert.export import export_onnx
from attncompile.frontends.checkpoint import AttentionImplementation, OpenedModel, open_model
from attncompile.frontends.errors import InputError
from attncompile.frontends.onnx import onnx_graph
from attncompile.frontends.onnx_bodies import nested_values
from attncompile.frontends.torch_internals import flatten
from attncompile.ir import RefusalError, Spec, parse_spec
from attncompile.lift import Program, lift_graph
from attncompile.passes import PassCall, parse_passes, run_passes
from attncompile.plan.schema import Plan, SitePlan, save_plan
from attncompile.report import Measurement, write_report
from attncompile.verify import (
    DRAWS,
    Certificate,
    Draw,
    EndToEnd,
    SiteCertificate,
    check_site,
    refused_site,
    save_certificate,
)

MODEL = "model.onnx"
SOURCE = "source.json"
"""What was converted, so that `attncompile verify` can compare again while it is still there."""

LARGEST_FILE = 1_900_000_000
"""Bytes of weights beyond which they go into a file beside the model: a protobuf holds two gigabytes."""

PROVIDERS: Mapping[str, tuple[str, ...]] = {
    "cpu": ("CPUExecutionProvider",),
    "cuda": ("CUDAExecutionProvider", "CPUExecutionProvider"),
}
COPIED = (
    "config.json",
    "tokenizer*",
    "vocab*",
    "merges*",
    "special_tokens_map.json",
    "preprocessor_config.json",
    "generation_config.json",
    "1_Pooling",
    "modules.json",
    "sentence_bert_config.json",
)
"""Files of a checkpoint that a user of the ONNX model still needs."""


@dataclass(frozen=True)
class _Rewritten:
    """A model after its sites were replaced.

    Attributes:
        model: the ONNX model; outcomes: one per site; choices: the operator rows of replaced sites by name.
        notes: what else was rewritten.
    """

    model: onnx_ir.Model
    program: Program
    outcomes: tuple[Outcome, ...]
    choices: Mapping[str, Choice]
    notes: tuple[str, ...]


def convert_onnx(
    target: str | Path,
    out: Path,
    *,
    provider: Provider = "cpu",
    prefer: Prefer = "fastest",
    passes: str = "fuse",
    allow_untrained: bool = False,
    attn_implementation: AttentionImplementation | None = None,
    allow_pickle: bool = False,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Conversion:
    """Write a folder with ``model.onnx``, its plan and its evidence.

    The arguments are those of :func:`attncompile.convert`. The result is loaded and compared with the original before
    it is written. When it does not agree, the plain decomposition is tried, and the site is reported.

    Raises:
        InputError: when the target cannot be opened or exported, no site is found, or ``out`` cannot be written.
        ValueError: for passes that cannot be read.
    """
    requested = parse_passes(passes)
    with new_folder(out, overwrite=overwrite) as folder:
        progress("opening")
        opened = open_model(
            target, attn_implementation=attn_implementation or "eager", allow_pickle=allow_pickle
        )
        source, notes = _source(opened, progress)
        onnx_ir.save(source, folder / "before.onnx", **_external(source, "before.onnx"))
        original = _Original(opened, folder / "before.onnx")
        lossy_projections = _quantizes_projections(requested)
        tried: list[str] = []
        for preference in dict.fromkeys((prefer, "decomposed")):
            progress("finding attention")
            model = onnx_ir.load(folder / "before.onnx")
            rewritten = _rewrite(model, opened.name, requested, provider, preference, allow_untrained, notes)
            if not rewritten.program.sites:
                raise NoSiteError(str(target))
            progress("writing the model")
            written = _write_model(rewritten.model, folder, lossy_projections)
            progress("comparing with the original")
            lossy = lossy_projections or any(outcome.lossy for outcome in rewritten.outcomes)
            end_to_end, problem = _compare(original, folder / MODEL, provider, lossy)
            if problem is None:
                break
            tried.append(f"with prefer={preference} the result did not agree and was dropped: {problem}")
        else:
            raise InputError(
                f"the rewritten model does not agree with the original: {problem}",
                str(target),
                "nothing was written; please report this model",
            )
        progress("checking every site")
        sites = _site_certificates(rewritten, provider)
        plan = make_plan(rewritten.program, "onnx", provider, passes, allow_untrained, rewritten.outcomes)
        certificate = make_certificate(plan, sites, end_to_end)
        if not certificate.passed:
            raise InputError(
                f"a site does not compute its Spec: {certificate.failures()[0]}",
                str(target),
                "nothing was written; please report this model",
            )
        progress("measuring")
        measurements = _measure(original, folder, provider)
        report = make_report(
            rewritten.program,
            plan,
            rewritten.outcomes,
            certificate,
            measurements,
            (*rewritten.notes, *written, *tried, *_slower(measurements)),
        )
        save_plan(plan, folder / "plan.json")
        save_certificate(certificate, folder / "certificate.json")
        write_report(report, folder)
        (folder / SOURCE).write_text(
            json.dumps(_source_record(target, opened, attn_implementation), indent=2) + "\n"
        )
        _copy_companions(opened, folder)
        for leftover in folder.glob("before.onnx*"):
            leftover.unlink()
    return Conversion(out, "onnx", report, certificate)


def _source(opened: OpenedModel, progress: Progress) -> tuple[onnx_ir.Model, tuple[str, ...]]:
    """The ONNX model to start from."""
    if opened.kind == "onnx":
        return onnx_ir.load(opened.path), opened.notes
    progress("exporting to ONNX")
    opened.model.eval()
    model, notes = export_onnx(opened)
    return model, (*opened.notes, *notes)


def _source_record(target: str | Path, opened: OpenedModel, attention: str | None) -> dict[str, str]:
    return {
        "target": str(Path(target).resolve() if ":" not in str(target) else target),
        "kind": opened.kind,
        "attn_implementation": attention or "eager",
    }


def _external(model: onnx_ir.Model, name: str) -> dict[str, Any]:
    size = sum(
        value.const_value.nbytes
        for value in model.graph.initializers.values()
        if value.const_value is not None
    )
    return {"external_data": f"{name}.data"} if size > LARGEST_FILE else {}


def _quantizes_projections(requested: Sequence[PassCall]) -> bool:
    return any(
        call.rewrite.name == "quantize.int8" and getattr(call.options, "projections", False)
        for call in requested
    )


def _rewrite(
    model: onnx_ir.Model,
    name: str,
    requested: Sequence[PassCall],
    provider: Provider,
    prefer: Prefer,
    allow_untrained: bool,
    notes: tuple[str, ...],
) -> _Rewritten:
    """Lift the model, replace every site in place, and tidy what is around them."""
    raised = raise_opset(model)
    program = lift_graph(onnx_graph(model), name, notes)
    # ONNX Runtime has no score product in INT8; that pass is the quantiser's, on the projections
    calls_of_sites = tuple(call for call in requested if call.rewrite.name != "quantize.int8")
    values = {value.name: value for value in nested_values(model.graph)}
    scopes = Scopes(model.graph)
    outcomes: list[Outcome] = []
    choices: dict[str, Choice] = {}
    for site in program.sites:
        if site.status != "lifted" or site.spec is None or site.region is None:
            outcomes.append(Outcome(site, None, "original", str(site.refusal)))
            continue
        result = run_passes(site.spec, calls_of_sites, allow_untrained=allow_untrained)
        try:
            (binding,) = site.region.outputs
            assert binding.layout is not None
            old = values[binding.value]
            place = old.producer()
            assert place is not None
            opset, inside = model.opset_imports.get("", 0), scopes.is_body(place)
            choice = choose(result.spec, provider, prefer, opset=opset, switch=not inside)
            if place.op_type == choice.row.operator and not result.lossy:
                reason = f"it is {place.op_type} already: {choice.reason}"
                outcomes.append(Outcome(site, None, "original", reason))
                continue
            if prefer == "fastest" and choice.row.operator == "decomposition" and not result.lossy:
                outcomes.append(
                    Outcome(
                        site, None, "original", f"already plain operators, which win here: {choice.reason}"
                    )
                )
                continue
            build = Builder(model.graph, site.name)
            operands = {
                entry.name: Operand(
                    values[entry.value],
                    entry.layout.groups
                    if entry.layout
                    else single_groups(axis.name for axis in result.spec.types()[entry.name].axes),
                )
                for entry in site.region.inputs
            }
            made = emit(
                result.spec,
                operands,
                {binding.name: binding.layout.groups},
                choice.row,
                build,
                scopes.at(place),
                provider,
            )
        except RefusalError as error:
            outcomes.append(Outcome(site, None, "original", str(error.refusal)))
            continue
        for node in build.nodes:
            node.metadata_props["attncompile.site"] = site.name
            node.metadata_props["attncompile.spec"] = str(result.spec)
        build.insert_before(place)
        redirect(old, made[binding.name])
        outcomes.append(Outcome(site, result, choice.row.operator, choice.reason))
        choices[site.name] = choice
    done = tidy(model, provider)
    told = [f"around attention: {done}"]
    if not raised:
        told.append(
            f"the model stays at opset {model.opset_imports.get('', 0)}, because not all its nodes have a newer form"
        )
    return _Rewritten(model, program, tuple(outcomes), choices, tuple(told))


def _write_model(model: onnx_ir.Model, folder: Path, quantize: bool) -> tuple[str, ...]:
    for stale in folder.glob(f"{MODEL}*"):
        stale.unlink()
    if not quantize:
        onnx_ir.save(model, folder / MODEL, **_external(model, MODEL))
        return ()
    onnx_ir.save(model, folder / "float.onnx", **_external(model, "float.onnx"))
    count = quantize_projections(folder / "float.onnx", folder / MODEL)
    for stale in folder.glob("float.onnx*"):
        stale.unlink()
    return (
        f"{count} projections multiply in INT8 (ONNX Runtime's dynamic quantiser); attention products stay in float",
    )


def session(path: Path, provider: str, threads: int | None = None) -> onnxruntime.InferenceSession:
    """A session on the provider.

    Raises:
        InputError: when the provider is not installed, or ONNX Runtime cannot load the file.
    """
    wanted = PROVIDERS[provider]
    if wanted[0] not in onnxruntime.get_available_providers():
        raise InputError(
            f"{wanted[0]} is not among the providers of the installed ONNX Runtime",
            path,
            "install onnxruntime-gpu, or use --provider cpu",
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=list(wanted))
    except Exception as error:
        raise InputError(
            f"ONNX Runtime cannot load it: {str(error).splitlines()[0]}", path, "please report this"
        ) from error


def feeds(loaded: onnxruntime.InferenceSession, call: Call) -> dict[str, np.ndarray]:
    """The arguments of a call as an ONNX model takes them: by name where names agree, else by order."""
    tensors = {name: value for name, value in call.kwargs.items() if isinstance(value, torch.Tensor)}
    leaves = [leaf for leaf in flatten((call.args, dict(call.kwargs)))[0] if isinstance(leaf, torch.Tensor)]
    wanted = [entry.name for entry in loaded.get_inputs()]
    by_name = all(name in tensors for name in wanted)
    return {
        name: (tensors[name] if by_name else leaf).detach().cpu().numpy()
        for name, leaf in zip(wanted, leaves if not by_name else wanted, strict=False)
    }


def run(loaded: onnxruntime.InferenceSession, call: Call) -> dict[str, torch.Tensor]:
    """The float outputs of a model in ONNX Runtime, by name."""
    results = loaded.run(None, feeds(loaded, call))
    named = {
        entry.name: torch.from_numpy(array)
        for entry, array in zip(loaded.get_outputs(), results, strict=True)
        if isinstance(array, np.ndarray)
    }
    return {name: tensor for name, tensor in named.items() if tensor.is_floating_point()}


@dataclass(frozen=True)
class _Original:
    """The model before: PyTorch's where there is one, otherwise the file."""

    opened: OpenedModel
    file: Path

    def __call__(self, call: Call) -> Outputs:
        if self.opened.kind == "onnx":
            return run(session(self.file, "cpu"), call)
        with torch.no_grad():
            return outputs_of(self.opened.model(*call.args, **call.kwargs))

    def exact(self, call: Call) -> Outputs | None:
        """The outputs in float64; ``None`` for a file, which has one precision."""
        return run_exact(self._wide, call) if self.opened.kind == "torch" else None

    @cached_property
    def _wide(self) -> torch.nn.Module:
        return in_float64(self.opened.model)


def _compare(
    original: _Original, file: Path, provider: str, lossy: bool, shift: int = 0
) -> tuple[list[EndToEnd], str | None]:
    """The evidence, and what is wrong with it."""
    found: list[EndToEnd] = []
    loaded = session(file, provider)
    for call in calls(original.opened, shift):
        try:
            found += distances(
                call, original(call), run(loaded, call), original.exact(call), judged=not lossy
            )
        except (ValueError, RuntimeError, onnxruntime.capi.onnxruntime_pybind11_state.Fail) as error:
            return found, f"on {call.what}: {str(error).splitlines()[0]}"
    text = text_call(original.opened) if original.opened.kind == "torch" else None
    if text is not None and lossy:
        found += on_text(text, original(text), run(loaded, text))
    failed = [entry for entry in found if not entry.passed]
    if failed:
        return found, f"{failed[0].metric} is {failed[0].after:.3g} on {failed[0].inputs}"
    return found, None


def _site_certificates(rewritten: _Rewritten, provider: Provider) -> list[SiteCertificate]:
    """One entry per site, each distinct Spec run once as a model of its own."""
    known: dict[tuple[str, str], SiteCertificate] = {}
    made = []
    for outcome in rewritten.outcomes:
        name, result = outcome.site.name, outcome.passes
        if result is None or name not in rewritten.choices:
            made.append(refused_site(name, outcome.reason, outcome.site.spec))
            continue
        choice = rewritten.choices[name]
        key = (result.spec.fingerprint(), choice.row.operator)
        if key not in known:
            known[key] = check_site(
                name,
                result.spec,
                _site_runner(result.spec, choice, provider),
                operator=choice.row.operator,
                original=outcome.site.spec if result.lossy else None,
                draws=(*DRAWS, LONG),
            )
        made.append(known[key].model_copy(update={"site": name, "spec": str(result.spec)}))
    return made


def _site_runner(spec: Spec, choice: Choice, provider: Provider) -> Any:
    """A site alone, as a model in ONNX Runtime."""
    graph = onnx_ir.Graph([], [], nodes=[], opset_imports={"": 23, "com.microsoft": 1}, name="site")
    operands: dict[str, Operand] = {}
    for value in spec.inputs:
        groups = single_groups(axis.name for axis in value.type.axes)
        known = onnx_ir.Value(
            name=value.name,
            type=onnx_ir.TensorType(NUMPY_TYPES[value.type.dtype]),
            shape=onnx_ir.Shape([None] * len(groups)),
        )
        graph.inputs.append(known)
        operands[value.name] = Operand(known, groups)
    build = Builder(graph, "site")
    made = emit(spec, operands, {}, choice.row, build, {}, provider)
    graph.extend(build.nodes)
    for name in spec.outputs:
        made[name].dtype = onnx_ir.DataType.FLOAT
        graph.outputs.append(made[name])
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    loaded = onnxruntime.InferenceSession(
        onnx_ir.to_proto(onnx_ir.Model(graph, ir_version=10)).SerializeToString(),
        options,
        providers=list(PROVIDERS[provider]),
    )
    wanted = {entry.name for entry in loaded.get_inputs()}

    def computed(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        fed = {v.name: t.numpy() for v, t in zip(spec.inputs, tensors, strict=True) if v.name in wanted}
        return tuple(torch.from_numpy(array) for array in loaded.run(None, fed))

    return computed


LONG = Draw(760, "random", 5)
"""One more random input for sites: above the length at which a chosen operator may give way to another."""

ROUNDS = 7
"""Interleaved repetitions of a latency; the median is reported."""


def _measure(original: _Original, folder: Path, provider: str) -> list[Measurement]:
    """Size and latency before and after, in one interleaved run of ONNX Runtime on this machine."""
    sizes = [
        sum(path.stat().st_size for path in folder.glob(f"{name}*")) / 1e6 for name in ("before.onnx", MODEL)
    ]
    found = [Measurement(name="size", before=sizes[0], after=sizes[1], unit="MB", note="weights included")]
    before, after = session(folder / "before.onnx", provider), session(folder / MODEL, provider)
    for call in calls(original.opened)[-1:]:
        pairs = [(loaded, feeds(loaded, call)) for loaded in (before, after)]
        times: list[list[float]] = [[], []]
        for _ in range(3):
            for loaded, fed in pairs:
                loaded.run(None, fed)
        for _ in range(ROUNDS):
            for record, (loaded, fed) in zip(times, pairs, strict=True):
                start = time.perf_counter()
                loaded.run(None, fed)
                record.append(1e3 * (time.perf_counter() - start))
        medians = [float(np.median(record)) for record in times]
        found.append(
            Measurement(
                name=f"latency, {call.what}",
                before=medians[0],
                after=medians[1],
                unit="ms",
                note="median of interleaved runs; before is torch's own export"
                if original.opened.kind == "torch"
                else "median of interleaved runs",
            )
        )
    return found


def _slower(measurements: Sequence[Measurement]) -> list[str]:
    return [
        f"SLOWER than before: {row.name} went from {row.before:.1f} to {row.after:.1f} ms on this machine"
        for row in measurements
        if row.unit == "ms" and row.before is not None and row.after > 1.05 * row.before
    ]


def _copy_companions(opened: OpenedModel, folder: Path) -> None:
    if not opened.path.is_dir():
        return
    for pattern in COPIED:
        for path in opened.path.glob(pattern):
            if path.is_dir():
                shutil.copytree(path, folder / path.name, dirs_exist_ok=True)
            else:
                shutil.copy(path, folder / path.name)


def verify_onnx(folder: Path, plan: Plan, shift: int) -> Certificate:
    """The certificate of a folder, computed again on other inputs than the conversion saw.

    Raises:
        InputError: when what was converted is no longer there, or the model cannot be loaded.
    """
    try:
        record = json.loads((folder / SOURCE).read_text(encoding="utf-8"))
        target, attention = str(record["target"]), record["attn_implementation"]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{SOURCE} is missing or damaged", folder, "convert the model again") from error
    opened = open_model(target, attn_implementation=attention)
    if opened.kind == "torch":
        opened.model.eval()
    requested = parse_passes(plan.passes)
    lossy = _quantizes_projections(requested) or any(
        site.applied and site.before != site.after and _lossy(site.applied) for site in plan.sites
    )
    original = _Original(opened, Path(target))
    end_to_end, problem = _compare(original, folder / MODEL, plan.provider, lossy, shift)
    if problem is not None and all(entry.passed for entry in end_to_end):
        raise InputError(f"the model does not run: {problem}", folder, "convert the model again")
    provider: Provider = "cuda" if plan.provider == "cuda" else "cpu"
    sites = [_verified_site(site, provider) for site in plan.sites]
    return make_certificate(plan, sites, end_to_end)


def _lossy(applied: Sequence[str]) -> bool:
    return any(call.rewrite.contract != "exact" for text in applied for call in parse_passes(text))


def _verified_site(site: SitePlan, provider: Provider) -> SiteCertificate:
    """A site of a plan, run again.

    Raises:
        ValueError: when the plan names an operator that is not known.
    """
    if site.operator == "original" or not site.after:
        return refused_site(site.site, site.reason, parse_spec(site.before) if site.before else None)
    spec = parse_spec(site.after)
    choice = Choice(row_named(spec, site.operator), site.reason, ())
    return check_site(
        site.site, spec, _site_runner(spec, choice, provider), operator=site.operator, draws=(*DRAWS, LONG)
    )
