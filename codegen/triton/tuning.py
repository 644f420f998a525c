"""Tuning: what is fastest for the tensors of a call, found by trying within a given time.

    with attncompile.tuning(seconds=60):
        model(**inputs)

Every Spec that a GPU is asked for inside, at sizes that were not tuned before, is computed by some alternatives: other
tiles of its kernel, the other target, PyTorch's own operator where that computes the same. They are compiled at the
same time, compared with what would have run, timed with what it is called with, and the fastest is kept
(:mod:`attncompile.codegen.triton.tuned`) for this process and later ones.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field, replace

import torch

from attncompile.codegen.triton.compiling import LONGEST, Workers
from attncompile.codegen.triton.generate import GeneratedModule
from attncompile.codegen.triton.trial import apart, milliseconds
from attncompile.codegen.triton.tuned import Choice, keep_choices

Run = Callable[..., "torch.Tensor | tuple[torch.Tensor, ...]"]
"""Takes a Spec's inputs in order, returns its outputs."""
Clock = Callable[[Callable[[], object]], float]
"""Milliseconds of a call."""

SHARE = 3
"""No Spec takes more than one part in so many of what is left of the time."""
COMPILING = 0.7
"""Of a Spec's time at most this goes into compiling."""
WORTH = 0.02
"""What is faster by less than this is not told from noise, and leaves everything as it is."""
FINALISTS = 3
ROUNDS = 5
"""So many of the fastest are timed again, in turns with what ran before, so often."""
UNTUNED = "as it was"
LONGEST_SESSION = 7 * 24 * 3600


@dataclass(frozen=True)
class Alternative:
    """One way to compute a Spec.

    Attributes:
        choice: what would be kept.
        make: gives the function that computes it; raises where there is no such kernel.
        module: gives what has to be compiled for it, raises as ``make`` does; ``None`` where nothing has to.
    """

    choice: Choice
    make: Callable[[], Run]
    module: Callable[[], GeneratedModule] | None = None


@dataclass(frozen=True)
class Tuned:
    """What tuning found for a Spec at some sizes.

    Attributes:
        spec: its text.
        bucket: the sizes.
        choice: what was kept.
        timed: milliseconds of everything that was timed, by description.
        refused: what was compiled and not taken, with the reason.
        untried: alternatives that the time did not reach.
    """

    spec: str
    bucket: str
    choice: Choice
    timed: dict[str, float]
    refused: dict[str, str]
    untried: int

    def __str__(self) -> str:
        faster = self.choice.instead / self.choice.milliseconds if self.choice.milliseconds else 1.0
        return (
            f"{self.bucket}: {self.choice.describe()}, {self.choice.milliseconds:.4g} ms instead of "
            f"{self.choice.instead:.4g} ({faster:.2f}x); {len(self.timed)} timed, {len(self.refused)} refused, "
            f"{self.untried} not tried"
        )


@dataclass
class Session:
    """Tuning while it lasts.

    Attributes:
        left: seconds that remain for all Specs together.
        progress: whether a bar is shown on stderr.
        found: what was tuned so far.
        thread: that it is on in; calls of others are not tuned, nor do they wait.
    """

    left: float
    progress: bool
    found: list[Tuned] = field(default_factory=list)
    thread: int = field(default_factory=threading.get_ident)
    _workers: Workers = field(default_factory=Workers, repr=False)

    def __str__(self) -> str:
        return "\n".join(map(str, self.found)) or "nothing was tuned: no kernel ran that was not tuned before"

    def tune(
        self,
        text: str,
        where: str,
        tensors: Sequence[torch.Tensor],
        default: Alternative,
        alternatives: Sequence[Alternative],
        codes: bool,
    ) -> Choice:
        """Find the fastest for these tensors, keep it and return it.

        Args:
            text: of the Spec.
            where: the bucket.
            tensors: the Spec's inputs in order.
            default: what runs without tuning.
            alternatives: the most promising first.
            codes: whether the Spec rounds operands to 8 bits.
        """
        start = time.perf_counter()
        with _bar(self.progress, f"tuning {where}", len(alternatives)) as advance:
            seconds = max(0.0, self.left / SHARE)
            tuned = tune(
                text, where, tensors, default, alternatives,
                seconds=seconds, codes=codes, workers=self._workers, advance=advance,
            )  # fmt: skip
        self.left -= time.perf_counter() - start
        self.found.append(tuned)
        try:
            keep_choices(text, tensors[0].device, {where: tuned.choice})
        except OSError as error:
            warnings.warn(f"what tuning found is not kept for later processes: {error}", RuntimeWarning, stacklevel=2)
        return tuned.choice

    def wants(self, text: str, where: str, known: Choice | None) -> bool:
        """Whether a Spec is to be tuned at these sizes: nothing is known, or not all was tried and not in here."""
        if any((tuned.spec, tuned.bucket) == (text, where) for tuned in self.found):
            return False
        return known is None or known.untried > 0

    def close(self) -> None:
        """End the processes that compile."""
        self._workers.close()


