"""A model as an ONNX file with rewritten attention: exported, lifted, lowered, loaded, compared."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import onnx_ir
import onnxruntime
import torch

from attncompile.convert.artifact import Conversion
from attncompile.convert.calibration import calls, text_call
from attncompile.convert.change import Change, changes_in_onnx
from attncompile.convert.comparison import (
    Compared,
    DoesNotRunError,
    Run,
    Runs,
    compare_runs,
    in_float64,
    outputs_of,
)
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
from attncompile.convert.precision import Precision, parse_precision, require_possible
from attncompile.convert.providers import kernels_of
from attncompile.convert.quality import over_budget
from attncompile.convert.rounding import Rounded, Texts, round_model, rounding_changes, texts_of
from attncompile.convert.runtime import run, save, session
from attncompile.convert.source import read_source, reopen, source_text
from attncompile.convert.timing import latency_measurement, size_measurement, slower
from attncompile.convert.unrewritten import UNREWRITTEN, load_unrewritten, save_unrewritten
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
        ValueError: for passes that cannot be read.
    """

    _precision(options, parse_passes(options.passes))  # what is misspelt is said before anything is opened

    def make(opened: OpenedModel, requested: tuple[PassCall, ...], folder: Path) -> Made:
        return _made(target, opened, requested, folder, options)

    return conversion(target, out, options, "onnx", "eager", make)


def _made(
    target: str | Path, opened: OpenedModel, requested: tuple[PassCall, ...], folder: Path, options: Options
) -> Made:
    provider, before = options.provider, folder / BEFORE
    precision = _precision(options, requested)
    if precision is not None:
        require_possible(precision, provider, target)
        opened = _in_float32(opened)
    rounds = precision is not None and precision.kind.budget is not None
    opened, source, notes = _source(opened, options)
    texts = texts_of(opened, options.text) if rounds or options.text is not None else None
    save(source, before)
    unrewritten = session(before, provider)
    exact = in_float64(opened.model) if opened.kind == "torch" else None
    budget = options.budget if options.budget is not None or precision is None else precision.kind.budget

    def loaded(file: Path) -> Runs:
        return _runs(opened, unrewritten, exact, file, provider)

    tried: list[str] = []
    for preference in dict.fromkeys((options.prefer, "decomposed")):
        options.progress("finding attention")
        rewritten = rewrite_onnx(
            onnx_ir.load(before), opened.name, requested, kernels_of(provider), preference, options.allow_untrained,
            notes,
        )
        require_sites(rewritten.program, target)
        options.progress("writing the model")
        save(rewritten.model, folder / MODEL)
        options.progress("comparing with the original")
        lossy = any(outcome.lossy for outcome in rewritten.outcomes)
        judged = None if rounds else budget
        try:
            compared = compare_runs(
                opened, loaded(folder / MODEL), lossy=lossy, budget=judged, texts=texts.judged if texts else None
            )
            problem = None if over_budget(compared.entries) else compared.problem()
        except DoesNotRunError as error:
            problem = str(error)
        if problem is None:
            break
        tried.append(f"with prefer={preference} the result did not agree and was dropped: {problem}")
    else:
        raise disagreement(str(problem), target)
    options.progress("checking every site")
    sites = site_certificates(rewritten, kernels_of(provider), provider)
    changes, told = _changes(opened, rewritten, folder, provider)
    kept: tuple[str, ...] = ()
    if precision is not None and texts is not None and budget is not None and rounds:
        options.progress(f"rounding to {precision}")
        rounded = _round(opened, rewritten, folder, precision, budget, texts, loaded, provider)
        told, kept, changes = [*rounded.notes, _agreed(compared), *told], rounded.kept, {**changes, **rounded.changes}
        runs = replace(loaded(folder / MODEL), exact=None)  # rounding is far above what float64 would show
        compared = compare_runs(opened, runs, lossy=True, budget=budget, texts=texts.judged)
    options.progress("measuring")
    measured, unchanged = _measurements(opened, not (rewritten.changed or rounds), folder, provider)
    if opened.kind == "torch":
        save_unrewritten(onnx_ir.load(before), opened, folder / UNREWRITTEN)
    for leftover in folder.glob(f"{BEFORE}*"):
        leftover.unlink()
    _copy_companions(opened, folder)
    if isinstance(opened, CachedModel):
        told += write_generator(opened, MODEL, folder)
    return Made(
        rewritten.program,
        rewritten.outcomes,
        tuple(sites),
        compared,
        changes,
        tuple(measured),
        (*rewritten.notes, *told, *tried, *unchanged, *slower(measured)),
        cache=isinstance(opened, CachedModel),
        precision=str(precision) if precision is not None else "",
        budget=budget if lossy or rounds else None,
        kept=kept,
    )


def _precision(options: Options, requested: Sequence[PassCall]) -> Precision | None:
    """What was asked for, by ``--precision`` or by a pass that rounds projections on this target.

    Raises:
        ValueError: for an unknown precision, or for both.
    """
    by_pass = any(
        call.rewrite.name == "quantize.int8" and getattr(call.options, "projections", False) for call in requested
    )
    if options.precision is None:
        return parse_precision("int8") if by_pass else None
    if by_pass:
        raise ValueError(
            f"the pass quantize.int8 rounds the projections already, and --precision {options.precision} was given; "
            "leave one of them out"
        )
    return parse_precision(options.precision)


