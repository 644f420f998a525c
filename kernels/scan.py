"""Skeleton of the chunkwise scan: linear attention with a fixed decay for each head.

One program walks over the positions of one head in chunks and carries the state ``S[d,e]`` in registers.
Inside a chunk the sum over keys is a masked product of queries and keys; what came before the chunk enters
through the state:

``out_i = scale · (Σ_{j ≤ i, same chunk} decay^(i−j) (φ(q_i)·φ(k_j)) v_j + decay^(i−c+1) φ(q_i)ᵀ S)``

with ``c`` the chunk's first position; then ``S ← decay^C S + Σ_j decay^(c+C−1−j) φ(k_j) v_jᵀ``. A key that the
mask hides has zeros for ``φ(k_j)``. The state is kept in float32; products take their factors in the dtype of
the inputs.

Follows: RetNet's chunkwise form (arXiv:2307.08621).
"""

from __future__ import annotations

from dataclasses import dataclass

from attncompile.kernels.dense import DeviceFunction
from attncompile.kernels.source import indented, signature

FEATURES: dict[str, str] = {
    "identity": "x",
    "elu1": "tl.where(x > 0.0, x + 1.0, tl.exp(tl.minimum(x, 0.0)))",
    "relu": "tl.maximum(x, 0.0)",
}
"""Feature maps by the name that the Spec gives them, over float32 ``x``."""


