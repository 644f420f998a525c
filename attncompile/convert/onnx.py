"""A model as an ONNX file with rewritten attention: exported, lifted, lowered, loaded, compared."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import onnx_ir
import torch

from attncompile.codegen.onnx.capabilities import Provider
from attncompile.codegen.onnx.quantize import quantize_projections
from attncompile.codegen.onnx.tried import installed, newest_ir_version, newest_opset, require_version
from attncompile.convert.artifact import Conversion, Progress, silent
from attncompile.convert.calibration import Call, calls, text_call
from attncompile.convert.change import Change, changes_in_onnx, difference, name_values, observed
from attncompile.convert.comparison import DoesNotRunError, Run, Runs, compare_runs
from attncompile.convert.evidence import make_certificate
from attncompile.convert.export import export_onnx
from attncompile.convert.frame import (
    Made,
    Options,
    conversion,
    disagreement,
    lossy_rewrites,
    plan_is_lossy,
    require_sites,
)
from attncompile.convert.generator import write_generator
from attncompile.convert.onnx_rewrite import Rewritten, rewrite_onnx
from attncompile.convert.onnx_sites import site_certificates, verified_sites
from attncompile.convert.recorded import recorded
from attncompile.convert.runtime import release, run, save, session
from attncompile.convert.source import read_source, reopen
from attncompile.convert.timing import latency_measurement, size_measurement, slower
from attncompile.convert.unrewritten import UNREWRITTEN, load_unrewritten, save_unrewritten
from attncompile.convert.widened import Widened, outputs_of
from attncompile.frontends.cached import CachedModel, with_cache
from attncompile.frontends.checkpoint import OpenedModel
from attncompile.frontends.errors import CaptureError, InputError
from attncompile.passes import PassCall, parse_passes
from attncompile.plan.schema import Plan
from attncompile.report import Measurement
from attncompile.verify import Certificate

MODEL = "model.onnx"
BEFORE = "before.onnx"

COPIED = (
    "config.json",
    "tokenizer*",
    "vocab*",
    "merges*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*.model",
    "preprocessor_config.json",
    "generation_config.json",
    "1_Pooling",
    "modules.json",
    "sentence_bert_config.json",
)
"""Files of a checkpoint that a user of the ONNX model still needs."""


def convert_onnx(target: str | Path, out: Path, options: Options) -> Conversion:
    """Write a folder with ``model.onnx``, its plan and its evidence.

    The result is loaded and compared with the original before it is written. When it does not agree, the plain
    decomposition is tried, and the report says so.

    Raises:
        InputError: when the target cannot be opened or exported, no site is found, or ``out`` cannot be written.
        ValueError: for passes that cannot be read, or a version of ONNX Runtime of which nothing is known.
    """
    if options.onnxruntime is not None:
        options = replace(options, onnxruntime=require_version(options.onnxruntime, options.provider))

    def make(opened: OpenedModel, requested: tuple[PassCall, ...], folder: Path) -> Made:
        return _made(target, opened, requested, folder, options)

    return conversion(target, out, options, "onnx", "eager", make)


def _made(
    target: str | Path, opened: OpenedModel, requested: tuple[PassCall, ...], folder: Path, options: Options
) -> Made:
    with tempfile.TemporaryDirectory(prefix=".", dir=folder) as scratch:
        return _made_in(target, opened, requested, folder, options, Path(scratch))


def _made_in(
    target: str | Path,
    opened: OpenedModel,
    requested: tuple[PassCall, ...],
    folder: Path,
    options: Options,
    scratch: Path,
) -> Made:
    """See :func:`convert_onnx`. At most one session is open at a time, but for the two whose latencies are compared."""
    provider, before = options.provider, scratch / BEFORE
    opened, notes = _exported(target, opened, options, before)
    known: Runs | None = None
    tried: list[str] = []
    for preference in dict.fromkeys((options.prefer, "decomposed")):
        options.progress("finding attention")
        rewritten = rewrite_onnx(
            onnx_ir.load(before), opened.name, requested, provider, preference, options.allow_untrained, notes,
            options.onnxruntime,
        )  # fmt: skip
        require_sites(rewritten.program, target)
        options.progress("writing the model")
        quantised = _write_model(rewritten.model, folder, quantize=_quantizes_projections(requested))
        result_told = _running(options.progress, "the result")
        lossy = quantised > 0 or any(outcome.lossy for outcome in rewritten.outcomes)
        if known is None:  # the other form has the same passes, so the same calls
            made = _made_calls(opened, lossy=lossy)
            known = _known_runs(opened, before, provider, made, scratch, options.progress)
        converted = _session_results(folder / MODEL, provider, made, scratch / preference, result_told)
        options.progress("comparing with the original")
        try:
            compared = compare_runs(opened, replace(known, converted=converted), lossy=lossy)
            problem = compared.problem()
        except DoesNotRunError as error:
            problem = str(error)
        release()
        if problem is None:
            break
        tried.append(f"with prefer={preference} the result did not agree and was dropped: {problem}")
    else:
        raise disagreement(str(problem), target)
    options.progress("checking every site")
    sites = site_certificates(rewritten, provider)
    release()
    options.progress("measuring")
    changes, told = _changes(opened, rewritten, before, provider, quantised)
    measured, unchanged = _measurements(
        opened, not (rewritten.changed or quantised), before, folder / MODEL, provider
    )
    release()
    if opened.kind == "torch":
        save_unrewritten(onnx_ir.load(before), opened, folder / UNREWRITTEN)
    _copy_companions(opened, folder)
    if isinstance(opened, CachedModel):
        told += write_generator(opened, MODEL, folder)
    if quantised:
        told.insert(
            0,
            f"{quantised} projections multiply in INT8 (ONNX Runtime's dynamic quantiser); attention products stay "
            "in float",
        )
    return Made(
        rewritten.program,
        rewritten.outcomes,
        tuple(sites),
        compared,
        changes,
        tuple(measured),
        (*_chosen_for(options), *rewritten.notes, *told, *tried, *unchanged, *slower(measured)),
        cache=isinstance(opened, CachedModel),
    )


def _chosen_for(options: Options) -> list[str]:
    """A sentence on the version that operators were chosen for, where that is not the one that ran them here."""
    asked, here = options.onnxruntime, installed()
    if asked is None or asked == here:
        return []
    return [f"operators were chosen for ONNX Runtime {asked}, by what was tried with it; the checks here ran {here}"]


_WITHOUT = "converted without a cache"


def _with_cache(opened: OpenedModel, wanted: bool | None) -> OpenedModel:
    """The model with its cache as inputs and outputs where that is wanted; with a note where it has none.

    Raises:
        InputError: when a cache is insisted on.
    """
    if wanted is False:
        return opened
    try:
        return with_cache(opened)
    except InputError as error:
        if wanted:
            raise
        generates = opened.kind == "torch" and getattr(opened.model, "can_generate", lambda: False)()
        told = (f"{_WITHOUT}: {error.what}",) if generates else ()
        return replace(opened, notes=(*opened.notes, *told))


def _exported(
    target: str | Path, opened: OpenedModel, options: Options, before: Path
) -> tuple[OpenedModel, tuple[str, ...]]:
    """Write the ONNX model to start from, its weights in a file that is mapped; the model as converted, and notes."""
    opened, source, notes = _source(opened, options)
    _require_opset(source, target, options)
    save(source, before, largest=0)
    del source
    release()
    return opened, notes


def _source(opened: OpenedModel, options: Options) -> tuple[OpenedModel, onnx_ir.Model, tuple[str, ...]]:
    """The model as it is converted, with its cache or without, the ONNX model to start from, and notes."""
    if opened.kind == "onnx" and not options.cache:
        return opened, onnx_ir.load(opened.path), opened.notes
    given, opened = opened, _with_cache(opened, options.cache)
    options.progress("exporting to ONNX")
    try:
        model, notes = export_onnx(opened)
    except CaptureError as error:
        if opened is given or options.cache or not isinstance(opened, CachedModel):
            raise
        opened = replace(given, notes=(*given.notes, f"{_WITHOUT}: {error.reason}"))
        model, notes = export_onnx(opened)
    return opened, model, (*opened.notes, *notes)


def _require_opset(model: onnx_ir.Model, target: str | Path, options: Options) -> None:
    """Raises InputError when the version that operators are chosen for does not read the model as it is."""
    if options.onnxruntime is None:
        return
    newest, opset = newest_opset(options.onnxruntime, options.provider), model.opset_imports.get("", 0)
    if opset > newest:
        raise InputError(
            f"the model has opset {opset}, and ONNX Runtime {options.onnxruntime} takes up to {newest}",
            str(target),
            f"export it with opset {newest}, or choose a newer ONNX Runtime",
        )
    # a file that needs nothing of a newer format does not have to say that it has one
    model.ir_version = min(model.ir_version, newest_ir_version(options.onnxruntime, options.provider))


def _quantizes_projections(requested: Sequence[PassCall]) -> bool:
    return any(
        call.rewrite.name == "quantize.int8" and getattr(call.options, "projections", False) for call in requested
    )


def _write_model(model: onnx_ir.Model, folder: Path, *, quantize: bool) -> int:
    """Write the result; returns how many projections were quantised."""
    for stale in folder.glob(f"{MODEL}*"):
        stale.unlink()
    if not quantize:
        save(model, folder / MODEL)
        return 0
    save(model, folder / "float.onnx")
    count = quantize_projections(folder / "float.onnx", folder / MODEL)
    for stale in folder.glob("float.onnx*"):
        stale.unlink()
    return count


def _made_calls(opened: OpenedModel, *, lossy: bool, shift: int = 0) -> list[Call]:
    """All calls on which :func:`compare_runs` compares forms of a model."""
    text = text_call(opened) if lossy else None
    return [*calls(opened, shift), *([text] if text is not None else [])]


def _running(progress: Progress, what: str) -> Progress:
    """Tells the calls of one form of a model."""
    return lambda call: progress(f"running {what}: {call}")


def _session_results(
    file: Path, provider: str, made: Sequence[Call], scratch: Path, progress: Progress = silent
) -> Run:
    """What a model in ONNX Runtime gives, in files; the session has ended by then."""
    found = recorded(partial(run, session(file, provider, lean=True)), made, scratch, progress)
    release()
    return found


def _known_runs(
    opened: OpenedModel,
    before: Path,
    provider: str,
    made: Sequence[Call],
    scratch: Path,
    progress: Progress = silent,
) -> Runs:
    """What a result is compared with: the original, in float64 too, and the export, all of it in files.

    The place of the result is still the export's.
    """
    plain = _session_results(before, provider, made, scratch / "plain", _running(progress, "the export"))
    if opened.kind == "onnx":
        return Runs(plain, plain, plain)
    with torch.no_grad():
        original = recorded(
            lambda call: outputs_of(opened.model(*call.args, **call.kwargs)),
            made,
            scratch / "original",
            _running(progress, "the original"),
        )
        exact = recorded(
            Widened(opened.model), made, scratch / "exact", _running(progress, "the original in float64")
        )
    release()
    return Runs(original, plain, plain, exact, "ONNX Runtime")


def _changes(
    opened: OpenedModel, rewritten: Rewritten, before: Path, provider: str, quantised: int
) -> tuple[dict[str, Change], list[str]]:
    """How far lossy passes moved each site on running text, and what there is to say about it."""
    rewrites = lossy_rewrites(rewritten.outcomes)
    if not rewrites and not quantised:
        return {}, []
    text = text_call(opened)
    if text is None:
        return {}, ["the model takes no text, so the change of each site is measured on random inputs only"]
    found: dict[str, Change] = {}
    if quantised:
        outputs = {
            site.name: site.region.outputs[0].value
            for site in rewritten.program.sites
            if site.status == "lifted" and site.region is not None
        }
        found |= _quantised_changes(outputs, before, text, provider)
    found |= changes_in_onnx(onnx_ir.load(before), text, provider, rewrites)
    missing = len({one.site.name for one in rewrites} - set(found))
    told = [f"{missing} sites lie in a body of If or Loop; their change is measured on random inputs only"]
    return found, told if missing else []


def _quantised_changes(outputs: Mapping[str, str], file: Path, text: Call, provider: str) -> dict[str, Change]:
    """The change of each site's output, by name, when the projections of the unrewritten model are quantised.

    The rewritten model has other values between its nodes, so the same quantiser is run on the model before.

    Args:
        outputs: native result of each site.
        file: the unrewritten model; text: what both run on; provider: where.
    """
    before = onnx_ir.load(file)
    name_values(before)
    with tempfile.TemporaryDirectory(prefix="attncompile-") as scratch:
        plain, quantised = Path(scratch) / "plain.onnx", Path(scratch) / "quantised.onnx"
        save(before, plain)
        quantize_projections(plain, quantised)
        natives = observed(before, text, provider, outputs.values())
        results = observed(onnx_ir.load(quantised), text, provider, outputs.values())
    inputs = f"{text.what}, with the projections before it quantised too"
    return {
        site: difference([results[name]], [natives[name]], inputs)
        for site, name in outputs.items()
        if name in natives and name in results
    }


def _measurements(
    opened: OpenedModel, unchanged: bool, file: Path, result: Path, provider: str
) -> tuple[list[Measurement], list[str]]:
    """Size and latency before and after, and a sentence where nothing was changed."""
    found = [size_measurement(file, result)]
    if unchanged:
        return found, ["nothing was rewritten: the model runs as it did, so its latency was not measured"]
    before, after = session(file, provider), session(result, provider)
    what = "torch's own export" if opened.kind == "torch" else "the given file"
    found += [latency_measurement(before, after, call, what) for call in calls(opened)[-1:]]
    return found, []


def _copy_companions(opened: OpenedModel, folder: Path) -> None:
    if not opened.path.is_dir():
        return
    for pattern in COPIED:
        for path in opened.path.glob(pattern):
            if path.is_dir():
                shutil.copytree(path, folder / path.name, dirs_exist_ok=True)
            else:
                shutil.copy(path, folder / path.name)


def verify_onnx(folder: Path, plan: Plan, shift: int, *, allow_pickle: bool = False) -> Certificate:
    """The certificate of a folder, computed again on other inputs than the conversion saw.

    Raises:
        InputError: when what was converted is no longer there or has changed, or the model cannot be loaded.
    """
    opened = reopen(folder, allow_pickle=allow_pickle)
    opened = _with_cache(opened, read_source(folder).cache)
    lossy = _quantizes_projections(parse_passes(plan.passes)) or plan_is_lossy(plan)
    with _unrewritten(folder, opened) as (file, scratch):
        made = _made_calls(opened, lossy=lossy, shift=shift)
        known = _known_runs(opened, file, plan.provider, made, scratch)
        converted = _session_results(folder / MODEL, plan.provider, made, scratch / "converted")
        try:
            compared = compare_runs(opened, replace(known, converted=converted), lossy=lossy, shift=shift)
        except DoesNotRunError as error:
            raise InputError(f"the model does not run: {error}", folder, "convert the model again") from error
    provider: Provider = "cuda" if plan.provider == "cuda" else "cpu"
    return make_certificate(plan, verified_sites(plan, provider), compared.entries)


@contextmanager
def _unrewritten(folder: Path, opened: OpenedModel) -> Iterator[tuple[Path, Path]]:
    """The model before any site was replaced, and a folder for files, for as long as the block runs."""
    with tempfile.TemporaryDirectory(prefix="attncompile-") as scratch:
        if opened.kind == "onnx":
            yield opened.path, Path(scratch)
            return
        file = Path(scratch) / BEFORE
        save(load_unrewritten(folder / UNREWRITTEN, opened), file, largest=0)
        yield file, Path(scratch)
