"""Text of the functions of the Hopper kernel into which a Spec's arguments are filled, see ``HopperForward``.

``CONTEXT`` stands for the arguments that expressions may read, ``HEADS QUERIES LENGTH_J`` for the identifiers of
sizes, ``QUERY_PLACE KEY_PLACE VALUE_PLACE`` for where a tile begins and ``QUERY_BOX KEY_BOX VALUE_BOX`` for its sizes,
those of values as they are or turned over; ``SCALES`` for the scales that a step needs, ``QUERY_OPERAND`` for where the
queries lie, ``CARRIED(p)`` for weights as words that a step hands to the next, ``OPERAND(words)`` for these as an
operand, ``PRODUCTS`` for the type of products of queries and keys, ``OUT_DTYPE`` for that of results; a line
``# <name>`` for lines that depend on the Spec; a line that ends in ``# if option`` is left out unless the option holds.
"""

LOGITS = '''
@gluon.jit
def logits(s, start, first_row, b, h, BY_BOTH, CONTEXT, EDGE: gl.constexpr):
    """Logits of a block from its products, up to their constant factor; HIDDEN where an EDGE block hides them.

    A thread's columns are 8n + c + 2·(lane % 4): ``near`` differs between threads, ``far`` between the registers of
    one, so that a comparison with ``near`` on the queries' side takes one instruction with a literal.
    """
    rows = first_row + gl.arange(0, 64, layout=gl.SliceLayout(1, SCORES))
    columns = gl.expand_dims(gl.arange(0, BLOCK_J, layout=gl.SliceLayout(0, SCORES)), 0)
    start = gl.multiple_of(start, BLOCK_J)
    near = start + (columns & 6)
    far = columns & ~6
    # <positions>
    # <score>
    if EDGE:
        # <mask>
    return s
'''

STEP = '''
@gluon.jit
def step(
    QUERY_OPERAND, key_tiles, value_tiles, key_ready, value_ready, weights, accumulator, peak, total,
    stage, phase, next_stage, next_phase, more, start, first_row, b, h, SCALES, BY_ROW, CONTEXT AND_SCORES,
    GROUP: gl.constexpr, EDGE: gl.constexpr,
):
    """One key block: its products with the queries, then its weights while the block before meets its values.

    ``stage`` holds the values of the block before, ``more`` says whether another block
    follows. AHEAD
    """
    # <block_scales>
    # <own_elements>
    # The query's place is made anew in each step. Made once, ptxas 12.8 takes it  # if placed
    # in one loop from the loop before, even where that one did not run.  # if placed
    query_tile = query_tiles.index(query_slot + (start >> 31)).reshape([64, CHANNELS])  # if placed
    weights = OPERAND(weights)
    if EDGE:  # if digits
        hidden = hidden_digits(start, first_row, b, h, CONTEXT)  # if digits
    mbarrier.wait(key_ready.index(next_stage), next_phase)  # if early
    meet(TURN + GROUP, 256)  # if turns
    signal(KEY_FREE + next_stage, GROUPS * 128 + 32)  # if ahead
    later_stage, later_phase = following(next_stage, next_phase)  # if ahead
    mbarrier.wait(value_ready.index(stage), phase)  # if ahead
    products = gl.zeros([64, BLOCK_J], gl.float32, SCORES)  # if digits
    if EDGE:  # if digits
        products = warpgroup_mma(  # if digits
            hidden, digit_tile.permute((1, 0)), products, use_acc=False, is_async=True  # if digits
        )  # if digits
    products = warpgroup_mma(
        query_tile,
        key_tiles.index(next_stage).reshape([BLOCK_J, CHANNELS]).permute((1, 0)),  # if behind
        key_tiles.index(later_stage).reshape([BLOCK_J, CHANNELS]).permute((1, 0)),  # if ahead
        gl.zeros([64, BLOCK_J], PRODUCTS, SCORES),  # if no digits
        use_acc=False,  # if no digits
        products,  # if digits
        use_acc=EDGE,  # if digits
        is_async=True,
    )
    mbarrier.wait(value_ready.index(stage), phase)  # if behind
    values = value_tiles.index(stage).reshape([BLOCK_J, FEATURES])  # if wide values
    values = value_tiles.index(stage).reshape([FEATURES, BLOCK_J]).permute((1, 0))  # if narrow values
    sums = warpgroup_mma(weights, values, accumulator, is_async=True)
    signal(TURN + (GROUP + 1) % GROUPS, 256)  # if turns
    # <columns>
    if EDGE:  # if digits
        s, sums, hidden = warpgroup_mma_wait(1, deps=[products, sums, hidden])  # if digits
    else:  # if digits
        s, sums = warpgroup_mma_wait(1, deps=[products, sums])  # if digits
    s, sums = warpgroup_mma_wait(1, deps=[products, sums])  # if no digits behind
    signal(KEY_FREE + next_stage, GROUPS * 128 + 32)  # if behind
    # <columns_late>
    # <scaled>
    s = logits(s, start, first_row, b, h, BY_BOTH, CONTEXT, EDGE)
    # <highest>
    new_peak = gl.maximum(peak, highest)  # if softmax
    factor = gl.exp2(peak - new_peak)  # if softmax
    # <exponentials>
    change = gl.convert_layout(factor, gl.SliceLayout(1, total.type.layout), assert_trivial=True)  # if softmax
    total = total * gl.expand_dims(change, 1) + own_sums(p)  # if summed wide values
    total = total * gl.expand_dims(change, 1) + own_sums(p) * value_inverse  # if narrow values
    total = settled(total)  # if settled
    last_stage, last_phase = following(later_stage, later_phase)  # if ahead
    mbarrier.wait(key_ready.index(last_stage), last_phase, pred=more)  # if ahead
    later_stage, later_phase = following(next_stage, next_phase)  # if behind
    # This wait also keeps the next one from being scheduled before the exponentials.  # if late
    mbarrier.wait(key_ready.index(later_stage), later_phase, pred=more)  # if late
    accumulator, weights = warpgroup_mma_wait(0, deps=[sums, weights])  # if wide values
    accumulator = warpgroup_mma_wait(0, deps=[sums])  # if narrow values behind
    accumulator, s = warpgroup_mma_wait(0, deps=[sums, products])  # if ahead
    kept(weights)  # if narrow values
    signal(VALUE_FREE + stage, GROUPS * 128 + 32)
    accumulator = rescaled(accumulator, factor)  # if softmax
    weights = CARRIED(p)
    return weights, accumulator, new_peak, total, next_stage, next_phase, later_stage, later_phase AND_SCORES
'''

