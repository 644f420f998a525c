"""The command line: inspect, convert, kernels, verify, bench, passes, demo.

Exit codes: 0 done; 1 a verification failed, or a kernel does not compile; 2 a wrong option or input; 3 no attention
site was found; 70 a defect of ours; 130 interrupted. Whatever goes wrong is one sentence on stderr; ``--debug`` or
``ATTNCOMPILE_DEBUG=1`` shows where it happened.

Commands import what they need when they run: ``--help`` and ``--version`` answer without loading torch.
"""

from __future__ import annotations

import contextlib
import json as json_text
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from attncompile import __version__

if TYPE_CHECKING:
    from attncompile.convert.artifact import Progress
    from attncompile.lift import Program, Site
    from attncompile.lift.render import Tensors

# Click's base of all errors about arguments. Some releases of typer bring a copy of click instead of
# importing it, so it is taken from where both have it.
Misuse = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

DONE, FAILED, MISUSED, NOTHING_FOUND, DEFECT, INTERRUPTED = 0, 1, 2, 3, 70, 130

app = typer.Typer(
    help="A compiler for attention: find it in a model, state it, rewrite it, check it.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="a Hugging Face folder, an .onnx file, or file.py:function")
]
Debug = Annotated[bool, typer.Option("--debug", help="show where an error happened")]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="read weights that only exist as pickle, as plain tensors")
]

Provider = Annotated[
    str,
    typer.Option(
        metavar="PROVIDER",
        help="where it will run: cpu, cuda, or an execution provider of ONNX Runtime such as CPUExecutionProvider",
    ),
]

_ATTENTION = typer.Option(help="which implementation a Hugging Face folder is loaded with")
Attention = Annotated[Literal["sdpa", "eager"], _ATTENTION]
Passes = Annotated[
    str, typer.Option(help='what to do at each site, e.g. "fuse,sparsify.window(size=1024,sinks=4)"')
]
AllowUntrained = Annotated[
    bool, typer.Option("--allow-untrained", help="allow passes that ruin a model not trained for them")
]


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


# --- commands -----------------------------------------------------------------------------------------------


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"attncompile {__version__}")
        raise typer.Exit()


@app.callback()
def attncompile(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """A compiler for attention: find it in a model, state it, rewrite it, check it."""


@app.command()
def inspect(
    model: Model,
    seq: Annotated[int, typer.Option(min=1, help="length that densities and pictures are stated for")] = 2048,
    json: Annotated[
        str | None, typer.Option(metavar="FILE", help="write every site as JSON; - for standard output")
    ] = None,
    attn: Attention = "sdpa",
    every: Annotated[bool, typer.Option("--all", help="print each site, also when it is like another")] = False,
    block: Annotated[bool, typer.Option("--block", help="print the operations around each site")] = False,
    picture: Annotated[bool, typer.Option("--picture", help="draw the masks")] = False,
    picture_to: Annotated[
        Path | None, typer.Option(metavar="FILE", help="write the masks as pictures: FILE.svg or FILE.png")
    ] = None,
    values: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="an .npz of tensors that masks read, by name: densities are then exact"),
    ] = None,
    provider: Annotated[
        str | None,
        typer.Option(metavar="PROVIDER", help="also tell the ONNX operator that each site would become there"),
    ] = None,
    allow_pickle: AllowPickle = False,
    debug: Debug = False,
) -> int:
    """Print every attention site of a model: what it computes, or why it was refused."""
    from attncompile.api import lift, operators
    from attncompile.lift.render import render_program

    if picture_to is not None and picture_to.suffix not in (".svg", ".png"):
        raise typer.BadParameter(f"--picture-to {picture_to}: a picture is .svg or .png")
    tensors = _read_values(values) if values is not None else None
    if provider is not None:
        from attncompile.convert.providers import session_providers

        session_providers(provider)
    with _progress() as progress:
        program = lift(model, attn_implementation=attn, allow_pickle=allow_pickle, progress=progress)
        chosen = operators(model, program, provider) if provider is not None else None
    if json is not None:
        data = program_data(program, seq, tensors, chosen)
        _write_file(json, json_text.dumps(data, ensure_ascii=False, indent=2) + "\n")
    if json != "-":
        _show(render_program(program, seq, every=every, block=block, picture=picture, values=tensors))
        if chosen is not None:
            _show("\n".join(("", *operator_lines(chosen, str(provider)))))
    if picture_to is not None:
        for name, file in _write_pictures(program, picture_to, seq, tensors):
            print(f"{file}: {name}", file=sys.stderr)
    if not program.sites:
        print(f"error: {nothing_found(program)}", file=sys.stderr)
        return NOTHING_FOUND
    return DONE


