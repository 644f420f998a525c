"""Lines of the Hopper kernel for operands that are codes with scales, see :class:`HopperForward`.

Scales cost nothing for each score where no score function comes between: the scale of a query times that of a key block
is a factor of the exponentials' argument, and the scale of a block of values, a power of two, joins it. Only where a
mask hides something are scores multiplied themselves, so that a hidden one stays the same number in every block.
"""

from __future__ import annotations

from dataclasses import dataclass

from attncompile.kernels.dense import NarrowOperands

_HEADROOM = 8
WEIGHT_UNIT = 2.0**-_HEADROOM
"""Weights in e4m3 are multiples of this, so that the largest lies from 128 to 256."""

WORDS = """
    query_scale key_scale value_scale key_scales value_scales key_heads key_row
    query_factor key_factor row_scale power exponent value_inverse highest shift
"""
"""Identifiers of these lines."""


@dataclass(frozen=True)
class CodeText:
    """The lines that depend on how operands are stored.

    Attributes:
        narrow: operands that are codes with scales, or ``None``.
        scored: whether a score function comes between products and exponentials.
        keys: identifier of the number of keys.
        kv_head: source of the KV head over ``h``.
        chains: as in :class:`attncompile.kernels.hopper.HopperTile`.
        hides: as in :class:`attncompile.kernels.hopper.HopperForward`.
    """

    narrow: NarrowOperands | None
    scored: bool
    keys: str
    kv_head: str
    chains: bool
    hides: bool

    @property
    def products(self) -> str:
        """Type of the products of queries and keys."""
        return "gl.int32" if self.narrow and self.narrow.dtype == "int8" else "gl.float32"

    @property
    def in_exponent(self) -> bool:
        """Whether the scales of queries and keys join the exponentials' argument."""
        return self.narrow is not None and not self.scored

    @property
    def _narrow_values(self) -> bool:
        return self.narrow is not None and self.narrow.value_block is not None

    def blocks(self) -> list[tuple[str, str, str]]:
        """Constants: name, value, meaning."""
        if self.narrow is None:
            return []
        rows = [
            ("QUERY_BLOCK", f"{self.narrow.query_block}", "queries that share a scale"),
            ("KEY_BLOCK", f"{self.narrow.key_block}", "keys that share a scale"),
        ]
        if self.narrow.value_block:
            rows.append(("VALUE_BLOCK", f"{self.narrow.value_block}", "values that share a scale"))
        return rows

    def block_scales(self) -> list[str]:
        """Loads of the scales of the key block at ``start``."""
        if self.narrow is None:
            return []
        place = f"gl.minimum(start, {self.keys} - 1)"
        lines = [f"key_factor = gl.load(key_scales + {place} // KEY_BLOCK)"]
        if self._narrow_values:
            lines += [
                f"power = gl.load(value_scales + {place} // VALUE_BLOCK)",
                "exponent = power_exponent(power)",
                f"value_inverse = inverse_power(power) * {WEIGHT_UNIT!r}",
            ]
        return lines

    def tile_scales(self) -> list[str]:
        """Scales of a tile's queries, where those of its keys begin, and the scores of its first block."""
        if self.narrow is None:
            return []
        lines = [
            "query_factor = next_factor * SCALE" if self.in_exponent else "query_factor = next_factor",
            f"key_row = b * key_heads + {self.kv_head}",
        ]
        for scale in self.narrow.scales()[1:]:
            block = scale.replace("scale", "block").upper()
            lines.append(f"{scale}s = {scale} + key_row * gl.cdiv({self.keys}, {block})")
        return [*lines, *self.block_scales(), *self.scaled(edge=True)]

    def scaled(self, *, edge: bool) -> list[str]:
        """From products of codes to scores.

        Args:
            edge: whether the block is known to be one where the mask hides something.
        """
        if self.narrow is None:
            return []
        lines = ["s = s.to(gl.float32)"] if self.narrow.dtype == "int8" else []
        lines.append("row_scale = query_factor * key_factor")
        scaled = "s = s * gl.expand_dims(row_scale, 1)"
        return [*lines, *([scaled] if edge or self.scored else ["if EDGE:", f"    {scaled}"])]

    def highest(self, name: str, *, edge: bool) -> list[str]:
        """The rows' greatest exponent in this block."""
        factor = "" if self.in_exponent else " * SCALE"
        lines = [f"{name} = {'highest_of(s)' if self.chains else 'gl.max(s, axis=1)'}{factor}"]
        if self.hides:
            lines.append(f"{name} = gl.maximum({name}, HIDDEN{factor})")
        if self.in_exponent and not edge:
            lines += ["if not EDGE:", f"    {name} = {name} * row_scale"]
        if self._narrow_values:
            lines += [
                "# Whole numbers: what is rounded to e4m3 then does not depend on the keys before.",
                f"{name} = gl.ceil({name} + exponent)",
            ]
        return lines

    def exponentials(self, peak: str, *, edge: bool) -> list[str]:
        """The weights of a block."""
        shift, lines = f"gl.expand_dims({peak}, 1)", []
        if self._narrow_values:
            lines.append(f"shift = {peak} - (exponent + {float(_HEADROOM)!r})")
            shift = "gl.expand_dims(shift, 1)"
        if not self.in_exponent:
            return [*lines, f"p = gl.exp2(s * SCALE - {shift})"]
        if edge:
            return [*lines, f"p = gl.exp2(s - {shift})"]
        scaled = f"p = gl.exp2(s * gl.expand_dims(row_scale, 1) - {shift})"
        return [*lines, "if EDGE:", f"    p = gl.exp2(s - {shift})", "else:", f"    {scaled}"]
