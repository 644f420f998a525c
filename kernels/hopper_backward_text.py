"""Text of the functions of the Hopper backward kernel into which a Spec's arguments are filled.

Markers are those of :mod:`attncompile.kernels.hopper_text`; ``ROW_BLOCKS`` stands for the number of query blocks of a
head, ``FIRST_HEAD LAST_HEAD NEXT_HEAD`` for the heads that read KV head ``g``.
"""

WEIGHTS = '''
@gluon.jit
def weights_of(s, shift, start, own_first, b, h, CONTEXT, EDGE: gl.constexpr, DTYPE: gl.constexpr):
    """Weights of a block from its products, and what the gradient of a logit is multiplied with; 0 where hidden.

    A row is a key, a column a query. A thread's columns are 8n + c + 2·(lane % 4): ``near`` differs between threads,
    ``far`` between the registers of one.
    """
    keys = own_first + gl.arange(0, 64, layout=gl.SliceLayout(1, SCORES))
    columns = gl.expand_dims(gl.arange(0, 64, layout=gl.SliceLayout(0, SCORES)), 0)
    start = gl.multiple_of(start, 64)
    near = start + (columns & 6)
    far = columns & ~6
    # <positions>
    # <slope>
    # <score>
    weights = gl.exp2(s * SCALE - gl.expand_dims(shift, 0))
    if EDGE:
        # <mask>
    return weights.to(DTYPE), RISING
'''

STEP = '''
@gluon.jit
def step(
    query_tiles, grad_tiles, row_tiles, key_tiles, value_tiles, difference_tiles, query_ready, grad_ready,
    query_sums, s, key_sum, value_sum, stage, phase, buffer, more, start, own_first, b, h, CONTEXT,
    GROUP: gl.constexpr, EDGE: gl.constexpr,
):
    """One block of queries: its part of the gradients of keys and values, and of its own.

    ``s`` holds the products of the keys with these queries; the next block's are begun here, where ``more`` says
    that there is one.
    """
    query_tile = query_tiles.index(stage).reshape([BLOCK_I, CHANNELS])
    grad_tile = grad_tiles.index(stage).reshape([BLOCK_I, CHANNELS])
    # Always 0: with it the addresses of keys and values are computed again, where they would take registers all along.
    again = stage >> 4
    mbarrier.wait(grad_ready.index(stage), phase)
    # <parts>
    fence_async_shared()
    signal(SHARED + buffer * GROUPS + GROUP, GROUPS * 128)
    key_sum = warpgroup_mma(LAST_DIFFERENCES, LAST_QUERIES, key_sum, is_async=True)
    value_sum, LAST_LEFT = warpgroup_mma_wait(1, deps=[value_sum, LAST_LEFT])
    signal(GRAD_FREE + stage, GROUPS * 128 + 32)
    # <rest>
    block = (b * HEADS + h) * ROW_BLOCKS + start // BLOCK_I
    add_to(query_sums, block, query_sum, GROUP)
    return s, key_sum, value_sum, next_stage, next_phase, buffer ^ 1
'''

PART = """
grad_part = GRAD_PART
products = warpgroup_mma(
    value_tiles.index(GROUP + again).reshape([64, CHANNELS]),
    grad_part.permute((1, 0)),
    gl.zeros([64, 64], gl.float32, SCORES),
    use_acc=False,
    is_async=True,
)
# <next_part>
shift = row_tiles.index(ROW).reshape([64]).load(gl.SliceLayout(0, SCORES))
weights, rising = weights_of(s, shift, start + BEGIN, own_first, b, h, CONTEXT, EDGE, grad_tiles.dtype)
left_NUMBER = gl.convert_layout(weights, WEIGHTS, assert_trivial=True)
value_sum = warpgroup_mma(left_NUMBER, grad_part, value_sum, is_async=True)
delta = row_tiles.index(ROW + 1).reshape([64]).load(gl.SliceLayout(0, SCORES))
# <wait>
differences = (rising.to(gl.float32) * (products - gl.expand_dims(delta, 0))).to(query_tiles.dtype)
difference_tiles.index(PLACE).store(differences)
differences_NUMBER = gl.convert_layout(differences, WEIGHTS, assert_trivial=True)
# <after>
"""