CONSUMER = '''
@gluon.jit
def consumer(
    query_tiles, key_tiles, value_tiles, out_tiles, out, query_ready, query_free, key_ready, value_ready,
    LAUNCHED, WORK, CONTEXT, GROUP: gl.constexpr,
):
    """A warpgroup: 64 queries of each tile on the work list."""
    if GROUP == GROUPS - 1:  # if turns
        signal(TURN, 256)  # if turns
    stage = 0
    phase = 0
    buffer = 0
    buffer_phase = 0
    tile = gl.load(work)  # if limits
    next_tile = gl.load(work + 1)  # if limits
    tile = listed_tile(gl.program_id(0), tile_count, CONTEXT)  # if listed
    next_tile = listed_tile(gl.program_id(0) + gl.num_programs(0), tile_count, CONTEXT)  # if listed
    position = 2
    COUNTED = counted(tile, CONTEXT)  # if listed
    next_factor = query_factors(query_scale, tile, HEADS, QUERIES, GROUP, QUERY_BLOCK)  # if narrow
    row_first, b, h = unpacked(tile)  # if known early
    # <first_elements>
    mbarrier.wait(query_ready.index(GROUP), 0)
    mbarrier.wait(key_ready.index(0), 0)
    hidden = hidden_digits(first_block(COUNTED), row_first + 64 * GROUP, b, h, CONTEXT)  # if digits
    first_products = gl.zeros([64, BLOCK_J], gl.float32, SCORES)  # if digits
    first_products = warpgroup_mma(  # if digits
        hidden, digit_tile.permute((1, 0)), first_products, use_acc=False, is_async=True  # if digits
    )  # if digits
    first_products = warpgroup_mma(
        query_tiles.index(GROUP).reshape([64, CHANNELS]),
        key_tiles.index(0).reshape([BLOCK_J, CHANNELS]).permute((1, 0)),
        gl.zeros([64, BLOCK_J], PRODUCTS, SCORES),  # if no digits
        use_acc=False,  # if no digits
        first_products,  # if digits
        is_async=True,
    )
    s = warpgroup_mma_wait(0, deps=[first_products])  # if no digits
    s, hidden = warpgroup_mma_wait(0, deps=[first_products, hidden])  # if digits
    while tile >= 0:
        later_tile = gl.load(work + position)  # if limits
        # The producer wrote it before it said that this tile's queries are coming.  # if listed
        later_tile = gl.load(work + position % RECENT)  # if listed
        row_first, b, h = unpacked(tile)
        first_row = row_first + 64 * GROUP
        blocks, KNOWN = key_blocks(TILE, CONTEXT)
        # What the next tile visits is known when it begins.  # if listed
        COUNTED = counted(next_tile, CONTEXT)  # if listed
        query_slot = buffer * GROUPS + GROUP  # if placed
        query_tile = query_tiles.index(buffer * GROUPS + GROUP).reshape([64, CHANNELS]).load(OWN_ROWS)  # if loaded
        signal(KEY_FREE + stage, GROUPS * 128 + 32)
        start = block_start(0, KNOWN)  # if narrow limits
        start = first_start  # if narrow listed
        next_stage, next_phase = following(stage, phase)  # if ahead
        mbarrier.wait(key_ready.index(next_stage), next_phase, pred=blocks > 1)  # if ahead
        products = warpgroup_mma(  # if ahead
            query_tiles.index(buffer * GROUPS + GROUP).reshape([64, CHANNELS]),  # if ahead
            key_tiles.index(next_stage).reshape([BLOCK_J, CHANNELS]).permute((1, 0)),  # if ahead
            gl.zeros([64, BLOCK_J], PRODUCTS, SCORES),  # if ahead
            use_acc=False,  # if ahead
            is_async=True,  # if ahead
        )  # if ahead
        # <tile_scales>
        # <own_elements>
        # <columns>
        s = logits(s, block_start(0, KNOWN), first_row, b, h, BY_BOTH, CONTEXT, True)  # if wide limits
        if edges > 0:  # if listed selected
            s = logits(s, first_start, first_row, b, h, BY_BOTH, CONTEXT, True)  # if listed selected
        else:  # if listed selected
            s = logits(s, first_start, first_row, b, h, BY_BOTH, CONTEXT, False)  # if listed selected
        s = logits(s, start, first_row, b, h, BY_BOTH, CONTEXT, True)  # if narrow
        # <first_highest>
        # <first_exponentials>
        total = own_sums(p)  # if summed wide values
        total = own_sums(p) * value_inverse  # if narrow values
        weights = CARRIED(p)
        accumulator = gl.zeros([64, FEATURES], gl.float32, OUTPUT)
        # The results of the tile before have left the place of its queries.  # if digits
        tma.store_wait(0)  # if digits
        mbarrier.arrive(query_free.index((buffer ^ 1) * GROUPS + GROUP), count=1, pred=position > 2)  # if digits
        later_stage, later_phase = following(next_stage, next_phase)  # if ahead
        mbarrier.wait(key_ready.index(later_stage), later_phase, pred=blocks > 2)  # if ahead
        s = warpgroup_mma_wait(0, deps=[products])  # if ahead
        next_stage, next_phase = following(stage, phase)  # if behind
        mbarrier.wait(key_ready.index(next_stage), next_phase, pred=blocks > 1)  # if late
        # Where a block begins is asked for a step before.  # if listed
        start = block_start(1, KNOWN)  # if listed
        for number in range(1, edges):
            later_start = block_start(number + 1, KNOWN)  # if listed
            weights, accumulator, peak, total, stage, phase, next_stage, next_phase AND_SCORES = step(
                QUERY_OPERAND, key_tiles, value_tiles, key_ready, value_ready, weights, accumulator, peak, total,
                stage, phase, next_stage, next_phase, number + FURTHER < blocks,
                EDGE_START, first_row, b, h, SCALES, BY_ROW, CONTEXT AND_SCORES, GROUP, True,
            )
            start = later_start  # if listed
        # <full>
        mbarrier.arrive(query_free.index(buffer * GROUPS + GROUP), count=1)  # if no digits
        # The last values of this tile, and the first keys of the next; after the last tile that product is not used.
        mbarrier.wait(value_ready.index(stage), phase)
        buffer ^= 1  # if two buffers
        if buffer == 0:  # if two buffers
            buffer_phase ^= 1  # if two buffers
        buffer_phase ^= 1  # if one buffer
        last_stage = stage
        next_row, next_b, next_h = unpacked(gl.maximum(next_tile, 0))  # if known early
        hidden = hidden_digits(first_block(COUNTED), next_row + 64 * GROUP, next_b, next_h, CONTEXT)  # if digits
        weights = OPERAND(weights)
        meet(TURN + GROUP, 256)  # if turns
        values = value_tiles.index(last_stage).reshape([BLOCK_J, FEATURES])  # if wide values
        values = value_tiles.index(last_stage).reshape([FEATURES, BLOCK_J]).permute((1, 0))  # if narrow values
        sums = warpgroup_mma(weights, values, accumulator, is_async=True)
        stage, phase = following(stage, phase)
        mbarrier.wait(query_ready.index(buffer * GROUPS + GROUP), buffer_phase, pred=next_tile >= 0)
        mbarrier.wait(key_ready.index(stage), phase, pred=next_tile >= 0)
        next_products = gl.zeros([64, BLOCK_J], gl.float32, SCORES)  # if digits
        next_products = warpgroup_mma(  # if digits
            hidden, digit_tile.permute((1, 0)), next_products, use_acc=False, is_async=True  # if digits
        )  # if digits
        next_products = warpgroup_mma(
            query_tiles.index(buffer * GROUPS + GROUP).reshape([64, CHANNELS]),
            key_tiles.index(stage).reshape([BLOCK_J, CHANNELS]).permute((1, 0)),
            gl.zeros([64, BLOCK_J], PRODUCTS, SCORES),  # if no digits
            use_acc=False,  # if no digits
            next_products,  # if digits
            is_async=True,
        )
        signal(TURN + (GROUP + 1) % GROUPS, 256)  # if turns
        next_factor = query_factors(query_scale, next_tile, HEADS, QUERIES, GROUP, QUERY_BLOCK)  # if narrow
        # <next_elements>
        accumulator, next_s, weights = warpgroup_mma_wait(1, deps=[sums, next_products, weights])  # if wide values
        accumulator, next_s = warpgroup_mma_wait(1, deps=[sums, next_products])  # if narrow values
        kept(weights)  # if narrow values
        signal(VALUE_FREE + last_stage, GROUPS * 128 + 32)
        total = gl.convert_layout(gl.sum(total, axis=1), gl.SliceLayout(1, SCORES), assert_trivial=True)  # if softmax
        rows = first_row + gl.arange(0, 64, layout=gl.SliceLayout(1, SCORES))  # if softmax
        # <sink>
        # <lse>
        factor = gl.convert_layout(factor, gl.SliceLayout(1, OUTPUT), assert_trivial=True)  # if softmax
        accumulator = accumulator * gl.expand_dims(factor, 1)  # if softmax
        tma.store_wait(0)  # if staged apart
        out_tiles.index(GROUP).reshape([64, FEATURES]).store(accumulator.to(OUT_DTYPE))  # if staged apart
        query_tiles.index(query_slot).reshape([64, FEATURES]).store(accumulator.to(OUT_DTYPE))  # if digits
        fence_async_shared()  # if staged
        copy_out(out, QUERY_PLACE(b, h, first_row), out_tiles.index(GROUP))  # if staged apart
        copy_out(out, QUERY_PLACE(b, h, first_row), query_tiles.index(query_slot))  # if digits
        # <stored>
        s = warpgroup_mma_wait(0, deps=[next_s])  # if no digits
        s, hidden = warpgroup_mma_wait(0, deps=[next_s, hidden])  # if digits
        tile = next_tile
        next_tile = later_tile
        position += 1
    tma.store_wait(0)  # if staged
    if GROUP == 0:  # if turns
        meet(TURN, 256)  # if turns
'''