@app.command()
def convert(
    model: Model,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="OUT", help="the folder to write")],
    target: Annotated[
        Literal["onnx", "torch", "pt2"],
        typer.Option(help="ONNX Runtime, a folder for attncompile.load, or a package compiled by AOTInductor"),
    ] = "onnx",
    provider: Provider = "cpu",
    prefer: Annotated[
        Literal["fastest", "fused", "decomposed"],
        typer.Option(help="take fused operators where they win, always, or never"),
    ] = "fastest",
    onnxruntime: Annotated[
        str | None,
        typer.Option(metavar="VERSION", help="onnx: the version that will run it; the installed one if none"),
    ] = None,
    passes: Passes = "fuse",
    allow_untrained: AllowUntrained = False,
    cache: Annotated[
        bool | None,
        typer.Option(
            "--cache/--no-cache",
            help="onnx: a language model, or encoder and decoder, with the cache as inputs and outputs, or the "
            "forward pass; with its cache where it can be, unless said",
            show_default=False,
        ),
    ] = None,
    shared_buffer: Annotated[
        bool,
        typer.Option(
            "--shared-buffer",
            help="onnx: past and present of a language model's cache are one buffer, written in place; for rows "
            "without padding",
        ),
    ] = False,
    precision: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="onnx: fp32, fp16, bf16, int8, int8-static, int8-weights, int4 or fp8, with options such as "
            '"int4(block=64)"; the model\'s own unless given',
        ),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(min=0.0, help="largest relative change of an output by lossy passes or a precision; else refused"),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="onnx: running text to calibrate and judge a precision with")
    ] = None,
    attn: Annotated[Literal["sdpa", "eager"] | None, _ATTENTION] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an earlier conversion in OUT")] = False,
    allow_pickle: AllowPickle = False,
    debug: Debug = False,
) -> int:
    """Rewrite the attention of a model, check it against the original, and write the result to a folder."""
    from attncompile import api

    with _progress() as progress:
        made = api.convert(
            model,
            out,
            to=target,
            provider=provider,
            prefer=prefer,
            onnxruntime=onnxruntime,
            passes=passes,
            allow_untrained=allow_untrained,
            cache=cache,
            shared_buffer=shared_buffer,
            precision=precision,
            budget=budget,
            text=text,
            attn_implementation=attn,
            allow_pickle=allow_pickle,
            overwrite=overwrite,
            progress=progress,
        )
    _show(str(made))
    return DONE


@app.command()
def kernels(
    model: Model,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="the folder to write")],
    target: Annotated[
        list[str], typer.Option(metavar="GPU", help="sm_80, sm_89, sm_90, sm_100 or gfx942; may be given again")
    ] = ["sm_90"],  # noqa: B006 - typer reads it
    dtype: Annotated[
        list[str] | None,
        typer.Option(metavar="TYPE", help="float16, bfloat16 or float32, the model's own if none; may be given again"),
    ] = None,
    passes: Passes = "fuse",
    allow_untrained: AllowUntrained = False,
    attn: Attention = "sdpa",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an earlier folder of kernels")] = False,
    allow_pickle: AllowPickle = False,
    debug: Debug = False,
) -> int:
    """Write the generated kernels of a model, compiled for GPUs that need not be there."""
    from attncompile import api

    with _progress() as progress:
        made = api.compile_kernels(
            model,
            out,
            targets=target,
            dtypes=dtype or (),
            passes=passes,
            allow_untrained=allow_untrained,
            attn_implementation=attn,
            allow_pickle=allow_pickle,
            overwrite=overwrite,
            progress=progress,
        )
    _show(f"{made}\n\nwritten to {out}")
    return FAILED if made.failures else DONE


