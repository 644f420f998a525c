"""Gluon functions of the Hopper kernel that no Spec changes; their source is copied into each module.

The constants at the top stand for those of a generated module. Named barriers (PTX ``bar``) synchronise warps of
different partitions: numbers below 6 belong to Triton.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.language.nvidia.hopper.tma import async_copy_global_to_shared as copy_in

SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32]))
WEIGHTS = gl.constexpr(gl.DotOperandLayout(0, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 32]), 4))
KEY_LANES = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
GROUPS = gl.constexpr(2)
BLOCK_I = gl.constexpr(128)
STAGES = gl.constexpr(2)


@gluon.jit
def signal(barrier, THREADS: gl.constexpr):
    """These warps have come to a named barrier, and do not wait for the others of its THREADS threads."""
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    text: gl.constexpr = barrier_text("arrive", THREADS)
    number = gl.full([1], barrier, gl.int32, LANES)
    gl.inline_asm_elementwise(text, "=r,r", [number], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def meet(barrier, THREADS: gl.constexpr):
    """These warps wait at a named barrier until THREADS threads have come to it."""
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    text: gl.constexpr = barrier_text("sync", THREADS)
    number = gl.full([1], barrier, gl.int32, LANES)
    gl.inline_asm_elementwise(text, "=r,r", [number], dtype=gl.int32, is_pure=False, pack=1)


@gluon.constexpr_function
def barrier_text(verb, threads):
    """PTX of a named barrier whose number is the operand."""
    return f"bar.{verb} $1, {threads}; mov.u32 $0, $1;"


@gluon.jit
def unpacked(tile):
    """First query, batch row and head of an entry of the work list: divisions would cost more than a key block."""
    row_first = (tile & 0xFFFFFF).to(gl.int32) * BLOCK_I
    return row_first, (tile >> 40).to(gl.int32), ((tile >> 24) & 0xFFFF).to(gl.int32)


@gluon.jit
def following(stage, phase):
    """The next stage of the ring of buffers, and the phase of its barriers."""
    stage += 1
    if stage == STAGES:
        stage = 0
        phase ^= 1
    return stage, phase


@gluon.jit
def fill(source, at, ready, tiles, stage, free, filled):
    """Copy a tile into its stage, once the consumers have freed it; whoever waits for ``ready`` then reads it."""
    if filled >= STAGES:
        meet(free + stage, GROUPS * 128 + 32)
    mbarrier.expect(ready.index(stage), source.block_type.nbytes)
    copy_in(source, at, ready.index(stage), tiles.index(stage))


@gluon.jit
def own_sums(p):
    """Sums over the columns that one thread holds; its three neighbours' join them after the last key."""
    QUERIES: gl.constexpr = p.shape[0]
    KEYS: gl.constexpr = p.shape[1]
    return gl.sum(gl.sum(gl.reshape(p, [QUERIES, KEYS // 8, 4, 2]), axis=3), axis=1)


@gluon.constexpr_function
def pair_text(element):
    """PTX: two float32 numbers, rounded to 16 bits, in a word."""
    return f"cvt.rn.{'bf16' if element == gl.bfloat16 else 'f16'}x2.f32 $0, $2, $1;"


@gluon.jit
def paired(p, element: gl.constexpr):
    """Weights rounded to 16 bits, those of neighbouring keys in a word: a thread of an accumulator holds both.

    A step hands words to the next: numbers of 16 bits would be taken apart and joined again.
    """
    QUERIES: gl.constexpr = p.shape[0]
    KEYS: gl.constexpr = p.shape[1]
    text: gl.constexpr = pair_text(element)
    even, odd = gl.split(gl.reshape(p, [QUERIES, KEYS // 2, 2]))
    return gl.inline_asm_elementwise(text, "=r,f,f", [even, odd], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def two_weights(words, element: gl.constexpr):
    """Paired weights as an operand."""
    QUERIES: gl.constexpr = words.shape[0]
    KEYS: gl.constexpr = words.shape[1] * 2
    even = (words & 0xFFFF).to(gl.int16).to(element, bitcast=True)
    odd = (words >> 16).to(gl.int16).to(element, bitcast=True)
    return gl.convert_layout(gl.reshape(gl.join(even, odd), [QUERIES, KEYS]), WEIGHTS, assert_trivial=True)


@gluon.jit
def highest_of(s):
    """The rows' greatest scores, by four chains of comparisons in a thread that do not wait for one another."""
    QUERIES: gl.constexpr = s.shape[0]
    KEYS: gl.constexpr = s.shape[1]
    within = gl.max(gl.reshape(s, [QUERIES, KEYS // 16, 16]), axis=1)
    return gl.convert_layout(gl.max(within, axis=1), gl.SliceLayout(1, SCORES), assert_trivial=True)


@gluon.jit
def packed(p):
    """Weights as e4m3, four in a word: of each 16 keys, word t holds columns 2t, 2t + 1, 8 + 2t and 9 + 2t.

    A thread of an accumulator holds just these, so that no data moves. A step hands words to the next: bytes would be
    taken apart and put together again, and float32 numbers would take four times the registers.
    """
    QUERIES: gl.constexpr = p.shape[0]
    KEYS: gl.constexpr = p.shape[1]
    named = gl.permute(gl.reshape(p, [QUERIES, KEYS // 16, 2, 4, 2]), (0, 1, 3, 2, 4))
    even, odd = gl.split(named)
    first, third = gl.split(even)
    second, fourth = gl.split(odd)
    text: gl.constexpr = (
        "{ .reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, $2, $1; "
        "cvt.rn.satfinite.e4m3x2.f32 high, $4, $3; mov.b32 $0, {low, high}; }"
    )
    four = [first, second, third, fourth]
    return gl.inline_asm_elementwise(text, "=r,f,f,f,f", four, dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def four_weights(words):
    """Packed weights as operands of a product with turned values: the order of a thread's keys is the same."""
    pairs = gl.join(words, words)
    copies = gl.reshape(gl.join(pairs, pairs), [words.shape[0], 4 * words.shape[1] * words.shape[2]])
    text: gl.constexpr = "mov.b32 $0, $1;"
    copies = gl.convert_layout(copies, WEIGHTS, assert_trivial=True)
    codes = gl.inline_asm_elementwise(text, "=r,r,r,r,r", [copies], dtype=gl.int8, is_pure=True, pack=4)
    return codes.to(gl.float8e4nv, bitcast=True)


@gluon.jit
def settled(total):
    """The same, by a shuffle from each lane to itself.

    It keeps what leads to the sums in front of the wait that follows: ptxas 12.8 moves exponentials that no product
    of this step feeds behind it, where nothing runs under them.
    """
    text: gl.constexpr = "{ .reg .b32 lane; mov.u32 lane, %laneid; shfl.sync.idx.b32 $0, $1, lane, 31, -1; }"
    return gl.inline_asm_elementwise(text, "=r,r", [total], dtype=gl.float32, is_pure=False, pack=1)


@gluon.jit
def kept(weights):
    """Keeps registers that a product reads until here: waits take no operands of 8 bits."""
    gl.inline_asm_elementwise("", "=r,0", [weights], dtype=weights.dtype, is_pure=False, pack=4)


@gluon.jit
def query_factors(query_scale, tile, heads, queries, GROUP: gl.constexpr, QUERY_BLOCK: gl.constexpr):
    """Scales of a warpgroup's queries."""
    row_first, b, h = unpacked(gl.maximum(tile, 0))
    rows = row_first + 64 * GROUP + gl.arange(0, 64, layout=gl.SliceLayout(1, SCORES))
    scales = query_scale + (b * heads + h) * gl.cdiv(queries, QUERY_BLOCK)
    return gl.load(scales + gl.minimum(rows, queries - 1) // QUERY_BLOCK)


@gluon.jit
def power_exponent(power):
    """The exponent of a power of two."""
    return ((power.to(gl.int32, bitcast=True) >> 23) - 127).to(gl.float32)


@gluon.jit
def inverse_power(power):
    """One divided by a power of two, exactly."""
    return (0x7F000000 - power.to(gl.int32, bitcast=True)).to(gl.float32, bitcast=True)


@gluon.constexpr_function
def rescale_text(count):
    """PTX: multiply ``count`` numbers of two rows by their rows' factors, unless the warp's factors are all 1."""
    products = " ".join(f"mul.f32 ${n}, ${n}, ${count + n};" for n in range(count))
    return (
        f"{{ .reg .pred changed, any; setp.ne.f32 changed, ${count}, 0f3F800000; "
        f"setp.ne.or.f32 changed, ${count + 2}, 0f3F800000, changed; "
        f"vote.sync.any.pred any, changed, 0xffffffff; @!any bra unchanged; {products} unchanged: }}"
    )


@gluon.constexpr_function
def rescale_operands(count):
    """Constraints of :func:`rescale_text`: the results are the numbers themselves, in place."""
    return ",".join(["=f"] * count + ["f"] * count + [str(n) for n in range(count)])


@gluon.jit
def rescaled(accumulator, factor):
    """The accumulator times its rows' factors; most steps find all of them 1."""
    LAYOUT: gl.constexpr = accumulator.type.layout
    COUNT: gl.constexpr = min(32, accumulator.shape[1] // 2)
    text: gl.constexpr = rescale_text(COUNT)
    operands: gl.constexpr = rescale_operands(COUNT)
    rows = gl.expand_dims(gl.convert_layout(factor, gl.SliceLayout(1, LAYOUT), assert_trivial=True), 1)
    factors = gl.full(accumulator.shape, 1.0, gl.float32, LAYOUT) * rows
    arguments = [factors, accumulator]
    return gl.inline_asm_elementwise(text, operands, arguments, dtype=gl.float32, is_pure=True, pack=COUNT)


@gluon.constexpr_function
def add_text(count):
    """PTX: add ``count`` numbers of each thread to memory, in fours, those of neighbouring threads side by side."""
    first = count // 4  # results stand before operands
    return " ".join(
        f"red.relaxed.gpu.global.add.v4.f32 [${first + count}+{512 * n}], {{${first + n}, ${first + n + 1}, "
        f"${first + n + 2}, ${first + n + 3}}};"
        for n in range(0, count, 4)
    )


@gluon.constexpr_function
def add_operands(count):
    """Constraints of :func:`add_text`: results that nobody reads, the numbers, where the first four belong."""
    return ",".join(["=r"] * (count // 4) + ["f"] * count + ["l"] * count)


@gluon.jit
def add_to(sums, block, values, GROUP: gl.constexpr):
    """Add a warpgroup's numbers to its part of a block of sums, in the order of its registers."""
    LAYOUT: gl.constexpr = values.type.layout
    COUNT: gl.constexpr = values.shape[0] * values.shape[1] // 128
    text: gl.constexpr = add_text(COUNT)
    operands: gl.constexpr = add_operands(COUNT)
    rows = gl.expand_dims(gl.arange(0, values.shape[0], layout=gl.SliceLayout(1, LAYOUT)), 1)
    columns = gl.expand_dims(gl.arange(0, values.shape[1], layout=gl.SliceLayout(0, LAYOUT)), 0)
    # The same for all numbers of a thread: its own. Where PTX asks for %tid in a loop, ptxas keeps descriptors of
    # products out of uniform registers, in hundreds of others.
    thread = (rows >> 4) * 32 + (rows & 7) * 4 + ((columns & 7) >> 1)
    place = sums + (block.to(gl.int64) * GROUPS + GROUP) * (128 * COUNT)
    places = place.to(gl.int64) + thread.to(gl.int64) * 16
    gl.inline_asm_elementwise(text, operands, [values, places], dtype=gl.int8, is_pure=False, pack=COUNT)


@gluon.jit
def reciprocal(x):
    """1/x by the special-function unit: relative error at most 2^-23, and 0 where x is infinite."""
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def tanh(x):
    """Hyperbolic tangent by the special-function unit: relative error at most 2^-11."""
    return gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def in_columns(values):
    """What the threads of a warpgroup loaded, one key each, as a row of the columns of the scores."""
    return gl.expand_dims(gl.convert_layout(values, gl.SliceLayout(0, SCORES)), 0)