PRODUCTS = """
query_sum = gl.zeros(QUERY_SUM, gl.float32, QUERY_GRADIENT)
for part in gl.static_range(GROUPS):
    query_sum = warpgroup_mma(
        QUERY_LEFT,
        QUERY_RIGHT,
        query_sum,
        use_acc=part > 0,
        is_async=True,
    )
"""

NEXT = """
next_stage, next_phase = following(stage, phase)
mbarrier.wait(query_ready.index(next_stage), next_phase, pred=more)
next_products = warpgroup_mma(
    key_tiles.index(GROUP + again).reshape([64, CHANNELS]),
    NEXT_PART.permute((1, 0)),
    gl.zeros([64, 64], gl.float32, SCORES),
    use_acc=False,
    is_async=True,
)
"""

REST = {
    "ahead": """
# <next>
meet(SHARED + buffer * GROUPS + (GROUP + 1) % GROUPS, GROUPS * 128)
# <products>
key_sum, s, LAST_DIFFERENCES = warpgroup_mma_wait(GROUPS, deps=[key_sum, next_products, LAST_DIFFERENCES])
signal(QUERY_FREE + stage, GROUPS * 128 + 32)
query_sum = warpgroup_mma_wait(0, deps=[query_sum])
""",
    "middle": """
meet(SHARED + buffer * GROUPS + (GROUP + 1) % GROUPS, GROUPS * 128)
# <products>
key_sum, LAST_DIFFERENCES = warpgroup_mma_wait(GROUPS, deps=[key_sum, LAST_DIFFERENCES])
signal(QUERY_FREE + stage, GROUPS * 128 + 32)
# <next>
query_sum = warpgroup_mma_wait(1, deps=[query_sum])
s = warpgroup_mma_wait(0, deps=[next_products])
""",
    "behind": """
# <next>
key_sum, LAST_DIFFERENCES = warpgroup_mma_wait(1, deps=[key_sum, LAST_DIFFERENCES])
signal(QUERY_FREE + stage, GROUPS * 128 + 32)
meet(SHARED + buffer * GROUPS + (GROUP + 1) % GROUPS, GROUPS * 128)
# <products>
s = warpgroup_mma_wait(GROUPS, deps=[next_products])
query_sum = warpgroup_mma_wait(0, deps=[query_sum])
""",
}

CONSUMER = '''
@gluon.jit
def consumer(
    grad_key, grad_value, query_tiles, grad_tiles, row_tiles, key_tiles, value_tiles, difference_tiles, query_ready,
    grad_ready, key_ready, query_sums, work, CONTEXT, GROUP: gl.constexpr,
):
    """A warpgroup: 64 keys of each tile on the work list."""
    stage = 0
    phase = 0
    buffer = 0
    key_phase = 0
    position = 1
    tile = gl.load(work)
    while tile >= 0:
        next_tile = gl.load(work + position)
        key_first, b, g = unpacked(tile)
        own_first = key_first + 64 * GROUP
        key_sum = gl.zeros([64, CHANNELS], gl.float32, GRADIENT)
        value_sum = gl.zeros([64, CHANNELS], gl.float32, GRADIENT)
        mbarrier.wait(key_ready, key_phase)
        mbarrier.wait(query_ready.index(stage), phase)
        products = warpgroup_mma(
            key_tiles.index(GROUP).reshape([64, CHANNELS]),
            FIRST_PART.permute((1, 0)),
            gl.zeros([64, 64], gl.float32, SCORES),
            use_acc=False,
            is_async=True,
        )
        s = warpgroup_mma_wait(0, deps=[products])
        last_head = LAST_HEAD
        for h in range(FIRST_HEAD, last_head, NEXT_HEAD):
            blocks, KNOWN = query_blocks(key_first, b, h, CONTEXT)
            # <masked>
            # <loops>
        meet(DONE, GROUPS * 128)
        value_tiles.index(GROUP).reshape([64, CHANNELS]).store(value_sum.to(value_tiles.dtype))
        key_tiles.index(GROUP).reshape([64, CHANNELS]).store((key_sum * GAIN).to(key_tiles.dtype))
        fence_async_shared()
        copy_out(grad_value, [b, g, own_first, 0], value_tiles.index(GROUP))
        copy_out(grad_key, [b, g, own_first, 0], key_tiles.index(GROUP))
        tma.store_wait(0)
        signal(KEY_FREE, GROUPS * 128 + 32)
        key_phase ^= 1
        tile = next_tile
        position += 1
'''