@app.command()
def verify(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="a folder that attncompile convert wrote, or the model.onnx in it")
    ],
    provider: Annotated[
        str | None,
        typer.Option(metavar="PROVIDER", help="run it there, instead of where it was converted for (ONNX Runtime)"),
    ] = None,
    allow_pickle: AllowPickle = False,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="run a package that was not made by you on this machine")
    ] = False,
    debug: Debug = False,
) -> int:
    """Compute the certificate of a conversion again on fresh inputs; exit 1 when it fails."""
    from attncompile import api
    from attncompile.report import certificate_text

    with _progress() as progress:
        progress("verifying")
        certificate = api.verify(folder, provider=provider, allow_pickle=allow_pickle, allow_code=allow_code)
    _show(certificate_text(certificate))
    return DONE if certificate.passed else FAILED


@app.command()
def bench(
    models: Annotated[
        list[Path], typer.Argument(metavar="MODEL…", help=".onnx files, or folders that attncompile convert wrote")
    ],
    provider: Provider = "cpu",
    shape: Annotated[
        list[str], typer.Option(metavar="BATCHxTOKENS", help="a call to time; may be given again")
    ] = ["1x128"],  # noqa: B006 - typer reads it
    past: Annotated[int, typer.Option(min=0, help="cached positions in front of it, for models with a cache")] = 0,
    threads: Annotated[
        int | None, typer.Option(min=1, help="threads of each model; ONNX Runtime's own choice unless given")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="time for a shape, unless medians settle before")] = 30.0,
    json: Annotated[
        str | None, typer.Option(metavar="FILE", help="write the numbers as JSON; - for standard output")
    ] = None,
    debug: Debug = False,
) -> int:
    """Time ONNX models in turns on the same inputs; the first one is what the others are compared with."""
    from attncompile.convert.bench import bench_models, bench_text, read_shapes

    shapes = read_shapes(shape)
    with _progress() as progress:
        found = bench_models(models, provider, shapes, past=past, threads=threads, seconds=seconds, progress=progress)
    if json is not None:
        _write_file(json, found.model_dump_json(indent=2, by_alias=True) + "\n")
    if json != "-":
        _show(bench_text(found))
    return DONE


@app.command()
def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="the folder to write")] = Path("attncompile-demo"),
    debug: Debug = False,
) -> int:
    """Take all-MiniLM-L6-v2 through every stage: inspect, convert, verify, embed, compare."""
    from attncompile.demo import run_demo

    with _progress() as progress:
        verified = run_demo(out, progress, _show)
    return DONE if verified else FAILED


@app.command()
def passes(debug: Debug = False) -> int:
    """List the registered passes with their contracts and options."""
    from attncompile.passes import all_passes

    _show("\n\n".join(pass_text(rewrite) for rewrite in all_passes().values()))
    return DONE


# --- what is printed ----------------------------------------------------------------------------------------


def program_data(
    program: Program,
    seq: int,
    values: Tensors | None = None,
    chosen: Mapping[str, tuple[str, str]] | None = None,
) -> dict[str, Any]:
    """What ``inspect --json`` writes: every site, Specs in the form that parses back; ``chosen`` are operators."""
    sites = [_site_data(site, seq, values) for site in program.sites]
    if chosen is not None:
        for site in sites:
            operator, reason = chosen[site["name"]]
            site |= {"operator": operator, "operator_reason": reason}
    return {
        "schema": 1,
        "model": program.model,
        "sites": sites,
        "summary": {
            "sites": len(program.sites),
            "lifted": program.count("lifted"),
            "observed": program.count("observed"),
            "refused": program.count("refused"),
        },
    }