_lock = threading.RLock()
_session: Session | None = None


def session() -> Session | None:
    """Tuning that is on in this thread, unless a CUDA graph is being captured, or nothing is left of the time."""
    if _session is None or _session.left <= 0 or _session.thread != threading.get_ident():
        return None
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return None
    return _session


@contextlib.contextmanager
def tuning(seconds: float = 60.0, *, progress: bool | None = None) -> Iterator[Session]:
    """Tune every generated forward kernel that runs on a GPU inside, for the sizes that it is called with.

    What is found serves this process and later ones on the same kind of device with the same versions, for calls whose
    sizes round up to the same powers of two. Results stay within rounding of what they were: alternatives are compared
    with it on the tensors of the call.

    Calls of this thread alone; a graph that was captured before stays as it is.

    Args:
        seconds: for everything inside together, about; no kernel takes more than a third of what is left.
        progress: whether a bar is shown on stderr; where that is a terminal, unless said.

    Yields:
        What was found so far; its text is a table.

    Raises:
        ValueError: for no time or more than a week, or inside another ``tuning``.
    """
    global _session
    if not isinstance(seconds, (int, float)) or not 0 < seconds <= LONGEST_SESSION:
        raise ValueError(f"seconds is {seconds!r}; tuning takes some, and at most {LONGEST_SESSION} (a week)")
    with _lock:
        if _session is not None:
            raise ValueError("tuning is on already; leave the outer one first")
        _session = Session(seconds, sys.stderr.isatty() if progress is None else progress)
        found = _session
    try:
        yield found
    finally:
        with _lock:
            _session = None
        found.close()


def tune(
    text: str,
    where: str,
    tensors: Sequence[torch.Tensor],
    default: Alternative,
    alternatives: Sequence[Alternative],
    *,
    seconds: float,
    codes: bool = False,
    workers: Workers | None = None,
    clock: Clock | None = None,
    advance: Callable[[], None] = lambda: None,
) -> Tuned:
    """The fastest of the alternatives for these tensors.

    Args:
        text: of the Spec.
        where: the bucket.
        tensors: the Spec's inputs in order.
        default: what runs without tuning; it has to work.
        alternatives: the most promising first.
        seconds: after which nothing new begins.
        codes: whether the Spec rounds operands to 8 bits.
        workers: compile ahead; nobody unless given.
        clock: what times a call; GPU time, by replayed CUDA graphs where that is possible, unless given.
        advance: called after each alternative.
    """
    clock = clock or milliseconds
    start = time.perf_counter()
    refused: dict[str, str] = {}
    running: dict[str, tuple[Alternative, Run]] = {}
    with torch.no_grad(), torch.cuda.device_of(tensors[0]):
        usual = default.make()
        wanted = _outputs(usual(*tensors))
        until = start + COMPILING * seconds
        untried = 0
        for alternative, outcome in _compiled(alternatives, tensors, wanted, codes, until, workers):
            advance()
            name = alternative.choice.describe()
            if outcome is None:
                untried += 1
            elif isinstance(outcome, str):
                refused[name] = outcome
            else:
                running[name] = (alternative, outcome)
        contenders: list[tuple[str, Alternative, Run]] = [(UNTUNED, default, usual)]
        contenders += [(name, *each) for name, each in running.items()]
        timed: dict[str, float] = {}
        for name, _, run in contenders:
            if timed and time.perf_counter() > start + seconds:
                break
            try:
                timed[name] = clock(lambda run=run: run(*tensors))  # type: ignore[misc]
            except Exception as error:  # there may be no memory for it, or no way to capture it
                if name == UNTUNED:
                    raise
                refused[name] = _line(error)
        best = _best(contenders, timed, tensors, clock, start + 2 * seconds)
    instead = timed[UNTUNED]
    choice = replace((best or default).choice, milliseconds=instead, instead=instead, untried=untried)
    if best is not None:
        choice = replace(choice, milliseconds=timed[best.choice.describe()])
    return Tuned(text, where, choice, timed, refused, untried)


