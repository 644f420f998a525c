"""``Attend`` by ``scaled_dot_product_attention``: whole, or block by block where the mask leaves out
tiles.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from attncompile.codegen.pytorch.autocast import autocast_dtype
from attncompile.codegen.pytorch.form import NEGLIGIBLE, AdditiveForm
from attncompile.codegen.pytorch.grid import Map, Range, take
from attncompile.ir import Attend, Expr, simplify
from attncompile.ir.blocks import block_map
from attncompile.ir.evaluate import evaluate
from attncompile.ir.expr import TRUE, Const, Load, Size, loads, substitute, walk
from attncompile.ir.intervals import Visibility

# Queries of one block-wise call, and the tile in which the block map is read. A block sees its window and
# itself, so small blocks skip more; below this the fixed cost of a call shows on a CPU.
BLOCK_QUERY, BLOCK_KEY = 256, 64

# A block-wise walk pays when it leaves out at least this share of the tiles, over at least this many blocks.
# Causal with padding, 9 heads of 64 channels, CPU: 1.04 times the time of one masked call at 2 blocks, 0.86
# at 3, 0.64 at 8.
WORTH_SKIPPING, FEWEST_BLOCKS = 0.25, 3


@dataclass(frozen=True)
class Operands:
    """Query ``[b,h,i,d]``, key ``[b,g,j,d]`` and value ``[b,g,j,e]`` of one call, in one dtype."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


def read_operands(attend: Attend, form: AdditiveForm, where: Map) -> Operands:
    """Query, key and value, heads listed where the kernel cannot share them, query scaled where the scale
    varies.
    """
    query = where.tensors[attend.query]
    key, value = (where.tensors[name].to(query.dtype) for name in (attend.key, attend.value))
    if form.shared_heads == "listed":
        heads = attend.kv_heads(query.shape[1], query.device, where.sizes)
        key, value = key.index_select(1, heads), value.index_select(1, heads)
    if form.query_factor is not None:
        factor = evaluate(form.query_factor, where.environment(_wide(query.dtype)))
        query = (query * factor).to(query.dtype)
    return Operands(query, key, value)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which score expressions are evaluated: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def additive_mask(
    form: AdditiveForm, mask: Expr, where: Map, dtype: torch.dtype, rows: Range | None = None,
    columns: Sequence[Range] | None = None,
) -> torch.Tensor | None:
    """What is added to the scaled scores, as small as broadcasting allows (padding alone is ``[b,1,1,j]``).

    Args:
        form: the recognised form.
        mask: its mask, or a simpler one that is equal for these lengths.
        where: the map of this call.
        dtype: dtype of the query; a bias computed from positions, or read from a tensor of a wider dtype, stays
            in float32, where 16 bits would lose it, and make −∞ of a number that hides.
        rows, columns: the part of the map, all of it when ``None``.

    Returns:
        A float tensor, or ``None`` when nothing is added.
    """
    if mask == TRUE and form.bias is None:
        return None
    wide = _wide(dtype)
    environment = where.environment(wide, rows, columns)
    zero = torch.zeros((), dtype=wide, device=where.device)
    bias = zero if form.bias is None else evaluate(as_stored(form.bias, form, where), environment)
    added = bias
    if mask != TRUE:
        lowest = torch.finfo(dtype if form.bias is None else wide).min
        fill = evaluate(as_stored(form.masked, form, where), environment)
        # of numbers that are read, two may add up to −∞, and weigh nothing beside one of them
        fill = fill.clamp(min=lowest) if form.fill != "infinite" and isinstance(form.masked, Const) else fill
        added = torch.where(evaluate(mask, environment), bias, fill)
    added = added if stays_wide(form, where, dtype) else added.to(dtype)
    return added.reshape([1] * (4 - added.dim()) + list(added.shape))


