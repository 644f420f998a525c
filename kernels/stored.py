"""How the decode kernel reads keys and values as they lie in memory: rows, codes, scales and shifts as source text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from attncompile.kernels.dense import DeviceFunction
from attncompile.kernels.source import signature

LARGEST_PIECE = 256
"""Channels that are multiplied at once; a wider head is read in pieces."""

Form = Literal["real", "float8_e4m3", "int8", "int4"]
EXCESS = {"int8": 128, "int4": 8}
"""What is added to integer codes in float16 so that none is negative: matrix units then take their bits as they are."""

Reads = Literal["channel", "token", "both"]


@dataclass(frozen=True)
class Term:
    """A scale or a shift of stored numbers.

    Attributes:
        function: of ``b g j d``.
        reads: what it differs by inside a head: ``channel`` (or nothing), ``token``, or ``both``.
    """

    function: DeviceFunction
    reads: Reads

    def read(self, target: str, token: str, channel: str) -> list[str]:
        """Lines that bind the target to its values at a key position and a channel, given as source."""
        places = {"j": token, "d": channel}
        arguments = [places.get(name, name) for name in self.function.parameters]
        return signature(f"{target} = {self.function.name}", arguments, "", inside=12).splitlines()


def piece(channels: int) -> int:
    """Channels of a piece of a head: all of a usual one, else the largest power of two that divides them."""
    if channels <= LARGEST_PIECE:
        return channels
    return min(LARGEST_PIECE, channels & -channels)


@dataclass(frozen=True)
class Stored:
    """Keys or values as they lie in memory.

    Attributes:
        name: ``key`` or ``value``.
        rows: source of the index of each stored axis over ``b g keys``; ``None`` for the axis of the channels.
        channels: number of channels, as the Spec has them.
        form: how a number is stored; ``real`` is the operands' own type.
        scale, shift: of stored numbers, or ``None``.
        factored: whether scale and shift are applied around the products, not to the tile.
    """

    name: str
    rows: tuple[str | None, ...]
    channels: int
    form: Form = "real"
    scale: Term | None = None
    shift: Term | None = None
    factored: bool = True

    @property
    def parts(self) -> tuple[str, ...]:
        """Endings of the names of the tiles that a tile of stored numbers gives, or of the pieces of a wide head.

        Codes are read two bytes at a time: tensor cores take neighbouring keys of one channel in 32 bits, which is then
        what two loads of 16 bits give.
        """
        if self.form == "real":
            pieces = self.channels // piece(self.channels)
            return tuple(f"_{number}" for number in range(pieces)) if pieces > 1 else ("",)
        return ("_0", "_1", "_2", "_3") if self.form == "int4" else ("_0", "_1")

    @property
    def width(self) -> int:
        """Channels of each part."""
        return self.channels // len(self.parts)

    @property
    def padded(self) -> int:
        """Channels of a part's tile: a power of two that the matrix units take."""
        return max(16, 1 << (self.width - 1).bit_length())

    @property
    def excess(self) -> int:
        """What the numbers of the tiles exceed the codes by, until it is subtracted."""
        return EXCESS.get(self.form, 0)

    def multiple(self, part: int) -> int:
        """How many times too large the numbers of a part's tile are."""
        return 16 if self.form == "int4" and part > 1 else 1

    @property
    def lanes(self) -> str:
        """Identifier of the numbers of a part's channels."""
        return "channels" if self.name == "key" else "features"

    def bytes_of_a_key(self, element: int) -> int:
        """Bytes of a tile's row in shared memory, its scales included, for operands of so many bytes."""
        terms = sum(term is not None for term in (self.scale, self.shift)) if not self.factored else 0
        pieces = len(self.parts) if self.form == "real" else 1
        return self.padded * ((element if self.form == "real" else 2) * pieces + 4 * terms * len(self.parts))

    def strides(self) -> tuple[str, ...]:
        """Stride arguments in order."""
        return tuple(f"{self.name}_stride_{axis}" for axis in range(len(self.rows)))

    def place(self, part: int) -> str:
        """Source of the channels of a part: the bytes of a pair hold neighbours, the halves of a byte are far apart."""
        if self.form == "real":
            return f"({self.lanes} + {part * self.width})" if part else self.lanes
        offset = part % 2 + (self.channels // 2 if part > 1 else 0)
        return f"(2 * {self.lanes} + {offset})" if offset else f"(2 * {self.lanes})"

    def lane(self, part: int) -> str:
        """The same for channels that exist; past the last one the last."""
        if self.padded == self.width:
            return self.place(part)
        return self.place(part).replace(self.lanes, f"tl.minimum({self.lanes}, {self.width - 1})")

    @property
    def even(self) -> bool:
        """Whether keys lie equally far apart: their distances from a tile's first stay the same from tile to tile."""
        return "keys" in self.rows

    def offsets(self) -> list[str]:
        """Lines that compute the offset of each key, or where the first of a tile lies."""
        steps = [
            f"tl.cast({'start' if text == 'keys' else text}, tl.int64) * {stride}"
            for text, stride in zip(self.rows, self.strides(), strict=True)
            if text not in (None, "0")
        ]
        if self.even:
            name = f"{self.name}_start"
            return [f"{name} = {self.name} + {steps[0]}", *(f"{name} += {step}" for step in steps[1:])]
        name = f"{self.name}_rows"
        return [f"{name} = {steps[0]}", *(f"{name} += {step}" for step in steps[1:])]

    def load(self, across: bool) -> list[str]:
        """Lines that read the tile of stored numbers ``[keys, channels]``, or ``[channels, keys]`` if ``across``."""
        token, channel = ("[None, :]", "[:, None]") if across else ("[:, None]", "[None, :]")
        shown = f"inside{token}"
        if self.padded != self.width:
            shown += f" & ({self.lanes} < {self.width}){channel}"
        stride = f"{self.name}_stride_{self.rows.index(None)}"
        empty = "0.0" if self.form == "real" else "0"
        first, rows = self.name, f"{self.name}_rows{token}"
        if self.even:
            first = f"{self.name}_start"
            rows = f"far_lanes{token} * {self.name}_stride_{self.rows.index('keys')}"
        # bytes of codes are read together, whatever the tiles that they give
        pieces = [(part, self.place(n)) for n, part in enumerate(self.parts)] if self.form == "real" else []
        lines = self.offsets()
        for part, place in pieces or [("", self.lanes)]:
            lines += [
                f"{self.name}_offsets = {rows} + {place}{channel} * {stride}",
                f"{self.name}_stored{part} = tl.load({first} + {self.name}_offsets, mask={shown}, other={empty})",
            ]
        return lines

    def numbers(self, part: int, across: bool) -> list[str]:
        """Lines that make the tile of a part's numbers from the stored ones: where it is multiplied, not before."""
        name, tile = f"{self.name}_stored", f"{self.name}_tile{self.parts[part]}"
        if self.form == "real":
            return [f"{tile} = {name}{self.parts[part]}"]
        dtype = "PRODUCT" if self.factored else "tl.float32"
        function = {"int8": "from_int8", "float8_e4m3": "from_e4m3", "int4": "from_int4"}[self.form]
        lines = [f"{tile} = {function}({name}, {part}, {dtype}, CAPABILITY)"]
        if self.factored:
            return lines
        token, channel = ("[None, :]", "[:, None]") if across else ("[:, None]", "[None, :]")
        if self.multiple(part) > 1:
            lines.append(f"{tile} = {tile} * {1 / self.multiple(part)!r}")
        for sign, term in (("*", self.scale), ("+", self.shift)):
            if term:
                lines += term.read(f"{self.name}_terms", f"keys{token}", f"{self.lane(part)}{channel}")
                lines.append(f"{tile} = {tile} {sign} {self.name}_terms")
        if self.name == "value":  # the weight there is zero, but no number times zero may be NaN
            lines.append(f"{tile} = tl.where(inside{token}, {tile}, 0.0)")
        lines.append(f"{tile} = {tile}.to(query.dtype.element_ty)")
        return lines


PAIRS_OF = '''\
def pairs_of(name, tensor):
    """A store of bytes as 16-bit numbers; its rows must lie so."""
    places = (*tensor.stride()[:-1], tensor.storage_offset())
    if tensor.stride()[-1] != 1 or any(place % 2 for place in places):
        raise ValueError(f"rows of {name} should be contiguous and begin at even bytes: strides {tensor.stride()}")
    return tensor.view(torch.int16)


def capability_of(tensor):
    """Compute capability of the tensor's device, such as 90; 0 where it is no GPU of NVIDIA's."""
    if not tensor.is_cuda or torch.version.hip is not None:
        return 0
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor'''

__all__ = ["PAIRS_OF", "Form", "Reads", "Stored", "Term", "piece"]
