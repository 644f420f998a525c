"""Skeleton of the kernel that moves tokens to other places before and after an attention."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass

from attncompile.kernels.source import WIDTH, indented, signature

ROWS = 64
"""Places that one program fills."""

_STRIDES = tuple(f"{tensor}_stride_{axis}" for tensor in ("source", "moved") for axis in "bhid")


@dataclass(frozen=True)
class MoveTokens:
    """One direction of moving.

    Attributes:
        name: of the kernel.
        lines, token: source of the token's number at place ``i``.
        tokens, places: how many there are before and after.
        said: the expression, for people.
    """

    name: str
    lines: tuple[str, ...]
    token: str
    tokens: int
    places: int
    said: str

    @staticmethod
    def strides() -> tuple[str, ...]:
        """Stride arguments in order."""
        return _STRIDES

    @classmethod
    def words(cls) -> frozenset[str]:
        """Identifiers that the text uses itself."""
        return frozenset(re.findall(r"\w+", cls("move", (), "", 0, 0, "").source() + cls.launcher()))

    def source(self) -> str:
        """The kernel as text."""
        parameters = ["source", "moved", *_STRIDES, "heads", "D: tl.constexpr", "CHANNELS: tl.constexpr"]
        body = [
            "program = tl.program_id(0)",
            f"blocks = tl.cdiv({self.places}, {ROWS})",
            f"i = program % blocks * {ROWS} + tl.arange(0, {ROWS})",
            "b = (program // blocks // heads).to(tl.int64)",
            "h = (program // blocks % heads).to(tl.int64)",
            "channel = tl.arange(0, CHANNELS)[None, :]",
            *self.lines,
            f"token = {self.token}",
            f"held = (token >= 0) & (token < {self.tokens})",
            "row = b * source_stride_b + h * source_stride_h + tl.cast(token, tl.int64) * source_stride_i",
            "real = channel < D",
            "values = tl.load(",
            "    source + row[:, None] + channel * source_stride_d, mask=held[:, None] & real, other=0.0",
            ")",
            "row = b * moved_stride_b + h * moved_stride_h + tl.cast(i, tl.int64) * moved_stride_i",
            f"real = real & (i < {self.places})[:, None]",
            "tl.store(moved + row[:, None] + channel * moved_stride_d, values, mask=real)",
        ]
        said = f'"""At place i the token {self.said}; zeros where there is none."""'
        return "\n".join(
            [
                "@triton.jit",
                signature(f"def {self.name}", parameters, ":"),
                indented(textwrap.wrap(said, WIDTH - 8, break_on_hyphens=False), 4),
                indented(body, 4),
            ]
        )

    @staticmethod
    def launcher() -> str:
        """The function that runs such a kernel, as text."""
        return f'''\
def moved_tokens(kernel, source, moved):
    """``moved`` [b,h,i,d] with the tokens of ``source`` where the kernel puts them."""
    batch, heads, places, channels = moved.shape
    with torch.cuda.device_of(source):
        launch(
            kernel, (triton.cdiv(places, {ROWS}) * batch * heads,), source, moved, *source.stride(), *moved.stride(),
            heads, D=channels, CHANNELS=triton.next_power_of_2(channels),
        )
    return moved'''


__all__ = ["ROWS", "MoveTokens"]