def as_stored(expr: Expr, form: AdditiveForm, where: Map) -> Expr:
    """An expression whose numbers that hide are rounded to the dtype of those that are loaded beside them.

    A model that adds −1e9 in bfloat16 adds −999292928, which is what a mask holds that it loads: equal numbers, which
    hide a row equally.
    """
    parts = (form.masked,) if form.bias is None else (form.bias, form.masked)
    read = [where.tensors[load.tensor].dtype for part in parts for load in loads(part)]
    narrow = [dtype for dtype in read if dtype.is_floating_point and dtype.itemsize < 4]
    if not narrow:
        return expr
    dtype = functools.reduce(torch.promote_types, narrow)
    rounded: dict[Expr, Expr] = {}
    for node in walk(expr):
        if isinstance(node, Const) and not isinstance(node.value, bool) and -NEGLIGIBLE <= abs(node.value) < math.inf:
            near = _rounded(float(node.value), dtype)
            rounded |= {node: Const(near)} if math.isfinite(near) else {}
    return substitute(expr, rounded) if rounded else expr


def _rounded(value: float, dtype: torch.dtype) -> float:
    """A number in a float dtype, by arithmetic alone: while a graph is traced a tensor has no value."""
    kind = torch.finfo(dtype)
    fraction, exponent = math.frexp(value)
    digits = 1 - round(math.log2(kind.eps))
    near = math.ldexp(round(math.ldexp(fraction, digits)), exponent - digits)
    return near if abs(near) <= kind.max else math.copysign(math.inf, near)


def computed_bias(form: AdditiveForm) -> bool:
    """Whether there is a bias that is not read from a tensor as it is."""
    return form.bias is not None and not isinstance(form.bias, Load)


def stays_wide(form: AdditiveForm, where: Map, dtype: torch.dtype) -> bool:
    """Whether there is a bias that a dtype does not hold: one that is computed, or read in a wider one."""
    if isinstance(form.bias, Load):
        return torch.promote_types(where.tensors[form.bias.tensor].dtype, dtype) != dtype
    return computed_bias(form)


def empty_rows(form: AdditiveForm, mask: Expr, where: Map) -> torch.Tensor:
    """Whether a query sees no key: truth values ``[b,h,i,1]``, broadcastable."""
    visible = evaluate(mask, where.environment(torch.float32))
    return ~visible.reshape([1] * (4 - visible.dim()) + list(visible.shape)).any(-1, keepdim=True)


