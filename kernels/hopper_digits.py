"""A mask by one more product: where a mask knows a key of a block by the digits of its place, as the axes of a box.

Within a block the place of a key is a number of a few digits, ``place // 32``, ``place // 4 % 8`` and ``place % 4`` in
a box of 4·8·4 keys, and a window is a conjunction of conditions on a single digit each. A key is then a row of ones and
zeros, a one for the value of each digit, the same for all blocks; and a query a row of zeros and of numbers that hide,
one for each value of each digit. Their product, 16 or 32 columns wide, is what the mask adds to the scores: the matrix
unit does in one step or two what takes several instructions for every score.

Visible scores stay as they are, since zeros are added to them. A hidden one is at most its product with the keys minus
2^100, so that products of query and key have to stay below 2^98, as they have to stay above −2^98 anyway.
"""

from __future__ import annotations

from dataclasses import dataclass

from attncompile.kernels.dense import DeviceFunction
from attncompile.kernels.source import signature

MOST = 32
"""Columns of the product: two steps of the matrix unit."""


@dataclass(frozen=True)
class Digit:
    """A digit of a key's place in its block, ``place // divisor % count``, and what a mask asks of it.

    Attributes:
        divisor, count: of the digit.
        allowed: truth value over ``b h i``, the block's first key ``start`` and the ``digit``.
    """

    divisor: int
    count: int
    allowed: DeviceFunction


@dataclass(frozen=True)
class KeyDigits:
    """A mask as conditions on digits.

    Attributes:
        digits: all of them.
    """

    digits: tuple[Digit, ...]

    @property
    def columns(self) -> int:
        """Columns of the product."""
        return max(16, 1 << (sum(digit.count for digit in self.digits) - 1).bit_length())

    def source(self, context: tuple[str, ...]) -> str:
        """The functions that make both rows.

        Args:
            context: arguments that expressions may read.
        """
        first = 0
        ones, chosen = [], []
        for number, digit in enumerate(self.digits):
            place = f"place // {digit.divisor} % {digit.count}" if digit.divisor > 1 else f"place % {digit.count}"
            ones.append(f"(column == {place + f' + {first}' if first else place})")
            allowed = signature(f"allowed_{number}", digit.allowed.parameters, "")
            test = f"digit = column - {first}" if first else "digit = column"
            chosen += [test, f"shown = {allowed if not number else f'gl.where(column < {first}, shown, {allowed})'}"]
            first += digit.count
        keys = [
            "@gluon.jit",
            "def digits_of_keys():",
            '    """Rows of a block\'s keys: 1 in the column of each digit, 0 elsewhere."""',
            "    LANES: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [gl.num_warps(), 1], [1, 0])",
            "    place = gl.expand_dims(gl.arange(0, BLOCK_J, layout=gl.SliceLayout(1, LANES)), 1)",
            "    column = gl.expand_dims(gl.arange(0, DIGITS, layout=gl.SliceLayout(0, LANES)), 0)",
            f"    ones = {' | '.join(ones)}",
            "    return gl.where(ones, 1.0, 0.0).to(gl.bfloat16)",
        ]
        queries = [
            "@gluon.jit",
            signature("def hidden_digits", ["start", "first_row", "b", "h", *context], ":"),
            '    """Rows of 64 queries: HIDDEN in the column of each digit that the mask hides from them."""',
            "    rows = first_row + gl.arange(0, 64, layout=gl.SliceLayout(1, HIDING))",
            "    i = gl.expand_dims(rows, 1)",
            "    column = gl.expand_dims(gl.arange(0, DIGITS, layout=gl.SliceLayout(0, HIDING)), 0)",
            *(f"    {line}" for line in chosen),
            "    hidden = gl.where(shown, 0.0, HIDDEN).to(gl.bfloat16)",
            "    return gl.convert_layout(hidden, gl.DotOperandLayout(0, SCORES, 2), assert_trivial=True)",
        ]
        functions = [digit.allowed.source().replace("@triton.jit", "@gluon.jit", 1) for digit in self.digits]
        return "\n\n\n".join(["\n".join(keys), *functions, "\n".join(queries)])


WORDS = frozenset(
    ("digits_of_keys", "hidden_digits", "digit", "digits", "place", "column", "ones", "hidden", "HIDING", "DIGITS")
) | {f"allowed_{number}" for number in range(8)}
"""Identifiers that this text uses."""

__all__ = ["MOST", "WORDS", "Digit", "KeyDigits"]
