"""Lines of generated Gluon: functions copied from their file, long calls broken to fit."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from attncompile.kernels.source import WIDTH, file_text, function_text, signature, wrap


def device_source() -> str:
    """Text of :mod:`attncompile.kernels.hopper_device`, which is read, not imported."""
    return file_text("hopper_device.py")


def hopper_function(name: str) -> str:
    """Source text of a function of :mod:`attncompile.kernels.hopper_device`.

    Raises:
        ValueError: when there is no such function.
    """
    return function_text("hopper_device.py", name)


def filled(
    template: str, options: Mapping[str, bool], named: Callable[[str], str], parts: Mapping[str, list[str]]
) -> str:
    """A template with its markers replaced, in lines that fit; see :mod:`attncompile.kernels.hopper_text`.

    Args:
        template: the text.
        options: which of the lines that depend on an option stand.
        named: replaces the markers of arguments in a line.
        parts: lines that stand for ``# <name>``.
    """
    lines: list[str] = []
    for line in template.strip("\n").splitlines():
        marker = re.fullmatch(r"( *)# <(\w+)>", line)
        if marker:
            lines += [marker[1] + each for each in parts[marker[2]]]
            continue
        line, _, condition = line.partition("  # if ")
        if not condition or options[condition]:
            lines.append(named(line))
    return tidy(lines)


def listed(line: str, lists: Mapping[str, Iterable[str]]) -> str:
    """A line with the markers of lists of arguments replaced; one of an empty list goes with its comma."""
    for marker, names in lists.items():
        text = ", ".join(names)
        line = line.replace(marker, text) if text else line.replace(f"{marker}, ", "").replace(f", {marker}", "")
    return line


def tidy(lines: list[str]) -> str:
    """The lines as text, those with many arguments broken to fit."""
    return "\n".join(_fitted(line) for line in "\n".join(lines).splitlines())


def _fitted(line: str) -> str:
    """A call or a line of arguments on as many lines as it takes."""
    if len(line) <= WIDTH:
        return line
    indent = len(line) - len(line.lstrip())
    tuple_of_call = re.fullmatch(r"\((\w+), \((.*)\)\),", line.strip())
    if tuple_of_call:
        return signature(f"({tuple_of_call[1]}, ", _arguments(tuple_of_call[2]), "),", indent)
    call = re.fullmatch(r"(.*?)\((.*)\)([^()]*)", line.strip())
    if call and not line.rstrip().endswith(","):
        return signature(call[1], _arguments(call[2]), call[3], indent)
    return wrap(_arguments(line.strip().rstrip(",")), indent)


def _arguments(text: str) -> list[str]:
    """Split at the commas that stand in no brackets."""
    found, depth = [""], 0
    for character in text:
        depth += {"(": 1, "[": 1, ")": -1, "]": -1}.get(character, 0)
        if character == "," and depth == 0:
            found.append("")
        else:
            found[-1] += character
    return [part.strip() for part in found if part.strip()]