def _site_data(site: Site, seq: int, values: Tensors | None) -> dict[str, Any]:
    from attncompile.ir import print_spec
    from attncompile.lift.refusals import failed_check
    from attncompile.lift.render import site_density
    from attncompile.lift.step import as_data

    density = site_density(site.spec, seq, guard=site.guarded, values=values) if site.spec else None
    return {
        "name": site.name,
        "status": site.status,
        "spec": print_spec(site.spec) if site.spec else None,
        "reason": site.refusal.reason if site.refusal else None,
        "hint": site.refusal.hint if site.refusal else None,
        "source": site.source,
        "density": density.share if density else None,
        "guard": str(site.guarded) if site.guarded else None,
        "block": as_data(site.steps),
        "kind": site.refusal.kind if site.refusal else None,
        "check": failed_check(site.refusal) if site.refusal else None,
        "node": site.refusal.node if site.refusal else None,
        "line": site.refusal.source if site.refusal else None,
        "nearest": site.nearest or None,
    }


def operator_lines(chosen: Mapping[str, tuple[str, str]], provider: str) -> Iterator[str]:
    """The ONNX operators that sites would become, one line for all that get the same for the same reason."""
    from attncompile.convert.providers import named_provider

    counts: dict[tuple[str, str], int] = {}
    for outcome in chosen.values():
        counts[outcome] = counts.get(outcome, 0) + 1
    yield f"on {named_provider(provider)}"
    for (operator, reason), count in counts.items():
        sites = f"{count} site{'' if count == 1 else 's'}"
        yield f"  {sites} would {'stay' if operator == 'original' else f'become {operator}'}: {reason}"


def nothing_found(program: Program) -> str:
    """The loud message for a model without a site."""
    steps = "steps" if program.graph is None else f"{len(program.graph.nodes)} steps"
    return (
        f"NO ATTENTION SITE FOUND in {program.model}: among its {steps} there is no attention call, and "
        "no normaliser between two products of activations; if the model has attention, please report it"
    )


def pass_text(rewrite: Any) -> str:
    """A pass with its contract and options, as ``attncompile passes`` prints it."""
    from attncompile.passes import described

    lines = [
        f"{rewrite.name}   {rewrite.contract}   {', '.join(rewrite.phases)}",
        f"  {rewrite.summary}",
    ]
    if rewrite.untrained:
        lines.append(f"  needs --allow-untrained: {rewrite.untrained}")
    lines += [f"  {name} = {default}   {text}" for name, default, text in described(rewrite)]
    return "\n".join(lines)


def _write_file(file: str, content: str | bytes) -> None:
    from attncompile.frontends.errors import InputError

    data = content.encode() if isinstance(content, str) else content
    if file == "-":
        print(data.decode(), end="")
        return
    path = Path(file).expanduser()
    scratch = path.with_name(f".{path.name}.part")
    try:
        scratch.write_bytes(data)
        scratch.replace(path)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise InputError(f"cannot be written ({error.strerror})", path, "choose another FILE") from error


def _write_pictures(program: Program, file: Path, seq: int, values: Tensors | None) -> Iterator[tuple[str, Path]]:
    """One picture for each different mask: FILE, then FILE-2 and so on; gives the sites that each is of."""
    from attncompile.ir.picture import drawn_png, drawn_svg
    from attncompile.lift.render import alike, mask_tiles_of

    drawings: dict[bytes, list[str]] = {}
    for name, (site, *_) in alike(program.sites):
        tiles = mask_tiles_of(site.spec, seq, guard=site.guarded, values=values, columns=128) if site.spec else None
        if tiles is not None:
            drawing = drawn_svg(tiles).encode() if file.suffix == ".svg" else drawn_png(tiles)
            drawings.setdefault(drawing, []).append(name)
    for number, (drawing, names) in enumerate(drawings.items(), start=1):
        path = file if number == 1 else file.with_name(f"{file.stem}-{number}{file.suffix}")
        _write_file(str(path), drawing)
        yield ", ".join(names), path


