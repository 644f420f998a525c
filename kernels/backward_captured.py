"""Skeletons of two more kernels of the backward pass: what goes before, and the gradient of an element per pair.

:func:`preparation` makes ``shift`` (the log-sum-exp in base 2) and ``delta`` of each query, and what belongs to the
sink. :func:`pair_kernel` computes the gradient of a tensor that is loaded by query and key, such as a bias: one program
for a tile of it, which goes over the batch rows and heads that share the tile.
"""

from __future__ import annotations

from attncompile.kernels.backward import CapturedGradient, DenseBackward, KernelText
from attncompile.kernels.dense import LOG2E
from attncompile.kernels.loops import deeper
from attncompile.kernels.source import signature


def preparation(skeleton: DenseBackward) -> KernelText:
    """For each query ``shift = lse · log2(e)`` and ``delta = Σ_e out · grad_out − grad_lse``.

    A query that saw no key has ``shift = +∞``, so that each of its weights is computed as 0, and ``delta = 0``. The
    gradient of a sink's logit is ``−exp(sink − lse) · delta``.
    """
    heads, queries = skeleton.lengths[:2]
    sinks = skeleton.along("rows", "sink")
    setup = [
        "program = tl.program_id(0)",
        f"blocks = tl.cdiv({queries}, BLOCK_I)",
        f"b = program // blocks // {heads}",
        f"h = program // blocks % {heads}",
        "rows = program % blocks * BLOCK_I + tl.arange(0, BLOCK_I)",
        *([f"i = tl.minimum(rows, {queries} - 1)[:, None]"] if sinks else []),
        f"features = tl.arange(0, {skeleton.padded(skeleton.features)})",
        *(
            [f"real_features = (features < {skeleton.features})[None, :]"]
            if skeleton.padded(skeleton.features) != skeleton.features
            else []
        ),
        *skeleton.base("out"),
        *skeleton.base("grad_out"),
        *skeleton.own_tile("out", "rows", queries, real=".to(tl.float32)"),
        *skeleton.own_tile("grad_out", "rows", queries, real=".to(tl.float32)"),
        f"where = tl.cast(program // blocks, tl.int64) * {queries} + rows",
        f"inside = rows < {queries}",
        "row_delta = tl.sum(out_tile * grad_tile, 1)",
        *(["row_delta -= tl.load(grad_lse + where, mask=inside, other=0.0)"] if skeleton.lse_gradient else []),
        f"row_shift = tl.load(lse + where, mask=inside, other=0.0) * {LOG2E!r}",
        'empty = row_shift == float("-inf")  # no visible key: no weight, whatever the logits',
        "row_delta = tl.where(empty, 0.0, row_delta)",
        'row_shift = tl.where(empty, float("inf"), row_shift)',
        "tl.store(shift + where, row_shift, mask=inside)",
        "tl.store(delta + where, row_delta, mask=inside)",
    ]
    if sinks and skeleton.sink:
        setup += [
            *signature("sink_logit = sink", skeleton.sink.parameters, "", inside=4).splitlines(),
            "sink_logit += tl.zeros([BLOCK_I, 1], tl.float32)",
            f"sink_weight = tl.exp2(sink_logit * {LOG2E!r} - row_shift[:, None])",
            "logit_gradient = -sink_weight * row_delta[:, None]",
        ]
    for each in sinks:
        setup += [
            *each.contribution(),
            f"{each.name}_sum = tl.reshape({each.name}_part, [BLOCK_I])",
            *skeleton.store_sums(each, "where", "inside", "I"),
        ]
    results = ("out", "grad_out", "lse", *(("grad_lse",) if skeleton.lse_gradient else ()), "shift", "delta")
    return skeleton.kernel(
        "prepare",
        results,
        sinks,
        "One program: the log-sum-exp in base 2 and delta of BLOCK_I queries of one head.",
        [setup],
        constants=("BLOCK_I",),
    )


