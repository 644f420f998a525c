"""Options of the torch.compile back end."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError


class Options(BaseModel):
    """What ``torch.compile(model, backend="attncompile", options={...})`` takes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rest: Literal["inductor", "eager"] = Field(
        "inductor", description="what compiles everything but attention"
    )
    passes: str = Field(
        "fuse", description="passes to run on every site, such as 'fuse,sparsify.window(size=1024)'"
    )
    allow_untrained: bool = Field(
        False, description="allow passes that need training to keep the model's quality"
    )
    verbose: bool = Field(False, description="print one line per site")


def read_options(given: Mapping[str, Any] | None) -> Options:
    """Validated options.

    Raises:
        ValueError: one sentence naming the option, what was given and what it may be; an unknown name comes with the
            nearest valid one.
    """
    names = list(Options.model_fields)
    for name in given or {}:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            meant = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"unknown option {name!r} of the attncompile back end{meant} (valid: {', '.join(names)})"
            )
    try:
        return Options(**(given or {}))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise ValueError(
            f"option {name!r} of the attncompile back end: {first['msg']}, got {first['input']!r}"
        ) from None