def attend_whole(
    attend: Attend, form: AdditiveForm, where: Map, shared_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """One call over the whole map; traceable with symbolic sizes.

    Args:
        attend: the operation.
        form: its form.
        where: the map of this call.
        shared_mask: :func:`additive_mask` of an equal site, built once by the caller.
    """
    operands = read_operands(attend, form, where)
    query, key, value = operands.query, operands.key, operands.value
    mask = form.mask_at(query.shape[2], key.shape[2])
    causal = form.causal_at(query.shape[2], key.shape[2])
    added = None if causal else shared_mask
    if added is None and not causal:
        added = additive_mask(form, mask, where, query.dtype)
    care = _empty_row_care(form, query, key) if added is not None and not form.proven and mask != TRUE else ()
    if care and added is not None:
        empty = empty_rows(form, mask, where)
        added = added.masked_fill(empty, 0.0)
        query = query.masked_fill(empty, 0.0) if "query" in care else query
    out = _call(query, key, value, form, added, causal)
    if form.fill == "infinite" and not causal and added is not None and (
        not form.proven or (form.bias is not None and any(isinstance(node, Load) for node in walk(form.bias)))
    ):
        # torch gives 0 for a row without a key on the CPU; other devices are not trusted to
        wanted = math.nan if attend.norm.empty == "nan" else 0.0
        if attend.norm.empty == "nan" or where.device.type != "cpu":
            out = out.masked_fill((added == -math.inf).all(-1, keepdim=True), wanted)
    return edited(out, form, where)


def _empty_row_care(form: AdditiveForm, query: torch.Tensor, key: torch.Tensor) -> tuple[str, ...]:
    """What has to be zeroed in a row without a key, because adding a finite fill there is not what the Spec
    says.

    A fill that replaces the score makes the row's logits equal, and lets no gradient through: with ``query``
    and ``mask`` zeroed they are equal too. Where the fill swallows the score, adding it does that by itself,
    but for float16, which cannot hold such a fill, and for CUDA's kernels, which scale it beyond the largest
    number. A fill that
    is added moves the whole row, which a softmax does not notice: the ``mask`` is zeroed, where kernels would
    lose the score's last digits next to it, or their backward pass the number of keys in the log-sum-exp.
    """
    elsewhere = query.device.type != "cpu"
    differentiated = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
    if form.fill == "shifted":
        moved = form.bias is None and isinstance(form.masked, Const)
        return ("mask",) if moved and (elsewhere or differentiated) else ()
    swallowed = form.fill == "absorbing" and not elsewhere and query.dtype != torch.float16
    if form.fill == "infinite" or (swallowed and not (form.replaces and differentiated)):
        return ()
    return ("query", "mask")


def edited(out: torch.Tensor, form: AdditiveForm, where: Map) -> torch.Tensor:
    if form.edit is None:
        return out
    return (out * evaluate(form.edit, where.environment(_wide(out.dtype)))).to(out.dtype)


def attend_added(operands: Operands, form: AdditiveForm, added: torch.Tensor) -> torch.Tensor:
    """One call with given numbers to add to the scaled scores, without :attr:`AdditiveForm.edit`."""
    return _call(operands.query, operands.key, operands.value, form, added, causal=False)


def _call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, form: AdditiveForm,
          added: torch.Tensor | None, causal: bool) -> torch.Tensor:
    shared, dtype = form.shared_heads == "grouped", query.dtype
    narrow = autocast_dtype(query)
    if narrow is not None and added is not None and added.dtype != narrow:
        # autocast would round what is added as well
        with torch.autocast(query.device.type, enabled=False):
            made = _call(query.to(narrow), key.to(narrow), value.to(narrow), form, added, causal)
        return made.to(dtype)
    if query.device.type != "cpu" and added is not None:
        if added.dtype != dtype:
            # CUDA's kernels misread a float32 mask beside 16-bit operands (torch 2.11), and 16 bits lose the
            # bias
            query, key, value = query.to(added.dtype), key.to(added.dtype), value.to(added.dtype)
        if shared:
            # those that take a mask want as many key heads as query heads
            repeats = query.shape[1] // key.shape[1]
            key, value, shared = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1), False
    out = scaled_dot_product_attention(
        query, key, value, attn_mask=added, is_causal=causal, scale=form.scale, enable_gqa=shared)
    return out.to(dtype)


@functools.lru_cache(maxsize=256)
def visited_keys(mask: Expr, query_length: int, key_length: int) -> tuple[tuple[tuple[int, int], ...], ...]:
    """For each block of queries the ranges of keys that some query of it may see."""
    tiles = block_map(mask, query_length, key_length, block_query=BLOCK_QUERY, block_key=BLOCK_KEY).visibility
    found = []
    for row in tiles != Visibility.NONE:
        edges = np.flatnonzero(np.diff(np.concatenate([[0], row.astype(np.int8), [0]])))
        found.append(tuple((int(first) * BLOCK_KEY, min(int(after) * BLOCK_KEY, key_length))
                           for first, after in zip(edges[::2], edges[1::2], strict=True)))
    return tuple(found)


@functools.lru_cache(maxsize=256)
def at_sizes(mask: Expr, sizes: tuple[tuple[str, int], ...]) -> Expr:
    """The mask with its symbolic sizes replaced by their values."""
    return simplify(substitute(mask, {Size(name): Const(value) for name, value in sizes}))


def visited_share(mask: Expr, query_length: int, key_length: int) -> float:
    """Share of the map inside the ranges of :func:`visited_keys`."""
    ranges = visited_keys(mask, query_length, key_length)
    rows = [min(BLOCK_QUERY, query_length - block * BLOCK_QUERY) for block in range(len(ranges))]
    seen = sum(count * sum(after - first for first, after in parts)
               for count, parts in zip(rows, ranges, strict=True))
    return seen / (query_length * key_length)


