"""Skeleton of the kernel that sums the weights of each key over the queries: one more product, and no map.

A program has a block of keys and walks over the queries that see any of them; their weights come from the log-sum-exp
of the forward pass, as in the backward kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

from attncompile.kernels.dense import LOG2E, DenseForward
from attncompile.kernels.loops import KEYS, QUERIES, KeyRuns, key_loops, own_block
from attncompile.kernels.source import indented, signature


@dataclass(frozen=True)
class ColumnMass:
    """``mass[b,h,j] = Σ_i exp(logit[b,h,i,j] − lse[b,h,i])``.

    Attributes:
        forward: the kernel that goes before, whose functions are called.
        runs: queries that a block of keys visits.
        last_first: start with the last keys: where they have the most queries.
    """

    forward: DenseForward
    runs: KeyRuns
    last_first: bool

    def pointers(self) -> tuple[str, ...]:
        """Pointer arguments in order; the log-sum-exp and the result are contiguous."""
        return ("query", "key", "lse", "mass", *(name for name, _ in self.forward.captured))

    def strides(self) -> tuple[str, ...]:
        """Stride arguments in order."""
        left_out = ("value_stride_", "out_stride_")
        return tuple(name for name in self.forward.strides() if not name.startswith(left_out))

    def source(self) -> str:
        """The kernel as text."""
        forward = self.forward
        heads, queries, keys = forward.lengths
        space = forward.padded(forward.channels)
        padded = space != forward.channels
        real = " & real_channels" if padded else ""
        body = [
            *own_block(KEYS, keys, ("h", heads), self.last_first, forward.clamped),
            f"g = {forward.kv_head}",
            "lanes = tl.arange(0, BLOCK_I)",
            f"channels = tl.arange(0, {space})",
            *([f"real_channels = (channels < {forward.channels})[None, :]"] if padded else []),
            "# Offsets of batch row and head may pass 2^31.",
            "query += tl.cast(b, tl.int64) * query_stride_b + tl.cast(h, tl.int64) * query_stride_h",
            "key += tl.cast(b, tl.int64) * key_stride_b + tl.cast(g, tl.int64) * key_stride_g",
            f"lse += tl.cast(program // blocks, tl.int64) * {queries}",
            f"mass += tl.cast(program // blocks, tl.int64) * {keys}",
            "key_offsets = tl.cast(keys, tl.int64)[:, None] * key_stride_j + channels[None, :] * key_stride_d",
            f"key_tile = tl.load(key + key_offsets, mask=(keys < {keys})[:, None]{real}, other=0)",
            "query_offsets = tl.cast(lanes, tl.int64)[:, None] * query_stride_i + channels[None, :] * query_stride_d",
            "key_mass = tl.zeros([BLOCK_J], tl.float32)",
        ]
        for group in key_loops(self.runs, queries, self._step, QUERIES):
            body += group
        body.append(f"tl.store(mass + keys, key_mass, mask=keys < {keys})")
        parameters = [
            *self.pointers(),
            *self.strides(),
            *forward.integers(),
            *(f"{name}: tl.constexpr" for name in forward.constants()),
        ]
        head = signature("def column_mass", parameters, ":")
        text = "One program: what BLOCK_J keys of one head get from all the queries that see them."
        return f'@triton.jit\n{head}\n    """{text}"""\n{indented(body, 4)}'

    def _step(self, masked: bool) -> list[str]:
        forward = self.forward
        queries = forward.lengths[1]
        space = forward.padded(forward.channels)
        guards = [f"(rows < {queries})[:, None]"] if masked else []
        guards += ["real_channels"] if space != forward.channels else []
        guard = f", mask={' & '.join(guards)}, other=0" if guards else ""
        clamp = forward.clamped and masked
        lines = [
            "rows = start + lanes",
            f"i = tl.minimum(rows, {queries} - 1)[None, :]" if clamp else "i = rows[None, :]",
            "offset = tl.cast(start, tl.int64)",
            f"query_tile = tl.load(query + offset * query_stride_i + query_offsets{guard})",
            f'row_lse = tl.load(lse + rows, mask=rows < {queries}, other=float("-inf"))'
            if masked
            else "row_lse = tl.load(lse + rows)",
            "# A query that sees no key has weights of 0.",
            f'row_shift = tl.where(row_lse == float("-inf"), float("inf"), row_lse * {LOG2E!r})[None, :]',
            "# A row of this tile is a key, a column a query.",
            's = tl.dot(key_tile, tl.trans(query_tile), input_precision="ieee")',
        ]
        if forward.score:
            lines += signature("logits = score", forward.score.parameters, "", inside=8).splitlines()
        else:
            lines.append("logits = s")
        if masked and forward.visible:
            lines += signature("shown = visible", forward.visible.parameters, "", inside=8).splitlines()
            lines.append('logits = tl.where(shown, logits, float("-inf"))')
        return [*lines, f"key_mass += tl.sum(tl.exp2(logits * {forward.scale * LOG2E!r} - row_shift), 1)"]


__all__ = ["ColumnMass"]