def _read_values(file: Path) -> Tensors:
    """Tensors by name from an .npz file; nothing in it is run."""
    import zipfile

    import numpy as np
    import torch

    from attncompile.frontends.errors import InputError

    try:
        with np.load(file, allow_pickle=False) as archive:
            return {name: torch.from_numpy(archive[name]) for name in archive.files}
    except (ValueError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise InputError("is no .npz of plain numbers", file, "write it with numpy.savez(file, name=array)") from error


def _show(text: str) -> None:
    """Print text; on a terminal names and statuses are coloured."""
    if not sys.stdout.isatty():
        print(text)
        return
    from rich.console import Console
    from rich.highlighter import RegexHighlighter
    from rich.theme import Theme

    class Sites(RegexHighlighter):
        base_style = "site."
        highlights = (
            r"(?m)^(?P<name>\S+)(?=   )",
            r"(?m)^  (?P<key>[a-z_]+) ",
            r"(?P<lifted>\blifted\b)|(?P<observed>\bobserved\b)|(?P<refused>\brefused\b)",
            r"(?P<density>density .*)$",
            r"(?m)^  (?P<source>source .*)$",
        )

    styles = {"name": "bold", "key": "cyan", "lifted": "green", "observed": "yellow", "refused": "red"}
    styles |= {"density": "magenta", "source": "dim"}
    theme = Theme({f"site.{part}": style for part, style in styles.items()})
    Console(theme=theme, highlighter=Sites()).print(text, markup=False, soft_wrap=True)


@contextlib.contextmanager
def _progress() -> Iterator[Progress]:
    """A progress bar on stderr where that is a terminal; otherwise silence."""
    from attncompile.convert.artifact import silent

    if not sys.stderr.isatty():
        yield silent
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (BarColumn(bar_width=20), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("starting", total=None)
        yield lambda stage: bars.update(task, description=stage)


# --- what goes wrong ----------------------------------------------------------------------------------------


def _out_of_memory(error: BaseException) -> bool:
    """Python's, PyTorch's (CPU and GPU) and ONNX Runtime's ways of saying that memory ran out."""
    said = str(error).lower()
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(part in said for part in ("can't allocate memory", "failed to allocate memory", "bad_alloc"))
    )


def _interrupted(error: BaseException) -> bool:
    return isinstance(error, KeyboardInterrupt | typer.Abort)


def _misused(error: BaseException) -> bool:
    return isinstance(error, Misuse)


def _without_attention(error: BaseException) -> bool:
    return type(error).__name__ == "NoSiteError"


def _from_the_system(error: BaseException) -> bool:
    return isinstance(error, OSError)


def _ours(error: BaseException) -> bool:
    """Whether a ValueError was raised by this package, for the user to read, not somewhere underneath."""
    if not isinstance(error, ValueError):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).is_relative_to(Path(__file__).parent)


# What is foreseen: how to recognise it, the exit code, and what to say.
_FORESEEN: tuple[tuple[Callable[[Any], bool], int, Callable[[Any], str]], ...] = (
    (_interrupted, INTERRUPTED, lambda error: "interrupted; nothing half-written was left behind"),
    (
        _out_of_memory,
        MISUSED,
        lambda error: "out of memory; use a smaller model or a machine with more memory, nothing was written",
    ),
    (_without_attention, NOTHING_FOUND, str),
    (_misused, MISUSED, lambda error: error.format_message().replace("Value error, ", "")),
    (
        _from_the_system,
        MISUSED,
        lambda error: f"{error.strerror or error}" + (f": {error.filename}" if error.filename else ""),
    ),
    (_ours, MISUSED, str),
)


def explain(error: BaseException) -> tuple[int, str]:
    """The exit code for an error and one sentence about it."""
    for recognised, code, said in _FORESEEN:
        if recognised(error):
            return code, _first_line(said(error))
    return DEFECT, (
        f"unexpected {type(error).__name__}: {_first_line(str(error))}; this is a defect of attncompile: "
        "please report it with what --debug prints"
    )


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "no more is known")


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