LOOP = """
for number in range(FIRST_NUMBER, LAST_NUMBER):
    start = gl.minimum(block_start(number, KNOWN), (ROW_BLOCKS - 1) * BLOCK_I)
    s, key_sum, value_sum, stage, phase, buffer = step(
        query_tiles, grad_tiles, row_tiles, key_tiles, value_tiles, difference_tiles, query_ready,
        grad_ready, query_sums, s, key_sum, value_sum, stage, phase, buffer,
        (number + 1 < blocks) | (h + NEXT_HEAD < last_head),
        start, own_first, b, h, CONTEXT, GROUP, MASKED,
    )
"""

PRODUCER = '''
@gluon.jit
def producer(
    query, key, value, grad_out, row_values, query_tiles, grad_tiles, row_tiles, key_tiles, value_tiles, query_ready,
    grad_ready, key_ready, work, CONTEXT,
):
    """One warp: copies the tiles that the warpgroups multiply, as far ahead as there is room."""
    stage = 0
    phase = 0
    filled = 0
    position = 1
    tile = gl.load(work)
    while tile >= 0:
        next_tile = gl.load(work + position)
        key_first, b, g = unpacked(tile)
        if position > 1:
            meet(KEY_FREE, GROUPS * 128 + 32)
        mbarrier.expect(key_ready, GROUPS * (key.block_type.nbytes + value.block_type.nbytes))
        for group in gl.static_range(GROUPS):
            copy_in(key, [b, g, key_first + 64 * group, 0], key_ready, key_tiles.index(group))
            copy_in(value, [b, g, key_first + 64 * group, 0], key_ready, value_tiles.index(group))
        last_head = LAST_HEAD
        for h in range(FIRST_HEAD, last_head, NEXT_HEAD):
            blocks, KNOWN = query_blocks(key_first, b, h, CONTEXT)
            for number in range(0, blocks):
                start = gl.minimum(block_start(number, KNOWN), (ROW_BLOCKS - 1) * BLOCK_I)
                row = ((b * HEADS + h) * ROW_BLOCKS + start // BLOCK_I) * ROWS
                fill(query, [b, h, start, 0], query_ready, query_tiles, stage, QUERY_FREE, filled)
                if filled >= STAGES:
                    meet(GRAD_FREE + stage, GROUPS * 128 + 32)
                copied: gl.constexpr = grad_out.block_type.nbytes + ROWS * row_values.block_type.nbytes
                mbarrier.expect(grad_ready.index(stage), copied)
                copy_in(grad_out, [b, h, start, 0], grad_ready.index(stage), grad_tiles.index(stage))
                for each in gl.static_range(ROWS):
                    place = row_tiles.index(stage * ROWS + each)
                    copy_in(row_values, [row + each, 0], grad_ready.index(stage), place)
                stage, phase = following(stage, phase)
                filled += 1
        tile = next_tile
        position += 1
'''

KERNEL = '''
@gluon.jit(do_not_specialize=[UNSPECIALIZED])
def attend_backward_kernel(DESCRIPTORS, query_sums, work, work_width, SIZES):
    """One thread block for each row of the work list."""
    query_tiles = gl.allocate_shared_memory(query.dtype, [STAGES, 1, 1, BLOCK_I, CHANNELS], query.layout)
    grad_tiles = gl.allocate_shared_memory(grad_out.dtype, [STAGES, 1, 1, BLOCK_I, CHANNELS], grad_out.layout)
    row_tiles = gl.allocate_shared_memory(gl.float32, [STAGES * ROWS, 1, 64], row_values.layout)
    key_tiles = gl.allocate_shared_memory(key.dtype, [GROUPS, 1, 1, 64, CHANNELS], key.layout)
    value_tiles = gl.allocate_shared_memory(value.dtype, [GROUPS, 1, 1, 64, CHANNELS], value.layout)
    difference_tiles = gl.allocate_shared_memory(query.dtype, [DIFFERENCE_TILES, 64, 64], DIFFERENCES)
    query_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    grad_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    key_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(query_ready.index(stage), count=1)
        mbarrier.init(grad_ready.index(stage), count=1)
    mbarrier.init(key_ready, count=1)
    fence_async_shared()
    work += gl.program_id(0) * work_width
    gl.warp_specialize(
        [
            # <consumers>
            # <producer>
        ],
        WARPS,
        REGISTERS,
    )
'''

