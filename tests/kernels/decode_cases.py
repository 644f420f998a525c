"""Rows for the decode kernel: few queries over long caches, plain, paged and in narrow types."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Any

import torch

from attncompile.ir import Dequantize, Gather, Spec
from attncompile.ir.storage import LARGEST, narrow
from attncompile.ir.types import DTYPES, concrete
from tests.cases import Case
from tests.kernels.comparison import poisoned_inputs

CAUSAL = "j ≤ i + J − I"


@dataclass(frozen=True)
class DecodeCase(Case):
    """A row whose stores hold narrowed random numbers.

    Attributes:
        tables: integer tensors that hold places in a store of ``P``, each at most once, in random order.
    """

    tables: tuple[str, ...] = ()

    def tensors(self, seed: int = 0, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        """Random inputs by name; the scales of a store are those of the numbers that it holds."""
        generator = torch.Generator().manual_seed(seed)
        plain = {name: tensor for name, tensor in super().tensors(seed, None).items() if name not in self._narrow()}
        made = {
            name: tensor.to(dtype) if dtype and tensor.is_floating_point() and "scale" not in name else tensor
            for name, tensor in plain.items()
        }
        for name in self.tables:
            shape = made[name].shape
            places = torch.randperm(self.sizes["P"], generator=generator)[: shape.numel()]
            made[name] = places.reshape(shape).to(torch.int32)
        for operation in self.spec.operations:
            if isinstance(operation, Dequantize):
                made |= self._stored(operation, generator)
        return made

    def _narrow(self) -> set[str]:
        return {v.name for v in self.spec.inputs if v.type.dtype in ("float8_e4m3", "int8", "uint8")}

    def _stored(self, operation: Dequantize, generator: torch.Generator) -> dict[str, torch.Tensor]:
        spec = self.spec
        types = {value.name: value.type for value in spec.inputs}
        gathers = {op.out: op for op in spec.operations if isinstance(op, Gather)}
        name = gathers[operation.code].store if operation.code in gathers else operation.code
        shape = [concrete(size, self.sizes) for size in types[name].sizes]
        channels = shape[-1] * (8 // operation.bits)
        drawn = torch.randn([*shape[:-1], channels], generator=generator) + 0.5
        storage: Any = "int4" if operation.bits == 4 else types[name].dtype
        found = narrow(drawn, storage, "channel")
        made = {name: found.codes}
        for load in operation.captured():
            extents = [concrete(size, self.sizes) for size in types[load.tensor].sizes]
            if load.tensor in self.tables:
                continue
            size = 0.5 if "shift" in load.tensor else 4.0 / LARGEST[storage]
            values = torch.rand(extents, generator=generator) * size + 0.2 * size
            made[load.tensor] = values.to(DTYPES[types[load.tensor].dtype])
        return made


def _row(name: str, text: str, sizes: dict[str, int], note: str = "", *, empty_rows: bool = False,
         tables: tuple[str, ...] = (), **ranges: tuple[int, int]) -> DecodeCase:  # fmt: skip
    head, _, rest = textwrap.dedent(text).strip().partition("\n")
    single = head.startswith("attend")
    body = [f"{name}   {head}"] if single else [name, f"  {head}"]
    lines = [line for line in rest.splitlines() if line.strip()]
    text = "\n".join([*body, *(f"  {line}" for line in lines)])
    return DecodeCase(name, text, sizes, note, ranges, empty_rows, tables)


def _plain(
    name: str,
    sizes: tuple[int, int, int],
    heads: tuple[int, int] = (4, 1),
    channels: tuple[int, int] = (64, 64),
    score: str = "0.125·s",
    mask: str = CAUSAL,
    more: str = "",
    note: str = "",
    kv_head: str = "",
    *,
    empty_rows: bool = False,
    **ranges: tuple[int, int],
) -> DecodeCase:
    total, groups = heads
    width, features = channels
    kv_head = kv_head or ("h" if total == groups else "0" if groups == 1 else f"h // {total // groups}")
    lines = [
        f"attend  q[B,{total},I,{width}]  k[B,{groups},J,{width}]  v[B,{groups},J,{features}]  float32",
        f"score  {score}",
        f"mask   {mask}",
        f"kv_head {kv_head}",
        "norm   softmax (float32)",
        *(line.strip() for line in more.splitlines() if line.strip()),
    ]
    batch, queries, keys = sizes
    text = "\n".join(line for line in lines if line != "kv_head h")
    return _row(name, text, {"B": batch, "I": queries, "J": keys}, note, empty_rows=empty_rows, **ranges)


def _narrowed(name: str, key: str, value: str, sizes: dict[str, int], note: str = "", channels: int = 64,
              mask: str = "j ≤ i + J − I", **options: Any) -> DecodeCase:  # fmt: skip
    """Keys and values in a store; each is ``dtype by``, such as ``int4 channel``."""
    parts, given = [], []
    for letter, described in (("k", key), ("v", value)):
        dtype, by = described.split()
        stored, bits, width = ("uint8", 4, channels // 2) if dtype == "int4" else (dtype, 8, channels)
        index, shape = {
            "channel": ("b, g, d", f"B,2,{channels}"),
            "token": ("b, g, j", "B,2,J"),
            "group": ("b, g, j, d // 16", f"B,2,J,{channels // 16}"),
            "head": ("g", "2"),
            "shifted": ("b, g, d", f"B,2,{channels}"),
        }[by]
        parts += [
            f"dequantize  {letter}_codes[B,2,J,{width}]  {stored}",
            f"  scale  {letter}_scale[{index}]",
            *([f"  shift  {letter}_shift[b, g, d]"] if by == "shifted" else []),
            *(["  bits   4"] if bits == 4 else []),
            f"  out    {letter}",
        ]
        given += [f"given  {letter}_scale[{shape}]:float32"]
        given += [f"given  {letter}_shift[B,2,{channels}]:float32"] if by == "shifted" else []
    text = "\n".join(
        [
            *parts,
            f"attend  q[B,8,I,{channels}]  k  v  float32",
            "  score  0.125·s",
            f"  mask   {mask}",
            "  kv_head h // 4",
            "  norm   softmax (float32)",
            *given,
        ]
    )
    return _row(name, text, sizes, note, **options)


LONG = {"B": 2, "I": 1, "J": 300}

PLAIN_CASES: tuple[DecodeCase, ...] = (
    *(_plain(f"keys-{keys}", (1, 1, keys)) for keys in (1, 17, 100, 1000)),
    _plain("three-queries", (2, 3, 100), (4, 2)),
    _plain("sixteen-queries", (1, 16, 300), (8, 1), note="several tiles of rows"),
    _plain("each-head-its-keys", (2, 1, 170), (3, 3)),
    _plain("groups-of-8", (1, 1, 200), (16, 2)),
    _plain("heads-apart", (1, 2, 100), (6, 2), kv_head="h % 2"),
    _plain("channels-80", (1, 1, 100), (4, 1), (80, 80)),
    _plain("channels-128", (1, 1, 300), (8, 2), (128, 128)),
    _plain("channels-192-128", (1, 1, 100), (4, 1), (192, 128), note="D ≠ E"),
    _plain("window", (1, 3, 1000), (4, 2), mask=f"{CAUSAL} and j > i + J − I − 200"),
    _plain("sinks-and-window", (1, 3, 1000), (4, 2), mask=f"{CAUSAL} and (j > i + J − I − 200 or j < 5)"),
    _plain("alibi", (1, 3, 300), (8, 2), score="0.125·s + exp2(−h − 1)·(j − i − J + I)"),
    _plain("softcap", (1, 1, 300), (8, 2), score="5.0·tanh(0.025·s)"),
    _plain("head-windows", (1, 1, 300), (8, 2), mask=f"{CAUSAL} and j > i + J − I − 30·(h + 1)"),
    _plain("sink", (2, 3, 100), (8, 2), more="sink   sinks[h]\nlse    lse\ngiven  sinks[8]:float32\ngives  out, lse"),
    _plain("sink-constant", (1, 1, 100), (4, 1), more="sink   0.5"),
    _plain("padding", (6, 2, 100), (4, 1), mask=f"{CAUSAL} and attention_mask[b, j] ≠ 0",
           more="given  attention_mask[B,J]:int64"),
    _plain("empty-rows", (4, 2, 100), (4, 1), mask="j < lengths[b] − 20 + i",
           more="lse    lse\ngiven  lengths[B]:int64\ngives  out, lse", empty_rows=True, lengths=(1, 60)),
    _plain("every-third", (1, 1, 300), (4, 1), mask=f"{CAUSAL} and (j < 7 or j > 250 or j % 3 = 0)",
           note="a test per tile"),
    _plain("bias", (1, 3, 100), (4, 1), score="0.125·s + bias[h, i, j]", more="given  bias[4,I,J]:float32"),
    _plain("head-mask", (1, 2, 100), (8, 2), more="weight w·head_mask[h]\ngiven  head_mask[8]:float32"),
    _row("static-cache", """
        attend  q[B,8,1,64]  k,v[B,2,J,64]  float32
          score  0.125·s
          mask   j ≤ position[i]
          kv_head h // 4
          norm   softmax (float32)
        given  position[1]:int64
        """, {"B": 2, "J": 300}, "filled up to the query's position", position=(40, 41)),
)  # fmt: skip
"""What the dense kernel computes too."""

PAGES = {"B": 3, "I": 2, "P": 40, "M": 9}


def _pages(name: str, width: int, dtype: str, out: str) -> str:
    """Pages of 16 tokens of two heads."""
    return f"""gather  {name}[P,16,2,{width}]  {dtype}
          at     block_table[b, j // 16], j % 16, g, d
          sizes  B, 2, 16·M, {width}
          out    {out}"""


def _tokens(name: str, out: str) -> str:
    """A pool of single tokens of one head."""
    return f"""gather  {name}[P,1,64]  float32
          at     rows[b, j], 0, d
          sizes  B, 1, M, 64
          out    {out}"""


STORED_CASES: tuple[DecodeCase, ...] = (
    _row("paged", f"""
        {_pages("key_pages", 64, "float32", "k")}
        {_pages("value_pages", 80, "float32", "v")}
        attend  q[B,8,I,64]  k  v  float32
          score  0.125·s
          mask   j ≤ i + lengths[b] − I
          kv_head h // 4
          norm   softmax (float32)
          lse    lse
        given  block_table[B,M]:int32
        given  lengths[B]:int32
        gives  out, lse
        """, PAGES, "pages of 16 tokens", tables=("block_table",), lengths=(2, 144)),
    _row("paged-prefill", f"""
        {_pages("key_pages", 64, "float32", "k")}
        {_pages("value_pages", 64, "float32", "v")}
        attend  q[B,2,I,64]  k  v  float32
          score  0.125·s
          mask   j ≤ i + lengths[b] − I and j > i + lengths[b] − I − 30
          norm   softmax (float32)
        given  block_table[B,M]:int32
        given  lengths[B]:int32
        """, {**PAGES, "I": 70}, "many queries: each tile has keys of its own", tables=("block_table",),
        lengths=(70, 144)),
    _row("paged-by-head", """
        gather  pages[P,2,2,8,64]  float32
          at     block_table[b, j // 8], 0, g, j % 8, d
          sizes  B, 2, 8·M, 64
          out    k
        gather  pages  float32
          at     block_table[b, j // 8], 1, g, j % 8, d
          sizes  B, 2, 8·M, 64
          out    v
        attend  q[B,4,I,64]  k  v  float32
          score  0.125·s
          mask   j < lengths[b] and j > i + lengths[b] − 30
          kv_head h // 2
          norm   softmax (float32)
        given  block_table[B,M]:int32
        given  lengths[B]:int32
        """, PAGES, "keys and values in one store, heads before tokens", tables=("block_table",),
        lengths=(2, 72)),
    _row("token-table", f"""
        {_tokens("key_pool", "k")}
        {_tokens("value_pool", "v")}
        attend  q[B,4,I,64]  k  v  float32
          score  0.125·s
          mask   j < lengths[b]
          kv_head 0
          norm   softmax (float32)
        given  rows[B,M]:int32
        given  lengths[B]:int32
        """, {"B": 2, "I": 1, "P": 210, "M": 100}, "a table of tokens", tables=("rows",), lengths=(1, 100)),
    _row("paged-narrow", f"""
        {_pages("key_pages", 64, "int8", "key_codes")}
        dequantize  key_codes
          scale  key_scale[block_table[b, j // 16], j % 16, g]
          out    k
        {_pages("value_pages", 32, "uint8", "value_codes")}
        dequantize  value_codes
          scale  value_scale[block_table[b, j // 16], j % 16, g]
          bits   4
          out    v
        attend  q[B,8,I,64]  k  v  float32
          score  0.125·s
          mask   j ≤ i + lengths[b] − I
          kv_head h // 4
          norm   softmax (float32)
        given  block_table[B,M]:int32
        given  lengths[B]:int32
        given  key_scale[P,16,2]:float32
        given  value_scale[P,16,2]:float32
        """, PAGES, "scales lie in pages too", tables=("block_table",), lengths=(2, 144)),
    _narrowed("float8", "float8_e4m3 channel", "float8_e4m3 token", LONG),
    _narrowed("float8-heads", "float8_e4m3 head", "float8_e4m3 head", LONG, "a scale for each head"),
    _narrowed("int8-token", "int8 token", "int8 channel", {**LONG, "I": 3}),
    _narrowed("int8-channel", "int8 channel", "int8 token", LONG),
    _narrowed("int8-smooth", "int8 shifted", "int8 token", LONG, "the keys' mean beside the codes"),
    _narrowed("int4-channel", "int4 channel", "int4 token", LONG),
    _narrowed("int4-token", "int4 token", "int4 channel", {**LONG, "I": 3}),
    _narrowed("int4-smooth", "int4 shifted", "int4 token", LONG),
    _narrowed("int4-groups", "int4 group", "int4 group", {"B": 1, "I": 2, "J": 100}, "scales that do not factor out"),
    _narrowed("int8-value-mean", "int8 channel", "int8 shifted", {"B": 1, "I": 1, "J": 100}),
    _narrowed("int4-channels-80", "int4 channel", "int4 token", {"B": 1, "I": 1, "J": 100}, "halves of 40", 80),
    _narrowed("mixed", "float8_e4m3 token", "int4 channel", LONG, "keys and values in different types", 128),
)  # fmt: skip
"""What only the decode kernel computes."""

WIDE_CASES: tuple[DecodeCase, ...] = (
    _plain("latent-576-512", (2, 1, 90), (8, 1), (576, 512), mask="j < length[b]",
           more="given  length[B]:int32", length=(1, 90), note="multi-head latent attention, absorbed"),
    _plain("latent-several-queries", (1, 3, 70), (20, 1), (576, 512), more="lse    lse\ngives  out, lse"),
    _plain("wide-keys", (1, 1, 50), (4, 2), (320, 64), note="pieces of 64"),
    _plain("wide-values", (1, 2, 50), (2, 2), (48, 272), note="pieces of 16"),
)  # fmt: skip
DECODE_CASES = (*PLAIN_CASES, *STORED_CASES, *WIDE_CASES)
DECODE_BY_NAME = {case.name: case for case in DECODE_CASES}


def stored_inputs(spec: Spec, tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Non-contiguous inputs with poison around them; rows of bytes are contiguous and begin at even places."""
    made = poisoned_inputs(spec, tensors)
    captured = {value.name for value in spec.captured()}
    for number, value in enumerate(spec.inputs):
        if DTYPES[value.type.dtype].itemsize == 1 and value.name not in captured:
            tensor = tensors[value.name]
            room = torch.full([*tensor.shape[:-1], tensor.shape[-1] + 6], 0x7F, dtype=torch.uint8, device=tensor.device)
            made[number] = room.view(tensor.dtype)[..., 2 : 2 + tensor.shape[-1]].copy_(tensor)
    return made


__all__ = ["DECODE_BY_NAME", "DECODE_CASES", "PLAIN_CASES", "STORED_CASES", "DecodeCase", "stored_inputs"]
