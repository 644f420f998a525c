"""Rows for kernels alone: odd head sizes, many blocks, ranges that join and part, rare operators."""

from __future__ import annotations

import textwrap

from tests.cases import CASES, Case

SOFTMAX = "norm   softmax (float32)"


def _row(
    name: str,
    text: str,
    sizes: dict[str, int],
    note: str = "",
    *,
    empty_rows: bool = False,
    **ranges: tuple[int, int],
) -> Case:
    head, _, rest = textwrap.dedent(text).strip().partition("\n")
    return Case(name, f"{name}   {head}\n" + textwrap.indent(rest, "  "), sizes, note, ranges, empty_rows)


def _rounded(
    name: str, text: str, sizes: dict[str, int], note: str, *, given: str = "", lse: bool = False
) -> Case:
    """A row whose weights and values meet in e4m3."""
    lines = [
        textwrap.dedent(text).strip(),
        f"{SOFTMAX}, weights float8_e4m3",
        *(["lse    lse"] if lse else []),
        *([f"given  {given}"] if given else []),
        *(["gives  out, lse"] if lse else []),
    ]
    return _row(name, "\n".join(lines), sizes, note)


def _rotated(
    name: str,
    note: str,
    *,
    channels: int,
    rotated: int,
    convention: str = "half",
    dtype: str = "int8",
    blocks: tuple[int, int] = (32, 48),
    smooth: bool = True,
    query: tuple[str, str] = ("cos[b, i, d]", "sin[b, i, d]"),
    key: tuple[str, str] | None = None,
    given: tuple[str, ...] = ("cos[B,I,{0}]:float32", "sin[B,I,{0}]:float32"),
    keys: str = "I",
) -> Case:
    """A row whose queries and keys are rotated, then rounded; without ``key`` keys as queries."""
    lines: list[str] = []
    for tensor, heads, length, (cos, sin) in (("q", 4, "I", query), ("k", 2, keys, key or query)):
        lines += [f"position  {tensor}[B,{heads},{length},{channels}]  float32", f"cos    {cos}", f"sin    {sin}"]
        lines += [f"channels {rotated}", f"convention {convention}", f"out    {tensor}_rotated"]
    for tensor, block in zip("qk", blocks, strict=True):
        lines += [f"quantize  {tensor}_rotated", f"dtype  {dtype}", f"block  {block}"]
        lines += [f"smooth {str(smooth and tensor == 'k').lower()}", f"out    {tensor}_codes"]
    lines += [f"attend  q_codes  k_codes  v[B,2,{keys},40]  float32", "score  0.1·s", "mask   j ≤ i + 40"]
    lines += ["kv_head h // 2", SOFTMAX, *(f"given  {each.format(rotated)}" for each in given)]
    sizes = {"B": 2, "I": 70} | ({"J": 110} if keys == "J" else {})
    return _row(name, "\n".join(lines), sizes, note)


def _masked(name: str, mask: str, sizes: dict[str, int], note: str = "", *, empty_rows: bool = False) -> Case:
    return _row(
        name,
        f"attend  q[B,2,I,16]  k,v[B,2,J,16]  float32\nscore  0.25·s\nmask   {mask}\n{SOFTMAX}",
        sizes,
        note,
        empty_rows=empty_rows,
    )


def _channels(query: int, value: int) -> Case:
    return _row(
        f"channels-{query}-{value}",
        f"""
        attend  q[B,3,I,{query}]  k[B,3,J,{query}]  v[B,3,J,{value}]  float32
        score  0.11·s
        mask   j ≤ i + 3
        {SOFTMAX}
        """,
        {"B": 1, "I": 37, "J": 45},
    )


def _groups(query: int, key: int, rows: int) -> Case:
    return _row(
        f"groups-of-{query // key}",
        f"""
        attend  q[B,{query},I,24]  k,v[B,{key},J,24]  float32
        score  0.2·s
        mask   j ≤ i + J − I
        kv_head h // {query // key}
        {SOFTMAX}
        """,
        {"B": 2, "I": rows, "J": rows + 2},
        "groups that are no power of two, and tiles that hardly anything fills",
    )


