"""A rewritten ONNX file in another precision: rounded, judged, and what is rolled back where that fails.

A budget that does not hold is no fault as long as it does not hold without any site rewritten either: a precision is
what was asked for. A file that is not loaded, a call that does not run and a result that is no number are faults.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import onnx_ir

from attncompile.convert.agreeing import Agreeing, Making, kinds_of, without, write_rewritten
from attncompile.convert.change import Change
from attncompile.convert.clean import judged
from attncompile.convert.comparison import Compared, DoesNotRunError, Runs, compare_on
from attncompile.convert.frame import Options
from attncompile.convert.memory import release
from attncompile.convert.precision import NotStoredError, Precision
from attncompile.convert.rollback import failing_sites
from attncompile.convert.rounding import OverBudgetError, Rounded, round_model, rounding_changes
from attncompile.convert.runtime import LoadError, run, session
from attncompile.frontends.errors import InputError

FAULTS = (NotStoredError, LoadError, DoesNotRunError, OverBudgetError)
"""What a site may be the reason of."""


@dataclass(frozen=True)
class Precise:
    """A part in its precision.

    Attributes:
        rounded: what was rounded; compared: the file against the original.
        changes: how far that moved each site, by name.
    """

    rounded: Rounded
    compared: Compared
    changes: Mapping[str, Change]


@dataclass(frozen=True)
class Retry:
    """What to make in the place of a part whose precision failed.

    Attributes:
        making: the same, or with another form of the cache; rolled_back: sites that stay as they were.
        notes: what was given up beside sites.
    """

    making: Making
    rolled_back: Mapping[str, str]
    notes: tuple[str, ...] = ()


def in_precision(making: Making, agreed: Agreeing, file: Path) -> Precise | Retry:
    """Put a file that agrees with the original in its precision, or say what has to be rolled back for that.

    Args:
        making: the part; agreed: what was written; file: where that is, and where the result goes.

    Raises:
        InputError: when the precision cannot be had, or its budget does not hold, with no site rewritten either.
    """
    making.options.progress(f"rounding to {making.precision}{making.part.doing}")
    with tempfile.TemporaryDirectory(prefix="attncompile-") as scratch:
        plain = Path(scratch) / file.name
        for each in file.parent.glob(f"{file.name}*"):
            shutil.move(each, plain.parent / each.name)
        try:
            rounded, compared = rounded_file(making, agreed, plain, file)
        except FAULTS as error:
            return _retry(making, agreed, error)
        text, models = making.judged, (onnx_ir.load(plain), onnx_ir.load(file))
        assert text is not None  # every rounded part has calls that it is judged on
        changes = rounding_changes(agreed.rewritten.program, *models, text[0], making.options.provider)
    return Precise(rounded, compared, changes)


def rounded_file(making: Making, agreed: Agreeing, plain: Path, target: Path) -> tuple[Rounded, Compared]:
    """Round a file, and compare the result with the original.

    Args:
        making: the part; agreed: what it is compared with; plain: the file to round; target: where the result goes.

    Raises:
        InputError, DoesNotRunError: as :func:`attncompile.convert.rounding.round_model`, and for results that are not
            finite, or files that are no valid ONNX.
    """
    precision, options, texts = making.precision, making.options, making.texts
    budget = budget_of(options, precision)
    assert precision is not None and budget is not None and texts is not None  # it rounds
    compared_with = replace(agreed.known, exact=None)  # rounding is far above what float64 would show

    def loaded(file: Path) -> Runs:
        return replace(compared_with, converted=partial(run, session(file, options.provider, lean=True)))

    opened, version = making.part.opened, options.onnxruntime
    made = round_model(opened, plain, target, precision, budget, texts, loaded, options.provider, version)
    compared = compare_on(agreed.inputs, loaded(target), budget)
    release()
    clean = judged(target, making.before)
    problem = compared.problem() or clean.problem
    if problem is not None:
        raise DoesNotRunError(problem)
    return made, replace(compared, notes=(*compared.notes, *clean.notes))


def _retry(making: Making, agreed: Agreeing, error: ValueError) -> Retry:
    """Raises the error where neither the form of the cache nor a site is the reason."""
    precision, said = making.precision, error.what if isinstance(error, InputError) else str(error)
    assert precision is not None  # it rounds
    finite = isinstance(error, OverBudgetError) and error.finite
    if isinstance(error, NotStoredError) and not agreed.rolled_back:
        raise error  # a model that has no such cache, whatever is rolled back
    if precision.cache is not None and not finite:
        other = precision.without_cache()
        told = f"keys and values are cached in floats in all layers, which share one form, not in {precision.cache} "
        told += f"bits: {said}"
        return Retry(replace(making, precision=other), agreed.rolled_back, (told,))
    if not agreed.rewritten.choices or (finite and precision.states is None):
        raise error  # where projections alone are rounded, attention computes what was compared already
    wrong = f"in {precision}: {said}"
    found = failing_sites(kinds_of(agreed.rewritten), wrong, partial(_fails, making, agreed))
    if found.sites is None:
        raise error
    return Retry(making, {**agreed.rolled_back, **found.sites})


def _fails(making: Making, agreed: Agreeing, sites: frozenset[str]) -> str | None:
    """Tries the part with fewer sites rewritten."""
    rewritten, part = agreed.rewritten, making.part
    told = f"finding the sites that differ in {making.precision}{part.doing}"
    making.options.progress(f"{told}: {len(sites)} of {len(rewritten.choices)} rewritten")
    with tempfile.TemporaryDirectory(dir=making.scratch) as folder:
        plain, target = Path(folder) / f"plain_{part.file}", Path(folder) / part.file
        write_rewritten(making, plain, without(rewritten, sites, agreed.rolled_back), rewritten.program)
        try:
            rounded_file(making, agreed, plain, target)
        except FAULTS as error:
            return f"in {making.precision}: {error.what if isinstance(error, InputError) else error}"
        finally:
            release()
    return None


def budget_of(options: Options, precision: Precision | None) -> float | None:
    """The largest relative change of an output: what was asked for, or the precision's own."""
    if options.budget is not None or precision is None:
        return options.budget
    return precision.budget


__all__ = ["FAULTS", "Precise", "Retry", "budget_of", "in_precision", "rounded_file"]
