"""``plan.json``: which passes and which operator every site gets, and why. Read, validated, never
evaluated.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from attncompile.ir import parse_spec
from attncompile.passes import parse_passes
from attncompile.plan.cost import CostRow
from attncompile.verify.certificate import read_record, write_record


class Refused(BaseModel):
    """A pass that was asked for and not applied.

    Attributes:
        call: the pass with its options.
        reason: why not, in one sentence.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    call: str
    reason: str


class SitePlan(BaseModel):
    """What happens to one site.

    Attributes:
        site: its name in the model.
        fingerprint: hash of the Spec as it was lifted; empty where none was.
        before, after: the Spec as it was lifted and after the passes, as text; empty where none was lifted.
        operator: what computes it in the result; ``original`` where it stays as it was.
        reason: why that operator.
        rolled_back: it was rewritten, and the result failed: ``reason`` says how; it stays as it was.
        applied: passes applied, in order, with their options.
        refused: passes asked for that do not apply.
        cost: modelled work before and after, where sizes were given.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    site: str
    fingerprint: str
    before: str
    after: str
    operator: str
    reason: str
    rolled_back: bool = False
    applied: tuple[str, ...] = ()
    refused: tuple[Refused, ...] = ()
    cost: CostRow | None = None

    @field_validator("applied")
    @classmethod
    def _are_passes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for call in value:
            parse_passes(call)
        return value

    @model_validator(mode="after")
    def _specs_read_back(self) -> SitePlan:
        if self.after:
            parse_spec(self.after)
        if self.before and parse_spec(self.before).fingerprint() != self.fingerprint:
            raise ValueError(f"the Spec of {self.site} does not have the fingerprint {self.fingerprint}")
        if self.rolled_back and self.operator != "original":
            raise ValueError(f"{self.site} was rolled back, but is computed by {self.operator}")
        return self


class Plan(BaseModel):
    """A conversion, to be read, compared and repeated.

    Attributes:
        schema_version: 1; written as ``schema``.
        model: name of the model.
        target: ``onnx``, ``torch`` or ``pt2``.
        provider: where it is to run, such as ``cpu`` or ``cuda``.
        passes: what was asked for, as :func:`attncompile.passes.parse_passes` reads it.
        allow_untrained: passes whose result needs training were allowed.
        precision: element types of the result, as it was asked for; empty for the model's own.
        budget: the largest relative change of an output that was allowed; ``null`` where none was set.
        kept: projections that the precision left in float32, by node name.
        sites: one entry per site, sorted by name, so that two plans can be compared line by line.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, serialize_by_alias=True)

    schema_version: Literal[1] = Field(1, alias="schema")
    model: str
    target: Literal["onnx", "torch", "pt2"]
    provider: str
    passes: str = ""
    allow_untrained: bool = False
    precision: str = ""
    budget: float | None = None
    kept: tuple[str, ...] = ()
    sites: tuple[SitePlan, ...]

    @field_validator("passes")
    @classmethod
    def _can_be_read(cls, value: str) -> str:
        parse_passes(value)
        return value

    @field_validator("sites")
    @classmethod
    def _are_sorted(cls, value: tuple[SitePlan, ...]) -> tuple[SitePlan, ...]:
        names = [site.site for site in value]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"the site {twice[0]} is planned twice")
        return tuple(sorted(value, key=lambda site: natural_key(site.site)))

    def site(self, name: str) -> SitePlan:
        """The entry of a site.

        Raises:
            ValueError: when the plan has none of that name.
        """
        for entry in self.sites:
            if entry.site == name:
                return entry
        raise ValueError(f"the plan of {self.model} has no site {name!r}; it has "
                         f"{', '.join(entry.site for entry in self.sites) or 'none'}")

    def digest(self) -> str:
        """Hash of everything in the plan, for the certificate."""
        return hashlib.sha256(self.model_dump_json(by_alias=True).encode()).hexdigest()[:16]


def natural_key(name: str) -> tuple[tuple[int, int | str], ...]:
    """Sorts ``layers.2`` before ``layers.10``."""
    parts = name.replace("/", ".").split(".")
    return tuple((0, int(part)) if part.isdigit() else (1, part) for part in parts)


def save_plan(plan: Plan, path: Path) -> None:
    """Write ``plan.json``: indented, sites sorted."""
    write_record(plan, path)


def load_plan(path: Path) -> Plan:
    """Read ``plan.json``.

    Raises:
        ValueError: in one sentence, for a file that is missing or no valid plan; names the first field at
            fault.
    """
    return read_record(Plan, path, "plan")