COMPUTED = ("cos(float(i)·exp2(−0.3·float(d % 12)))", "sin(float(i)·exp2(−0.3·float(d % 12)))")
"""Angles that are computed from positions."""

ROTATED: tuple[Case, ...] = (
    _rotated("rotated", "a table for each row of the batch, heads that are no power of two", channels=72, rotated=72),
    _rotated(
        "rotated-interleaved",
        "pairs of neighbours, some channels pass through",
        channels=40,
        rotated=24,
        convention="interleaved",
        dtype="float8_e4m3",
    ),
    _rotated(
        "rotated-two-maps",
        "queries and keys of different lengths, tables for the whole batch, indexed behind an offset",
        channels=32,
        rotated=20,
        query=("cos_q[0, i + J − I, d % 10]", "sin_q[0, i + J − I, d % 10]"),
        key=("cos_q[0, i, d % 10]", "1.0·sin_k[i, d]"),
        given=("cos_q[1,J,10]:float32", "sin_q[1,J,10]:float32", "sin_k[J,20]:float32"),
        keys="J",
    ),
    _rotated(
        "rotated-computed",
        "angles from positions, few queries a scale",
        channels=24,
        rotated=24,
        query=COMPUTED,
        given=(),
        blocks=(5, 200),
        dtype="float8_e4m3",
    ),
    _rotated(
        "rotated-constant",
        "an angle of zero",
        channels=16,
        rotated=2,
        query=("1.0", "0.0"),
        key=COMPUTED,
        given=(),
        smooth=False,
    ),
)
"""Queries and keys behind rotary maps, rounded."""

LONG = {"B": 1, "I": 150, "J": 150}
RECTANGLE = {"B": 1, "I": 50, "J": 170}

TERMS = (
    "0.25·s",
    "round(0.3·(i − j))",
    "floor(0.7·h)",
    "ceil(0.3·j)",
    "float(abs(i − j))",
    "sqrt(j + 1)",
    "rsqrt(i + 1)",
    "sin(i)",
    "cos(j)",
    "erf(0.1·s)",
    "log(j + 1)",
    "log2(j + 2)",
    "exp(−j)",
    "sigmoid(s)",
    "2.0^(−j)",
    "float(int(0.4·j))",
    "max(0.1·s, 0.0)",
    "where(not (i = j or j ≠ 3), 1.0, 0.5)",
)