FULL = """
for number in range(gl.maximum(edges, 1), blocks):
    later_start = block_start(number + 1, KNOWN)  # if listed
    weights, accumulator, peak, total, stage, phase, next_stage, next_phase AND_SCORES = step(
        QUERY_OPERAND, key_tiles, value_tiles, key_ready, value_ready, weights, accumulator, peak, total,
        stage, phase, next_stage, next_phase, number + FURTHER < blocks,
        FULL_START, first_row, b, h, SCALES, BY_ROW, CONTEXT AND_SCORES, GROUP, False,
    )
    start = later_start  # if listed
"""

PAIRS = """
# Two blocks at a time: scores of one and products of the next change places without a move.
rest = gl.maximum(edges, 1)
for pair in range((blocks - rest) // 2):
    number = rest + 2 * pair
    later_start = block_start(number + 1, KNOWN)  # if listed
    weights, accumulator, peak, total, stage, phase, next_stage, next_phase AND_SCORES = step(
        QUERY_OPERAND, key_tiles, value_tiles, key_ready, value_ready, weights, accumulator, peak, total,
        stage, phase, next_stage, next_phase, number + FURTHER < blocks,
        FULL_START, first_row, b, h, SCALES, BY_ROW, CONTEXT AND_SCORES, GROUP, False,
    )
    start = later_start  # if listed
    number += 1
    later_start = block_start(number + 1, KNOWN)  # if listed
    weights, accumulator, peak, total, stage, phase, next_stage, next_phase AND_SCORES = step(
        QUERY_OPERAND, key_tiles, value_tiles, key_ready, value_ready, weights, accumulator, peak, total,
        stage, phase, next_stage, next_phase, number + FURTHER < blocks,
        FULL_START, first_row, b, h, SCALES, BY_ROW, CONTEXT AND_SCORES, GROUP, False,
    )
    start = later_start  # if listed
if (blocks - rest) % 2 == 1:
    number = blocks - 1
    later_start = block_start(number + 1, KNOWN)  # if listed
    weights, accumulator, peak, total, stage, phase, next_stage, next_phase AND_SCORES = step(
        QUERY_OPERAND, key_tiles, value_tiles, key_ready, value_ready, weights, accumulator, peak, total,
        stage, phase, next_stage, next_phase, number + FURTHER < blocks,
        FULL_START, first_row, b, h, SCALES, BY_ROW, CONTEXT AND_SCORES, GROUP, False,
    )
    start = later_start  # if listed
"""