def _best(
    contenders: Sequence[tuple[str, Alternative, Run]],
    timed: dict[str, float],
    tensors: Sequence[torch.Tensor],
    clock: Clock,
    until: float,
) -> Alternative | None:
    """The fastest that is ahead of the first; ``timed`` gets the medians of those that were timed anew.
    Nobody is ahead when the time is over before the rounds are.

    They take turns with the first. One is ahead when it is in every round, and in the middle one by :data:`WORTH`: a
    GPU's clock wanders by more than that from one second to the next, with everything that runs on it.
    """
    others = sorted((each for each in contenders[1:] if each[0] in timed), key=lambda each: timed[each[0]])
    finalists = [contenders[0], *others[:FINALISTS]]
    if len(finalists) == 1:
        return None
    rounds: dict[str, list[float]] = {name: [] for name, *_ in finalists}
    for number in range(ROUNDS):
        if time.perf_counter() > until:
            return None
        for name, _, run in finalists[:: 1 if number % 2 else -1]:
            rounds[name].append(clock(lambda run=run: run(*tensors)))  # type: ignore[misc]
    timed.update({name: sorted(found)[len(found) // 2] for name, found in rounds.items()})
    usual = rounds[UNTUNED]
    ratios = {name: sorted(a / b for a, b in zip(found, usual, strict=True)) for name, found in rounds.items()}
    middle = ROUNDS // 2
    ahead = [each for each in finalists[1:] if ratios[each[0]][-1] < 1 and ratios[each[0]][middle] <= 1 - WORTH]
    best = min(ahead, key=lambda each: ratios[each[0]][middle], default=None)
    return best[1] if best is not None else None


def _compiled(
    alternatives: Sequence[Alternative],
    tensors: Sequence[torch.Tensor],
    wanted: Sequence[torch.Tensor],
    codes: bool,
    until: float,
    workers: Workers | None,
) -> Iterator[tuple[Alternative, Run | str | None]]:
    """Each alternative with its function, or why it is refused, or ``None`` when the time was over.

    Workers compile ahead, and what crashes there does not run here.
    """
    waiting: dict[Future[str | None], Alternative] = {}
    remaining = iter(alternatives)
    while True:
        over = time.perf_counter() > until
        while not over and len(waiting) < (workers.count if workers else 1):
            alternative = next(remaining, None)
            if alternative is None:
                break
            waiting[_compiling(alternative, tensors, workers)] = alternative
        if not waiting:
            break
        done, _ = wait(waiting, None if workers is None else max(0.0, until - time.perf_counter()), FIRST_COMPLETED)
        if not done and workers is not None:  # the time is over; nothing else may run while others are timed
            workers.stop()
            yield from ((alternative, None) for alternative in waiting.values())
            break
        for future in done:
            alternative = waiting.pop(future)
            yield alternative, future.result() or _checked(alternative, tensors, wanted, codes)
    yield from ((alternative, None) for alternative in remaining)


def _compiling(
    alternative: Alternative, tensors: Sequence[torch.Tensor], workers: Workers | None
) -> Future[str | None]:
    if alternative.module is not None and workers is not None:
        try:
            return workers.submit(alternative.module(), tensors)
        except ValueError as error:  # there is no such kernel
            reason: str | None = _line(error)
    else:
        reason = None
    told: Future[str | None] = Future()
    told.set_result(reason)
    return told


def _checked(
    alternative: Alternative, tensors: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor], codes: bool
) -> Run | str:
    try:
        run = alternative.make()
        return apart(_outputs(run(*tensors)), wanted, codes) or run
    except Exception as error:  # compilers and drivers raise what they like
        return _line(error)


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:LONGEST]


def _outputs(found: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return (found,) if isinstance(found, torch.Tensor) else tuple(found)


@contextlib.contextmanager
def _bar(shown: bool, what: str, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar on stderr; gives what moves it on by one."""
    if not shown:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(what, total=total)
        yield lambda: bars.advance(task)


__all__ = ["Alternative", "Session", "Tuned", "session", "tune", "tuning"]