KERNEL_CASES: tuple[Case, ...] = (
    *(
        _channels(query, value)
        for query, value in (
            *((72, 40), (80, 80), (96, 96), (112, 64), (160, 160), (192, 128), (256, 256)),
            *((24, 1), (3, 7)),
        )
    ),
    *(_groups(query, key, rows) for query, key, rows in ((5, 1, 11), (14, 2, 15), (9, 3, 17))),
    _masked("five-keys", "true", {"B": 2, "I": 3, "J": 5}),
    _masked("one-query", "j ≤ i + J − I", {"B": 2, "I": 1, "J": 77}, "decode"),
    _masked("one-key", "true", {"B": 1, "I": 40, "J": 1}),
    _masked("window-rectangle", "j ≤ i + J − I and j > i + J − I − 40", RECTANGLE),
    _masked(
        "window-ahead",
        "j ≥ i + 20 and j < i + 60",
        {"B": 1, "I": 70, "J": 100},
        "late rows are empty",
        empty_rows=True,
    ),
    _masked("late-start", "j ≤ i − 5", LONG, "early rows are empty", empty_rows=True),
    _masked("sink-window-rectangle", "j ≤ i + 90 and (j > i + 60 or j < 20)", RECTANGLE),
    _masked("sinks-touch-window", "j ≤ i and (j > i − 64 or j < 33)", LONG, "ranges that part as rows go on"),
    _masked("late-range", "j > 120 or j ≤ i", LONG, "the fixed range lies behind the moving one"),
    _masked("two-windows", "j ≤ i and (j > i − 20 or j ≤ i − 90)", LONG, "both ranges move"),
    _masked(
        "three-ranges",
        "j ≤ i and (j < 4 or j > i − 20 or j % 32 = 0)",
        LONG,
        "no closed form: a test per block",
    ),
    _masked(
        "neighbourhood", "i // 8 ≤ j // 8 + 1 and j // 8 ≤ i // 8 + 1", LONG, "blocks of an image's rows"
    ),
    _masked("blockwise", "i // 32 = j // 32", LONG, "block diagonal"),
    _masked("dilated-window", "j ≤ i and j > i − 60 and (i − j) % 7 = 0", LONG),
    _masked("head-window", "j ≤ i and j > i − 16·(h + 1)", LONG, "a window for each head"),
    _row(
        "bias-heads",
        """
        attend  q[B,4,I,16]  k,v[B,4,J,16]  float32
        score  0.25·s + bias[0, h, i, j]
        mask   true
        norm   softmax (float32)
        given  bias[1,4,I,J]:float32
        """,
        {"B": 2, "I": 21, "J": 35},
    ),
    _row(
        "grouped-everything",
        """
        attend  q[B,6,I,16]  k,v[B,2,J,16]  float32
        score  20.0·tanh(0.0125·s)
        mask   j ≤ i + J − I and j > i + J − I − 60 and attention_mask[b, j] ≠ 0
        kv_head h // 3
        norm   softmax (float32), empty rows zero
        lse    lse
        given  attention_mask[B,J]:int64
        gives  out, lse
        """,
        {"B": 2, "I": 33, "J": 150},
    ),
    _row(
        "far-loads",
        """
        attend  q[B,2,I,16]  k,v[B,2,J,16]  float32
        score  0.25·s + bias[b, i + 5, j − 3]
        mask   true
        norm   softmax (float32)
        given  bias[B,I,J]:float32
        """,
        {"B": 2, "I": 21, "J": 35},
        "indices past both ends are clamped",
    ),
    _row(
        "negative-floor",
        """
        attend  q,k,v[B,2,I,16]  float32
        score  0.25·s + table[(j − i) // 4 % 5] + 0.1·float((j − i) // 4)
        mask   true
        norm   softmax (float32)
        given  table[5]:float32
        """,
        {"B": 1, "I": 29},
        "integer division rounds down",
    ),
    _row(
        "relative",
        """
        attend  q[B,4,I,16]  k,v[B,2,I,16]  float32
        score  0.25·s + table[h, max(0, min(i − j, 70))]
        mask   j ≤ i and j > i − 260
        kv_head h // 2
        norm   softmax (float32)
        given  table[4,71]:float32
        """,
        {"B": 2, "I": 330},
        "a relative bias that is one number from a distance on",
    ),
    _row(
        "relative-both-ways",
        """
        attend  q,k,v[B,2,I,16]  float32
        score  0.25·s + table[min(max(j − i, −20), 20) + 20, h]
        mask   true
        norm   softmax (float32)
        given  table[41,2]:float32
        """,
        {"B": 1, "I": 275},
        "one number behind, and loads for each pair before",
    ),
    _row(
        "operators",
        f"attend  q,k,v[B,2,I,16]  float32\nscore  {' + '.join(TERMS)}\nmask   true\n{SOFTMAX}",
        {"B": 1, "I": 19},
        "every operator",
    ),
    _row(
        "score-free",
        """
        attend  q,k,v[B,2,I,16]  float32
        score  −0.1·float(abs(i − j))
        mask   j ≤ i
        norm   softmax (float32)
        """,
        {"B": 1, "I": 40},
        "weights from positions alone",
    ),
    _row(
        "negative-scale",
        """
        attend  q,k,v[B,2,I,16]  float32
        score  −0.25·s
        mask   j ≤ i
        norm   softmax (float32)
        """,
        {"B": 1, "I": 40},
    ),
    _row(
        "fill-counts",
        """
        attend  q,k,v[B,2,I,16]  float32
        score  0.25·s
        mask   j ≤ i
        fill   −1.0
        norm   softmax (float32)
        """,
        {"B": 1, "I": 40},
        "a masked key still has weight",
    ),
    _row(
        "sigmoid-padding",
        """
        attend  q[B,2,I,16]  k,v[B,2,J,16]  float32
        score  0.25·s − 1.0
        mask   visible[b, j]
        norm   sigmoid (float32)
        given  visible[B,J]:bool
        """,
        {"B": 2, "I": 21, "J": 35},
    ),
    _row(
        "heads-pruned",
        """
        attend  q,k,v[B,4,I,16]  float32
        score  0.25·s
        mask   j ≤ i
        weight where(h < 2, w, 0.5·w)
        norm   softmax (float32)
        """,
        {"B": 1, "I": 40},
    ),
    _row(
        "lengths",
        """
        attend  q[B,2,I,16]  k,v[B,2,J,16]  float32
        score  0.25·s
        mask   j < lengths[b]
        norm   softmax (float32), empty rows zero
        given  lengths[B]:int32
        """,
        {"B": 4, "I": 21, "J": 75},
        "keys per batch row",
        lengths=(1, 76),
    ),
    _row(
        "awkward-names",
        """
        attend  value,out.0[B,2,I,16]  tl[B,2,I,16]  float32
        score  0.25·s + lambda[b, j]
        mask   j ≤ i
        norm   softmax (float32)
        given  lambda[B,I]:float32
        """,
        {"B": 2, "I": 20},
        "names that Python and the kernel have other uses for",
    ),
    _row(
        "int8-grouped",
        """
        quantize  q[B,4,I,72]  float32
        block  32
        out    q8
        quantize  k[B,2,J,72]  float32
        block  48
        smooth true
        out    k8
        attend  q8  k8  v[B,2,J,40]  float32
        score  0.1·s
        mask   j ≤ i + 40
        kv_head h // 2
        norm   softmax (float32)
        """,
        {"B": 1, "I": 70, "J": 110},
        "scale blocks that are no tiles",
    ),
    _rounded(
        "fp8",
        """
        quantize  q[B,2,I,32]  float32
        dtype  float8_e4m3
        block  32
        out    q8
        quantize  k[B,2,I,32]  float32
        dtype  float8_e4m3
        block  128
        smooth true
        out    k8
        quantize  v[B,2,I,32]  float32
        dtype  float8_e4m3
        block  128
        out    v8
        attend  q8  k8  v8
        score  0.18·s
        mask   j ≤ i
        """,
        {"B": 2, "I": 150},
        "as quantize.fp8 makes it",
    ),
    _rounded(
        "fp8-grouped",
        """
        quantize  q[B,4,I,72]  float32
        dtype  float8_e4m3
        block  1
        out    q8
        quantize  k[B,2,J,72]  float32
        dtype  float8_e4m3
        block  48
        smooth true
        out    k8
        quantize  v[B,2,J,40]  float32
        dtype  float8_e4m3
        block  40
        out    v8
        attend  q8  k8  v8
        score  0.1·s − 0.02·abs(float(i − j))
        mask   j ≤ i + 40 and attention_mask[b, j] ≠ 0
        kv_head h // 2
        """,
        {"B": 1, "I": 70, "J": 110},
        "scale blocks that are no tiles",
        given="attention_mask[B,J]:int64",
    ),
    _rounded(
        "int8-fp8-sinks",
        """
        quantize  q[B,2,I,24]  float32
        out    q8
        quantize  k[B,2,J,24]  float32
        out    k8
        quantize  v[B,2,J,16]  float32
        dtype  float8_e4m3
        block  32
        out    v8
        attend  q8  k8  v8
        score  30.0·tanh(0.007·s)
        mask   j ≤ i + J − I and j > i − 40
        sink   sinks[h]
        """,
        {"B": 1, "I": 50, "J": 90},
        "integer scores, values in e4m3, a sink and the log-sum-exp",
        given="sinks[2]:float32",
        lse=True,
    ),
    *ROTATED,
    _row(
        "scan-decays",
        """
        scan  q,k[B,2,I,72]  v[B,2,I,40]  float32
        decay  sigmoid(decays[h])
        scale  0.2
        feature relu
        given  decays[2]:float32
        """,
        {"B": 1, "I": 90},
    ),
)

ALL_CASES: tuple[Case, ...] = (*CASES, *KERNEL_CASES)
ALL_BY_NAME: dict[str, Case] = {case.name: case for case in ALL_CASES}

__all__ = ["ALL_BY_NAME", "ALL_CASES", "KERNEL_CASES"]