STORED = """
own_rows = first_row + gl.arange(0, 64, layout=gl.SliceLayout(1, OUTPUT))
features = gl.arange(0, FEATURES, layout=gl.SliceLayout(0, OUTPUT))
# Offsets of batch row and head may pass 2^31.
out_offsets = gl.expand_dims(own_rows.to(gl.int64) * out_stride_i, 1) + gl.expand_dims(features, 0)
out_offsets += b.to(gl.int64) * out_stride_b + h.to(gl.int64) * out_stride_h
real = gl.expand_dims(own_rows < QUERIES, 1) & gl.expand_dims(features < EXTENT, 0)
gl.store(out + out_offsets, accumulator.to(OUT_DTYPE), mask=real)
"""

PRODUCER = '''
@gluon.jit
def producer(
    query, key, value, query_tiles, key_tiles, value_tiles, query_ready, query_free, key_ready, value_ready, WORK,
    CONTEXT,
):
    """One warp: copies the tiles that the warpgroups multiply, as far ahead as there is room."""
    stage = 0
    phase = 0
    buffer = 0
    buffer_phase = 1
    filled = 0
    last_b = 0  # if two buffers
    last_g = 0  # if two buffers
    last_start = 0  # if two buffers
    last_stage = 0  # if two buffers
    tile = gl.load(work)  # if limits
    tile = listed_tile(gl.program_id(0), tile_count, CONTEXT)  # if listed
    next_tile = listed_tile(gl.program_id(0) + gl.num_programs(0), tile_count, CONTEXT)  # if listed
    COUNTED = counted(tile, CONTEXT)  # if listed
    position = 1
    while tile >= 0:
        next_tile = gl.load(work + position)  # if limits
        later_tile = claimed_tile(work, tile_count, CONTEXT)  # if listed
        gl.store(work + (position + 1) % RECENT, later_tile)  # if listed
        row_first, b, h = unpacked(tile)
        g = KV_HEAD
        blocks, KNOWN = key_blocks(TILE, CONTEXT)
        for group in gl.static_range(GROUPS):
            slot = buffer * GROUPS + group
            mbarrier.wait(query_free.index(slot), buffer_phase)
            mbarrier.expect(query_ready.index(slot), query.block_type.nbytes)
            place = QUERY_PLACE(b, h, row_first + 64 * group)
            copy_in(query, place, query_ready.index(slot), query_tiles.index(slot))
        start = block_start(0, KNOWN)  # if limits
        start = first_start  # if listed
        fill(key, KEY_PLACE(b, g, start), key_ready, key_tiles, stage, KEY_FREE, filled)
        if filled > 0:  # if two buffers
            # The last values of the tile before come after the first keys of this one.  # if two buffers
            at = VALUE_PLACE(last_b, last_g, last_start)  # if two buffers
            fill(value, at, value_ready, value_tiles, last_stage, VALUE_FREE, filled - 1)  # if two buffers
        COUNTED = counted(next_tile, CONTEXT)  # if listed
        for number in range(1, blocks):
            next_start = block_start(number, KNOWN)
            next_stage, phase = following(stage, phase)
            fill(key, KEY_PLACE(b, g, next_start), key_ready, key_tiles, next_stage, KEY_FREE, filled + 1)
            fill(value, VALUE_PLACE(b, g, start), value_ready, value_tiles, stage, VALUE_FREE, filled)
            start = next_start
            stage = next_stage
            filled += 1
        fill(value, VALUE_PLACE(b, g, start), value_ready, value_tiles, stage, VALUE_FREE, filled)  # if one buffer
        last_b = b  # if two buffers
        last_g = g  # if two buffers
        last_start = start  # if two buffers
        last_stage = stage  # if two buffers
        stage, phase = following(stage, phase)
        filled += 1
        buffer ^= 1  # if two buffers
        if buffer == 0:  # if two buffers
            buffer_phase ^= 1  # if two buffers
        buffer_phase ^= 1  # if one buffer
        tile = next_tile
        next_tile = later_tile  # if listed
        position += 1
    if filled > 0:  # if two buffers
        at = VALUE_PLACE(last_b, last_g, last_start)  # if two buffers
        fill(value, at, value_ready, value_tiles, last_stage, VALUE_FREE, filled - 1)  # if two buffers
'''

