"""The command line: inspect, convert, kernels, verify, bench, passes, demo.

Exit codes: 0 done; 1 a verification failed, or a kernel does not compile; 2 a wrong option or input; 3 no attention
site was found; 70 a defect of ours; 130 interrupted. Whatever goes wrong is one sentence on stderr; ``--debug`` or
``ATTNCOMPILE_DEBUG=1`` shows where it happened.

Commands import what they need when they run: ``--help`` and ``--version`` answer without loading torch.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence

from attncompile.cli.commands import app
from attncompile.cli.errors import DEFECT, DONE, FAILED, INTERRUPTED, MISUSED, NOTHING_FOUND, Misuse, explain


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    given = given or ["--help"]
    debug = "--debug" in given or os.environ.get("ATTNCOMPILE_DEBUG") == "1"
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal that lacks ≤ still gets an answer
    try:
        with _quiet(debug), _terminable():
            code = app(args=given, prog_name="attncompile", standalone_mode=False)
            sys.stdout.flush()
            if code == INTERRUPTED:  # typer turns Ctrl-C into this code without a word
                raise KeyboardInterrupt
            return code if isinstance(code, int) else DONE
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except (Exception, KeyboardInterrupt) as error:
        if debug and not isinstance(error, Misuse):
            traceback.print_exc()
        code, sentence = explain(error)
        print(f"error: {sentence}" if sentence else "", file=sys.stderr)
        return code


@contextlib.contextmanager
def _quiet(debug: bool) -> Iterator[None]:
    """Without warnings and log lines of the libraries underneath, unless a defect is being looked for."""
    if debug:
        yield
        return
    import logging

    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """A termination signal ends the work as an exception does, so that it cleans up behind itself."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    try:
        previous = signal.signal(signal.SIGTERM, end)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


__all__ = ["DEFECT", "DONE", "FAILED", "INTERRUPTED", "MISUSED", "NOTHING_FOUND", "app", "explain", "main"]
