"""Where a node comes from: stack traces become one source line, Dynamo's source names become dotted paths."""

import functools
import linecache
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

_FRAME = re.compile(r'^\s*File "(?P<file>[^"]+)", line (?P<line>\d+)(?:, in (?P<function>\S+))?')
_CARETS = re.compile(r"^[\s^~]*$")

# Folders whose frames explain how torch did it, not what the model asked for.
_MACHINERY = ("torch",)


@dataclass(frozen=True)
class SourceLine:
    """One line of code: ``file`` is the full path, ``line`` counts from 1, ``code`` is stripped text or
    empty."""

    file: str
    line: int
    function: str
    code: str

    def __str__(self) -> str:
        return f"{Path(self.file).name}:{self.line}  {self.code}".rstrip()


def frames(stack_trace: str) -> Iterator[SourceLine]:
    """The frames of a printed Python stack trace, outermost first. Text that is no frame is skipped."""
    lines = stack_trace.splitlines()
    for number, text in enumerate(lines):
        match = _FRAME.match(text)
        if match is None:
            continue
        following = lines[number + 1] if number + 1 < len(lines) else ""
        code = "" if _FRAME.match(following) or _CARETS.match(following) else following.strip()
        file, line = match["file"], int(match["line"])
        yield SourceLine(file, line, match["function"] or "", code or linecache.getline(file, line).strip())


def innermost_model_frame(stack_trace: str | None) -> SourceLine | None:
    """The innermost frame outside torch itself; the innermost of all when every frame is torch's, None
    without frames."""
    found = list(frames(stack_trace or ""))
    outside = [frame for frame in found if not _inside_machinery(frame.file)]
    return (outside or found)[-1] if found else None


@functools.lru_cache(maxsize=1024)
def _inside_machinery(file: str) -> bool:
    """True for a file of an installed package of `_MACHINERY`, and for code that has no file
    (``<string>``)."""
    if file.startswith("<"):
        return True
    parts = Path(file).parts
    return any(
        parent in ("site-packages", "dist-packages") and package in _MACHINERY
        for parent, package in pairwise(parts)
    )


_ROOT = re.compile(r"^[A-Z]\['(?P<root>[^']*)'\]")
_REGISTRY = re.compile(r"\._(?:modules|parameters|buffers)\['(?P<name>[^']*)'\]")
_ITEM = re.compile(r"\[['\"]?(?P<key>[^'\"\]]*)['\"]?\]")
_SIZE = re.compile(r"\.size\(\)\[(?P<axis>\d+)\]$")


def dotted_path(source_name: str) -> str:
    """A Dynamo source as a dotted path.

    ``L['self']._modules['layers']._modules['0']._parameters['weight']`` → ``layers.0.weight``;
    ``L['kwargs']['input_ids'].size()[1]`` → ``input_ids.size(1)``; ``L['args'][0]`` → ``args.0``; a name that
    is not a source stays as it is.
    """
    size = _SIZE.search(source_name)
    path = source_name[: size.start()] if size else source_name
    root = _ROOT.match(path)
    if root is not None:
        path = path[root.end() :]
        # What hangs below these two has a name of its own; positional arguments do not.
        if not path or root["root"] not in ("self", "kwargs"):
            path = f"{root['root']}{path}"
    path = _REGISTRY.sub(r".\g<name>", path)
    path = _ITEM.sub(r".\g<key>", path)
    path = path.replace("..", ".").strip(".")
    return f"{path}.size({size['axis']})" if size else path
