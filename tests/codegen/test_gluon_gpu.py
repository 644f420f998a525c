"""The Hopper kernel on a Hopper GPU, compared with the reference in float64 at awkward shapes."""

from __future__ import annotations

import pytest
import torch

from attncompile.codegen.gluon import generate, why_not_spec
from attncompile.codegen.triton import lower
from attncompile.codegen.triton.cache import load, load_module
from attncompile.codegen.triton.lower import on_hopper
from attncompile.ir import parse_spec
from attncompile.passes import parse_passes, run_passes
from attncompile.verify import derive_tolerance, require_within
from tests.cases import BY_NAME, Case
from tests.kernels.cases import ALL_CASES
from tests.kernels.comparison import aligned_inputs, compare, measured
from tests.kernels.narrow import ZeroCase

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not on_hopper(torch.device("cuda")), reason="the kernel needs compute capability 9.x"),
]

LOWERED = tuple(case for case in ALL_CASES if why_not_spec(case.spec) is None)

ALIBI = "0.125·s + exp2(−0.5·h − 0.5)·float(j − i)"
SHARED = "h // {0}"


def _row(
    name: str,
    channels: int,
    groups: int = 1,
    mask: str = "true",
    score: str = "0.125·s",
    features: int = 0,
    heads: int = 8,
    more: str = "",
    given: str = "",
    dtype: str = "bfloat16",
    norm: str = "softmax",
) -> Case:
    """A row of 8 query heads, ``groups`` of which share a key head; its sizes are filled in by the test."""
    lines = [
        f"{name}   attend  q[B,{heads},I,{channels}]  k[B,{heads // groups},J,{channels}]  "
        f"v[B,{heads // groups},J,{features or channels}]  {dtype}",
        f"score  {score}",
        f"mask   {mask}",
        *([f"kv_head h // {groups}"] if groups > 1 else []),
        *([more] if more.startswith("sink") else []),
        f"norm   {norm} (float32)",
        *(["lse    lse"] if norm == "softmax" else []),
        *([given] if given else []),
        *(["gives  out, lse"] if norm == "softmax" else []),
    ]
    return Case(name, "\n  ".join(lines), {})


ROWS = (
    _row("full-64", 64, 2),
    _row("causal-64", 64, 4, "j ≤ i"),
    _row("causal-128", 128, 8, "j ≤ i + J − I"),
    _row("full-128", 128),
    _row("window-128", 128, 2, "j ≤ i and j > i − 100"),
    _row("sink-window-64", 64, 1, "j ≤ i and (j > i − 70 or j < 4)"),
    _row("symmetric-80", 80, 2, "j ≤ i + 50 and j > i − 50"),
    _row("alibi-128", 128, 4, "j ≤ i", ALIBI),
    _row("distance-64", 64, 1, "true", "0.125·s − 0.03·abs(float(i − j))"),
    _row("relative-128", 128, 2, "j ≤ i", "0.09·s + table[h, max(0, min(i − j, 70))]",
         given="given  table[8,71]:float32"),
    _row("relative-window-64", 64, 1, "j ≤ i and j > i − 300", "0.125·s + table[max(−40, j − i) + 40]",
         given="given  table[41]:float32"),
    _row("softcap-128", 128, 2, "j ≤ i", "30.0·tanh(0.01·s)"),
    _row("bias-128", 128, 1, "j ≤ i", "0.09·s + bias[h, i, j]", given="given  bias[8,I,J]:float32"),
    _row("documents-64", 64, 2, "j ≤ i and document[b, j] = document[b, min(i, J − 1)]",
         given="given  document[B,J]:int64"),
    _row("blocks-128", 128, 2, "blocks[h, i // 128, j // 128]",
         given="given  blocks[8,(I+127)//128,(J+127)//128]:bool"),
    _row("blocks-causal-64", 64, 1, "j ≤ i and listed[b, i // 64, j // 128] ≠ 0",
         given="given  listed[B,(I+63)//64,(J+127)//128]:uint8"),
    _row("blocks-of-64-128", 128, 1, "blocks[h, i // 64, j // 64]",
         given="given  blocks[8,(I+63)//64,(J+63)//64]:bool"),
    _row("sinks-128", 128, 8, "j ≤ i and j > i − 160", more="sink   sinks[h]", given="given  sinks[8]:float32"),
    _row("late-128", 128, 1, "j ≤ i − 200"),
    _row("causal-256", 256, 2, "j ≤ i", "0.06·s"),
    _row("mla-192-128", 192, 1, "j ≤ i", "0.07·s", features=128),
    _row("narrow-16", 16, 2, "j ≤ i", "0.25·s", features=24),
    _row("half-96", 96, 2, "j ≤ i", dtype="float16"),
    _row("sigmoid-64", 64, 2, "j ≤ i", norm="sigmoid"),
    _row("sigmoid-128", 128, 4, score="0.125·s − 6.0", norm="sigmoid"),
    _row("sigmoid-documents-128", 128, 1, "j ≤ i and document[b, j] = document[b, min(i, J − 1)]",
         given="given  document[B,J]:int64", norm="sigmoid"),
    _row("relu-window-96", 96, 2, "j ≤ i and j > i − 100", dtype="float16", norm="relu"),
)  # fmt: skip
SIZES = ((2, 1, 1), (1, 7, 13), (2, 64, 64), (1, 129, 128), (1, 130, 257), (3, 191, 191), (1, 777, 700))


