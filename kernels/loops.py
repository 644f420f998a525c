"""The loops of a kernel over the positions that its block may see, from limits that the mask gives.

Written for a block of queries and the keys it visits; with the roles exchanged it serves a block of keys and the
queries that see it. The steps come in up to three runs: blocks where everything is visible, without any mask; blocks on
an edge of the mask or past the last position, with it; and none at all for the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

Step = Callable[[bool], list[str]]
"""Lines of one step at the position ``start``; told whether the mask has to be applied."""


@dataclass(frozen=True)
class KeyRuns:
    """Source of the limits of the key loops; ``None`` where there is no such run, or no limit.

    Attributes:
        first: start and stop of a range before the main one.
        main: start and stop of the main range; starts are at least 0, stops at most the number of keys.
        full: start and stop of the keys that every query of the block sees.
        test: condition for a key block to be visited at all, over ``key_first`` and ``key_last``.
        lines: statements that the limits rely on.
        test_lines: statements that the condition relies on besides, over ``key_first`` and ``key_last`` too.
    """

    first: tuple[str, str] | None
    main: tuple[str, str]
    full: tuple[str, str] | None
    test: str | None
    lines: tuple[str, ...] = ()
    test_lines: tuple[str, ...] = ()

    @property
    def everything(self) -> bool:
        """Whether all keys are visible."""
        return self.first is None and self.main[0] == "0" and self.full is not None and self.full == self.main


@dataclass(frozen=True)
class Visited:
    """Which positions a loop goes over, or a program has for its own.

    Attributes:
        block: compile-time argument with the size of a step.
        positions, index: identifiers of a block's positions, and of them as the index of an expression.
        first, last: identifiers of a step's first and last position in :attr:`KeyRuns.test`.
        most: what is said where the last of them have the most to do.
        full: what is said of the run without a mask.
        rest: what is said of the positions behind the last whole block.
    """

    block: str
    positions: str
    index: str
    first: str
    last: str
    most: str
    full: str
    rest: str


KEYS = Visited(
    "BLOCK_J",
    "keys",
    "j",
    "key_first",
    "key_last",
    "the last keys have the most queries: they start first",
    "Every query of the block sees every one of these keys.",
    "The rest of the keys does not fill a block.",
)
QUERIES = Visited(
    "BLOCK_I",
    "rows",
    "i",
    "row_first",
    "row_last",
    "the last queries have the most keys: they start first",
    "Every one of these queries sees every key of the block.",
    "The rest of the queries does not fill a block.",
)


def own_block(own: Visited, length: str, head: tuple[str, str], last_first: bool, clamped: bool) -> list[str]:
    """Batch row, head and positions of a program that has a block of a head for its own.

    Args:
        own: the positions.
        length: identifier of their number.
        head: identifiers of the head and of the number of heads.
        last_first: whether the last block comes first.
        clamped: whether tensors are loaded by the positions: past the last one the last element is read.
    """
    block, (one, heads) = "program % blocks", head
    index = f"tl.minimum({own.positions}, {length} - 1)[:, None]" if clamped else f"{own.positions}[:, None]"
    return [
        "program = tl.program_id(0)",
        f"blocks = tl.cdiv({length}, {own.block})",
        f"block = blocks - 1 - {block}  # {own.most}" if last_first else f"block = {block}",
        f"b = program // blocks // {heads}",
        f"{one} = program // blocks % {heads}",
        f"{own.first} = block * {own.block}",
        f"{own.last} = tl.minimum({own.first} + {own.block}, {length}) - 1",
        f"{own.positions} = {own.first} + tl.arange(0, {own.block})",
        f"{own.index} = {index}",
    ]


def key_loops(runs: KeyRuns, length: str, step: Step, over: Visited = KEYS) -> list[list[str]]:
    """The loops as groups of lines: limits, steps without a mask, steps with it.

    Args:
        runs: the limits.
        length: identifier of the number of positions.
        step: gives the body.
        over: what the loops go over.
    """
    block = over.block
    full = [
        f"# {over.full}",
        f"for start in range(full_start, full_stop, {block}):",
        *deeper(step(False)),
    ]
    if runs.everything:
        return [
            ["full_start = 0", f"full_stop = {length} // {block} * {block}"],
            full,
            [
                f"# {over.rest}",
                f"for start in range(full_stop, {length}, {block}):",
                *deeper(step(True)),
            ],
        ]
    limits = [*runs.lines]
    if runs.full and runs.first is None and runs.main[0] == runs.full[0] == "0":
        return [
            [
                *limits,
                "full_start = 0",
                f"full_stop = tl.maximum({runs.full[1]}, 0) // {block} * {block}",
                f"main_stop = {runs.main[1]}",
            ],
            full,
            [
                "# Blocks on the edge of the mask.",
                *_guarded(f"for start in range(full_stop, main_stop, {block}):", runs, step(True), over),
            ],
        ]
    if runs.full:
        limits.append("# Visited: main_start to main_stop; without a mask: full_start to full_stop.")
    limits += [
        f"main_start = {_aligned(runs.main[0], block)}",
        f"main_stop = tl.maximum({runs.main[1]}, main_start)",
    ]
    if runs.first:
        limits += [
            "# A range before it, as far as it does not reach into it.",
            f"first_start = {_aligned(runs.first[0], block)}",
            f"first_stop = tl.minimum(tl.cdiv({runs.first[1]}, {block}) * {block}, main_start)",
            f"first_count = tl.maximum(first_stop - first_start, 0) // {block}",
        ]
    if runs.full:
        limits += [
            f"full_start = tl.cdiv(tl.maximum({runs.full[0]}, main_start), {block}) * {block}",
            f"full_start = tl.minimum(full_start, tl.cdiv(main_stop, {block}) * {block})",
            f"full_stop = tl.minimum({runs.full[1]}, main_stop) // {block} * {block}",
            "full_stop = tl.maximum(full_stop, full_start)",
            f"before = (full_start - main_start) // {block}",
            f"after = tl.cdiv(tl.maximum(main_stop - full_stop, 0), {block})",
        ]
    return [limits, *([full] if runs.full else []), _edges(runs, step, over)]


def _edges(runs: KeyRuns, step: Step, over: Visited) -> list[str]:
    block = over.block
    if not runs.first and not runs.full:
        return _guarded(f"for start in range(main_start, main_stop, {block}):", runs, step(True), over)
    counts = ["first_count"] if runs.first else []
    counts += ["before", "after"] if runs.full else [f"tl.cdiv(main_stop - main_start, {block})"]
    origin = "first_start" if runs.first else "main_start"
    where = [f"start = {origin} + number * {block}"]
    if runs.first:
        where.append(f"start += tl.where(number >= first_count, main_start - first_start - first_count * {block}, 0)")
    if runs.full:
        passed = "first_count + before" if runs.first else "before"
        where.append(f"start += tl.where(number >= {passed}, full_stop - full_start, 0)")
    loop, *body = _guarded(f"for number in range(0, {' + '.join(counts)}):", runs, step(True), over)
    return ["# Blocks on an edge of the mask, one run after the other.", loop, *deeper(where), *body]


def _aligned(start: str, block: str) -> str:
    """The start of the block that holds a position (never a negative one)."""
    if start == "0":
        return start
    one_call = start.isidentifier() or (start.startswith("tl.maximum(") and start.count(") ") == 0)
    return f"{start if one_call else f'({start})'} // {block} * {block}"


def _guarded(head: str, runs: KeyRuns, step: list[str], over: Visited) -> list[str]:
    """A loop's head and body; with a test, blocks that fail it are passed over."""
    if runs.test:
        limits = f"{over.first}, {over.last} = start, start + {over.block} - 1"
        step = [limits, *runs.test_lines, f"if {runs.test}:", *deeper(step)]
    return [head, *deeper(step)]


def deeper(lines: Iterable[str]) -> list[str]:
    """The lines, one level further in."""
    return ["    " + line if line else "" for line in lines]
