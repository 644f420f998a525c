"""ONNX models timed in turns on the same inputs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
from pydantic import Field

from attncompile.convert.artifact import Progress, silent
from attncompile.convert.calibration import Call
from attncompile.convert.providers import named_provider, session_providers
from attncompile.convert.runtime import feeds, session
from attncompile.convert.timing import interleaved_medians, size_measurement
from attncompile.frontends.errors import InputError
from attncompile.frontends.example_inputs import onnx_arguments
from attncompile.frontends.onnx_file import read_onnx_file
from attncompile.plan.schema import load_plan
from attncompile.report import machine
from attncompile.verify.certificate import Record, tool_versions

Shape = tuple[int, int]


class Timed(Record):
    """One call: batch, tokens, the median of each model in milliseconds, how often each ran, whether that settled."""

    batch: int
    tokens: int
    milliseconds: dict[str, float]
    runs: int
    settled: bool


class Bench(Record):
    """Models beside each other.

    Attributes:
        schema_version: 1; written as ``schema``.
        provider: execution provider; machine: where; versions: of the tools.
        past: cached positions in front of each call; threads: of each model, ``null`` for ONNX Runtime's own choice.
        megabytes: size of each model with its weights, by name.
        calls: one entry for each shape.
    """

    model_config = Record.model_config | {"populate_by_name": True, "serialize_by_alias": True}

    schema_version: int = Field(1, alias="schema")
    provider: str
    machine: str = Field(default_factory=machine)
    versions: dict[str, str] = Field(default_factory=tool_versions)
    past: int
    threads: int | None
    megabytes: dict[str, float]
    calls: tuple[Timed, ...]


def read_shapes(words: Sequence[str]) -> tuple[Shape, ...]:
    """Batch and tokens of each ``BATCHxTOKENS``. Raises ValueError for anything else."""
    found = []
    for word in words:
        match = re.fullmatch(r"([1-9]\d*)[x×]([1-9]\d*)", word)
        if match is None:
            raise ValueError(f"--shape {word!r} is not BATCHxTOKENS, such as 16x128")
        found.append((int(match[1]), int(match[2])))
    return tuple(dict.fromkeys(found))


def bench_models(
    models: Sequence[Path],
    provider: str,
    shapes: Sequence[Shape],
    *,
    past: int = 0,
    threads: int | None = None,
    seconds: float = 30.0,
    progress: Progress = silent,
) -> Bench:
    """Time models on calls of each shape; inputs are made up from what the first one takes.

    Args:
        models: ``.onnx`` files, or folders of conversions.
        provider: where they run; shapes: batch and tokens.
        past: cached positions, for models with a cache.
        threads: of each model; seconds: for a shape, unless medians settle before.
        progress: told each stage as it begins.

    Raises:
        InputError: for what is no ONNX model, does not run, or takes other inputs than the first.
    """
    session_providers(provider)
    files = {str(model): _file(model) for model in models}
    if len(files) < len(models):
        raise InputError("a model is given twice", str(models[0]), "name each once")
    first, calls = next(iter(files)), []
    read = {name: read_onnx_file(path) for name, path in files.items()}
    loaded = {}
    for name, path in files.items():
        progress(f"loading {name}")
        loaded[name] = session(path, provider, threads, defaults=True)
    for batch, tokens in shapes:
        progress(f"timing {batch}x{tokens}")
        args, kwargs = onnx_arguments(read[first], batch, tokens, "none", past)
        call = Call(args, kwargs, f"{batch}x{tokens}")
        fed = {name: _fed(name, one, call, first) for name, one in loaded.items()}
        runs = [partial(one.run, None, fed[name]) for name, one in loaded.items()]
        medians, rounds, settled = interleaved_medians(runs, seconds)
        milliseconds = dict(zip(loaded, (1e3 * median for median in medians), strict=True))
        calls.append(Timed(batch=batch, tokens=tokens, milliseconds=milliseconds, runs=rounds, settled=settled))
    return Bench(
        schema=1,
        provider=named_provider(provider),
        past=past,
        threads=threads,
        megabytes={name: size_measurement(path, path).after for name, path in files.items()},
        calls=tuple(calls),
    )


def _file(model: Path) -> Path:
    """The ``.onnx`` file of what was given."""
    model = model.expanduser()
    if model.is_dir():
        if not (model / "plan.json").is_file():
            raise InputError("this folder is no conversion", model, _ADVICE)
        target = load_plan(model / "plan.json").target
        if target != "onnx":
            raise InputError(f"this conversion is to {target}", model, "bench times conversions to onnx")
        return model / "model.onnx"
    if not model.exists():
        raise InputError("no such file or folder", model, "check the path")
    if model.suffix != ".onnx":
        raise InputError("not an ONNX model", model, _ADVICE)
    return model


_ADVICE = "give an .onnx file, or a folder that attncompile convert wrote"


def _fed(name: str, loaded: onnxruntime.InferenceSession, call: Call, first: str) -> dict[str, np.ndarray]:
    """The inputs of one model, which has been run on them once."""
    wanted = {entry.name for entry in loaded.get_inputs()}
    missing = sorted(wanted - set(call.kwargs))
    if missing:
        raise InputError(f"it takes {missing[0]!r}, which {first} does not", name, "compare models of the same inputs")
    fed = feeds(loaded, Call((), {key: value for key, value in call.kwargs.items() if key in wanted}, call.what))
    quiet = onnxruntime.RunOptions()
    quiet.log_severity_level = 4
    try:
        loaded.run(None, fed, quiet)
    except Exception as error:  # ONNX Runtime's own errors share no other base
        said = str(error).splitlines()[0][:200]
        raise InputError(f"it does not run at {call.what} ({said})", name, "give another --shape") from error
    return fed


def bench_text(found: Bench) -> str:
    """A table: sizes, medians, and how many times as fast as the first model each one is."""
    width = max(len(name) for name in found.megabytes)
    heads = "".join(f"{f'{call.batch}x{call.tokens}':>22}" for call in found.calls)
    lines = [f"{'':<{width}}{'size':>12}{heads}"]
    for number, (name, size) in enumerate(found.megabytes.items()):
        cells = []
        for call in found.calls:
            times = call.milliseconds
            ratio = f" ({next(iter(times.values())) / times[name]:.2f}x)" if number else ""
            cells.append(f"{f'{times[name]:.2f} ms{ratio}':>22}")
        lines.append(f"{name:<{width}}{f'{size:.1f} MB':>12}{''.join(cells)}")
    behind = f", behind {found.past} cached positions" if found.past else ""
    runs = ", ".join(str(call.runs) for call in found.calls)
    runs += "" if all(call.settled for call in found.calls) else " (not settled: the machine is busy)"
    lines.append(f"\nmedians of {runs} interleaved runs{behind} on {found.provider}, {found.machine}")
    return "\n".join(lines)


__all__ = ["Bench", "Timed", "bench_models", "bench_text", "read_shapes"]
