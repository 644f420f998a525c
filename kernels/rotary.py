"""Skeleton of the kernels that rotate queries or keys and round them, in one reading of the tensor.

A program takes one block of positions of one head. It loads both channels of each pair, rotates them in float32 in
registers, and rounds the result with one scale. Where the mean over positions is subtracted, that is the mean of the
rotated tensor: a kernel before it rotates too, and sums.

Follows: Su et al. 2021 (arXiv:2104.09864) for the map; SageAttention (arXiv:2410.02367) for the rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

from attncompile.kernels.dense import DeviceFunction
from attncompile.kernels.quantize import power_of_two
from attncompile.kernels.source import indented, signature

FUNCTIONS = ("angles", "rotate", "rotate_sum_blocks", "rotate_quantize_blocks", "rotate_quantize")
"""What a module calls them; a second map's have a suffix."""

SUMMED = 128
"""Positions of a partial sum of the mean: as many as the keys of a tile of the attention."""

ELEMENTS = 64
"""Elements of a block that one thread holds: with their angles and partners they take about five times as many
registers, and a thread has 255."""


def warps_of(block: int, channels: int) -> int:
    """Warps that share a block of so many positions."""
    return min(16, max(4, power_of_two(block) * power_of_two(channels) // (32 * ELEMENTS)))


@dataclass(frozen=True)
class RotaryRounding:
    """What a rotary map decides about its kernels.

    Attributes:
        suffix: ends the names of its functions, where a module has two maps.
        cosine, sine: of the angle at ``b i d``.
        captured: identifier and number of axes of each tensor that these load.
        sizes: identifiers of the sizes that these read.
        interleaved: whether a pair is channels ``2n`` and ``2n + 1``, not ``n`` and ``n + rotated/2``.
        channels: of a head.
        rotated: the first of them, which are rotated.
        smooth: whether some tensor has its mean subtracted.
    """

    suffix: str
    cosine: DeviceFunction
    sine: DeviceFunction
    captured: tuple[tuple[str, int], ...]
    sizes: tuple[str, ...]
    interleaved: bool
    channels: int
    rotated: int
    smooth: bool

    @property
    def pairs(self) -> int:
        """Pairs of a tile, a power of two."""
        return power_of_two(self.rotated // 2)

    @property
    def rest(self) -> int:
        """Channels of the tile that passes through, a power of two; 0 where all are rotated."""
        return power_of_two(self.channels - self.rotated) if self.channels > self.rotated else 0

    def strides(self) -> tuple[str, ...]:
        """Identifiers of the captured tensors' strides."""
        return tuple(f"{name}_stride_{axis}" for name, axes in self.captured for axis in range(axes))

    def pointers(self) -> tuple[str, ...]:
        """Identifiers of the captured tensors."""
        return tuple(name for name, _ in self.captured)

    def source(self) -> str:
        """All functions of the map and their launcher, as text."""
        sections = [self.cosine.source(), self.sine.source(), self._angles(), self._rotate()]
        sections += [self._sum()] if self.smooth else []
        return "\n\n\n".join([*sections, self._quantize(), self._launcher()])

    # --- functions ------------------------------------------------------------------------------------------

    def _angles(self) -> str:
        """Adjacent elements stay adjacent, so that several are loaded at once: pairs that lie side by side are read as
        they lie and taken apart, and an index is limited only where there are more lanes than channels."""
        half = self.rotated // 2
        arguments = ["b", "i", *self._arguments(), "TILE: tl.constexpr", "PAIRS: tl.constexpr"]
        lines = ['"""Cosine and sine at the first, then at the second channel of each pair, [TILE,PAIRS] each."""']

        def element(name: str, function: DeviceFunction) -> list[str]:
            return signature(f"{name} = {function.name}", function.parameters, "", inside=4).splitlines()

        both = (("cosine", self.cosine), ("sine", self.sine))
        if self.interleaved:
            lines.append(f"d = {_lanes('2 * PAIRS', self.rotated, 2 * self.pairs)}[None, :]")
            for name, function in both:
                lines += element(f"{name}s", function)
                lines.append(f"{name}s = tl.broadcast_to({name}s + tl.zeros_like(d), (TILE, 2 * PAIRS))")
                lines.append(f"first_{name}, second_{name} = tl.split(tl.reshape({name}s, (TILE, PAIRS, 2)))")
        else:
            lines.append(f"near = {_lanes('PAIRS', half, self.pairs)}[None, :]")
            for place, d in (("first", "near"), ("second", f"near + {half}")):
                lines.append(f"d = {d}")
                for name, function in both:
                    lines += element(f"{place}_{name}", function)
        lines.append("return first_cosine, first_sine, second_cosine, second_sine")
        return _function(f"angles{self.suffix}", arguments, lines)

    def _rotate(self) -> str:
        half = self.rotated // 2
        arguments = ["tensor", "b", "rows", "stop", "stride_i", "stride_d", *self._arguments()]
        lines = [
            '"""Both channels of each pair of a block after rotation, [TILE,PAIRS] each; zeros from ``stop`` on."""',
            "i = tl.minimum(rows, stop - 1)[:, None]",
            "own = tensor + tl.cast(i, tl.int64) * stride_i",
        ]
        if self.interleaved:
            lines += [
                "both = tl.arange(0, 2 * PAIRS)[None, :]",
                f"inside = (rows < stop)[:, None] & (both < {self.rotated})",
                "x = tl.load(own + both * stride_d, mask=inside, other=0).to(tl.float32)",
                "first, second = tl.split(tl.reshape(x, (TILE, PAIRS, 2)))",
            ]
        else:
            lines += [
                "near = tl.arange(0, PAIRS)[None, :]",
                f"inside = (rows < stop)[:, None] & (near < {half})",
                "first = tl.load(own + near * stride_d, mask=inside, other=0).to(tl.float32)",
                f"second = tl.load(own + (near + {half}) * stride_d, mask=inside, other=0).to(tl.float32)",
            ]
        head = f"first_cosine, first_sine, second_cosine, second_sine = angles{self.suffix}"
        lines += [
            *signature(head, ["b", "i", *self._arguments(), "TILE", "PAIRS"], "", inside=4).splitlines(),
            "return first * first_cosine - second * first_sine, second * second_cosine + first * second_sine",
        ]
        return _function(f"rotate{self.suffix}", [*arguments, "TILE: tl.constexpr", "PAIRS: tl.constexpr"], lines)

    def _arguments(self) -> tuple[str, ...]:
        """What cosine and sine take beside their indices."""
        return (*self.pointers(), *self.strides(), *self.sizes)

    # --- kernels --------------------------------------------------------------------------------------------

    def _opening(self) -> list[str]:
        """Lines that find the block and rotate it: ``first`` and ``second``, and what passes as ``rest``."""
        arguments = ["tensor", "b", "rows", "stop", "stride_i", "stride_d", *self._arguments(), "TILE", "PAIRS"]
        lines = [
            "blocks = tl.cdiv(I, BLOCK)",
            "block = tl.program_id(0) % blocks",
            "head = tl.program_id(0) // blocks",
            "b = head // H",
            "tensor += tl.cast(b, tl.int64) * stride_b + tl.cast(head % H, tl.int64) * stride_h",
            "rows = block * BLOCK + tl.arange(0, TILE)",
            "stop = tl.minimum(block * BLOCK + BLOCK, I)",
            *signature(f"first, second = rotate{self.suffix}", arguments, "", inside=4).splitlines(),
            "pairs = tl.arange(0, PAIRS)",
            f"real = pairs < {self.rotated // 2}",
            *(
                ["near, far = 2 * pairs, 2 * pairs + 1"]
                if self.interleaved
                else [f"near, far = pairs, pairs + {self.rotated // 2}"]
            ),
        ]
        if self.rest:
            lines += [
                f"others = {self.rotated} + tl.arange(0, REST)",
                f"kept = (rows < stop)[:, None] & (others < {self.channels})[None, :]",
                "places = tl.cast(rows, tl.int64)[:, None] * stride_i + others[None, :] * stride_d",
                "rest = tl.load(tensor + places, mask=kept, other=0).to(tl.float32)",
            ]
        return lines

    def _parts(self) -> list[tuple[str, str, str]]:
        """Tiles of a block: its name, its channels, and which of them there are."""
        parts = [("first", "near", "real"), ("second", "far", "real")]
        return [*parts, *([("rest", "others", f"others < {self.channels}")] if self.rest else [])]

    def _kernel(self, name: str, arguments: list[str], constants: list[str], lines: list[str]) -> str:
        taken = ["tensor", *arguments, *self.pointers(), "stride_b", "stride_h", "stride_i", "stride_d"]
        rest = ["REST: tl.constexpr"] if self.rest else []
        known = ["BLOCK: tl.constexpr", "TILE: tl.constexpr", "PAIRS: tl.constexpr", *rest, *constants]
        taken += [*self.strides(), *(["code_stride"] if "codes" in arguments else []), "H", "I", *self.sizes, *known]
        text = _function(f"{name}{self.suffix}", taken, lines)
        return text.replace("@triton.jit", '@triton.jit(do_not_specialize=["H", "I"])', 1)

    def _sum(self) -> str:
        lines = [
            '"""One program: the sum of a rotated block of positions of a head; sums are [B,H,cdiv(I,BLOCK),D]."""',
            *self._opening(),
            f"sums += tl.cast(tl.program_id(0), tl.int64) * {self.channels}",
            *(f"tl.store(sums + {d}, tl.sum({tile}, 0), mask={mask})" for tile, d, mask in self._parts()),
        ]
        return self._kernel("rotate_sum_blocks", ["sums"], [], lines)

    def _quantize(self) -> str:
        lines = [
            '"""One program: one block of positions of one head; codes are [B,H,I,D], scale [B,H,cdiv(I,BLOCK)]."""',
            *self._opening(),
            "if SMOOTH:",
            f"    mean += tl.cast(head, tl.int64) * {self.channels}",
        ]
        largest: list[str] = []
        for tile, d, mask in self._parts():
            there = _there(mask)
            lines += [
                f"    {tile} -= tl.load(mean + {d}, mask={mask}, other=0)[None, :]",
                f"    {tile} = tl.where({there}, {tile}, 0.0)",
            ]
            own = f"tl.max(tl.max(tl.abs({tile}), 1), 0)"
            largest.append(f"largest = tl.maximum(largest, {own})" if largest else f"largest = {own}")
        lines += [*largest, "codes += (tl.cast(head, tl.int64) * I + rows)[:, None] * code_stride"]
        parts = self._parts()
        if self.interleaved:  # stored as they lie
            lines += [
                "both = tl.reshape(tl.join(first, second), (TILE, 2 * PAIRS))",
                "channels = tl.arange(0, 2 * PAIRS)",
            ]
            parts = [("both", "channels", f"channels < {self.rotated}"), *parts[2:]]
        for tile, d, mask in parts:
            there = _there(mask)
            lines += [
                f"rounded, unit = round_to_codes({tile}, largest, E4M3)",
                f"tl.store(codes + {d}[None, :], rounded, mask={there})",
            ]
        lines.append("tl.store(scale + tl.program_id(0), unit)")
        constants = ["SMOOTH: tl.constexpr", "E4M3: tl.constexpr"]
        return self._kernel("rotate_quantize_blocks", ["mean", "codes", "scale"], constants, lines)

    # --- launcher -------------------------------------------------------------------------------------------

    def _launcher(self) -> str:
        strides = ["*tensor.stride()", *(f"*{name}.stride()" for name in self.pointers())]
        rest = [f"REST={self.rest}"] if self.rest else []

        def launched(name: str, given: list[str], constants: list[str]) -> list[str]:
            arguments = ["tensor", *given, *self.pointers(), *strides, *(["codes.stride(2)"] if len(given) > 1 else [])]
            arguments += ["heads", "length", *self.sizes, f"PAIRS={self.pairs}", *rest, *constants]
            head = [f"{name}{self.suffix}", f"(batch * heads * {given[-1]}.shape[2],)"]
            return signature("launch", [*head, *arguments], "", inside=16).splitlines()

        smooth = []
        if self.smooth:
            summed = [f"BLOCK={SUMMED}", f"TILE={SUMMED}", f"num_warps={warps_of(SUMMED, self.channels)}"]
            sums = [f"(batch, heads, triton.cdiv(length, {SUMMED}), {self.channels})"]
            sums += ["dtype=torch.float32", "device=tensor.device"]
            smooth = [
                "if smooth:",
                *(f"    {line}" for line in signature("sums = torch.empty", sums, "", inside=16).splitlines()),
                *(f"    {line}" for line in launched("rotate_sum_blocks", ["sums"], summed)),
                "    mean = sums.sum(2) / length",
            ]
        tile = "triton.next_power_of_2(block)"
        elements = f"{tile} * {power_of_two(self.channels)} // {32 * ELEMENTS}"
        constants = ["BLOCK=block", f"TILE={tile}", "SMOOTH=smooth", "E4M3=dtype != torch.int8", "num_warps=warps"]
        constants.append("later=later")  # not the sums: the mean is computed of them at once
        lines = [
            '"""Codes [B,H,I,D] and float32 scales [B,H,cdiv(I,block)] of the rotated tensor; smooth subtracts its '
            'mean."""',
            "batch, heads, length, _ = tensor.shape",
            "codes, scale = empty_codes(tensor, dtype, block)",
            "mean = scale",
            f"warps = min(16, max(4, {elements}))",
            "if codes.numel():",
            "    with torch.cuda.device_of(tensor):",
            *(f"        {line}" for line in smooth),
            *(f"        {line}" for line in launched("rotate_quantize_blocks", ["mean", "codes", "scale"], constants)),
            f"return codes[..., :{self.channels}], scale",
        ]
        arguments = ["tensor", *self.pointers(), *self.sizes, "dtype", "block", "smooth", "later=None"]
        return f"{signature(f'def rotate_quantize{self.suffix}', arguments, ':')}\n{indented(lines, 4)}"


def _there(mask: str) -> str:
    """Which elements of a tile exist: positions of the block, and channels that the mask shows."""
    return f"(rows < stop)[:, None] & {mask if mask.isidentifier() else f'({mask})'}[None, :]"


def _lanes(count: str, there: int, lanes: int) -> str:
    """The channels of so many lanes; those that there are not repeat the last one."""
    return f"tl.arange(0, {count})" if lanes == there else f"tl.minimum(tl.arange(0, {count}), {there - 1})"


def _function(name: str, arguments: list[str], lines: list[str]) -> str:
    return f"@triton.jit\n{signature(f'def {name}', arguments, ':')}\n{indented(lines, 4)}"


__all__ = ["FUNCTIONS", "SUMMED", "RotaryRounding", "warps_of"]
