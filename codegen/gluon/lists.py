"""Lists of key blocks: who makes them, and how much memory they take.

A launcher makes them before each call where tensors decide. Calls with the same mask and sizes may share them: then
``mask_lists`` writes them into memory that is handed in, once, and each ``attend`` is given that memory. How much it is
has to be known when a graph is traced, from symbols for sizes and without a GPU, so that there is a little too much.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from attncompile.codegen.triton.module import Binding, Length, expectations
from attncompile.codegen.triton.structure import Dense
from attncompile.ir import Spec
from attncompile.kernels.hopper import HopperForward
from attncompile.kernels.hopper_marks import ROOM
from attncompile.kernels.source import indented, signature

SMALLEST_TILE = 128
"""Queries of the smallest tile of :mod:`attncompile.codegen.gluon.tiles`."""


@dataclass(frozen=True)
class ListRoom:
    """How much memory the lists of one kernel take.

    Attributes:
        queries, keys: of a tile and of a block.
        by_head: whether heads have lists of their own.
    """

    queries: int
    keys: int
    by_head: bool

    @classmethod
    def of(cls, skeleton: HopperForward) -> ListRoom | None:
        """That of a kernel whose lists a call may be given, or ``None``."""
        if skeleton.marks is None or not skeleton.captured:
            return None  # lists that depend on sizes alone are kept by the module
        return cls(skeleton.tile.queries, skeleton.tile.keys, skeleton.marks.by_head)

    def for_any_length(self) -> ListRoom:
        """Room for the kernel of few queries too, whose tiles may be smaller."""
        return dataclasses.replace(self, queries=min(self.queries, SMALLEST_TILE))

    def words(self, batch: Any, heads: Any, queries: Any, keys: Any) -> Any:
        """Numbers of 4 bytes at most; sizes may be symbols of a traced graph, and so is the result then."""
        tiles, blocks = -(-queries // self.queries), -(-keys // self.keys)
        lists = batch * (heads if self.by_head else 1) * tiles
        return 3 * lists + 9 + lists * torch.sym_min(blocks, ROOM)


@dataclass(frozen=True)
class ListLines:
    """The launcher's lines about lists.

    Attributes:
        sizes: statements that count tiles, blocks and thread blocks.
        parts: statements that divide memory called by a name, which stands in them as MEMORY.
        made: statements that write the lists; LATER in them is the list of kernels that wait.
        work: statements that make what a call's thread blocks take tiles from.
        key: sources of the device and of all sizes.
        query: parameter that tells the device.
    """

    sizes: tuple[str, ...]
    parts: tuple[str, ...]
    made: tuple[str, ...]
    work: tuple[str, ...]
    key: tuple[str, ...]
    query: str

    @classmethod
    def of(
        cls,
        parts: Dense,
        binding: Binding,
        lengths: tuple[Length, Length, Length],
        skeleton: HopperForward,
        query: str,
        values: Mapping[str, str],
    ) -> ListLines:
        """The lines for a kernel with lists.

        Args:
            parts: of the Spec.
            binding: identifiers.
            lengths: heads, queries and keys.
            skeleton: the kernel.
            query: parameter that tells the device.
            values: what stands for sizes.
        """
        assert skeleton.marks is not None
        batch, heads, queries = binding.size(parts.query.sizes[0]), lengths[0].value, lengths[1].value
        sizes = [values.get(name, name) for name in skeleton.integers()]
        captured = [binding.tensors[name] for name in binding.pointers]
        read = [*captured, *(f"*{name}.stride()" for name in captured), *sizes]
        lists = f"{batch} * {heads} * tiles" if skeleton.marks.by_head else f"{batch} * tiles"
        processors = f"torch.cuda.get_device_properties({query}.device).multi_processor_count"
        listed = ["counts", "places", "tiles", "blocks", f"({', '.join(read)},)", "LATER"]
        divided = ["MEMORY", query, lists, "blocks"]
        return cls(
            (
                f"tiles = triton.cdiv({queries}, BLOCK_I.value)",
                f"blocks = triton.cdiv({lengths[2].value}, BLOCK_J.value)",
            ),
            tuple(signature("counts, places, order = list_parts", divided, "", inside=12).splitlines()),
            (
                *signature("block_lists", listed, "", inside=12).splitlines(),
                "tile_order(counts, order, tiles, LATER)",
            ),
            (
                f"tile_count = {batch} * {heads} * tiles",
                f"rows = min({processors}, tile_count)",
                f"work = torch.zeros((rows + 1, RECENT.value), dtype=torch.int64, device={query}.device)",
            ),
            (f"{query}.device", *dict.fromkeys((batch, heads, queries, *sizes))),
            query,
        )

    def before(self, given: bool) -> list[str]:
        """Lines before the kernel, within its device; ``given`` where a call may be handed its lists.

        Lists that the module keeps are written at once: should the kernel be refused, others still rely on them.
        """
        if given:
            rest = [*self._parts("lists"), "if lists is None:", *(f"    {line}" for line in self._made("later"))]
            return indented([*self.sizes, *rest, *self.work], 4).splitlines()
        own = ["", "def lists():", *(f"    {line}" for line in (*self._parts("None"), *self._made("None")))]
        kept = signature("counts, places, order = kept_lists", [*self.key, "make=lists"], "", inside=8)
        lines = [*self.sizes, *own, "    return counts, places, order", "", *kept.splitlines(), *self.work]
        return indented(lines, 4).splitlines()

    def function(self, spec: Spec, binding: Binding) -> str:
        """``mask_lists`` as text."""
        inputs = [binding.tensors[value.name] for value in spec.inputs]
        body = [*self.sizes, *self._parts("memory"), *self._made("later"), "launch_rest(later)"]
        lines = [
            *expectations(spec, binding, self.query),
            "later = []",
            f"with torch.cuda.device_of({self.query}):",
            *(f"    {line}" for line in body),
        ]
        return "\n".join(
            [
                signature("def mask_lists", ["memory", *inputs], ":"),
                '    """Write the lists of key blocks, which ``attend`` takes for the same mask and sizes.',
                "",
                "    Args:",
                "        memory: int32, as many numbers as ``list_parts`` takes, or more",
                f"        {', '.join(inputs)}: as of ``attend``; of query, key and value only the sizes matter",
                '    """',
                indented(lines, 4),
            ]
        )

    def _parts(self, memory: str) -> Iterable[str]:
        return (line.replace("MEMORY", memory) for line in self.parts)

    def _made(self, later: str) -> Iterable[str]:
        return (line.replace("LATER", later) for line in self.made)


LISTS_GIVEN = ("lists", "from ``mask_lists`` for the same mask and sizes; made where there are none")
"""A parameter of launchers, and what it is."""

__all__ = ["LISTS_GIVEN", "ListLines", "ListRoom"]
