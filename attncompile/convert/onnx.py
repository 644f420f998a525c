"""A model as ONNX files with rewritten attention: one, or encoder and decoder of a model with both caches."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import onnx_ir

from attncompile.codegen.onnx.capabilities import Provider
from attncompile.convert.artifact import Conversion
from attncompile.convert.comparison import Compared, DoesNotRunError, compare_runs, in_float64
from attncompile.convert.evidence import make_certificate
from attncompile.convert.export import export_onnx
from attncompile.convert.frame import Made, Options, conversion, disagreement, plan_is_lossy, require_sites
from attncompile.convert.generator import write_generator
from attncompile.convert.in_steps import compare_in_steps
from attncompile.convert.onnx_part import (
    MODEL,
    Part,
    finish_part,
    kept_export,
    make_part,
    quantizes_projections,
    runs_of,
)
from attncompile.convert.onnx_sites import verified_sites
from attncompile.convert.runtime import save, session
from attncompile.convert.source import read_source, reopen
from attncompile.convert.timing import slower
from attncompile.frontends.cached import Generating, with_cache
from attncompile.frontends.checkpoint import OpenedModel
from attncompile.frontends.encoder_decoder import DecoderModel, encodes_and_decodes, with_cross_cache
from attncompile.frontends.errors import CaptureError, InputError
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

    The result is loaded and compared with the original before it is written. When it does not agree, the plain
    decomposition is tried, and the report says so.

    Raises:
        InputError: when the target cannot be opened or exported, no site is found, or ``out`` cannot be written.
        ValueError: for passes that cannot be read.
    """

    def make(opened: OpenedModel, requested: tuple[PassCall, ...], folder: Path) -> Made:
        return _made(target, opened, requested, folder, options)

    return conversion(target, out, options, "onnx", "eager", make)


def _made(
    target: str | Path, opened: OpenedModel, requested: tuple[PassCall, ...], folder: Path, options: Options
) -> Made:
    parts, notes = _exported(opened, folder, options)
    done = [make_part(part, target, requested, folder, options, notes[part.file]) for part in parts]
    program = join_programs(opened.name, [made.rewritten.program for made in done], ())
    require_sites(program, target)
    compared, decoder = [made.compared for made in done], _decoder(parts)
    if decoder is not None:
        options.progress("comparing generation with the original")
        before, after = (
            [session(folder / file, options.provider) for file in files]
            for files in ([part.before for part in parts], [part.file for part in parts])
        )
        lossy = any(made.lossy for made in done)
        compared.append(compare_in_steps(opened, decoder, before, after, in_float64(opened.model), lossy=lossy))
        problem = compared[-1].problem()
        if problem is not None:
            raise disagreement(problem, target)
    for part in parts:
        finish_part(part, folder)
    _copy_companions(opened, folder)
    caching = [part.opened for part in parts if isinstance(part.opened, Generating)]
    told = [note for one in caching for note in write_generator(one, [part.file for part in parts], folder)]
    measured = [row for made in done for row in made.measurements]
    return Made(
        program,
        tuple(outcome for made in done for outcome in made.rewritten.outcomes),
        tuple(site for made in done for site in made.sites),
        Compared(
            tuple(entry for one in compared for entry in one.entries),
            tuple(dict.fromkeys(note for one in compared for note in one.notes)),
        ),
        {name: change for made in done for name, change in made.changes.items()},
        tuple(measured),
        (*(note for made in done for note in made.notes), *told, *slower(measured)),
        cache=bool(caching),
    )


_WITHOUT = "converted without a cache"


def parts_of(opened: OpenedModel, wanted: bool | None) -> tuple[tuple[Part, ...], tuple[str, ...]]:
    """What is made of a model, and a note where it has no cache.

    Raises:
        InputError: when a cache is insisted on.
    """
    whole = (Part(MODEL, opened),)
    if wanted is False or (opened.kind == "onnx" and not wanted):
        return whole, ()
    try:
        if encodes_and_decodes(opened):
            encoder, decoder = with_cross_cache(opened)
            return (Part(ENCODER, encoder), Part(DECODER, decoder)), ()
        return (Part(MODEL, with_cache(opened)),), ()
    except InputError as error:
        if wanted:
            raise
        generates = getattr(opened.model, "can_generate", lambda: False)()
        return whole, (f"{_WITHOUT}: {error.what}",) if generates else ()


def _exported(
    opened: OpenedModel, folder: Path, options: Options
) -> tuple[tuple[Part, ...], Mapping[str, tuple[str, ...]]]:
    """What the model is made into, with the export of each part written to the folder, and notes by file."""
    parts, told = parts_of(opened, options.cache)
    try:
        return parts, _save_exports(parts, folder, options, told)
    except CaptureError as error:
        if options.cache or not any(isinstance(part.opened, Generating) for part in parts):
            raise
        whole = (Part(MODEL, opened),)
        return whole, _save_exports(whole, folder, options, (f"{_WITHOUT}: {error.reason}",))


def _save_exports(
    parts: tuple[Part, ...], folder: Path, options: Options, told: tuple[str, ...]
) -> Mapping[str, tuple[str, ...]]:
    """Write the export of each part; what there is to say about it, by file."""
    found: dict[str, tuple[str, ...]] = {}
    for part in parts:
        if part.opened.kind == "onnx":
            save(onnx_ir.load(part.opened.path), folder / part.before)
            found[part.file] = (*part.opened.notes, *told)
            continue
        options.progress(f"exporting the {part.name} to ONNX" if part.name else "exporting to ONNX")
        model, notes = export_onnx(part.opened)
        save(model, folder / part.before)
        found[part.file] = (*part.opened.notes, *told, *notes)
    return found


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


def verify_onnx(folder: Path, plan: Plan, shift: int, *, allow_pickle: bool = False) -> Certificate:
    """The certificate of a folder, computed again on other inputs than the conversion saw.

    Raises:
        InputError: when what was converted is no longer there or has changed, or the model cannot be loaded.
    """
    opened = reopen(folder, allow_pickle=allow_pickle)
    parts, _ = parts_of(opened, read_source(folder).cache)
    lossy = quantizes_projections(parse_passes(plan.passes)) or plan_is_lossy(plan)
    entries: list[EndToEnd] = []
    with ExitStack() as kept:
        before = [session(kept.enter_context(kept_export(part, folder)), plan.provider) for part in parts]
        after = [session(folder / part.file, plan.provider) for part in parts]
        try:
            for part, unrewritten in zip(parts, before, strict=True):
                exact = in_float64(part.opened.model) if part.opened.kind == "torch" else None
                runs = runs_of(part.opened, unrewritten, exact, folder / part.file, plan.provider)
                entries += compare_runs(part.opened, runs, lossy=lossy, shift=shift, part=part.name).entries
            decoder = _decoder(parts)
            if decoder is not None:
                exact = in_float64(opened.model)
                found = compare_in_steps(opened, decoder, before, after, exact, lossy=lossy, shift=shift)
                entries += found.entries
        except DoesNotRunError as error:
            raise InputError(f"the model does not run: {error}", folder, "convert the model again") from error
    provider: Provider = "cuda" if plan.provider == "cuda" else "cpu"
    return make_certificate(plan, verified_sites(plan, provider), entries)
