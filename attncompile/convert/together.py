"""Encoder and decoder of one model, made so that they agree with the original together, too.

Each agrees by itself. Where a generation in steps does not, sites of either may be the reason: fewer of them are
rewritten until it does, and the parts concerned are made again.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from attncompile.convert.agreeing import kinds_of, write_rewritten
from attncompile.convert.comparison import Compared
from attncompile.convert.frame import disagreement
from attncompile.convert.in_precision import FAULTS, budget_of, rounded_file
from attncompile.convert.in_steps import KnownInSteps, compare_in_steps, known_in_steps
from attncompile.convert.memory import release
from attncompile.convert.onnx_part import MadePart, make_part
from attncompile.convert.rollback import failing_sites
from attncompile.convert.runtime import LoadError
from attncompile.frontends.encoder_decoder import DecoderModel
from attncompile.frontends.errors import InputError


@dataclass(frozen=True)
class Together:
    """Parts that agree together: what was made of each, and the comparison in steps."""

    done: tuple[MadePart, ...]
    compared: Compared


def made_together(decoder: DecoderModel, done: Sequence[MadePart], folder: Path) -> Together:
    """Compare the parts in steps, and roll back sites where they do not agree.

    Args:
        decoder: how the second part of the original is called.
        done: encoder and decoder, each in agreement by itself; folder: where they lie.

    Raises:
        InputError: when they do not agree without any site rewritten either.
    """
    with tempfile.TemporaryDirectory(dir=done[0].making.scratch, prefix="steps_") as scratch:
        return _made_together(_known(decoder, done, Path(scratch) / "known"), done, folder)


def _known(decoder: DecoderModel, done: Sequence[MadePart], scratch: Path) -> KnownInSteps:
    """What the original gives in steps, computed once however many forms of the parts are tried."""
    making = done[0].making
    making.options.progress("comparing generation with the original")
    exports, lossy = [one.making.export for one in done], any(one.lossy for one in done)
    provider, progress = making.options.provider, making.options.progress
    return known_in_steps(decoder, exports, provider, scratch, lossy=lossy, progress=progress)


def _made_together(known: KnownInSteps, done: Sequence[MadePart], folder: Path) -> Together:
    target = done[0].making.target
    while True:
        compared = _compared(known, done, [folder / one.making.part.file for one in done])
        if isinstance(compared, Compared):
            return Together(tuple(done), compared)
        kinds = {_key(one, site): kind for one in done for site, kind in kinds_of(one.rewritten).items()}
        if not kinds:
            raise disagreement(compared, target)
        found = failing_sites(kinds, f"in steps: {compared}", _fails(known, done))
        if found.sites is None:
            raise disagreement(f"{compared} (with no site rewritten too)", target)
        done = [_again(one, folder, _rolled_back(one, found.sites)) for one in done]


def _again(one: MadePart, folder: Path, rolled_back: Mapping[str, str]) -> MadePart:
    """The part with more sites rolled back; as it is where there are no more."""
    if rolled_back.keys() == one.agreed.rolled_back.keys():
        return one
    return make_part(one.making, folder, rolled_back, one.agreed)


def _key(one: MadePart, site: str) -> str:
    """A name for a site that those of the other part do not have."""
    return f"{one.making.part.file}: {site}"


def _rolled_back(one: MadePart, sites: Mapping[str, str]) -> dict[str, str]:
    here = {site: sites[_key(one, site)] for site in kinds_of(one.rewritten) if _key(one, site) in sites}
    return {**one.agreed.rolled_back, **here}


def _compared(known: KnownInSteps, done: Sequence[MadePart], after: Sequence[Path]) -> Compared | str:
    """What a comparison in steps found, or what is wrong."""
    making = done[0].making
    scratch = Path(tempfile.mkdtemp(dir=making.scratch, prefix="steps_"))
    try:
        compared = compare_in_steps(
            known,
            after,
            making.options.provider,
            scratch / "results",
            lossy=any(one.lossy for one in done),
            budget=budget_of(making.options, making.precision),
            progress=making.options.progress,
        )
    except LoadError as error:
        return error.what
    except InputError:
        raise
    except ValueError as error:  # they do not run, or do not fit together
        return str(error)
    finally:
        release()
        shutil.rmtree(scratch, ignore_errors=True)
    return compared.problem() or compared


def _fails(known: KnownInSteps, done: Sequence[MadePart]) -> Callable[[frozenset[str]], str | None]:
    """Tries both parts with fewer sites rewritten."""

    def fails(sites: frozenset[str]) -> str | None:
        making = done[0].making
        making.options.progress(f"finding the sites that differ in steps: {len(sites)} rewritten")
        with tempfile.TemporaryDirectory(dir=making.scratch) as folder:
            files = []
            for one in done:
                files.append(Path(folder) / one.making.part.file)
                others = {site: "tried without" for site in one.rewritten.choices if _key(one, site) not in sites}
                back = {**one.agreed.rolled_back, **others}
                plain = files[-1].with_name(f"plain_{files[-1].name}") if one.making.rounds else files[-1]
                write_rewritten(one.making, plain, back, one.rewritten.program)
                if one.making.rounds:
                    try:
                        rounded_file(one.making, one.agreed, plain, files[-1])
                    except FAULTS as error:
                        return f"in {one.making.precision}: {error}"
            found = _compared(known, done, files)
        return None if isinstance(found, Compared) else f"in steps: {found}"

    return fails


__all__ = ["Together", "made_together"]