BEFORE = '''
@triton.jit(do_not_specialize=["heads", "queries", "blocks"])
def prepare(
    GIVEN, row_values, query_sums, heads, queries, blocks, OUT_STRIDES,
    EXTENT: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_I: tl.constexpr,
):
    """One program: the log-sum-exp in base 2 and delta of a block of queries; zeros where their gradient is summed.

    A query that saw no key, and one past the last, has +∞ and 0: each of its weights is computed as 0.
    """
    program = tl.program_id(0) % blocks
    lead = tl.cast(tl.program_id(0) // blocks, tl.int64)
    b = lead // heads
    h = lead % heads
    rows = program * BLOCK_I + tl.arange(0, BLOCK_I)
    features = tl.arange(0, CHANNELS)
    inside = rows < queries
    real = inside[:, None] & (features < EXTENT)[None, :]
    # Offsets of batch row and head may pass 2^31.
    out += b * out_stride_b + h * out_stride_h
    grad_out += b * grad_out_stride_b + h * grad_out_stride_h
    far = tl.cast(rows, tl.int64)[:, None]
    out += far * out_stride_i + features[None, :] * out_stride_e
    grad_out += far * grad_out_stride_i + features[None, :] * grad_out_stride_e
    out_tile = tl.load(out, mask=real, other=0.0)
    grad_tile = tl.load(grad_out, mask=real, other=0.0)
    delta = tl.sum(out_tile.to(tl.float32) * grad_tile.to(tl.float32), 1)
    delta -= tl.load(grad_lse + lead * queries + rows, mask=inside, other=0.0)  # if lse
    shift = tl.load(lse + lead * queries + rows, mask=inside, other=float("-inf")) * LOG2E
    empty = shift == float("-inf")
    places = tl.arange(0, BLOCK_I)
    row_values += (lead * blocks + program) * (2 * BLOCK_I) + places // 64 * 128 + places % 64
    tl.store(row_values, tl.where(empty, float("inf"), shift))
    tl.store(row_values + 64, tl.where(empty, 0.0, delta))
    query_sums += (lead * blocks + program) * (BLOCK_I * CHANNELS)
    tl.store(query_sums + tl.arange(0, BLOCK_I * CHANNELS), tl.zeros([BLOCK_I * CHANNELS], tl.float32))
'''

AFTER = '''
@triton.jit(do_not_specialize=["heads", "queries", "blocks"])
def finish(
    query_sums, grad_query, heads, queries, blocks, stride_b, stride_h, stride_i,
    EXTENT: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_I: tl.constexpr,
):
    """One program: the gradient of a block of queries from its sums, which lie as a warpgroup's registers do."""
    program = tl.program_id(0) % blocks
    lead = tl.cast(tl.program_id(0) // blocks, tl.int64)
    b = lead // heads
    h = lead % heads
    sums = tl.load(query_sums + (lead * blocks + program) * (BLOCK_I * CHANNELS) + tl.arange(0, BLOCK_I * CHANNELS))
    # Registers: which warpgroup, eight columns, warp, row, pair of columns, half of the rows, column of the pair.
    sums = tl.reshape(sums, [GROUPS, COLUMNS // 8, 4, 8, 4, 2, 2])
    sums = tl.permute(sums, PERMUTED)
    sums = tl.reshape(sums, [BLOCK_I, CHANNELS]) * GAIN
    rows = program * BLOCK_I + tl.arange(0, BLOCK_I)
    channels = tl.arange(0, CHANNELS)
    real = (rows < queries)[:, None] & (channels < EXTENT)[None, :]
    # Offsets of batch row and head may pass 2^31.
    grad_query += b * stride_b + h * stride_h
    grad_query += tl.cast(rows, tl.int64)[:, None] * stride_i + channels[None, :]
    tl.store(grad_query, sums.to(grad_query.dtype.element_ty), mask=real)
'''