KERNEL = '''
@gluon.jit(do_not_specialize=[UNSPECIALIZED])
def attend_forward(DESCRIPTORS, POINTERS, WORK_SIZE, STRIDES, SIZES):
    """One thread block for each row of the work list."""  # if limits
    """Each thread block takes tiles as long as there are any."""  # if listed
    query_tiles = gl.allocate_shared_memory(query.dtype, [BUFFERS * GROUPS, QUERY_BOX, CHANNELS], query.layout)
    key_tiles = gl.allocate_shared_memory(key.dtype, [STAGES, KEY_BOX, CHANNELS], key.layout)
    value_tiles = gl.allocate_shared_memory(value.dtype, [STAGES, VALUE_BOX], value.layout)
    out_tiles = gl.allocate_shared_memory(out.dtype, [GROUPS, QUERY_BOX, FEATURES], out.layout)  # if staged apart
    digit_rows: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_J, DIGITS], gl.bfloat16)  # if digits
    digit_tile = gl.allocate_shared_memory(gl.bfloat16, [BLOCK_J, DIGITS], digit_rows, digits_of_keys())  # if digits
    query_ready = gl.allocate_shared_memory(gl.int64, [BUFFERS * GROUPS, 1], mbarrier.MBarrierLayout())
    query_free = gl.allocate_shared_memory(gl.int64, [BUFFERS * GROUPS, 1], mbarrier.MBarrierLayout())
    key_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    value_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(BUFFERS * GROUPS):
        mbarrier.init(query_ready.index(slot), count=1)
        mbarrier.init(query_free.index(slot), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(key_ready.index(stage), count=1)
        mbarrier.init(value_ready.index(stage), count=1)
    fence_async_shared()
    work += gl.program_id(0) * work_width  # if limits
    # The first row counts the tiles that are taken, each other is what a thread block took last.  # if listed
    work += (gl.program_id(0) + 1) * RECENT  # if listed
    gl.warp_specialize(
        [
            # <consumers>
            # <producer>
        ],
        WARPS,
        REGISTERS,
    )
'''
