"""A process that reads damaged files, so that whatever takes it down takes nothing else down.

    python -m tests.frontends.damage_worker

Each line of its input is a job, ``{"do": "lift" | "inspect" | "convert", "file": …, "out": …}``, each line of its
output what became of it: ``made``, ``refused`` (one sentence for a person, nothing written), ``unforeseen`` (the same,
but it quotes an error from below), or ``failed`` with what was wrong.
It may take :data:`MORE` bytes more than it has after its imports.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import sys
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # they are imported where they are needed
    import numpy as np
    import torch

MORE = 2 << 30
"""Bytes of address space: the files are small, and so is all that is needed for them."""


LONGEST_SUM = 64
"""Terms of the longest sum in them: inner channels of a perceptron."""

TOO_MUCH = ("MemoryError", "bad_alloc", "allocate")
"""Parts of what is said where memory runs out."""


def limit_memory() -> None:
    """Let any allocation beyond the bound fail."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    bound = pages * resource.getpagesize() + MORE
    resource.setrlimit(resource.RLIMIT_AS, (bound, bound))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def shown(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:400]


def refused(error: Exception) -> str:
    """``refused`` for one sentence, ``unforeseen`` where that says no more than what was raised below."""
    said = str(error).strip()
    if "\n" in said or any(part in said for part in TOO_MUCH):
        return f"no sentence: {said[:400]}"
    return f"unforeseen: {said}" if "cannot be read as a model" in said else "refused"


def lifted(file: Path) -> str:
    """Lift and print; returns what was wrong, or ``refused``, or ``made``."""
    import attncompile

    try:
        str(attncompile.lift(file))
    except (attncompile.InputError, attncompile.CaptureError) as error:
        return refused(error)
    return "made"


def inspected(file: Path) -> str:
    """The command ``inspect``."""
    from attncompile import cli

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(["inspect", str(file)])
    said = err.getvalue().strip()
    if code in (cli.DONE, cli.NOTHING_FOUND):
        return "made"
    if code != cli.MISUSED or "\n" in said or "out of memory" in said:
        return f"exit code {code}: {said[:400]}"
    return f"unforeseen: {said}" if "cannot be read as a model" in said else "refused"


def converted(file: Path, out: Path) -> str:
    """``convert`` to ONNX; what comes of it gives what ONNX Runtime gives for the file itself."""
    import attncompile

    before = {path.name for path in out.parent.iterdir()}
    try:
        attncompile.convert(file, out)
    except ValueError as error:
        left = {path.name for path in out.parent.iterdir()} - before
        if left:
            return f"left {sorted(left)} behind: {shown(error)}"
        if type(error) is ValueError and not _ours(error):
            return f"not our own error: {shown(error)}"
        return refused(error)
    return _disagreement(file, out / "model.onnx") or "made"


def _ours(error: BaseException) -> bool:
    import traceback

    return "attncompile" in Path(traceback.extract_tb(error.__traceback__)[-1].filename).parts


def _disagreement(before: Path, after: Path) -> str:
    """How the results of two files differ on random inputs, in words; empty where they do not."""
    import numpy as np
    import onnxruntime

    from attncompile.convert.onnx_runs import runnable

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    files = (runnable(before, after.parent, before), after)
    try:
        first = onnxruntime.InferenceSession(str(files[0]), options, providers=["CPUExecutionProvider"])
    except Exception:  # as it stands it loads with its nodes fused alone, and there is nothing to compare with
        return ""
    second = onnxruntime.InferenceSession(str(files[1]), options, providers=["CPUExecutionProvider"])
    generator, feeds = np.random.default_rng(0), {}
    for value in first.get_inputs():
        shape = [size if isinstance(size, int) else 3 for size in value.shape]
        kinds: dict[str, Any] = {"tensor(float16)": np.float16, "tensor(double)": np.float64}
        drawn = generator.standard_normal(shape).astype(kinds.get(value.type, np.float32))
        whole = {"tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(bool)": np.bool_}.get(value.type)
        feeds[value.name] = drawn if whole is None else np.ones(shape, whole)
    try:
        wanted = first.run(None, feeds)
    except Exception:  # what does not run on these inputs tells nothing
        return ""
    names = [value.name for value in first.get_outputs()]
    if names != [value.name for value in second.get_outputs()]:
        return f"the outputs {names} became {[value.name for value in second.get_outputs()]}"
    found = second.run(None, feeds)
    for name, one, other in zip(names, wanted, found, strict=True):
        if one.shape != other.shape or one.dtype != other.dtype:
            return f"{name} was {one.dtype}{one.shape} and is {other.dtype}{other.shape}"
    return _beyond_rounding(before, feeds, dict(zip(names, zip(wanted, found, strict=True), strict=True)))


def _beyond_rounding(
    file: Path, feeds: Mapping[str, np.ndarray], results: Mapping[str, tuple[np.ndarray, np.ndarray]]
) -> str:
    """Which output of a conversion is further from float64 than rounding explains, in words; empty where none is.

    Args:
        file: what was converted.
        feeds: its inputs.
        results: for each output what the file gives, and what the conversion does.
    """
    import torch

    from attncompile.verify import MismatchError, derive_tolerance, require_within

    exact = _in_float64(file, feeds, results)
    for name, (one, other) in results.items():
        if one.dtype.kind == "f":
            given, made = torch.from_numpy(one), torch.from_numpy(other)
            truth = exact.get(name, given.double())
            try:
                require_within(made, truth, derive_tolerance(truth, given, LONGEST_SUM).bound, name)
            except MismatchError as error:
                return str(error)
    return ""


def _in_float64(file: Path, feeds: Mapping[str, np.ndarray], names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Results of a file by ONNX's reference in float64; none where that does not compute it."""
    import onnx_ir
    import torch

    from attncompile.frontends.onnx import onnx_graph
    from attncompile.ir import Size

    try:
        graph = onnx_graph(onnx_ir.load(file))
        sizes = {
            size.name: extent
            for name, value in feeds.items() if name in graph.infos
            for size, extent in zip(graph.infos[name].shape, value.shape, strict=True) if isinstance(size, Size)
        }  # fmt: skip
        given = {name: torch.from_numpy(value) for name, value in feeds.items()}
        return {name: value.double() for name, value in graph.evaluate(list(names), given, sizes).items()}
    except Exception:  # what ONNX Runtime alone computes has no other truth than its own results
        return {}


def done(job: dict[str, str]) -> dict[str, str]:
    """What became of a job."""
    file = Path(job["file"])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            said = {"lift": lifted, "inspect": inspected}[job["do"]](file) if job["do"] != "convert" else converted(
                file, Path(job["out"])
            )
    except BaseException as error:  # all that may come, so that it is told and the next file is read
        import traceback

        frames = traceback.extract_tb(error.__traceback__)
        where = next((f for f in reversed(frames) if "attncompile" in Path(f.filename).parts), frames[-1])
        said = f"{shown(error)} (in {Path(where.filename).name}:{where.lineno})"
    if any(part in said for part in TOO_MUCH):
        said = f"asked for too much memory: {said}"
    outcome = next((one for one in ("made", "refused", "unforeseen") if said.startswith(one)), "failed")
    return {"outcome": outcome, "said": said if outcome in ("unforeseen", "failed") else ""}


def main() -> None:
    """Do the jobs, one after the other."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # libraries print, too
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    import attncompile.api
    import attncompile.cli.commands
    import attncompile.convert.onnx
    import attncompile.lift  # noqa: F401

    limit_memory()
    for line in sys.stdin:
        replies.write(json.dumps(done(json.loads(line))) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
