"""A model as ONNX files with rewritten attention: one, or encoder and decoder of a model with both caches."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import onnx_ir
import torch

from attncompile.codegen.onnx.tried import column, installed, newest_ir_version, newest_opset, require_version
from attncompile.codegen.onnx.widen import widened
from attncompile.convert.artifact import Conversion
from attncompile.convert.comparison import Compared, DoesNotRunError, compare_on, inputs_of
from attncompile.convert.evidence import make_certificate
from attncompile.convert.export import export_onnx
from attncompile.convert.frame import Made, Options, conversion, plan_is_lossy, require_sites
from attncompile.convert.generator import write_generator
from attncompile.convert.in_precision import budget_of
from attncompile.convert.in_steps import compare_in_steps, known_in_steps
from attncompile.convert.memory import large_blocks_given_back, release
from attncompile.convert.onnx_part import make_part, making_of, texts_for
from attncompile.convert.onnx_runs import known_runs, session_results
from attncompile.convert.onnx_sites import verified_sites
from attncompile.convert.part import MODEL, Part, finish_part, kept_export
from attncompile.convert.precision import Precision, parse_precision, require_possible
from attncompile.convert.providers import session_providers
from attncompile.convert.runtime import save
from attncompile.convert.source import read_source, reopen, source_text
from attncompile.convert.timing import slower
from attncompile.convert.together import made_together
from attncompile.frontends.cached import ALL_LOGITS, Generating, with_cache
from attncompile.frontends.checkpoint import OpenedModel
from attncompile.frontends.encoder_decoder import DecoderModel, encodes_and_decodes, with_cross_cache
from attncompile.frontends.errors import CaptureError, InputError
from attncompile.frontends.onnx_file import load_onnx, reading
from attncompile.frontends.shared_buffer import SEPARATE, with_shared_buffer
from attncompile.lift.program import join_programs
from attncompile.passes import PassCall, parse_passes
from attncompile.plan.schema import Plan
from attncompile.verify import Certificate, EndToEnd

ENCODER, DECODER = "encoder.onnx", "decoder.onnx"

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
    """Write a folder with ``model.onnx``, or ``encoder.onnx`` and ``decoder.onnx``, its plan and its evidence.

    The result is loaded and compared with the original before it is written. A site that fails goes back to what it
    was and the report says so; the rest stays.

    Raises:
        InputError: when the target cannot be opened or exported, no site is found, or ``out`` cannot be written.
        ValueError: for passes that cannot be read, or a version of ONNX Runtime of which nothing is known.
    """
    if options.onnxruntime is not None:
        options = replace(options, onnxruntime=require_version(options.onnxruntime, options.provider))

    _precision(options, parse_passes(options.passes))  # what is misspelt is said before anything is opened
    if options.shared_buffer and options.cache is False:
        raise ValueError("--no-cache and --shared-buffer contradict each other; leave one of them out")
    if options.last_logits and options.cache is False:
        raise ValueError("--no-cache and --last-logits contradict each other; leave one of them out")

    def make(opened: OpenedModel, requested: tuple[PassCall, ...], folder: Path) -> Made:
        return _made(target, opened, requested, folder, options)

    with large_blocks_given_back():
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
    """See :func:`convert_onnx`; ``scratch`` is for exports, and for results that are compared."""
    precision = _precision(options, requested)
    if precision is not None:
        shared, version = options.shared_buffer, options.onnxruntime
        require_possible(precision, options.provider, target, shared=shared, version=version)
        opened = _in_float32(opened)
    parts, notes = _exported(opened, target, scratch, options)
    makings = [making_of(part, target, requested, options, precision, notes[part.file], scratch) for part in parts]
    done = tuple(make_part(making, folder) for making in makings)
    require_sites(join_programs(opened.name, [made.rewritten.program for made in done], ()), target)
    decoder, compared = _decoder(parts), [made.compared for made in done]
    if decoder is not None:
        together = made_together(decoder, done, folder)
        done = together.done
        compared = [*(made.compared for made in done), together.compared]
    for part in parts:
        finish_part(part, folder, scratch)
    _copy_companions(opened, folder)
    caching = [part.opened for part in parts if isinstance(part.opened, Generating)]
    files = [part.file for part in parts]
    told = [note for one in caching for note in write_generator(one, files, folder, options.provider)]
    measured = [row for made in done for row in made.measurements]
    precision = done[0].making.precision
    return Made(
        join_programs(opened.name, [made.rewritten.program for made in done], ()),
        tuple(outcome for made in done for outcome in made.rewritten.outcomes),
        tuple(site for made in done for site in made.agreed.sites),
        Compared(
            tuple(entry for one in compared for entry in one.entries),
            tuple(dict.fromkeys(note for one in compared for note in one.notes)),
        ),
        {name: change for made in done for name, change in made.changes.items()},
        tuple(measured),
        (*_chosen_for(options), *(note for made in done for note in made.notes), *told, *slower(measured)),
        cache=bool(caching),
        shared=options.shared_buffer,
        last_logits=options.last_logits,
        precision=str(precision) if precision is not None else "",
        budget=budget_of(options, precision) if any(made.lossy for made in done) else None,
        kept=tuple(name for made in done for name in made.kept),
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


def _chosen_for(options: Options) -> list[str]:
    """A sentence on the version that operators were chosen for, where that is not the one that ran them here."""
    asked, here = options.onnxruntime, installed()
    if asked is None or asked == here:
        return []
    known = column(options.provider, asked)
    by = "it" if known == asked else f"{known}, the last one before it that was tried"
    return [f"operators were chosen for ONNX Runtime {asked}, by what was tried with {by}; the checks here ran {here}"]


_WITHOUT = "converted without a cache"


def parts_of(
    opened: OpenedModel, wanted: bool | None, *, shared: bool, last: bool
) -> tuple[tuple[Part, ...], tuple[str, ...]]:
    """What is made of a model, and a note where it has no cache.

    Args:
        opened: the model; wanted: whether with its cache; shared: whether that is one buffer for past and present.
        last: whether only the logits of each row's last token are computed.

    Raises:
        InputError: when a cache is insisted on.
    """
    if last:
        _require_decoder(opened, "--last-logits", "the logits", ALL_LOGITS)
    if shared:
        _require_decoder(opened, "--shared-buffer", "past and present", SEPARATE)
        return (Part(MODEL, with_shared_buffer(opened, last=last)),), ()
    whole = (Part(MODEL, opened),)
    if wanted is False or (opened.kind == "onnx" and not wanted):
        return whole, ()
    try:
        if encodes_and_decodes(opened):
            encoder, decoder = with_cross_cache(opened)
            return (Part(ENCODER, encoder), Part(DECODER, decoder)), ()
        return (Part(MODEL, with_cache(opened, last=last)),), ()
    except InputError as error:
        if wanted:
            raise
        if last:  # to leave the cache out, which helps otherwise, would contradict what was asked for
            raise InputError(error.what, opened.name, ALL_LOGITS) from error
        generates = getattr(opened.model, "can_generate", lambda: False)()
        return whole, (f"{_WITHOUT}: {error.what}",) if generates else ()


def _require_decoder(opened: OpenedModel, option: str, what: str, advice: str) -> None:
    """Raises InputError, with the advice, for what does not generate from one file that is written here.

    Args:
        opened: the model; option: what was asked for; what: what it changes, in words.
    """
    if opened.kind == "onnx":
        reason = f"{what} of an ONNX file are what they are; {option} is for checkpoints"
        raise InputError(reason, opened.name, advice)
    if encodes_and_decodes(opened):
        reason = f"{what} of an encoder-decoder stay as they are; {option} is for decoders alone"
        raise InputError(reason, opened.name, advice)


def _exported(
    opened: OpenedModel, target: str | Path, scratch: Path, options: Options
) -> tuple[tuple[Part, ...], Mapping[str, tuple[str, ...]]]:
    """What the model is made into, with the export of each part written to ``scratch``, and notes by file."""
    parts, told = parts_of(opened, options.cache, shared=options.shared_buffer, last=options.last_logits)
    try:
        return parts, _save_exports(parts, target, scratch, options, told)
    except CaptureError as error:
        insisted = options.cache or options.shared_buffer or options.last_logits
        if insisted or not any(isinstance(part.opened, Generating) for part in parts):
            raise
        whole = (Part(MODEL, opened),)
        return whole, _save_exports(whole, target, scratch, options, (f"{_WITHOUT}: {error.reason}",))


def _save_exports(
    parts: tuple[Part, ...], target: str | Path, scratch: Path, options: Options, told: tuple[str, ...]
) -> Mapping[str, tuple[str, ...]]:
    """Write the export of each part, its weights in a file that is mapped; what there is to say about it, by file."""
    found: dict[str, tuple[str, ...]] = {}
    for part in parts:
        if part.opened.kind == "onnx":
            with reading(part.opened.path):
                given = load_onnx(part.opened.path)
                _require_opset(given, target, options)
                save(given, scratch / part.before, largest=0)
            found[part.file] = (*part.opened.notes, *told)
            continue
        options.progress(f"exporting the {part.name} to ONNX" if part.name else "exporting to ONNX")
        model, notes = export_onnx(part.opened)
        widened(model, "bfloat16", session_providers(options.provider))
        _require_opset(model, target, options)
        save(model, scratch / part.before, largest=0)
        del model
        release()
        found[part.file] = (*part.opened.notes, *told, *notes)
    return found


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


def _decoder(parts: Sequence[Part]) -> DecoderModel | None:
    """The decoder of an encoder-decoder that was taken apart."""
    return next((part.opened for part in parts if isinstance(part.opened, DecoderModel)), None)


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
    rounds, text = precision is not None and precision.budget is not None, source_text(source)
    parts, _ = parts_of(opened, source.cache, shared=source.shared, last=source.last_logits)
    lossy = rounds or plan_is_lossy(plan)
    entries: list[EndToEnd] = []
    with ExitStack() as kept:
        scratch = Path(kept.enter_context(tempfile.TemporaryDirectory(prefix="attncompile-")))
        before = [kept.enter_context(kept_export(part, folder)) for part in parts]
        after = [folder / part.file for part in parts]
        release()
        try:
            for part, plain, file in zip(parts, before, after, strict=True):
                judged = texts_for(part, text).judged if rounds or text is not None else None
                inputs = inputs_of(
                    part.opened, lossy=lossy, shift=shift, part=part.name, texts=judged, provider=plan.provider
                )
                results = scratch / f"{part.file}_known"
                known = known_runs(part.opened, plain, provider, inputs, results, exactly=not rounds)
                converted = session_results(file, provider, inputs.every, scratch / part.file)
                entries += compare_on(inputs, replace(known, converted=converted), plan.budget).entries
                release()
            decoder = _decoder(parts)
            if decoder is not None:
                whole = known_in_steps(
                    decoder, before, provider, scratch / "known_in_steps", lossy=lossy, shift=shift
                )
                steps = scratch / "steps"
                entries += compare_in_steps(whole, after, provider, steps, lossy=lossy, budget=plan.budget).entries
        except DoesNotRunError as error:
            raise InputError(f"the model does not run: {error}", folder, "convert the model again") from error
    return make_certificate(plan, verified_sites(plan, provider), entries)
