"""A rewritten ONNX file that agrees with the original: sites that fail go back to what they were, the rest stays.

A site can fail alone, against its Spec, or only in the whole model, against the original; the latter are found by
:mod:`attncompile.convert.rollback`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import onnx_ir

from attncompile.convert.blame import blaming
from attncompile.convert.calibration import Call
from attncompile.convert.clean import Before, judged
from attncompile.convert.comparison import Compared, Inputs, Runs, compare_on, inputs_of
from attncompile.convert.frame import Options, disagreement
from attncompile.convert.memory import release
from attncompile.convert.onnx_rewrite import Rewritten, rewrite_onnx
from attncompile.convert.onnx_runs import known_runs, running, session_results
from attncompile.convert.onnx_sites import Known, checked_sites
from attncompile.convert.part import Part
from attncompile.convert.precision import Precision
from attncompile.convert.providers import kernels_of
from attncompile.convert.rollback import Fails, failing_sites
from attncompile.convert.rounding import Texts
from attncompile.convert.runtime import LoadError, save
from attncompile.frontends.cached import Generating
from attncompile.frontends.errors import InputError
from attncompile.frontends.positions import positions_of
from attncompile.lift import Program
from attncompile.passes import PassCall
from attncompile.verify import SiteCertificate


@dataclass(frozen=True)
class Making:
    """What all forms of a part have in common.

    Attributes:
        part: what is made; its export lies in ``scratch``.
        target: what is converted, for errors.
        requested: passes to run on every site.
        options: how.
        precision: of the result; ``None`` is the model's own.
        notes: of the export.
        texts: what a lossy result is calibrated and judged with; ``None`` where nothing asks for any.
        scratch: a folder for files that are wanted while the conversion runs.
        before: the export, for what was wrong with it.
    """

    part: Part
    target: str | Path
    requested: Sequence[PassCall]
    options: Options
    precision: Precision | None
    notes: tuple[str, ...]
    texts: Texts | None
    scratch: Path
    before: Before

    @property
    def export(self) -> Path:
        """The file before any site was replaced."""
        return self.scratch / self.part.before

    @property
    def rounds(self) -> bool:
        """Whether the precision changes what is computed."""
        return self.precision is not None and self.precision.budget is not None

    @property
    def judged(self) -> tuple[Call, ...] | None:
        """Calls that a lossy result is judged on, where they were chosen."""
        return self.texts.judged if self.texts is not None else None


@dataclass(frozen=True)
class Agreeing:
    """A rewritten file that agrees with the original.

    Attributes:
        rewritten: its sites; sites: their certificates.
        compared: the file against the original.
        inputs: what it was compared on; known: what the forms that it was compared with gave.
        alone: what came of running sites alone.
        rolled_back: sites that are as they were, with the reason.
    """

    rewritten: Rewritten
    sites: tuple[SiteCertificate, ...]
    compared: Compared
    inputs: Inputs
    known: Runs
    alone: Known
    rolled_back: Mapping[str, str]


@dataclass(frozen=True)
class Problem:
    """What is wrong with a result, in words, and the calls on which that showed; all of them where none are named."""

    said: str
    calls: tuple[Call, ...] = ()


def write_rewritten(
    making: Making, file: Path, rolled_back: Mapping[str, str], program: Program | None = None
) -> Rewritten:
    """Rewrite the export of a part and write the result.

    Args:
        making: the part; file: where the result goes; rolled_back: sites that stay as they were, with the reason.
        program: what was lifted from the same export before.
    """
    part, options, precision = making.part, making.options, making.precision
    opened, kernels = part.opened, kernels_of(options.provider)
    rewritten = rewrite_onnx(
        onnx_ir.load(making.export),
        opened.name,
        making.requested,
        kernels,
        options.prefer,
        options.allow_untrained,
        making.notes,
        positions_of(opened.config) if opened.config is not None else None,
        options.onnxruntime,
        one_buffer=isinstance(opened, Generating) and opened.shared,
        # on a CPU most of float16 is computed in float32 between two casts, so what was tried there holds
        dtype=precision.states if precision is not None and kernels != "cpu" else None,
        program=program,
        rolled_back=rolled_back,
        guarded=partial(blaming, opened.path, making.before) if opened.kind == "onnx" else nullcontext,
    )
    for stale in file.parent.glob(f"{file.name}*"):  # of an earlier form
        stale.unlink()
    save(rewritten.model, file)
    return rewritten


def agreeing(
    making: Making, file: Path, rolled_back: Mapping[str, str], earlier: Agreeing | None = None
) -> Agreeing:
    """Write a part as a file that agrees with the original, in the precision of the export.

    What the original gives is computed once in a conversion: it lies in files of ``making.scratch``, so that it takes
    no memory, and ``earlier`` hands it on. So is what was lifted, and what sites give alone.

    Args:
        making: the part; file: where it goes; rolled_back: sites that stay as they were, with the reason.
        earlier: the same part with fewer sites rolled back.

    Raises:
        InputError: when it does not agree without any site rewritten either.
    """
    part, options, budget = making.part, making.options, None if making.rounds else making.options.budget
    back, attempts = dict(rolled_back), 0
    program, alone, inputs, known = None, Known(), Inputs(()), None
    if earlier is not None:
        program, alone, inputs, known = earlier.rewritten.program, earlier.alone, earlier.inputs, earlier.known
    while True:
        options.progress(f"{'rewriting' if program else 'finding'} attention{part.doing}")
        rewritten = write_rewritten(making, file, back, program)
        program = rewritten.program
        options.progress(f"checking every site{part.doing}")
        checked = checked_sites(rewritten, options.provider, alone)
        release()
        if checked.failures:
            back |= checked.failures
            continue
        lossy = any(outcome.lossy for outcome in rewritten.outcomes)
        if known is None or (lossy and not inputs.texts):
            inputs = inputs_of(
                part.opened,
                lossy=lossy or making.rounds,
                part=part.name,
                texts=making.judged,
                provider=options.provider,
            )
            results, told = _fresh(making) / "known", options.progress
            known = known_runs(
                part.opened, making.export, options.provider, inputs, results, told, doing=part.doing
            )
        seen = inputs if lossy else Inputs(inputs.calls)
        compared = compare_file(making, file, seen, known, budget)
        if isinstance(compared, Compared):
            return Agreeing(rewritten, checked.certificates, compared, inputs, known, alone, back)
        if not rewritten.choices:
            raise disagreement(compared.said, making.target)
        fewer = Inputs(compared.calls) if compared.calls and not seen.texts else seen
        fails = _fails(making, rewritten, back, fewer, known, budget)
        found = failing_sites(kinds_of(rewritten), f"in the whole model: {compared.said}", fails, made=attempts)
        attempts += found.attempts
        if found.sites is None:
            raise disagreement(f"{compared.said} (with no site rewritten too)", making.target)
        back |= found.sites


def kinds_of(rewritten: Rewritten) -> dict[str, tuple[str, str]]:
    """The rewritten sites of a model in its order, each with the operator and what that computes."""
    return {
        outcome.site.name: (outcome.operator, outcome.passes.spec.fingerprint())
        for outcome in rewritten.outcomes
        if outcome.site.name in rewritten.choices and outcome.passes is not None
    }


def without(rewritten: Rewritten, sites: frozenset[str], back: Mapping[str, str]) -> dict[str, str]:
    """What is rolled back where just these sites are to stay rewritten."""
    return {**back, **{name: "tried without" for name in rewritten.choices if name not in sites}}


def compare_file(
    making: Making, file: Path, inputs: Inputs, known: Runs, budget: float | None
) -> Compared | Problem:
    """Load a result, run it, compare it with what the other forms gave, and ask others what they have against it.

    Args:
        making: the part; file: the result.
        inputs: what it is run on; known: the other forms on these; budget: of lossy passes.
    """
    with tempfile.TemporaryDirectory(dir=making.scratch) as results:  # one attempt's can be gigabytes
        return _compared(making, file, inputs, known, budget, Path(results) / "results")


def _compared(
    making: Making, file: Path, inputs: Inputs, known: Runs, budget: float | None, results: Path
) -> Compared | Problem:
    options, part = making.options, making.part
    try:
        told = running(options.progress, f"the result{part.doing}")
        converted = session_results(file, options.provider, inputs.every, results, told)
        options.progress(f"comparing with the original{part.doing}")
        compared = compare_on(inputs, replace(known, converted=converted), budget)
    except LoadError as error:
        return Problem(error.what)
    except InputError:  # nothing that a site could be the reason of
        raise
    except ValueError as error:  # it does not run, or a result has another shape
        return Problem(str(error))
    finally:
        release()
    said = compared.problem()
    if said is None:
        release()  # what was compared, before the result is loaded once more
        clean = judged(file, making.before)
        if clean.problem is not None:
            return Problem(clean.problem)
        return replace(compared, notes=(*compared.notes, *clean.notes))
    where = {entry.inputs for entry in compared.faults()}
    return Problem(said, tuple(call for call in inputs.calls if call.what in where))


def _fails(
    making: Making, rewritten: Rewritten, back: Mapping[str, str], inputs: Inputs, known: Runs, budget: float | None
) -> Fails:
    """Tries the part with fewer sites rewritten."""

    def fails(sites: frozenset[str]) -> str | None:
        told = f"finding the sites that differ{making.part.doing}: {len(sites)} of {len(rewritten.choices)} rewritten"
        making.options.progress(told)
        with tempfile.TemporaryDirectory(dir=making.scratch) as folder:
            file = Path(folder) / making.part.file
            write_rewritten(making, file, without(rewritten, sites, back), rewritten.program)
            found = compare_file(making, file, inputs, known, budget)
        return f"in the whole model: {found.said}" if isinstance(found, Problem) else None

    return fails


def _fresh(making: Making) -> Path:
    return Path(tempfile.mkdtemp(dir=making.scratch, prefix=f"{making.part.file}_"))


__all__ = ["Agreeing", "Making", "Problem", "agreeing", "compare_file", "kinds_of", "without", "write_rewritten"]