@dataclass(frozen=True)
class ScanForward:
    """What a Spec decides about the scan.

    Attributes:
        decay: the decay factor over ``h``.
        visible: which keys count, over ``b j``, or ``None`` when all do.
        scale: factor of the output.
        feature: φ, a key of :data:`FEATURES`.
        normalize: divide by ``max(|Σ weights|, 1)``.
        kv_head: source of the KV head over ``h``.
        captured: identifier and number of axes of each captured tensor.
        heads, length: identifiers of the numbers of heads and positions.
        sizes: identifiers of other sizes.
        channels, features: number of channels of keys and of values.
    """

    decay: DeviceFunction
    visible: DeviceFunction | None
    scale: float
    feature: str
    normalize: bool
    kv_head: str
    captured: tuple[tuple[str, int], ...]
    heads: str
    length: str
    sizes: tuple[str, ...]
    channels: int
    features: int

    def padded_channels(self) -> int:
        """Tile size of the key channels: a power of two that the matrix units take."""
        return max(16, 1 << (self.channels - 1).bit_length())

    def pointers(self) -> tuple[str, ...]:
        """Pointer arguments in order."""
        return ("query", "key", "value", "out", *(name for name, _ in self.captured))

    def strides(self) -> tuple[str, ...]:
        """Stride arguments in order."""
        operands = [
            f"{name}_stride_{axis}"
            for name, axes in (("query", "bhid"), ("key", "bgid"), ("value", "bgie"), ("out", "bhie"))
            for axis in axes
        ]
        return (*operands, *(f"{name}_stride_{axis}" for name, rank in self.captured for axis in range(rank)))

    def integers(self) -> tuple[str, ...]:
        """Size arguments in order."""
        return tuple(dict.fromkeys((self.heads, self.length, *self.sizes)))

    def constants(self) -> tuple[str, ...]:
        """Compile-time arguments in order."""
        return ("CHUNK", "BLOCK_E")

    def source(self) -> str:
        """The functions and the kernel as text."""
        parameters = [
            *self.pointers(),
            *self.strides(),
            *self.integers(),
            *(f"{name}: tl.constexpr" for name in self.constants()),
        ]
        kernel = "\n".join(
            [
                "@triton.jit",
                signature("def scan_forward", parameters, ":"),
                '    """One program: BLOCK_E value channels of one head, chunk after chunk."""',
                indented(self._body(), 4),
            ]
        )
        feature = (
            '@triton.jit\ndef feature_map(x):\n    """The feature map '
            f'{self.feature}, on float32."""\n    return {FEATURES[self.feature]}'
        )
        functions = [function.source() for function in (self.decay, self.visible) if function]
        return "\n\n\n".join([*functions, feature, kernel])

    def _body(self) -> list[str]:
        length, padded = self.length, self.padded_channels()
        normal = self.normalize
        dot = 'input_precision="ieee"'
        seen = "seen" if self.visible else "read"
        return [
            "part = tl.program_id(1)",
            f"b = tl.program_id(0) // {self.heads}",
            f"h = tl.program_id(0) % {self.heads}",
            f"g = {self.kv_head}",
            f"log_decay = tl.log2({self.decay.name}({', '.join(self.decay.parameters)}))",
            "lanes = tl.arange(0, CHUNK)",
            f"channels = tl.arange(0, {padded})",
            "features = part * BLOCK_E + tl.arange(0, BLOCK_E)",
            "query += tl.cast(b, tl.int64) * query_stride_b + tl.cast(h, tl.int64) * query_stride_h",
            "key += tl.cast(b, tl.int64) * key_stride_b + tl.cast(g, tl.int64) * key_stride_g",
            "value += tl.cast(b, tl.int64) * value_stride_b + tl.cast(g, tl.int64) * value_stride_g",
            "out += tl.cast(b, tl.int64) * out_stride_b + tl.cast(h, tl.int64) * out_stride_h",
            "",
            "# Powers of the decay between positions of a chunk, since it began, and until it ends.",
            "distance = lanes[:, None] - lanes[None, :]",
            "between = tl.exp2(log_decay * tl.maximum(distance, 0).to(tl.float32))",
            "between = tl.where(distance >= 0, between, 0.0)",
            "since = tl.exp2(log_decay * (lanes + 1).to(tl.float32))",
            "until = tl.exp2(log_decay * (CHUNK - 1 - lanes).to(tl.float32))",
            "whole_chunk = tl.exp2(log_decay * CHUNK)",
            f"state = tl.zeros([{padded}, BLOCK_E], tl.float32)",
            *([f"key_sum = tl.zeros([{padded}], tl.float32)"] if normal else []),
            f"for start in range(0, {length}, CHUNK):",
            "    rows = start + lanes",
            f"    inside = (rows < {length})[:, None]",
            f"    read = inside & (channels < {self.channels})[None, :]",
            f"    shown = inside & (features < {self.features})[None, :]",
            "    positions = tl.cast(rows, tl.int64)[:, None]",
            "    query_offsets = positions * query_stride_i + channels[None, :] * query_stride_d",
            "    key_offsets = positions * key_stride_i + channels[None, :] * key_stride_d",
            "    value_offsets = positions * value_stride_i + features[None, :] * value_stride_e",
            "    query_tile = tl.load(query + query_offsets, mask=read, other=0)",
            "    key_tile = tl.load(key + key_offsets, mask=read, other=0)",
            "    value_tile = tl.load(value + value_offsets, mask=shown, other=0)",
            "    dtype = value_tile.dtype",
            "    query_features = tl.where(read, feature_map(query_tile.to(tl.float32)), 0.0)",
            *self._visible_keys(),
            f"    key_features = tl.where({seen}, feature_map(key_tile.to(tl.float32)), 0.0)",
            f"    weights = tl.dot(query_features.to(dtype), tl.trans(key_features.to(dtype)), {dot})",
            "    weights = weights * between",
            "    decayed_query = query_features * since[:, None]",
            f"    result = tl.dot(weights.to(dtype), value_tile, {dot})",
            f"    result = tl.dot(decayed_query.to(dtype), state.to(dtype), result, {dot}) * {self.scale!r}",
            *(
                [
                    "    norm = tl.sum(weights, 1) + tl.sum(decayed_query * key_sum[None, :], 1)",
                    f"    result = result / tl.maximum(tl.abs(norm * {self.scale!r}), 1.0)[:, None]",
                    "    key_sum = key_sum * whole_chunk + tl.sum(key_features * until[:, None], 0)",
                ]
                if normal
                else []
            ),
            "    written = positions * out_stride_i + features[None, :] * out_stride_e",
            "    tl.store(out + written, result.to(out.dtype.element_ty), mask=shown)",
            "    decayed_key = tl.trans((key_features * until[:, None]).to(dtype))",
            f"    state = tl.dot(decayed_key, value_tile, state * whole_chunk, {dot})",
        ]

    def _visible_keys(self) -> list[str]:
        """Lines of the loop that find which keys of the chunk count: ``seen[j,d]``."""
        if self.visible is None:
            return []
        call = signature("seen = read & visible", self.visible.parameters, "", inside=8).splitlines()
        # past the last key the mask is asked about the last one, so that its loads stay inside
        return ["    " + line for line in (f"j = tl.minimum(rows, {self.length} - 1)[:, None]", *call)]