def _in_float32(opened: OpenedModel) -> OpenedModel:
    """The model with its weights in float32; as it is where they are, and for an ONNX file."""
    if opened.kind != "torch" or all(
        not parameter.is_floating_point() or parameter.dtype is torch.float32 for parameter in opened.model.parameters()
    ):
        return opened
    return replace(opened, model=copy.deepcopy(opened.model).float())


@dataclass(frozen=True)
class _Rounded(Rounded):
    """With the change of each site by name."""

    changes: Mapping[str, Change] = field(default_factory=dict)


def _round(
    opened: OpenedModel,
    rewritten: Rewritten,
    folder: Path,
    precision: Precision,
    budget: float,
    texts: Texts,
    loaded: Callable[[Path], Runs],
    provider: str,
) -> _Rounded:
    """Put the model in the folder in another precision."""
    with tempfile.TemporaryDirectory(prefix="attncompile-") as scratch:
        plain = Path(scratch) / MODEL
        for file in folder.glob(f"{MODEL}*"):
            shutil.move(file, Path(scratch) / file.name)
        made = round_model(opened, plain, folder / MODEL, precision, budget, texts, loaded, provider)
        text = (texts.judged or calls(opened))[0]
        models = onnx_ir.load(plain), onnx_ir.load(folder / MODEL)
        changes = rounding_changes(rewritten.program, *models, text, provider)
    return _Rounded(made.kept, made.notes, changes)


def _agreed(compared: Compared) -> str:
    """What the comparison of the float32 model found, for the reader of a rounded one."""
    apart = [entry.after for entry in compared.entries if entry.before is None and entry.metric.startswith("largest")]
    return f"before rounding, the rewritten model differed from the original by at most {max(apart, default=0.0):.2g}"


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


def _runs(
    opened: OpenedModel, unrewritten: onnxruntime.InferenceSession, exact: Run | None, file: Path, provider: str
) -> Runs:
    """All that is compared: the original, the export and the result."""
    converted = session(file, provider)
    if opened.kind == "onnx":
        plain = partial(run, unrewritten)
        return Runs(plain, partial(run, converted), plain)
    return Runs(
        lambda call: outputs_of(opened.model(*call.args, **call.kwargs)),
        partial(run, converted),
        partial(run, unrewritten),
        exact,
        "ONNX Runtime",
    )


def _changes(
    opened: OpenedModel, rewritten: Rewritten, folder: Path, provider: str
) -> tuple[dict[str, Change], list[str]]:
    """How far lossy passes moved each site on running text, and what there is to say about it."""
    rewrites = lossy_rewrites(rewritten.outcomes)
    if not rewrites:
        return {}, []
    text = text_call(opened)
    if text is None:
        return {}, ["the model takes no text, so the change of each site is measured on random inputs only"]
    found = changes_in_onnx(onnx_ir.load(folder / BEFORE), text, provider, rewrites)
    missing = len({one.site.name for one in rewrites} - set(found))
    told = [f"{missing} sites lie in a body of If or Loop; their change is measured on random inputs only"]
    return found, told if missing else []


def _measurements(
    opened: OpenedModel, unchanged: bool, folder: Path, provider: str
) -> tuple[list[Measurement], list[str]]:
    """Size and latency before and after, and a sentence where nothing was changed."""
    found = [size_measurement(folder / BEFORE, folder / MODEL)]
    if unchanged:
        return found, ["nothing was rewritten: the model runs as it did, so its latency was not measured"]
    before, after = session(folder / BEFORE, provider), session(folder / MODEL, provider)
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


def verify_onnx(
    folder: Path, plan: Plan, shift: int, *, allow_pickle: bool = False, provider: str | None = None
) -> Certificate:
    """The certificate of a folder, computed again on other inputs than the conversion saw.

    Args:
        folder: what :func:`convert_onnx` wrote; plan: its plan.
        shift: added to the lengths of inputs.
        allow_pickle: the user's permission to read a pickle.
        provider: where to run it; where it was converted for unless given.

    Raises:
        InputError: when what was converted is no longer there or has changed, or the model cannot be loaded.
        ValueError: when the plan names a precision that is not known.
    """
    source, provider = read_source(folder), provider or plan.provider
    opened = reopen(folder, allow_pickle=allow_pickle)
    precision = parse_precision(plan.precision) if plan.precision else None
    if precision is not None:
        opened = _in_float32(opened)
    opened = _with_cache(opened, source.cache)
    rounds = precision is not None and precision.kind.budget is not None
    text = source_text(source)
    texts = texts_of(opened, text).judged if rounds or text is not None else None
    exact = in_float64(opened.model) if opened.kind == "torch" and not rounds else None
    with _unrewritten(folder, opened) as file:
        runs = _runs(opened, session(file, provider), exact, folder / MODEL, provider)
        try:
            lossy = rounds or plan_is_lossy(plan)
            compared = compare_runs(opened, runs, lossy=lossy, shift=shift, budget=plan.budget, texts=texts)
        except DoesNotRunError as error:
            raise InputError(f"the model does not run: {error}", folder, "convert the model again") from error
    return make_certificate(plan, verified_sites(plan, kernels_of(provider), provider), compared.entries)


@contextmanager
def _unrewritten(folder: Path, opened: OpenedModel) -> Iterator[Path]:
    """The model before any site was replaced, as a file for as long as the block runs."""
    if opened.kind == "onnx":
        yield opened.path
        return
    with tempfile.TemporaryDirectory(prefix="attncompile-") as scratch:
        file = Path(scratch) / BEFORE
        save(load_unrewritten(folder / UNREWRITTEN, opened), file)
        yield file
