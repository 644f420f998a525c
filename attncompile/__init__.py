"""A compiler for attention: find it, state it, rewrite it, emit it, check it.

    import attncompile

    print(attncompile.lift("path/to/checkpoint"))
    attncompile.convert("path/to/checkpoint", "out")
    attncompile.verify("out")

Nothing heavy is imported before a name is used. Three of the functions share their names with the packages
that do the work (`attncompile.lift`, `attncompile.convert`, `attncompile.verify`): each name is the package,
and calling it calls the function of `attncompile.api`.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "CaptureError",
    "Conversion",
    "InputError",
    "Program",
    "Refusal",
    "RefusalError",
    "Site",
    "Spec",
    "__version__",
    "attention",
    "compile",
    "convert",
    "explain",
    "lift",
    "load",
    "parse_spec",
    "tuning",
    "verify",
]

if TYPE_CHECKING:
    from attncompile.api import compile, convert, explain, lift, load, verify
    from attncompile.codegen.triton.tuning import tuning
    from attncompile.convert.artifact import Conversion
    from attncompile.frontends.errors import CaptureError, InputError
    from attncompile.ir import Refusal, RefusalError, Spec, parse_spec
    from attncompile.lift.program import Program, Site
    from attncompile.statement import attention

_HOMES = {
    "CaptureError": "attncompile.frontends.errors",
    "Conversion": "attncompile.convert.artifact",
    "InputError": "attncompile.frontends.errors",
    "Program": "attncompile.lift.program",
    "Refusal": "attncompile.ir",
    "RefusalError": "attncompile.ir",
    "Site": "attncompile.lift.program",
    "Spec": "attncompile.ir",
    "attention": "attncompile.statement",
    "compile": "attncompile.api",
    "explain": "attncompile.api",
    "load": "attncompile.api",
    "parse_spec": "attncompile.ir",
    "tuning": "attncompile.codegen.triton.tuning",
}
_CALLED_PACKAGES = ("convert", "lift", "verify")


class _CalledPackage(ModuleType):
    """A package that can be called: the function of the same name in `attncompile.api`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        name = self.__name__.rpartition(".")[2]
        return getattr(import_module("attncompile.api"), name)(*args, **kwargs)


class _ThisPackage(ModuleType):
    """Importing a subpackage binds it here, whoever imports it first: then it becomes callable."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _CALLED_PACKAGES and isinstance(value, ModuleType):
            value.__class__ = _CalledPackage
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _ThisPackage


def __getattr__(name: str) -> Any:
    if name in _CALLED_PACKAGES:
        return import_module(f"{__name__}.{name}")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
