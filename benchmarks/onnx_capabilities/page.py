"""``docs/onnx-operators.md``, made of the table."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

from attncompile.codegen.onnx.tried import Outcome, Tried

MARKS: Mapping[Outcome, str] = {
    "right": "✓",
    "wrong": "wrong",
    "ignored": "ignored",
    "unstable": "unstable",
    "refused": "✗",
    "crashed": "crash",
}

HEAD = """# What each version of ONNX Runtime can do

Made by `python -m benchmarks.onnx_capabilities`, which tries everything here on every version; nothing is taken from
documentation. The same table, `codegen/onnx/tried.tsv`, decides which operators a conversion may use
(`attncompile convert --onnxruntime 1.24` for another version than the installed one).

| mark | |
|---|---|
| ✓ | loads, runs, and gives what the operator's definition gives, up to rounding, at two lengths and twice in a row |
| wrong | runs and gives something else |
| ignored | runs and gives exactly what it gives without the attribute or input: accepted, and of no effect |
| unstable | gives something else when it is run again |
| ✗ | is refused, on loading or on running, with an error |
| crash | ends the process |

Dtypes with the same marks share a row. On a GPU an operator counts as refused where only the CPU has a kernel for it,
and float32 products are computed in float32 (`use_tf32=0`). float16 on the CPU is mostly computed in float32 between
two casts, which ONNX Runtime inserts itself. "Behind a cache" means with past keys and values.
"""


def page(rows: Sequence[Tried], versions: Sequence[str], exact: Mapping[str, str]) -> str:
    """The whole page.

    Args:
        rows: of the table; versions: its columns; exact: the patch release that stands for each.
    """
    parts = [HEAD]
    for provider in dict.fromkeys(row.provider for row in rows):
        of_provider = [row for row in rows if row.provider == provider]
        columns = [version for version in versions if any(version in row.outcomes for row in of_provider)]
        tried = ", ".join(exact.get(version, version) for version in columns)
        parts.append(f"# Provider {provider}, ONNX Runtime {tried}\n")
        for key, group in itertools.groupby(of_provider, key=lambda row: (row.domain, row.operator)):
            parts.append(_operator(*key, list(group), columns))
    return "\n".join(parts)


def _operator(domain: str, operator: str, rows: Sequence[Tried], versions: Sequence[str]) -> str:
    title = f"{domain}.{operator}" if domain else operator
    parts = []
    for number, group in itertools.groupby(rows, key=lambda row: row.opset):
        by_opset = domain == "" and operator not in ("opset", "IR version")
        parts.append(f"## {title}{f'-{number}' if by_opset and number else ''}\n" if by_opset or not parts else "")
        parts.append(_matrix(list(group), versions))
    if operator in ("opset", "IR version"):
        return f"## {title}\n\n" + _matrix(rows, versions)
    return "\n".join(parts)


def _matrix(rows: Sequence[Tried], versions: Sequence[str]) -> str:
    lines = [f"| feature | dtype | {' | '.join(versions)} |", "|---|---|" + "---|" * len(versions)]
    for feature, group in itertools.groupby(rows, key=lambda row: row.feature):
        alike: dict[tuple[str, ...], list[str]] = {}
        for row in group:
            marks = tuple(MARKS[row.outcomes[version]] if version in row.outcomes else "" for version in versions)
            alike.setdefault(marks, []).append(row.dtype)
        for marks, dtypes in alike.items():
            lines.append(f"| {feature.replace('|', chr(92) + '|')} | {_dtypes(dtypes)} | {' | '.join(marks)} |")
    return "\n".join(lines) + "\n"


def _dtypes(names: Iterable[str]) -> str:
    return ", ".join(names)