def pair_kernel(
    skeleton: DenseBackward, gradient: CapturedGradient, test: str | None, lines: tuple[str, ...]
) -> KernelText:
    """The gradient of a tensor that is loaded by query and key.

    Args:
        skeleton: the attention.
        gradient: of which load.
        test: condition for a tile to hold anything visible, over ``row_first row_last key_first key_last b h``, or
            ``None``.
        lines: statements that it relies on.
    """
    heads, queries, keys, _, batch = skeleton.lengths
    kept = [axis for axis in "bh" if axis not in gradient.summed]
    extents = {"b": batch, "h": heads}
    lead = ["rest = program // key_blocks // row_blocks"] if kept else []
    if kept == ["b", "h"]:
        lead += [f"b = rest // {heads}", f"h = rest % {heads}"]
    elif kept:
        lead.append(f"{kept[0]} = rest")
    setup = [
        "program = tl.program_id(0)",
        f"key_blocks = tl.cdiv({keys}, BLOCK_J)",
        "row_blocks = tl.cdiv(row_stop - row_start, BLOCK_I)",
        *lead,
        "row_first = row_start + program // key_blocks % row_blocks * BLOCK_I",
        f"row_last = tl.minimum(row_first + BLOCK_I, {queries}) - 1",
        "rows = row_first + tl.arange(0, BLOCK_I)",
        f"i = tl.minimum(rows, {queries} - 1)[:, None]",
        "key_first = program % key_blocks * BLOCK_J",
        f"key_last = tl.minimum(key_first + BLOCK_J, {keys}) - 1",
        "keys = key_first + tl.arange(0, BLOCK_J)",
        f"j = tl.minimum(keys, {keys} - 1)[None, :]",
        *skeleton.columns(),
        f"{gradient.name}_sum = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)",
    ]
    compute = [
        f"g = {skeleton.kv_head}",
        *(
            line
            for name, positions, length in (
                ("query", "rows", queries),
                ("key", "keys", keys),
                ("value", "keys", keys),
                ("grad_out", "rows", queries),
            )
            for line in (
                *skeleton.base(name, f"{name}_head"),
                *skeleton.own_tile(name, positions, length, at=f"{name}_head"),
            )
        ),
        f"row_base = (tl.cast(b, tl.int64) * {heads} + h) * {queries}",
        *skeleton.row_values("row_base", f"rows < {queries}", "[:, None]"),
        's = tl.dot(query_tile, tl.trans(key_tile), input_precision="ieee")',
        *skeleton.weights(f"(keys < {keys})[None, :]"),
        'products = tl.dot(grad_tile, tl.trans(value_tile), input_precision="ieee")',
        skeleton.logit_gradient(),
        *gradient.contribution(),
        f"{gradient.name}_sum += {gradient.name}_part",
    ]
    if test:
        compute = [*lines, f"if {test}:", *deeper(compute)]
    for axis in reversed(gradient.summed):
        compute = [f"for {axis} in range(0, {extents[axis]}):", *deeper(compute)]
    if gradient.summed:
        sharing = " and ".join({"b": "batch rows", "h": "heads"}[axis] for axis in gradient.summed)
        compute = [f"# All {sharing} that share the tile.", *compute]
    return skeleton.kernel(
        f"{gradient.name}_gradient_of_pairs",
        skeleton.inputs(),
        (gradient,),
        "One program: the gradient of the elements that BLOCK_I queries and BLOCK_J keys load.",
        [setup, compute, _stored(gradient, queries, keys, kept)],
        integers=("row_start", "row_stop"),
        constants=("BLOCK_I", "BLOCK_J", *(("ATOMIC",) if gradient.scattered else ())),
    )


def _stored(gradient: CapturedGradient, queries: str, keys: str, kept: list[str]) -> list[str]:
    name = gradient.name
    total = gradient.stored(f"{name}_sum")
    inside = f"inside = (rows < {queries})[:, None] & (keys < {keys})[None, :]"
    if not gradient.scattered:
        return [
            inside,
            *gradient.place_call(f"{name}_gradient"),
            f"{name}_total = {total}",
            f"tl.store({name}_place, {name}_total.to({name}_gradient.dtype.element_ty), mask=inside)",
        ]
    row = "(rest * (row_stop - row_start) + rows - row_start)" if kept else "(rows - row_start)"
    return [
        inside,
        f"{name}_total = {total}",
        "if ATOMIC:",
        *deeper(gradient.place_call(f"{name}_gradient")),
        f"    tl.atomic_add({name}_place, {name}_total, mask=inside & ({name}_total != 0.0))",
        "else:",
        *deeper(gradient.place_call("tl.cast(0, tl.int64)")),
        f"    where = tl.cast({row}, tl.int64)[:, None] * {keys} + keys[None, :]",
        "    inside = inside & (rows < row_stop)[:, None]",
        f"    tl.store({name}_sums + where, {name}_total, mask=inside)",
        f"    tl.store({name}_places + where, {name}_place + tl.zeros([BLOCK_I, BLOCK_J], tl.int64), mask=inside)",
    ]


__all__ = ["pair_kernel", "preparation"]
