"""``certificate.json``: what was compared, on what, how far apart, and whether that is near enough."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from attncompile.ir import parse_spec

# What decides a result besides the model: named in every certificate.
TOOLS = ("attncompile", "torch", "triton", "transformers", "onnx", "onnxruntime", "numpy")


class Record(BaseModel):
    """Base of what is written to JSON: unknown fields are refused, infinities and NaN are written as text."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class SiteCase(Record):
    """One random input of a site.

    Attributes:
        seed: of the random numbers.
        masks: how captured masks were drawn.
        sizes: values of the symbolic sizes.
        dtype: dtype of the real inputs and of the candidate's arithmetic.
        max_abs, max_rel: largest error against the Spec in float64, absolute and as a share of the largest
            output.
        misplaced: elements that are NaN or infinite on one side only.
        tolerance: the largest absolute error allowed, derived from dtype and length.
        change: relative distance between the Specs before and after lossy passes; ``null`` where none ran.
        passed: nothing misplaced, and the error within the tolerance.
    """

    seed: int
    masks: str
    sizes: dict[str, int]
    dtype: str
    max_abs: float
    max_rel: float
    misplaced: int = Field(ge=0)
    tolerance: float
    change: float | None = None
    passed: bool

    @model_validator(mode="after")
    def _is_consistent(self) -> SiteCase:
        if self.passed and (self.misplaced or not self.max_abs <= self.tolerance):
            raise ValueError(f"says passed, but the error {self.max_abs:.3g} is above the tolerance "
                             f"{self.tolerance:.3g} or {self.misplaced} elements are misplaced")
        return self


class SiteCertificate(Record):
    """One attention site.

    Attributes:
        site: its name in the model.
        spec: the Spec it computes, as text; empty where none was lifted.
        fingerprint: hash of the Spec; empty where none was lifted.
        status: ``checked`` (replaced and compared), ``unchanged`` (the original computation), or ``rolled back`` (the
            original computation, put back because what had replaced it failed).
        operator: what computes it.
        reason: why it is not replaced, or empty.
        cases: the random inputs it was compared on.
    """

    site: str
    spec: str
    fingerprint: str
    status: Literal["checked", "unchanged", "rolled back"]
    operator: str
    reason: str = ""
    cases: tuple[SiteCase, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether it is the original computation, or every case is within its tolerance."""
        return self.status != "checked" or (bool(self.cases) and all(case.passed for case in self.cases))

    @model_validator(mode="after")
    def _spec_is_the_one_hashed(self) -> SiteCertificate:
        if self.spec and parse_spec(self.spec).fingerprint() != self.fingerprint:
            raise ValueError(f"the Spec of {self.site} does not have the fingerprint {self.fingerprint}")
        return self


class EndToEnd(Record):
    """One number of the whole model, before and after.

    Attributes:
        metric: its name, such as ``max_abs logits``, ``perplexity`` or ``same tokens``.
        before, after: of the original and of the result; ``before`` is ``null`` for a distance between both.
        inputs: what it was measured on, in words.
        tolerance: how far ``after`` may be from ``before`` (from 0 for a distance); ``null`` where it is only
            reported.
        error: both are errors, so ``after`` may be any amount smaller than ``before``.
        passed: within the tolerance, or only reported.
    """

    metric: str
    before: float | None
    after: float
    inputs: str
    tolerance: float | None
    error: bool = False
    passed: bool

    @model_validator(mode="after")
    def _is_consistent(self) -> EndToEnd:
        if self.passed != _near_enough(self.before, self.after, self.tolerance, self.error):
            raise ValueError(f"{self.metric}: passed is {self.passed}, but {self.before} → {self.after} with "
                             f"the tolerance {self.tolerance} says otherwise")
        return self


def _near_enough(before: float | None, after: float, tolerance: float | None, error: bool) -> bool:
    if tolerance is None:
        return True
    grown = after - (before or 0.0)
    return (grown if error else abs(grown)) <= tolerance


def measured(
    metric: str,
    before: float | None,
    after: float,
    inputs: str,
    tolerance: float | None,
    *,
    error: bool = False,
) -> EndToEnd:
    """An end-to-end entry, judged by its tolerance; without one it is only reported."""
    return EndToEnd(metric=metric, before=before, after=after, inputs=inputs, tolerance=tolerance, error=error,
                    passed=_near_enough(before, after, tolerance, error))


class Certificate(Record):
    """All evidence about one conversion.

    Attributes:
        schema_version: 1; written as ``schema``.
        model: what was converted.
        target: ``onnx``, ``torch`` or ``pt2``.
        plan: hash of the plan it was made by.
        versions: of the tools that took part.
        sites: one entry per site, in the order of the model.
        end_to_end: numbers of the whole model.
        files: SHA-256 of files that cannot be read as text and are run: their names in the folder to the hash.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings", populate_by_name=True,
                              serialize_by_alias=True)

    schema_version: Literal[1] = Field(1, alias="schema")
    model: str
    target: str
    plan: str
    versions: dict[str, str] = Field(default_factory=lambda: tool_versions())
    sites: tuple[SiteCertificate, ...]
    end_to_end: tuple[EndToEnd, ...] = ()
    files: dict[str, str] = Field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether every site and every judged number is within its tolerance."""
        return not self.failures()

    def failures(self) -> tuple[str, ...]:
        """What is beyond its tolerance, a sentence each."""
        sites = [f"{site.site} ({site.operator}) is beyond its tolerance in "
                 f"{sum(not case.passed for case in site.cases)} of {len(site.cases)} cases"
                 for site in self.sites if not site.passed]
        numbers = [f"{entry.metric} on {entry.inputs} went from {entry.before} to {entry.after}, "
                   f"{entry.tolerance} is allowed" for entry in self.end_to_end if not entry.passed]
        return (*sites, *numbers)


def tool_versions(names: Sequence[str] = TOOLS) -> dict[str, str]:
    """Installed versions of the tools that take part; those that are not installed are left out."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


Kept = TypeVar("Kept", bound=BaseModel)


def write_record(record: BaseModel, path: Path) -> None:
    """Write a record as indented JSON, through a temporary file, so that it is there whole or not at all."""
    text = json.dumps(record.model_dump(mode="json", by_alias=True), indent=2, ensure_ascii=False) + "\n"
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def read_record(kind: type[Kept], path: Path, what: str) -> Kept:
    """Read and validate a record; nothing in it is evaluated.

    Raises:
        ValueError: in one sentence, when the file is missing, is no JSON, or does not fit: names the first
            field.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot read the {what} {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ValueError(f"the {what} {path} is not a text file") from None
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        fault = error.errors()[0]
    where = ".".join(str(part) for part in fault["loc"])
    place = f" at {where}" if where else ""
    said = fault["msg"].removeprefix("Value error, ").splitlines()[0]
    raise ValueError(f"the {what} {path} is not valid{place}: {said}")


def save_certificate(certificate: Certificate, path: Path) -> None:
    """Write ``certificate.json``."""
    write_record(certificate, path)


def load_certificate(path: Path) -> Certificate:
    """Read ``certificate.json``.

    Raises:
        ValueError: in one sentence, for a file that is missing or no valid certificate.
    """
    return read_record(Certificate, path, "certificate")
