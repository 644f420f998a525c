"""``tried.tsv``: what each version of ONNX Runtime was found to do with each feature of an operator.

The table is made by ``benchmarks/onnx_capabilities`` and says for every operator, feature, dtype and provider whether a
version of ONNX Runtime gives the right values. Nothing in it is taken from documentation: an attribute that a version
accepts and does not follow stands there as ``ignored``.
"""

from __future__ import annotations

import functools
import importlib.resources
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

Outcome = Literal["right", "wrong", "ignored", "unstable", "refused", "crashed"]
OUTCOMES: tuple[Outcome, ...] = ("right", "wrong", "ignored", "unstable", "refused", "crashed")
TABLE = "tried.tsv"
COLUMNS = ("provider", "domain", "operator", "opset", "feature", "dtype", "said")
"""Columns before those of the versions."""

_MEANING: Mapping[Outcome, str] = {
    "wrong": "gives wrong values for",
    "ignored": "does not follow the feature of",
    "unstable": "gives other values each time for",
    "refused": "refuses",
    "crashed": "crashes on",
}


@dataclass(frozen=True)
class Tried:
    """One row of the table.

    Attributes:
        provider: ``cpu`` or ``cuda``.
        domain, operator: of the node; opset: the version of a standard operator, else 0.
        feature, dtype: what was tried.
        outcomes: by version, such as ``"1.31"``.
        said: of the newest version that is not right: its error, or how far off it is; empty where all are right.
    """

    provider: str
    domain: str
    operator: str
    opset: int
    feature: str
    dtype: str
    outcomes: Mapping[str, Outcome]
    said: str


@functools.cache
def table() -> tuple[Tried, ...]:
    """All rows, in the order of the file."""
    text = importlib.resources.files(__package__).joinpath(TABLE).read_text(encoding="utf-8")
    return read(text)


def read(text: str) -> tuple[Tried, ...]:
    """The rows of a table's text.

    Raises:
        ValueError: for an outcome that there is not.
    """
    head, *lines = [line.split("\t") for line in text.splitlines() if line and not line.startswith("#")]
    made = []
    for line in lines:
        cell = dict(zip(head, line, strict=True))
        outcomes = {version: _outcome(cell[version]) for version in head[len(COLUMNS) :] if cell[version]}
        made.append(
            Tried(
                cell["provider"],
                cell["domain"],
                cell["operator"],
                int(cell["opset"]),
                cell["feature"],
                cell["dtype"],
                outcomes,
                cell["said"],
            )
        )
    return tuple(made)


def _outcome(text: str) -> Outcome:
    for outcome in OUTCOMES:
        if text == outcome:
            return outcome
    raise ValueError(f"{TABLE}: {text!r} is no outcome; they are {', '.join(OUTCOMES)}")


@functools.cache
def versions(provider: str = "cpu") -> tuple[str, ...]:
    """The versions that were tried on a provider, oldest first."""
    found = {version for row in table() if row.provider == provider for version in row.outcomes}
    return tuple(sorted(found, key=_number))


def _number(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


@functools.cache
def installed() -> str:
    """The version of the installed ONNX Runtime, such as ``1.31``."""
    import onnxruntime  # the package's own version: onnxruntime-gpu and others have other distribution names

    return minor_version(onnxruntime.__version__)


def minor_version(text: str) -> str:
    """``1.31`` of ``1.31.1`` or ``1.31``.

    Raises:
        ValueError: for what is no version.
    """
    found = re.match(r"(\d+)\.(\d+)(\.|$)", text.strip())
    if found is None:
        raise ValueError(f"{text!r} is no version of ONNX Runtime; give one such as 1.31")
    return f"{found[1]}.{found[2]}"


def require_version(text: str, provider: str = "cpu") -> str:
    """``1.31`` of ``1.31.1``, a version to choose operators for.

    Raises:
        ValueError: for what is no version, or one that is older than the table.
    """
    version = minor_version(text)
    if versions(provider) and column(provider, version) is None:
        known = versions(provider)
        raise ValueError(
            f"ONNX Runtime {version} was not tried, so nothing is known of its operators; choose one from {known[0]} on"
        )
    return version


@functools.cache
def _indexed() -> Mapping[tuple[str, str, str], Mapping[tuple[int, str, str], Tried]]:
    made: dict[tuple[str, str, str], dict[tuple[int, str, str], Tried]] = {}
    for row in table():
        made.setdefault((row.provider, row.domain, row.operator), {})[row.opset, row.feature, row.dtype] = row
    return made


def column(provider: str, version: str) -> str | None:
    """The version of the table that stands for a version: itself, or the newest for one that came later.

    ``None`` for one that is older than the table.
    """
    known = versions(provider)
    if not known or _number(version) < _number(known[0]):
        return None
    return max((one for one in known if _number(one) <= _number(version)), key=_number)


def why_not(
    domain: str,
    operator: str,
    features: Iterable[str],
    dtype: str,
    *,
    version: str | None = None,
    provider: str = "cpu",
    opset: int = 0,
) -> str | None:
    """Why a version of ONNX Runtime cannot be relied on for these features, ``None`` where all were found right.

    Args:
        domain, operator: of the node.
        features: that it uses, as the table calls them.
        dtype: of its operands.
        version: the one that is to run it; the installed one where it is left out.
        provider: where. Of one that has no rows nothing is known, and nothing is said.
        opset: of the model; the newest version of a standard operator up to it is the one that runs.
    """
    if not versions(provider):
        return None
    asked = version or installed()
    found = column(provider, asked)
    if found is None:
        return f"ONNX Runtime {asked} was not tried; {versions(provider)[0]} is the oldest that was"
    rows = _indexed().get((provider, domain, operator), {})
    numbers = [number for number, *_ in rows if number <= opset] if not domain else [0]
    number = max(numbers, default=-1)
    for feature in features:
        row = rows.get((number, feature, dtype))
        outcome = row.outcomes.get(found) if row is not None else None
        if outcome is None:
            return f"ONNX Runtime {found} was not tried with {operator} in {dtype} on {provider} ({feature})"
        if outcome != "right":
            return f"ONNX Runtime {found} {_MEANING[outcome]} {operator} in {dtype} on {provider} ({feature})"
    return None


def newest_opset(version: str | None = None, provider: str = "cpu") -> int:
    """The newest standard opset whose plain operators a version of ONNX Runtime runs; 0 where none was tried."""
    return _newest("opset", version, provider)


def newest_ir_version(version: str | None = None, provider: str = "cpu") -> int:
    """The newest version of the file format that a version of ONNX Runtime reads; 0 where none was tried."""
    return _newest("IR version", version, provider)


def _newest(what: str, version: str | None, provider: str) -> int:
    """The largest number that the features ``what N`` have which were found right: files are read alike everywhere."""
    provider = provider if versions(provider) else "cpu"
    found = column(provider, version or installed())
    rows = _indexed().get((provider, "", what), {}).values()
    right = [row for row in rows if found is not None and row.outcomes.get(found) == "right"]
    return max((int(row.feature.removeprefix(what)) for row in right), default=0)


__all__ = [
    "COLUMNS",
    "OUTCOMES",
    "TABLE",
    "Outcome",
    "Tried",
    "column",
    "installed",
    "minor_version",
    "newest_ir_version",
    "newest_opset",
    "read",
    "require_version",
    "table",
    "versions",
    "why_not",
]
