"""Passes as text: ``fuse, sparsify.window(size=1024, sinks=4)``."""

from __future__ import annotations

import re
from typing import Any

from pydantic import ValidationError

from attncompile.passes.frame import Options, Pass, PassCall
from attncompile.passes.registry import find_pass, nearest

_CALL = re.compile(r"\s*(?P<name>[A-Za-z_][\w.\-]*)\s*(?:\((?P<arguments>[^()]*)\))?\s*(?P<after>,|$)")
_ARGUMENT = re.compile(r"\s*(?P<key>[A-Za-z_]\w*)\s*=\s*(?P<value>[^,=]*[^,=\s])\s*")
_WORDS: dict[str, Any] = {"true": True, "false": False, "none": None}

# What pydantic calls a fault, and how it is said here; {0} is the limit.
_FAULTS: dict[str, tuple[str, str]] = {
    "greater_than_equal": ("must be at least {0}", "ge"),
    "greater_than": ("must be more than {0}", "gt"),
    "less_than_equal": ("must be at most {0}", "le"),
    "less_than": ("must be less than {0}", "lt"),
    "int_type": ("must be an integer", ""),
    "int_from_float": ("must be an integer", ""),
    "float_type": ("must be a number", ""),
    "bool_type": ("must be true or false", ""),
    "string_type": ("must be a word", ""),
    "literal_error": ("must be one of {0}", "expected"),
}


def parse_passes(text: str) -> tuple[PassCall, ...]:
    """Read a comma-separated list of passes with options.

    Args:
        text: such as ``"fuse,sparsify.window(size=1024,sinks=4)"``; empty for no pass.

    Raises:
        ValueError: in one sentence: an unknown pass or option (with the nearest known one), a value of the
            wrong type or out of range, or what cannot be read and where.
    """
    named = read_calls(text, "the passes")
    return tuple(make_call(find_pass(name), read_arguments(name, given)) for name, given in named)


def read_calls(text: str, what: str) -> list[tuple[str, str]]:
    """The names of a comma-separated list, each with the text of its options.

    Args:
        text: such as ``"int4(block=64)"``; what: the list is of, for errors.

    Raises:
        ValueError: in one sentence: what cannot be read and where.
    """
    calls: list[tuple[str, str]] = []
    position = 0
    while text[position:].strip():
        match = _CALL.match(text, position)
        if match is None:
            raise ValueError(f"cannot read {what} {text!r} from column {position + 1} on: expected a "
                             "name, then options in parentheses such as (size=1024), then a comma or the end")
        calls.append((match["name"], match["arguments"] or ""))
        position = match.end()
        if match["after"] and not text[position:].strip():
            raise ValueError(f"{what} {text!r} end with a comma")
    return calls


def read_arguments(name: str, text: str) -> dict[str, Any]:
    """Options by name from their text; whether they are known is not looked at.

    Raises:
        ValueError: in one sentence, for what cannot be read.
    """
    found: dict[str, Any] = {}
    for part in text.split(",") if text.strip() else ():
        match = _ARGUMENT.fullmatch(part)
        if match is None:
            raise ValueError(f"{name}: cannot read the option {part.strip()!r}; write it as name=value")
        if match["key"] in found:
            raise ValueError(f"{name}: the option {match['key']!r} is given twice")
        found[match["key"]] = _value(match["value"])
    return found


def _value(text: str) -> Any:
    if text in _WORDS:
        return _WORDS[text]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def make_call(rewrite: Pass, arguments: dict[str, Any]) -> PassCall:
    """A pass with options from Python values.

    Raises:
        ValueError: in one sentence, for the first option that is unknown, missing, of the wrong type or out
            of range.
    """
    return PassCall(rewrite, make_options(rewrite.name, rewrite.options, arguments))


def make_options(name: str, kind: type[Options], arguments: dict[str, Any]) -> Options:
    """Validated options from Python values.

    Args:
        name: of what they are for; kind: their class; arguments: by name.

    Raises:
        ValueError: in one sentence, for the first option that is unknown, missing, of the wrong type or out
            of range.
    """
    known = list(kind.model_fields)
    for key in arguments:
        if key not in known:
            there_are = f"its options are {', '.join(known)}" if known else "it has none"
            raise ValueError(f"{name} has no option {key!r}{nearest(key, known)}; {there_are}")
    try:
        return kind.model_validate(arguments)
    except ValidationError as error:
        fault = error.errors()[0]
    key = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "missing":
        raise ValueError(f"{name} needs the option {key!r}: {kind.model_fields[key].description}")
    said, limit = _FAULTS.get(fault["type"], (fault["msg"], ""))
    what = said.format(fault.get("ctx", {}).get(limit, ""))
    raise ValueError(f"{name}: {key} {what}, got {fault['input']!r}")