FORMS = ("quantize.fp8", "quantize.int8(values=true)", "quantize.int8", "quantize.fp8(values=false)")
ROUNDED = (
    *("full-64", "causal-128", "window-128", "symmetric-80"),
    *("documents-64", "softcap-128", "causal-256", "narrow-16"),
)


@pytest.mark.parametrize("queries", (1024, 16384))
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ROUNDED)
def test_operands_of_8_bits(name: str, form: str, queries: int) -> None:
    """The rows without a log-sum-exp, rounded as the passes do, keys smoothed where the score allows.

    What is rounded may lie anywhere; values that stay as they are begin at 16 bytes.
    """
    row = next(row for row in ROWS if row.name == name)
    text = row.text.replace("\n  lse    lse", "").replace("\n  gives  out, lse", "")
    smooth = "tanh" not in text
    call = form if smooth else f"{form.rstrip(')')}{',' if '(' in form else '('}smooth=false)"
    found = run_passes(parse_spec(text), parse_passes(call))
    assert found.applied, found.refused
    module = generate(found.spec, queries=queries)
    if queries > 1024 and module == generate(found.spec, queries=1024):
        return  # the same kernel
    attend = load(module)
    for batch, rows, keys in (*SIZES, (1, 600, 2048)):
        sizes = {"B": batch, "I": rows, "J": keys}
        case = Case(name, str(found.spec), sizes, ranges={"document": (0, 3)})
        for kind in (case, ZeroCase(**vars(case))):
            for outcome in compare(kind, attend, torch.bfloat16, "cuda", place=aligned_inputs):
                assert outcome.passed, (sizes, type(kind).__name__, outcome)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("channels, part, convention", ((128, 128, "half"), (64, 64, "interleaved"), (96, 24, "half")))
def test_rotated_operands_of_8_bits(channels: int, part: int, convention: str, form: str) -> None:
    """Queries and keys are rotated where they are rounded; what is rotated may lie anywhere."""
    maps = "".join(
        f"  position  {name}  bfloat16\n    cos    cos[b, i, d]\n    sin    sin[b, i, d]\n    channels {part}\n"
        f"    convention {convention}\n    out    {name[0]}_rotated\n"
        for name in (f"q[B,8,I,{channels}]", f"k[B,2,I,{channels}]")
    )
    text = (
        f"x\n{maps}  attend  q_rotated  k_rotated  v[B,2,I,{channels}]  bfloat16\n    score  0.1·s\n"
        f"    mask   j ≤ i\n    kv_head h // 4\n    norm   softmax (float32)\n"
        f"  given  cos[B,I,{part}]:bfloat16\n  given  sin[B,I,{part}]:bfloat16"
    )
    found = run_passes(parse_spec(text), parse_passes(form))
    assert found.applied, found.refused
    attend = load(generate(found.spec))
    for batch, rows in ((2, 1), (1, 130), (3, 191), (1, 777)):
        case = Case("rotated", str(found.spec), {"B": batch, "I": rows})
        for kind in (case, ZeroCase(**vars(case))):
            for outcome in compare(kind, attend, torch.bfloat16, "cuda", place=aligned_inputs):
                assert outcome.passed, (case.sizes, type(kind).__name__, outcome)


@pytest.mark.parametrize("case", LOWERED, ids=lambda case: case.name)
def test_table(case: Case) -> None:
    attend = load(generate(case.spec))
    for dtype in (torch.bfloat16, torch.float16):
        for outcome in compare(case, attend, dtype, "cuda", place=aligned_inputs):
            assert outcome.passed, (dtype, outcome)


@pytest.mark.parametrize("queries", (1024, 16384))
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_awkward_sizes(row: Case, queries: int) -> None:
    module = generate(row.spec, queries=queries)
    if queries > 1024 and module == generate(row.spec, queries=1024):
        return  # the same kernel
    attend = load(module)
    dtype = torch.float16 if "float16" in row.text.split() else torch.bfloat16
    failures = []
    for batch, queries, keys in SIZES:
        ranges = {"document": (0, 3), "listed": (0, 2)}
        case = Case(row.name, row.text, {"B": batch, "I": queries, "J": keys}, ranges=ranges)
        outcomes = compare(case, attend, dtype, "cuda", place=aligned_inputs)
        failures += [(case.sizes, outcome) for outcome in outcomes if not outcome.passed]
    assert not failures


