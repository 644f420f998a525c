"""Options of the torch.compile back end."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from attncompile.frontends.errors import given_path
from attncompile.frontends.torch_internals import modes
from attncompile.passes import parse_passes
from attncompile.plan.schema import Plan, load_plan

ARGUMENTS = ("dynamic", "fullgraph", "disable")
"""Arguments of ``torch.compile`` that are no options of a back end."""


class Options(BaseModel):
    """What ``torch.compile(model, backend="attncompile", options={...})`` takes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    passes: str = Field("fuse", description="passes to run on every site, such as 'fuse,sparsify.window(size=1024)'")
    plan: Plan | None = Field(
        None, description="passes for each site by its name: a plan, or the path of a plan.json; others get `passes`"
    )
    budget: float | None = Field(
        None,
        ge=0.0,
        description="largest relative change of a site's output that lossy passes may bring; beyond it the site gets "
        "its exact passes alone",
    )
    allow_untrained: bool = Field(False, description="allow passes that need training to keep the model's quality")
    rest: Literal["inductor", "eager"] = Field("inductor", description="what compiles everything but attention")
    mode: str | None = Field(None, description="mode of Inductor for the rest, such as 'max-autotune'")
    cudagraphs: bool = Field(False, description="have Inductor record the compiled graph as a CUDA graph")
    verify: Literal["off", "sites", "full"] = Field(
        "off",
        description="'sites' runs what computes each site on random inputs against its definition in float64; 'full' "
        "also compares the first call of each compiled graph with the graph as it was. What fails is put back",
    )
    verbose: bool = Field(False, description="print one line per site")
    explain: Path | None = Field(
        None, description="text file that holds what attncompile.explain() says, written after each compilation"
    )

    @field_validator("passes")
    @classmethod
    def _can_be_read(cls, value: str) -> str:
        parse_passes(value)
        return value

    @model_validator(mode="after")
    def _are_for_inductor(self) -> Options:
        given = "mode" if self.mode is not None else "cudagraphs" if self.cudagraphs else ""
        if given and self.rest != "inductor":
            raise ValueError(f"{given} is for Inductor, but rest is {self.rest!r}")
        if self.cudagraphs and self.mode is not None and self.mode.endswith("no-cudagraphs"):
            raise ValueError(f"mode {self.mode!r} and cudagraphs=True contradict each other; leave one of them out")
        return self

    @field_validator("explain", mode="before")
    @classmethod
    def _names_a_file(cls, value: Any) -> Any:
        if isinstance(value, str | Path):
            if not str(value).strip() or Path(value).is_dir():
                raise ValueError("it is the file that is written, not a folder")
            if not Path(value).parent.is_dir():
                raise ValueError(f"there is no folder {str(Path(value).parent)!r}; make it first")
        return value

    @field_validator("mode")
    @classmethod
    def _is_known(cls, value: str | None) -> str | None:
        if value is not None and value not in modes():
            raise ValueError(f"the modes are {', '.join(modes())}")
        return value

    @field_validator("budget", mode="before")
    @classmethod
    def _is_a_number(cls, value: Any) -> Any:
        if isinstance(value, bool):  # which pydantic takes for 0 and 1
            raise ValueError("it is a number, such as 0.01")
        return value

    @field_validator("plan", mode="before")
    @classmethod
    def _is_loaded(cls, value: Any) -> Any:
        if isinstance(value, str | Path):
            return load_plan(given_path(value))
        if value is not None and not isinstance(value, Plan | Mapping):
            raise ValueError("it is a Plan, or the path of a plan.json")
        return value


def read_options(given: Mapping[str, Any] | None, *, beside: Sequence[str] = ()) -> Options:
    """Validated options.

    Args:
        given: values by name.
        beside: names that the caller takes itself: an unknown one may be meant for them.

    Raises:
        ValueError: one sentence naming the option, what was given and what it may be; an unknown name comes with the
            nearest valid one.
    """
    names = list(Options.model_fields)
    if given is not None and not isinstance(given, Mapping):
        raise ValueError(f"options of the attncompile back end are names with values, got {given!r}")
    for name in given or {}:
        if name not in names:
            valid = [*beside, *names]
            near = difflib.get_close_matches(name, valid, n=1) if isinstance(name, str) else []
            meant = f"; did you mean {near[0]!r}?" if near else ""
            if name in ARGUMENTS:
                meant = f"; it is an argument of torch.compile itself: torch.compile(…, {name}=…)"
            raise ValueError(f"unknown option {name!r} of the attncompile back end{meant} (valid: {', '.join(valid)})")
    try:
        return Options(**(given or {}))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        said = first["msg"].removeprefix("Value error, ")
        if not name:  # options that do not go together
            raise ValueError(f"options of the attncompile back end: {said}") from None
        raise ValueError(f"option {name!r} of the attncompile back end: {said}, got {first['input']!r}") from None
