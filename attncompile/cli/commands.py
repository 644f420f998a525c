"""The commands and their options. Each imports what it needs when it runs."""

from __future__ import annotations

import json as json_text
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from attncompile import __version__
from attncompile.cli.errors import DONE, FAILED, NOTHING_FOUND
from attncompile.cli.shown import (
    nothing_found,
    operator_lines,
    pass_text,
    program_data,
    progress_bar,
    read_values,
    show,
    write_file,
    write_pictures,
)

app = typer.Typer(
    help="A compiler for attention: find it in a model, state it, rewrite it, check it.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="a Hugging Face folder, an .onnx file, or file.py:function")
]


def _path(text: str) -> Path:
    """A path option: an empty one is refused before it becomes the working folder."""
    from attncompile.frontends.errors import InputError, given_path

    try:
        return given_path(text)
    except InputError as error:
        raise typer.BadParameter(str(error)) from error


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

_ATTENTION = typer.Option(help="which implementation a Hugging Face folder is loaded with; eager where it has no sdpa")
Attention = Annotated[Literal["sdpa", "eager"], _ATTENTION]
Passes = Annotated[
    str, typer.Option(help='what to do at each site, e.g. "fuse,sparsify.window(size=1024,sinks=4)"')
]
AllowUntrained = Annotated[
    bool, typer.Option("--allow-untrained", help="allow passes that ruin a model not trained for them")
]


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
    seq: Annotated[
        int | None,
        typer.Option(min=1, help="length that densities and pictures are stated for; 2048, or what the model has"),
    ] = None,
    json: Annotated[
        str | None, typer.Option(metavar="FILE", help="write every site as JSON; - for standard output")
    ] = None,
    attn: Attention = "sdpa",
    every: Annotated[bool, typer.Option("--all", help="print each site, also when it is like another")] = False,
    block: Annotated[bool, typer.Option("--block", help="print the operations around each site")] = False,
    picture: Annotated[bool, typer.Option("--picture", help="draw the masks")] = False,
    picture_to: Annotated[
        Path | None,
        typer.Option(parser=_path, metavar="FILE", help="write the masks as pictures: FILE.svg or FILE.png"),
    ] = None,
    values: Annotated[
        Path | None,
        typer.Option(
            parser=_path,
            metavar="FILE",
            help="an .npz of tensors that masks read, by name: densities are then exact",
        ),
    ] = None,
    provider: Annotated[
        str | None,
        typer.Option(metavar="PROVIDER", help="also tell the ONNX operator that each site would become there"),
    ] = None,
    allow_pickle: AllowPickle = False,
    debug: Debug = False,
) -> int:
    """Print every attention site of a model: what it computes, or why it was refused."""
    from attncompile.api import lift_opened, operators
    from attncompile.frontends.checkpoint import open_model
    from attncompile.frontends.positions import stated_length
    from attncompile.lift.render import render_program

    if picture_to is not None and picture_to.suffix not in (".svg", ".png"):
        raise typer.BadParameter(f"--picture-to {picture_to}: a picture is .svg or .png")
    tensors = read_values(values) if values is not None else None
    if provider is not None:
        from attncompile.convert.providers import session_providers

        session_providers(provider)
    with progress_bar() as progress:
        progress("opening")
        opened = open_model(model, attn_implementation=attn, allow_pickle=allow_pickle)
        length = stated_length(opened.config, seq)
        program = lift_opened(opened, progress=progress)
        chosen = operators(model, program, provider) if provider is not None else None
    if json is not None:
        data = program_data(program, length, tensors, chosen)
        write_file(json, json_text.dumps(data, ensure_ascii=False, indent=2) + "\n")
    if json != "-":
        show(render_program(program, length, every=every, block=block, picture=picture, values=tensors))
        if chosen is not None:
            show("\n".join(("", *operator_lines(chosen, str(provider)))))
    if picture_to is not None:
        for name, file in write_pictures(program, picture_to, length, tensors):
            print(f"{file}: {name}", file=sys.stderr)
    if not program.sites:
        print(f"error: {nothing_found(program)}", file=sys.stderr)
        return NOTHING_FOUND
    return DONE


@app.command()
def convert(
    model: Model,
    out: Annotated[Path, typer.Option("-o", "--out", parser=_path, metavar="OUT", help="the folder to write")],
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
    last_logits: Annotated[
        bool,
        typer.Option(
            "--last-logits",
            help="onnx: a language model computes the logits of each row's last token alone, as generation reads them",
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
        Path | None,
        typer.Option(
            parser=_path, metavar="FILE", help="onnx: running text to calibrate and judge a precision with"
        ),
    ] = None,
    attn: Annotated[Literal["sdpa", "eager"] | None, _ATTENTION] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an earlier conversion in OUT")] = False,
    allow_pickle: AllowPickle = False,
    debug: Debug = False,
) -> int:
    """Rewrite the attention of a model, check it against the original, and write the result to a folder."""
    from attncompile import api

    with progress_bar() as progress:
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
            last_logits=last_logits,
            precision=precision,
            budget=budget,
            text=text,
            attn_implementation=attn,
            allow_pickle=allow_pickle,
            overwrite=overwrite,
            progress=progress,
        )
    show(str(made))
    return DONE


@app.command()
def kernels(
    model: Model,
    out: Annotated[Path, typer.Option("-o", "--out", parser=_path, metavar="DIR", help="the folder to write")],
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

    with progress_bar() as progress:
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
    show(f"{made}\n\nwritten to {out}")
    return FAILED if made.failures else DONE


@app.command()
def verify(
    folder: Annotated[
        Path,
        typer.Argument(
            parser=_path, metavar="DIR", help="a folder that attncompile convert wrote, or the model.onnx in it"
        ),
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

    with progress_bar() as progress:
        progress("verifying")
        certificate = api.verify(folder, provider=provider, allow_pickle=allow_pickle, allow_code=allow_code)
    show(certificate_text(certificate))
    return DONE if certificate.passed else FAILED


@app.command()
def bench(
    models: Annotated[
        list[Path],
        typer.Argument(
            parser=_path, metavar="MODEL…", help=".onnx files, or folders that attncompile convert wrote"
        ),
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
    with progress_bar() as progress:
        found = bench_models(models, provider, shapes, past=past, threads=threads, seconds=seconds, progress=progress)
    if json is not None:
        write_file(json, found.model_dump_json(indent=2, by_alias=True) + "\n")
    if json != "-":
        show(bench_text(found))
    return DONE


@app.command()
def demo(
    out: Annotated[
        Path, typer.Option(parser=_path, metavar="DIR", help="the folder to write")
    ] = Path("attncompile-demo"),
    debug: Debug = False,
) -> int:
    """Take all-MiniLM-L6-v2 through every stage: inspect, convert, verify, embed, compare."""
    from attncompile.demo import run_demo

    with progress_bar() as progress:
        verified = run_demo(out, progress, show)
    return DONE if verified else FAILED


@app.command()
def passes(debug: Debug = False) -> int:
    """List the registered passes with their contracts and options."""
    from attncompile.passes import all_passes

    show("\n\n".join(pass_text(rewrite) for rewrite in all_passes().values()))
    return DONE