def test_more_tiles_than_processors() -> None:
    """Thread blocks that compute many tiles, of different lengths, again and again with the same result."""
    for name in ("causal-64", "causal-128", "sink-window-64", "full-128"):
        row = next(row for row in ROWS if row.name == name)
        attend = load(generate(row.spec))
        case = Case(name, row.text, {"B": 4, "I": 1500, "J": 1500})
        assert all(outcome.passed for outcome in compare(case, attend, torch.bfloat16, "cuda", place=aligned_inputs))
        tensors = [tensor.cuda() for tensor in case.tensors(1, torch.bfloat16).values()]
        first = attend(*tensors)
        for _ in range(20):
            for one, other in zip(first, attend(*tensors), strict=True):
                assert torch.equal(one, other)


def test_an_additive_mask_may_be_infinite() -> None:
    spec = parse_spec(
        "x   attend  q[B,2,I,64]  k,v[B,2,J,64]  bfloat16\n  score  0.125·s + bias[b, 0, i, j]\n  mask   true\n"
        "  norm   softmax (float32)\n  given  bias[B,1,I,J]:float32"
    )
    query, key, value = (torch.randn(1, 2, 200, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    for lowest in (float("-inf"), torch.finfo(torch.float32).min):
        bias = torch.zeros(1, 1, 200, 200, device="cuda").masked_fill(
            ~torch.ones(200, 200, device="cuda").tril().bool(), lowest
        )
        found = load(generate(spec))(query, key, value, bias)
        tensors = {"q": query, "k": key, "v": value, "bias": bias}
        (outcome,) = measured(spec, tensors, found, torch.bfloat16)
        assert outcome.passed, outcome


def test_what_it_cannot_read_runs_in_plain_triton() -> None:
    case = BY_NAME["causal-long"]
    lowering = lower(case.spec, "cuda")
    assert "Gluon" in lowering.reason and "wgmma" not in lowering.reason
    assert lowering.source is not None and "gluon.jit" in lowering.source
    module = load_module(generate(case.spec))
    wide = torch.randn(1, 4, 301, 17, device="cuda", dtype=torch.bfloat16)
    for view, said in (
        (wide[..., 1:], "does not begin"),
        (wide[..., :16], "no multiple of 16 bytes"),
        (wide[..., :16].float(), "float16 and bfloat16"),
        (torch.randn(1, 4, 301, 32, device="cuda", dtype=torch.bfloat16)[..., ::2], "2 elements apart"),
        (torch.randn(1, 1, 301, 16, device="cuda", dtype=torch.bfloat16).expand(1, 4, 301, 16), "has stride 0"),
    ):
        assert said in (module.why_not(view, view, view) or "")
        tensors = {"q": view, "k": view, "v": view}
        (outcome,) = measured(case.spec, tensors, lowering.run(view, view, view), view.dtype)
        assert outcome.passed, (said, outcome)


def test_calls_share_lists_in_a_graph_that_is_captured() -> None:
    """Lists are made in two kernels for both calls, and again at each replay: the mask may have changed by then."""
    row = next(row for row in ROWS if row.name == "documents-64")
    text = row.text.replace("\n  lse    lse", "").replace("\n  gives  out, lse", "")
    case = Case(row.name, text, {"B": 2, "I": 1500, "J": 1500}, ranges={"document": (0, 9)})
    lowering = lower(case.spec, "cuda")
    assert lowering.lists is not None and lowering.lists.reads == ("document",)
    tensors = {name: tensor.cuda() for name, tensor in case.tensors(1, torch.bfloat16).items()}
    tensors["document"] = tensors["document"].sort(-1).values

    def layers() -> list[torch.Tensor]:
        lists = lowering.lists.make(*tensors.values())
        return [lowering.run(*tensors.values(), lists=lists) for _ in range(2)]

    for found in layers():  # compiled now
        assert torch.equal(found, lowering.run(*tensors.values()))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = layers()
    for documents in (3, 30):
        changed = torch.randint(0, documents, (2, 1500), device="cuda").sort(-1).values
        tensors["document"].copy_(changed)
        graph.replay()
        for found in recorded:
            (outcome,) = measured(case.spec, tensors, found, torch.bfloat16)
            assert outcome.passed, (documents, outcome)


@pytest.mark.parametrize("dynamic", (False, True))
def test_layers_of_a_compiled_model_share_lists(dynamic: bool) -> None:
    """Through torch.compile, two layers of which the second reads what the first gives, at every length."""
    import attncompile

    def layers(x: torch.Tensor, document: torch.Tensor) -> torch.Tensor:
        shown = document[:, None, :, None] == document[:, None, None, :]
        for _ in range(2):
            x = torch.nn.functional.scaled_dot_product_attention(x, x * 0.5, x + 1.0, attn_mask=shown)
        return x

    compiled = attncompile.compile(layers, dynamic=dynamic)
    for length in (300, 1000):
        document = torch.randint(0, 5, (2, length), device="cuda").sort(-1).values
        x = torch.randn(2, 4, length, 64, device="cuda", dtype=torch.bfloat16)
        with torch.no_grad():
            found, eager, best = compiled(x, document), layers(x, document), layers(x.double(), document)
        require_within(found, best, derive_tolerance(best, eager, length).bound, f"{length} tokens")
