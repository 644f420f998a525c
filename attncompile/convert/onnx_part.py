"""One ONNX file of a conversion: exported, lifted, lowered, loaded, compared.

Most models become one file. An encoder-decoder with its caches becomes two, and each is rewritten and compared by
itself, on the results of the original for what it reads of the other.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import onnx_ir
import onnxruntime

from attncompile.codegen.onnx.capabilities import Provider
from attncompile.codegen.onnx.quantize import quantize_projections
from attncompile.convert.calibration import Call, calls, text_call
from attncompile.convert.change import Change, changes_in_onnx, difference, name_values, observed
from attncompile.convert.comparison import (
    Compared,
    DoesNotRunError,
    Run,
    Runs,
    compare_runs,
    in_float64,
    outputs_of,
)
from attncompile.convert.frame import Options, disagreement, lossy_rewrites
from attncompile.convert.onnx_rewrite import Rewritten, rewrite_onnx
from attncompile.convert.onnx_sites import site_certificates
from attncompile.convert.runtime import run, save, session
from attncompile.convert.timing import latency_measurement, size_measurement
from attncompile.convert.unrewritten import UNREWRITTEN, load_unrewritten, save_unrewritten
from attncompile.frontends.checkpoint import OpenedModel
from attncompile.frontends.example_inputs import positions_of
from attncompile.passes import PassCall
from attncompile.report import Measurement
from attncompile.verify import SiteCertificate

MODEL = "model.onnx"


@dataclass(frozen=True)
class Part:
    """What one file is made from.

    Attributes:
        file: its name.
        opened: the model, or the function of a model, that it computes.
    """

    file: str
    opened: OpenedModel

    @property
    def name(self) -> str:
        """What it is of the whole model; "" for all of it."""
        return "" if self.file == MODEL else self.file.removesuffix(".onnx")

    @property
    def before(self) -> str:
        """The file with its export, while the conversion runs."""
        return f"before_{self.file}"

    @property
    def unrewritten(self) -> str:
        """The file that keeps its export for a verification."""
        return f"{Path(UNREWRITTEN).stem}_{self.file}" if self.name else UNREWRITTEN


@dataclass(frozen=True)
class MadePart:
    """What became of a part.

    Attributes:
        part: what it is.
        rewritten: its sites; sites: their certificates.
        quantised: how many of its projections multiply in INT8.
        compared: the file against the original.
        changes: how far lossy passes moved each site, by name.
        measurements: sizes and latencies.
        notes: what the reader should know.
    """

    part: Part
    rewritten: Rewritten
    sites: tuple[SiteCertificate, ...]
    quantised: int
    compared: Compared
    changes: Mapping[str, Change]
    measurements: tuple[Measurement, ...]
    notes: tuple[str, ...]

    @property
    def lossy(self) -> bool:
        """Whether it may compute something else than before."""
        return self.quantised > 0 or any(outcome.lossy for outcome in self.rewritten.outcomes)


def make_part(
    part: Part,
    target: str | Path,
    requested: Sequence[PassCall],
    folder: Path,
    options: Options,
    notes: tuple[str, ...],
) -> MadePart:
    """Rewrite an export and write the result beside it, after comparing both with the original.

    When the result does not agree, the plain decomposition is tried, and the notes say so.

    Args:
        part: what to make; its export lies in the folder.
        target: what is converted, for errors.
        requested: passes to run on every site.
        folder: where to write; options: how.
        notes: of the export.

    Raises:
        InputError: when no result agrees with the original.
    """
    opened, provider = part.opened, options.provider
    doing = f" of the {part.name}" if part.name else ""
    unrewritten = session(folder / part.before, provider)
    exact = in_float64(opened.model) if opened.kind == "torch" else None
    longest = positions_of(opened.config) if opened.config is not None else None
    tried: list[str] = []
    for preference in dict.fromkeys((options.prefer, "decomposed")):
        options.progress(f"finding attention{doing}")
        source, untrained = onnx_ir.load(folder / part.before), options.allow_untrained
        rewritten = rewrite_onnx(source, opened.name, requested, provider, preference, untrained, notes, longest)
        options.progress(f"writing the model{doing}")
        quantised = _write_model(rewritten.model, folder / part.file, quantize=quantizes_projections(requested))
        options.progress(f"comparing with the original{doing}")
        lossy = quantised > 0 or any(outcome.lossy for outcome in rewritten.outcomes)
        try:
            runs = runs_of(opened, unrewritten, exact, folder / part.file, provider)
            compared = compare_runs(opened, runs, lossy=lossy, part=part.name)
            problem = compared.problem()
        except DoesNotRunError as error:
            problem = str(error)
        if problem is None:
            break
        tried.append(f"with prefer={preference} the result did not agree and was dropped: {problem}")
    else:
        raise disagreement(str(problem), target)
    options.progress(f"checking every site{doing}")
    sites = site_certificates(rewritten, provider)
    options.progress(f"measuring{doing}")
    changes, told = _changes(part, rewritten, folder, provider, quantised)
    measured, unchanged = _measurements(part, not (rewritten.changed or quantised), folder, provider)
    if quantised:
        told.insert(
            0,
            f"{quantised} projections multiply in INT8 (ONNX Runtime's dynamic quantiser); attention products stay in "
            "float",
        )
    said = tuple(
        f"{part.name}: {note}" if part.name else note for note in (*rewritten.notes, *told, *tried, *unchanged)
    )
    return MadePart(part, rewritten, tuple(sites), quantised, compared, changes, tuple(measured), said)


def finish_part(part: Part, folder: Path) -> None:
    """Keep the export without its weights, where they are the original's, and remove the rest of it."""
    if part.opened.kind == "torch":
        save_unrewritten(onnx_ir.load(folder / part.before), part.opened, folder / part.unrewritten)
    for leftover in folder.glob(f"{part.before}*"):
        leftover.unlink()


