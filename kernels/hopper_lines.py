"""Lines of generated Gluon: functions copied from their file, long calls broken to fit."""

from __future__ import annotations

import re

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
