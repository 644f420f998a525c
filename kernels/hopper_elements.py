"""Elements of captured tensors that belong to a key or to a query, loaded before a Hopper kernel's products.

What a thread loads of a block's keys is asked for before the products that hide the wait, and spread over the columns
of the scores while they run. What belongs to a tile's queries is loaded while the tile before is finished.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass

from attncompile.kernels.dense import DeviceFunction
from attncompile.kernels.source import indented, signature

OWN_KEYS = "own_keys"
"""Identifier of the keys whose elements the threads of a warpgroup load, one each."""

MOST = 8
"""Loads of either kind that there are names for."""


SPREAD = 1
"""Words of each column that there are registers for while products run."""


def key_element(number: int) -> str:
    """Name of the elements of keys in the columns of the scores."""
    return f"by_key_{number}"


def row_element(number: int) -> str:
    """Name of the elements of queries in the rows of the scores."""
    return f"by_row_{number}"


def loading(name: str) -> str:
    """Name of the function that loads such elements."""
    return f"load_{name}"


@dataclass(frozen=True)
class KeyLoad:
    """One load by key.

    Attributes:
        function: loads the elements of :data:`OWN_KEYS`.
        name: of the elements in the columns of the scores.
        masking: whether only the mask reads it.
        words: registers of 4 bytes that an element takes.
    """

    function: DeviceFunction
    name: str
    masking: bool
    words: int

    @property
    def own(self) -> str:
        """Name of the elements that the threads loaded, one each."""
        return f"own_{self.name}"


@dataclass(frozen=True)
class RowLoad:
    """One load by query.

    Attributes:
        function: loads the elements of ``i``.
        name: of the elements.
    """

    function: DeviceFunction
    name: str


@dataclass(frozen=True)
class Elements:
    """The loads of a kernel.

    Attributes:
        keys, rows: by key and by query.
    """

    keys: tuple[KeyLoad, ...] = ()
    rows: tuple[RowLoad, ...] = ()

    @property
    def of_rows(self) -> tuple[str, ...]:
        """Names of the elements of a tile's queries."""
        return tuple(load.name for load in self.rows)

    @property
    def own(self) -> tuple[str, ...]:
        """Names of what threads loaded of a block's keys."""
        return tuple(load.own for load in self.keys)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all elements, in rows and columns of the scores."""
        return (*self.of_rows, *(load.name for load in self.keys))

    @property
    def spread_early(self) -> bool:
        """Whether there are registers for the columns' elements while products run."""
        return sum(load.words for load in self.keys) <= SPREAD

    def functions(self) -> tuple[DeviceFunction, ...]:
        """The functions that load."""
        return (*(load.function for load in self.rows), *(load.function for load in self.keys))

    def load_keys(self, start: str, edge: str, context: Iterable[str], *, b: str = "b", h: str = "h") -> list[str]:
        """A statement that asks for the elements of a block's keys, or none.

        Args:
            start: source of its first key.
            edge: source that tells whether the mask is asked.
            context: what expressions may read.
            b, h: sources of batch row and head.
        """
        return self._assigned(self.own, "elements_of_keys", [start, b, h, *context, edge])

    def load_rows(self, tile: str, context: Iterable[str]) -> list[str]:
        """A statement that asks for the elements of the queries of an entry of the work list, or none."""
        return self._assigned(self.of_rows, "elements_of_rows", [tile, *context, "GROUP"])

    def spread(self, *, edge: bool) -> list[str]:
        """Statements that spread the elements of keys over the columns.

        Args:
            edge: whether the block is known to be one where the mask is asked; else they ask.
        """
        scored = [f"{load.name} = in_columns({load.own})" for load in self.keys if edge or not load.masking]
        masking = [load for load in self.keys if not edge and load.masking]
        if not masking:
            return scored
        lines = [*scored, *(f"{load.name} = 0" for load in masking), "if EDGE:"]
        return [*lines, *(f"    {load.name} = in_columns({load.own})" for load in masking)]

    def source(self, context: Iterable[str], lengths: tuple[str, str, str]) -> list[str]:
        """The functions that load all elements, as text.

        Args:
            context: what expressions may read.
            lengths: identifiers of the numbers of heads, queries and keys.
        """
        found = []
        if self.rows:
            found.append(self._rows_function(list(context), lengths[1]))
        if self.keys:
            found.append(self._keys_function(list(context), lengths[2]))
        return found

    @staticmethod
    def _assigned(names: tuple[str, ...], function: str, arguments: list[str]) -> list[str]:
        return [f"{', '.join(names)} = {function}({', '.join(arguments)})"] if names else []

    def _rows_function(self, context: list[str], queries: str) -> str:
        calls = [signature(load.function.name, load.function.parameters, "", inside=4) for load in self.rows]
        lines = [
            "row_first, b, h = unpacked(gl.maximum(tile, 0))",
            "rows = row_first + 64 * GROUP + gl.arange(0, 64, layout=gl.SliceLayout(1, SCORES))",
            f"i = gl.expand_dims(gl.minimum(rows, {queries} - 1), 1)",
            *(f"{load.name} = {call}" for load, call in zip(self.rows, calls, strict=True)),
            f"return {', '.join(self.of_rows)}",
        ]
        head = signature("def elements_of_rows", ["tile", *context, "GROUP: gl.constexpr"], ":")
        said = '"""Elements that belong to the queries of an entry of the work; loaded long before they are read."""'
        return _function(head, said, lines)

    def _keys_function(self, context: list[str], keys: str) -> str:
        masking = [load for load in self.keys if load.masking]
        lines = [
            f"{OWN_KEYS} = start + gl.arange(0, BLOCK_J, layout=KEY_LANES)",
            *(f"{load.own} = 0" for load in masking),
            "if EDGE:",
            f"    {OWN_KEYS} = gl.minimum({OWN_KEYS}, {keys} - 1)",
            *(textwrap.indent(_loaded(load, 8), "    ") for load in masking),
            *(_loaded(load, 4) for load in self.keys if not load.masking),
        ]
        lines.append(f"return {', '.join(self.own)}")
        head = signature("def elements_of_keys", ["start", "b", "h", *context, "EDGE: gl.constexpr"], ":")
        said = '"""Elements of a block\'s keys, one a thread; those that only a mask reads in an EDGE block."""'
        return _function(head, said, lines)


def _loaded(load: KeyLoad, inside: int) -> str:
    return signature(f"{load.own} = {load.function.name}", load.function.parameters, "", inside=inside)


def _function(head: str, said: str, lines: list[str]) -> str:
    body = indented([line for text in lines for line in text.splitlines()], 4)
    return f"@gluon.jit\n{head}\n    {said}\n{body}"


WORDS = f"{OWN_KEYS} KEY_LANES in_columns elements_of_rows elements_of_keys " + " ".join(
    f"{name} {loading(name)} own_{name}"
    for number in range(MOST)
    for name in (key_element(number), row_element(number))
)
"""Identifiers that they use."""