def quantizes_projections(requested: Sequence[PassCall]) -> bool:
    return any(
        call.rewrite.name == "quantize.int8" and getattr(call.options, "projections", False) for call in requested
    )


def _write_model(model: onnx_ir.Model, file: Path, *, quantize: bool) -> int:
    """Write the result; returns how many projections were quantised."""
    folder = file.parent
    for stale in folder.glob(f"{file.name}*"):
        stale.unlink()
    if not quantize:
        save(model, file)
        return 0
    save(model, folder / "float.onnx")
    count = quantize_projections(folder / "float.onnx", file)
    for stale in folder.glob("float.onnx*"):
        stale.unlink()
    return count


def runs_of(
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
    part: Part, rewritten: Rewritten, folder: Path, provider: Provider, quantised: int
) -> tuple[dict[str, Change], list[str]]:
    """How far lossy passes moved each site on running text, and what there is to say about it."""
    rewrites = lossy_rewrites(rewritten.outcomes)
    if not rewrites and not quantised:
        return {}, []
    text, export = text_call(part.opened), folder / part.before
    if text is None:
        return {}, ["the model takes no text, so the change of each site is measured on random inputs only"]
    found: dict[str, Change] = {}
    if quantised:
        outputs = {
            site.name: site.region.outputs[0].value
            for site in rewritten.program.sites
            if site.status == "lifted" and site.region is not None
        }
        found |= _quantised_changes(outputs, export, text, provider)
    found |= changes_in_onnx(onnx_ir.load(export), text, provider, rewrites)
    missing = len({one.site.name for one in rewrites} - set(found))
    told = [f"{missing} sites lie in a body of If or Loop; their change is measured on random inputs only"]
    return found, told if missing else []


def _quantised_changes(outputs: Mapping[str, str], export: Path, text: Call, provider: str) -> dict[str, Change]:
    """The change of each site's output, by name, when the projections of the unrewritten model are quantised.

    The rewritten model has other values between its nodes, so the same quantiser is run on the model before.

    Args:
        outputs: native result of each site.
        export: file of the unrewritten model; text: what both run on; provider: where.
    """
    before = onnx_ir.load(export)
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


def _measurements(part: Part, unchanged: bool, folder: Path, provider: str) -> tuple[list[Measurement], list[str]]:
    """Size and latency before and after, and a sentence where nothing was changed."""
    export, file, which = folder / part.before, folder / part.file, f" of {part.file}" if part.name else ""
    found = [size_measurement(export, file, which)]
    if unchanged:
        return found, ["nothing was rewritten: the model runs as it did, so its latency was not measured"]
    before, after = session(export, provider), session(file, provider)
    what = "torch's own export" if part.opened.kind == "torch" else "the given file"
    found += [latency_measurement(before, after, call, what, which) for call in calls(part.opened)[-1:]]
    return found, []


@contextmanager
def kept_export(part: Part, folder: Path) -> Iterator[Path]:
    """A part before any site was replaced, as a file for as long as the block runs.

    Raises:
        InputError: when what the conversion kept of it is missing or damaged.
    """
    if part.opened.kind == "onnx":
        yield part.opened.path
        return
    with tempfile.TemporaryDirectory(prefix="attncompile-") as scratch:
        file = Path(scratch) / part.before
        save(load_unrewritten(folder / part.unrewritten, part.opened), file)
        yield file


__all__ = [
    "MODEL",
    "MadePart",
    "Part",
    "finish_part",
    "kept_export",
    "make_part",
    "quantizes_projections",
    "runs_of",
]
