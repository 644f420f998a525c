"""Tiles of a Hopper kernel that are boxes of a grid of tokens: the copying unit reads and writes them where they lie.

A tensor ``[b,h,i,d]`` whose tokens form a grid is a tensor of more axes; a box of it is what the unit copies in one go,
filled with zeros past the grid's end. In shared memory the box is a tile like any other.
"""

from __future__ import annotations

from dataclasses import dataclass

MOST_AXES = 5
"""Axes of a tensor that the copying unit knows."""


@dataclass(frozen=True)
class Boxes:
    """How tiles lie in a grid.

    Attributes:
        grid: sizes of its axes.
        query_box: of the 64 queries of a warpgroup.
        key_box: of a block of keys.
        heads: of queries and of keys.
        query_place, key_place: source of the coordinates of the first token, over ``i`` and ``j``; each with the lines
            that it relies on.
    """

    grid: tuple[int, ...]
    query_box: tuple[int, ...]
    key_box: tuple[int, ...]
    heads: tuple[int, int]
    query_place: tuple[tuple[str, ...], tuple[str, ...]]
    key_place: tuple[tuple[str, ...], tuple[str, ...]]

    @property
    def merged(self) -> bool:
        """Whether batch rows and heads have to be one axis."""
        return len(self.grid) + 3 > MOST_AXES

    def lead(self) -> tuple[int, ...]:
        """Sizes of a box along the axes before those of the grid."""
        return (1,) if self.merged else (1, 1)

    def source(self) -> str:
        """The functions that say where a tile begins."""
        found = []
        sides = (("query", "i", self.query_place), ("key", "j", self.key_place))
        for heads, (name, index, (lines, places)) in zip(self.heads, sides, strict=True):
            lead = f"b * {heads} + h" if self.merged else "b, h"
            body = [*lines, f"return {lead}, {', '.join(places)}, 0"]
            found.append(
                "\n".join(
                    [
                        "@gluon.jit",
                        f"def {name}_place(b, h, {index}):",
                        f'    """Where the box lies whose first {name} stands at a place of the new order."""',
                        *(f"    {line}" for line in body),
                    ]
                )
            )
        return "\n\n\n".join(found)

    def host(self) -> str:
        """The functions that describe a tensor to the copying unit."""
        view = f"tensor.unflatten(2, {self.grid})"
        if self.merged:
            view += ".flatten(0, 1)"
        merged = "\n    # Batch rows and heads are one axis; where they cannot be, this copies." if self.merged else ""
        return f'''\
@functools.lru_cache(maxsize=64)
def box_layout(box, channels):
    """How a box lies in shared memory."""
    return gl.NVMMASharedLayout.get_default_for([*box, channels], gl.float16)


def box_descriptor(tensor, box, channels):
    """What the copying unit needs to know of a grid of tokens."""{merged}
    view = {view}
    strides = [stride if size > 1 else 8 for size, stride in zip(view.shape, view.stride())]
    strides[-1] = 1
    return TensorDescriptor(view, list(view.shape), strides, [*box, channels], box_layout(box, channels))'''


WORDS = frozenset(("query_place", "key_place", "box_layout", "box_descriptor", "view"))
"""Identifiers that this text uses."""

__all__ = ["WORDS", "Boxes"]