def skips_blocks(form: AdditiveForm) -> bool:
    """Whether positions that the mask hides may be left out: their weight is 0, or their row is found and
    replaced.
    """
    if form.fill != "shifted":
        return True
    negligible = isinstance(form.masked, Const) and form.masked.value <= NEGLIGIBLE
    return form.proven and form.bias is None and negligible


def attend_blockwise(attend: Attend, form: AdditiveForm, where: Map) -> torch.Tensor:
    """One call per block of queries, over the keys that the block may see; for plain tensors only.

    Equal to :func:`attend_whole`: rows that see no key among those visited get what the fill gives them.
    """
    operands = read_operands(attend, form, where)
    query, key, value = operands.query, operands.key, operands.value
    mask = at_sizes(form.mask, tuple(where.sizes.items()))
    blocks: list[torch.Tensor] = []
    for number, columns in enumerate(visited_keys(mask, query.shape[2], key.shape[2])):
        rows = (number * BLOCK_QUERY, min((number + 1) * BLOCK_QUERY, query.shape[2]))
        part = query[:, :, rows[0]:rows[1]]
        if not columns:
            nothing = part.new_zeros(*part.shape[:3], value.shape[3])
            empty = torch.ones((), dtype=torch.bool, device=where.device)
            blocks.append(_replaced(nothing, empty, attend, form, operands))
            continue
        added = _finite_mask(form, mask, where, query.dtype, rows, columns)
        out = _call(part, take(key, 2, columns), take(value, 2, columns), form, added, causal=False)
        if not form.proven:
            visible = evaluate(mask, where.environment(torch.float32, rows, columns))
            out = _replaced(out, ~visible.any(-1, keepdim=True), attend, form, operands)
        blocks.append(out)
    return edited(torch.cat(blocks, 2), form, where)


def _finite_mask(form: AdditiveForm, mask: Expr, where: Map, dtype: torch.dtype, rows: Range,
                 columns: Sequence[Range]) -> torch.Tensor | None:
    """The additive mask of a block, −∞ made finite: a row without a key then stays finite, its gradient
    too.
    """
    added = additive_mask(form, mask, where, dtype, rows, columns)
    return added if added is None or form.proven else added.clamp(min=torch.finfo(dtype).min / 2)


def _replaced(out: torch.Tensor, empty: torch.Tensor, attend: Attend, form: AdditiveForm,
              operands: Operands) -> torch.Tensor:
    """Rows that see no key: NaN or 0 for a fill of −∞, the mean over all keys for a finite one."""
    if form.fill == "infinite":
        return out.masked_fill(empty, math.nan if attend.norm.empty == "nan" else 0.0)
    mean = operands.value.mean(2, keepdim=True)
    repeats = out.shape[1] // mean.shape[1]
    return torch.where(empty, mean.repeat_interleave(repeats, 1), out)


def _reads_low_numbers(form: AdditiveForm, where: Map) -> bool:
    """Whether a tensor that is added to the scores holds numbers so low that they hide, or that nobody knows."""
    read = [] if form.bias is None else [where.tensors[load.tensor] for load in loads(form.bias)]
    return any(tensor.numel() and float(tensor.amin()) <= NEGLIGIBLE / 2 for tensor in read if
               tensor.is_floating_point())


def blockwise_pays(form: AdditiveForm, where: Map) -> bool:
    """Whether the block-wise walk leaves out enough at the lengths of this call."""
    _, _, queries, keys = where.extents
    if not skips_blocks(form) or form.mask == TRUE or queries < FEWEST_BLOCKS * BLOCK_QUERY:
        return False
    if form.fill != "infinite" and _reads_low_numbers(form, where):
        return False  # of a row whose visible keys they hide, hidden keys weigh as much
    mask = at_sizes(form.mask, tuple(where.sizes.items()))
    if form.causal_at(queries, keys):
        return False  # SDPA skips those blocks itself
    return visited_share(mask, queries, keys) <= 1 - WORTH_SKIPPING
