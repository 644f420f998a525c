"""Identifiers of generated code: every name from a model is sanitised, and none is used twice."""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterable

MODULE_NAMES = frozenset(
    {
        "tl",
        "triton",
        "torch",
        "math",
        "range",
        "float",
        "attend",
        "attend_forward",
        "quantize_blocks",
        "scan_forward",
        "score",
        "visible",
        "edit",
        "decay_factor",
        "update",
        "feature_map",
        "expect",
        "tanh",
        "floor_divide",
        "floor_modulo",
        "round_half_even",
        "TILES",
        "LOG2E",
    }
)
"""Names that the module itself uses."""


class Names:
    """Gives out identifiers, each once."""

    def __init__(self, taken: Iterable[str] = ()) -> None:
        self._taken = set(MODULE_NAMES) | set(taken)

    def fresh(self, wanted: str) -> str:
        """An identifier like ``wanted`` that nothing else has."""
        plain = re.sub(r"\W", "_", wanted, flags=re.ASCII).strip("_") or "tensor"
        if plain[0].isdigit() or keyword.iskeyword(plain):
            plain = f"t_{plain}"
        name, number = plain, 2
        while name in self._taken:
            name, number = f"{plain}_{number}", number + 1
        self._taken.add(name)
        return name
