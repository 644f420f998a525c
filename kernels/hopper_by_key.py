"""Elements of captured tensors that belong to a key, loaded once for a block of the Hopper kernel."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from attncompile.kernels.dense import DeviceFunction
from attncompile.kernels.source import signature

OWN_KEYS = "own_keys"
"""Identifier of the keys whose elements the threads of a warpgroup load, one each."""

MOST = 8
"""Loads that there are names for."""


@dataclass(frozen=True)
class KeyLoad:
    """One load.

    Attributes:
        function: loads the elements of :data:`OWN_KEYS`.
        name: of the elements in the columns of the scores.
        masking: whether only the mask reads it.
    """

    function: DeviceFunction
    name: str
    masking: bool


def loading(number: int) -> str:
    """Name of a function that loads."""
    return f"load_by_key_{number}"


def loaded(number: int) -> str:
    """Name of what is loaded."""
    return f"by_key_{number}"


def load_lines(loads: Iterable[KeyLoad], keys: str, *, edge: bool) -> list[str]:
    """Statements that load.

    Args:
        loads: what is loaded; nothing is written for none.
        keys: identifier of the number of keys.
        edge: whether the lines only run where a block may reach past the last key; else they ask.
    """
    chosen = list(loads)
    if not chosen:
        return []
    limited = f"{OWN_KEYS} = gl.minimum({OWN_KEYS}, {keys} - 1)"
    calls = [
        signature(f"{load.name} = in_columns({load.function.name}", load.function.parameters, ")") for load in chosen
    ]
    return [
        f"{OWN_KEYS} = start + gl.arange(0, BLOCK_J, layout=KEY_LANES)",
        *([limited] if edge else ["if EDGE:", f"    {limited}"]),
        *calls,
    ]


WORDS = f"{OWN_KEYS} KEY_LANES in_columns " + " ".join(
    f"{loading(number)} {loaded(number)}" for number in range(MOST)
)
"""Identifiers that they use."""
