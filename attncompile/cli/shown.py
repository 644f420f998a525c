"""What the commands print and write, and what they read beside a model."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attncompile.convert.artifact import Progress
    from attncompile.lift import Program, Site
    from attncompile.lift.render import Tensors


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
        "rounds": [
            {"of": part.of, "value": part.rounding.source, "type": part.rounding.dtype}
            | {"scale": part.rounding.scale, "dynamic": part.rounding.dynamic}
            for part in site.roundings
        ],
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


def write_file(file: str, content: str | bytes) -> None:
    from attncompile.frontends.errors import InputError, given_path

    data = content.encode() if isinstance(content, str) else content
    if file == "-":
        print(data.decode(), end="")
        return
    path = given_path(file)
    scratch = path.with_name(f".{path.name}.part")
    try:
        scratch.write_bytes(data)
        scratch.replace(path)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise InputError(f"cannot be written ({error.strerror})", path, "choose another FILE") from error


def write_pictures(program: Program, file: Path, seq: int, values: Tensors | None) -> Iterator[tuple[str, Path]]:
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
        write_file(str(path), drawing)
        yield ", ".join(names), path


def read_values(file: Path) -> Tensors:
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


def show(text: str) -> None:
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
def progress_bar() -> Iterator[Progress]:
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
