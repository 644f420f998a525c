from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attncompile.ir import (
    NO_SINK,
    Attend,
    Axis,
    Cache,
    Expr,
    Normalizer,
    Operation,
    Position,
    Project,
    Quantize,
    Scan,
    Spec,
    TensorType,
    Value,
    grouped,
    parse_spec,
    print_spec,
    simplify,
    tensor_type,
)
from attncompile.ir.attend import DIVIDING, HIDING_NOTHING, NORMALIZERS
from attncompile.ir.expr import TOTAL, Const, Index, Load, Score, Size, Weight, apply, rewrite
from attncompile.ir.operators import Kind
from attncompile.ir.sample import random_tensors
from attncompile.ir.text import parse_expr
from attncompile.ir.types import DTYPES, bind_sizes, element_kind
from tests.ir.expressions import EXACT_LANGUAGE, expressions

FLOATS = st.sampled_from(["float32", "float16", "bfloat16", "float64"])
HEADS = [(4, 4), (6, 2), (9, 3), (8, 1)]
CAPTURED = {
    "keep": ("bj", ("B", "J"), "bool"),
    "documents": ("bi", ("B", "J"), "int64"),
    "bias": ("ij", ("I", "J"), "float16"),
    "layer.0.slopes": ("h", (4,), "float32"),
    "offset": ("", (), "int32"),
}


def over(expr: Expr, indices: str, tensors: bool, score: bool = False, weight: bool = False) -> Expr:
    """The expression with what may not be read there replaced, in canonical form."""

    def visit(node: Expr) -> Expr | None:
        match node:
            case Index(name) if name not in indices:
                return Index(indices[0])
            case Score() if not score:
                return Const(0.5)
            case Weight() if not weight:
                return Const(0.25)
            case Load(_, _, element) if not tensors:
                return {Kind.BOOL: Const(True), Kind.INT: Const(1), Kind.FLOAT: Const(1.5)}[element]
        return None

    return simplify(rewrite(expr, visit))


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    """A random Spec: perhaps projected, turned, cached and quantised operands of one attention or scan."""
    heads, groups = draw(st.sampled_from(HEADS))
    made: list[Operation] = []
    inputs: dict[str, TensorType] = {}

    def real(indices: str, **may: bool) -> Expr:
        return over(draw(expressions(Kind.FLOAT, EXACT_LANGUAGE, 2)), indices, draw(st.booleans()), **may)

    def operand(name: str, count: int, channels: int, length: str) -> str:
        letters = {"q": "bhid", "k": "bgjd", "v": "bgje"}[name]
        if draw(st.booleans()):
            inputs[f"{name}_state"] = tensor_type("bic", ("B", length, 48), draw(FLOATS))
            inputs[f"{name}.weight"] = tensor_type("oc", (count * channels, 48))
            bias = ""
            if draw(st.booleans()):
                bias = f"{name}.bias"
                inputs[bias] = tensor_type("o", (count * channels,), draw(FLOATS))
            made.append(Project(f"{name}_state", f"{name}.weight", bias, heads=count, out=f"{name}1"))
            name = f"{name}1"
        else:
            inputs[name] = tensor_type(letters, ("B", count, length, channels), draw(FLOATS))
        if draw(st.booleans()):
            made.append(
                Position(
                    name,
                    real("bid"),
                    real("bid"),
                    draw(st.sampled_from([0, 2, channels // 2 * 2])),
                    draw(st.sampled_from(["half", "interleaved"])),
                    out=f"{name}_turned",
                )
            )
            name = f"{name}_turned"
        if draw(st.booleans()):
            made.append(
                Quantize(name, block=draw(st.integers(1, 128)), smooth=draw(st.booleans()), out=f"{name}_8")
            )
            name = f"{name}_8"
        return name

    scans = draw(st.booleans())
    length = "I" if scans else draw(st.sampled_from(["I", "J"]))
    query = operand("q", heads, 8, "I")
    key, value = operand("k", groups, 8, length), operand("v", groups, draw(st.sampled_from([8, 5])), length)
    if not scans and draw(st.booleans()):
        for name in ("k", "v"):
            inputs[f"{name}_past"] = tensor_type("bgpd", ("B", groups, "P", 8 if name == "k" else 5))
        channels = 5
        inputs["v_new"] = tensor_type("bgid", ("B", groups, length, channels))
        made += [Cache("k_past", key, out="keys"), Cache("v_past", "v_new", out="values")]
        key, value = "keys", "values"
    out = draw(st.sampled_from(["out", "context"]))
    if scans:
        made.append(
            Scan(
                query,
                key,
                value,
                decay=over(draw(expressions(Kind.FLOAT, EXACT_LANGUAGE, 2)), "h", True),
                scale=draw(st.floats(-4, 4)),
                feature=draw(st.sampled_from(["identity", "elu1", "relu"])),
                normalize=draw(st.booleans()),
                kv_head=grouped(heads, groups),
                out=out,
            )
        )
        outputs = [out]
    else:
        norm = Normalizer(
            draw(st.sampled_from(NORMALIZERS)),
            draw(FLOATS),
            draw(st.sampled_from(["nan", "zero"])),
        )
        lse = draw(st.sampled_from(["", "lse"])) if norm.kind == "softmax" else ""
        hides = norm.kind not in HIDING_NOTHING
        fills = [Const(float("-inf") if hides else 0.0), Const(-1e4), parse_expr("s − 10000.0")]
        divisors = [TOTAL, *([parse_expr("max(1e-06, t)")] if norm.kind in DIVIDING else [])]
        made.append(
            Attend(
                query,
                key,
                value,
                real("bhij", score=True),
                over(draw(expressions(Kind.BOOL, EXACT_LANGUAGE, 3)), "bhij", True),
                draw(st.sampled_from(fills)),
                real("bhij", weight=True),
                kv_head=grouped(heads, groups),
                norm=norm,
                sink=real("bhi") if norm.kind == "softmax" and draw(st.booleans()) else NO_SINK,
                divisor=draw(st.sampled_from(divisors)),
                out=out,
                lse=lse,
            )
        )
        outputs = [out, *([lse] if lse else [])]
    for operation in made:
        for load in operation.captured():
            letters, sizes, dtype = CAPTURED[load.tensor]
            inputs[load.tensor] = tensor_type(letters, sizes, dtype)
    values = tuple(Value(name, found) for name, found in inputs.items())
    return Spec(
        "model.layers.0.self_attn", values, tuple(made), tuple(draw(st.permutations(outputs)))
    ).verify()


def in_order(spec: Spec) -> Spec:
    return replace(spec, inputs=tuple(sorted(spec.inputs, key=lambda value: value.name)))


@settings(max_examples=60)
@given(specs())
def test_specs_read_back(spec: Spec) -> None:
    assert in_order(parse_spec(print_spec(spec))) == in_order(spec)
    assert print_spec(parse_spec(print_spec(spec))) == print_spec(spec)


@settings(max_examples=30)
@given(specs(), specs())
def test_fingerprints_tell_computations_apart(one: Spec, other: Spec) -> None:
    assert one.fingerprint() == replace(one, name="another.place").fingerprint()
    assert (one.fingerprint() == other.fingerprint()) == (print_spec(one) == print_spec(other))


SPEC = parse_spec("""
model.layers.3.self_attn   attend  q[B,32,I,128]  k,v[B,8,J,128]  float16
  score  0.08838834764831845·s
  mask   j ≤ i and j > i − 4096 and attention_mask[b, j]
  kv_head h // 4
  norm   softmax (float32)
  given  attention_mask[B,J]:bool
""")


def attend_with(**changes: object) -> Spec:
    attend = SPEC.attend()
    assert attend is not None
    return replace(SPEC, operations=(replace(attend, **changes),))  # type: ignore[arg-type]


CHANGES: dict[str, Callable[[], Spec]] = {
    "score": lambda: attend_with(score=parse_expr("0.125·s")),
    "mask": lambda: attend_with(mask=parse_expr("j ≤ i")),
    "fill": lambda: attend_with(fill=Const(-1e4)),
    "weight": lambda: attend_with(weight=parse_expr("2.0·w")),
    "kv_head": lambda: attend_with(kv_head=parse_expr("h % 8")),
    "norm": lambda: attend_with(norm=Normalizer(empty="zero")),
    "norm dtype": lambda: attend_with(norm=Normalizer(dtype="float16")),
    "lse": lambda: attend_with(lse="lse"),
    "out": lambda: replace(attend_with(out="context"), outputs=("context",)),
    "outputs": lambda: replace(attend_with(lse="lse"), outputs=("out", "lse")),
    "operands": lambda: attend_with(value="k"),
    "size": lambda: replace(
        SPEC, inputs=(Value("q", tensor_type("bhid", ("B", 32, "Q", 128), "float16")), *SPEC.inputs[1:])
    ),
    "dtype": lambda: replace(
        SPEC,
        inputs=(
            *SPEC.inputs[:2],
            replace(SPEC.inputs[2], type=replace(SPEC.inputs[2].type, dtype="float32")),
            *SPEC.inputs[3:],
        ),
    ),
    "captured dtype": lambda: replace(
        SPEC,
        inputs=(
            *SPEC.inputs[:3],
            replace(SPEC.inputs[3], type=tensor_type(("a0", "a1"), ("B", "J"), "uint8")),
        ),
    ),  # type: ignore[arg-type]
    "an operation more": lambda: replace(
        SPEC, operations=(Quantize("q", out="q8"), *attend_with(query="q8").operations)
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_the_fingerprint_depends_on(what: str) -> None:
    assert CHANGES[what]().fingerprint() != SPEC.fingerprint()


def test_the_printed_form_people_read() -> None:
    assert print_spec(SPEC, digits=3) == (
        "model.layers.3.self_attn   attend  q[B,32,I,128]  k,v[B,8,J,128]  float16\n"
        "  score  0.0884·s\n"
        "  mask   j ≤ i and j > i − 4096 and attention_mask[b, j]\n"
        "  kv_head h // 4\n"
        "  norm   softmax (float32)\n"
        "  given  attention_mask[B,J]:bool"
    )
    assert str(SPEC) == print_spec(SPEC)
    assert "0.08838834764831845·s" in str(SPEC)


def test_the_printed_form_of_several_operations() -> None:
    text = "\n".join(
        [
            "decoder.attn",
            "  project  x[B,I,64]  w_q[48,64]  b_q[48]:float16  float32",
            "    heads  6",
            "    out    q",
            "  position  q",
            "    cos    cos[b, i, d]",
            "    sin    sin[b, i, d]",
            "    channels 8",
            "    out    q_turned",
            "  cache  k_past[B,2,P,8]  k_new[b:B,2,i:I,8]  float16",
            "    out    k",
            "  attend  q_turned  k  v[b:B,h:2,P+I,8]  float16",
            "    score  s",
            "    mask   true",
            "    kv_head h // 3",
            "    norm   softmax (float32)",
            "    lse    lse",
            "  given  cos[B,I,8]:float32",
            "  given  sin[B,i:I,8]:float32",
            "  gives  out, lse",
        ]
    )
    spec = parse_spec(text)
    # a letter is printed where it is not the one that the operand's axis has anyway
    assert print_spec(spec) == text.replace("b:B", "B").replace("i:I,8]  float16", "I,8]  float16")
    types = spec.types()
    assert [axis.name for axis in types["v"].axes] == ["b", "h", "j", "e"]
    assert str(types["k"]) == "[B,2,I + P,8] float16"
    assert [axis.name for axis in types["sin"].axes] == ["a0", "i", "a2"]
    assert str(types["out"]) == "[B,6,I,8] float32"


def test_sizes_may_hold_commas() -> None:
    spec = Spec(
        "site",
        tuple(
            Value(
                name,
                TensorType(
                    tuple(
                        Axis(letter, size)
                        for letter, size in zip(letters, (Size("B"), Const(2), length, Const(8)), strict=True)
                    ),
                    "float32",
                ),
            )
            for name, letters, length in (
                ("q", "bhid", Size("I")),
                ("k", "bgjd", apply("min", Size("I"), 64)),
                ("v", "bgje", apply("min", Size("I"), 64)),
            )
        ),
        (Attend("q", "k", "v"),),
    )
    assert "k,v[B,2,min(I,64),8]" in print_spec(spec)
    assert parse_spec(print_spec(spec)) == spec


def test_one_tensor_may_be_read_twice() -> None:
    spec = parse_spec(
        "site   attend  x[B,2,I,8]  x  x  float32\n  score  s\n  mask   true\n  norm   softmax (float32)"
    )
    assert [value.name for value in spec.inputs] == ["x"]
    assert parse_spec(print_spec(spec)) == spec


HEAD = "site   attend  q,k,v[B,2,I,8]  float32\n"
BAD = [
    ("", "an empty text is no Spec"),
    ("site  attend  q[B,4,I,16]  k,v[B,2,J,16]  float32", "the first line is a name and, behind three spaces"),
    (
        "site   swim  q[B]",
        "cannot read the line 'swim  q[B]': unknown operation 'swim', known are attend, scan",
    ),
    ("site   attend  q[B,2,I,8]  float32", "attend takes the operands query, key, value, got 1"),
    ("site   attend  q,k,v,w[B,2,I,8]  float32", "attend takes the operands query, key, value, got 4"),
    ("site   attend  q,k,v[B,2,I,8]", "the dtype is missing"),
    ("site   attend  q,k,v[B,2,I,8]:float33", "unknown dtype 'float33'"),
    ("site   attend  q,k,v{B}  float32", "cannot read 'q,k,v{B}'"),
    ("site   attend  q,k,v[B,2,I +,8]  float32", "cannot read 'q,k,v[B,2,I'"),
    ("site   attend  q,k,v[B,2,I+,8]  float32", "expected a value, found the end at column 3 of 'I+'"),
    (
        HEAD + "  colour blue",
        "cannot read the line 'colour blue': attend has no attribute 'colour', but score, mask",
    ),
    (HEAD + "  query x", "attend has no attribute 'query'"),
    (
        HEAD + "  score  0.5·",
        "cannot read the line 'score  0.5·': expected a value, found the end at column 5",
    ),
    (HEAD + "  mask   keep[b, j]", "unknown tensor 'keep'"),
    (HEAD + "  norm   softmax", "cannot read the normaliser 'softmax'"),
    (HEAD + "  given  keep[B,J]", "the dtype is missing"),
    (HEAD + "  given  keep", "expected given NAME[SIZES]:DTYPE"),
    (HEAD + "  gives  context", "output 'context' is never made; there are k, out, q, v"),
    ("site   scan  q,k,v[B,2,I,8]  float32\n  normalize maybe", "expected true or false, found 'maybe'"),
    ("site   scan  q,k,v[B,2,I,8]  float32\n  scale  big", "cannot read the line 'scale  big'"),
    ("site\n  score  s", "cannot read the line 'score  s': unknown operation 'score'"),
]


@pytest.mark.parametrize(("text", "message"), BAD, ids=[message[:50] for _, message in BAD])
def test_bad_text_is_refused_with_its_line(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_spec(text)


def value(name: str, letters: str = "bhid", dtype: str = "float32") -> Value:
    return Value(name, tensor_type(letters, ("B", 2, "I", 8), dtype))


Q, K, V = value("q"), value("k", "bgjd"), value("v", "bgje")
ATTEND = Attend("q", "k", "v")
UNSOUND = [
    (Spec("site", (Q, K, V, Q), (ATTEND,)), "site: two inputs are named 'q'"),
    (
        Spec("site", (Q, K), (ATTEND,)),
        "attend reads 'v', which nothing defines; there are ['k', 'q']\nsite\n▶ attend q, k, v",
    ),
    (
        Spec("site", (Q, K, V), (ATTEND, Quantize("out", out="q"))),
        "'q' is assigned twice\nsite\n  attend q, k, v\n▶ quantize out",
    ),
    (
        Spec("site", (Q, K, V), (ATTEND,), ("weights",)),
        "site: output 'weights' is never made; there are k, out, q, v",
    ),
    (Spec("site", (Q, K, V), ()), "site: a Spec needs an operation"),
    (Spec("a   b", (Q, K, V), (ATTEND,)), "'a   b' cannot name a Spec"),
    (Spec("", (Q, K, V), (ATTEND,)), "'' cannot name a Spec"),
    (
        Spec("site", (value("/model/Add_0"), K, V), (Attend("/model/Add_0", "k", "v"),)),
        "'/model/Add_0' cannot name a tensor",
    ),
    (Spec("site", (Q, K, V), (replace(ATTEND, out="none"),), ("none",)), "'none' cannot name a tensor"),
]


@pytest.mark.parametrize(("spec", "message"), UNSOUND, ids=[message[:50] for _, message in UNSOUND])
def test_unsound_specs_are_refused_with_the_fault_marked(spec: Spec, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        spec.verify()


def test_parts_of_a_spec() -> None:
    attend = SPEC.attend()
    assert attend is not None and attend.operands() == ("q", "k", "v", "attention_mask")
    assert attend.results() == ("out",)
    assert SPEC.scan() is None
    assert [value.name for value in SPEC.captured()] == ["attention_mask"]
    twice = replace(SPEC, operations=(attend, replace(attend, out="again")))
    assert twice.attend() is None
    scan = parse_spec("site   scan  q,k,v[B,2,I,8]  float32")
    assert scan.scan() == Scan("q", "k", "v") and scan.attend() is None


# Running a Spec


def test_interpret_runs_the_operations_in_order() -> None:
    spec = parse_spec(
        "\n".join(
            [
                "site",
                "  project  x[B,I,6]  weight[8,6]  float32",
                "    heads  2",
                "    out    q",
                "  quantize  q",
                "    block  4",
                "    out    q8",
                "  attend  q8  k,v[B,2,J,4]  float32",
                "    score  0.5·s",
                "    mask   j ≤ i",
                "    norm   softmax (float32)",
                "    lse    lse",
                "  gives  lse, out",
            ]
        )
    )
    tensors = random_tensors(spec, {"B": 2, "I": 5, "J": 7})
    lse, out = spec.interpret(tensors)
    assert out.dtype is lse.dtype is torch.float64
    q = (tensors["x"].double() @ tensors["weight"].double().T).reshape(2, 5, 2, 4).transpose(1, 2)
    q8 = Quantize("q", block=4).reference({"q": q}, {}, torch.float64)["out"]
    expected = torch.nn.functional.scaled_dot_product_attention(
        q8, tensors["k"].double(), tensors["v"].double(), is_causal=True, scale=0.5
    )
    torch.testing.assert_close(out, expected)
    assert spec.interpret(tensors, torch.float32)[1].dtype is torch.float32


MISFITS = [
    ({"k": (2, 8, 7, 127)}, "axis d of k is 127, but should be 128"),
    ({"v": (2, 8, 6, 128)}, "axis e of v is 6, but J is 7 as axis j of k"),
    ({"attention_mask": (3, 7)}, "axis a0 of attention_mask is 3, but B is 2 as axis b of q"),
    ({"q": (2, 32, 5)}, "q should have 4 axes [B,32,I,128] float16, but has shape (2, 32, 5)"),
]


@pytest.mark.parametrize(("change", "message"), MISFITS, ids=[message for _, message in MISFITS])
def test_tensors_are_checked_against_their_types(change: dict[str, tuple[int, ...]], message: str) -> None:
    shapes = {
        "q": (2, 32, 5, 128),
        "k": (2, 8, 7, 128),
        "v": (2, 8, 7, 128),
        "attention_mask": (2, 7),
        **change,
    }
    message = message.replace("axis e of v is 6", "axis j of v is 6")
    with pytest.raises(ValueError, match=re.escape(message)):
        SPEC.interpret({name: torch.ones(shape) for name, shape in shapes.items()})


def test_a_missing_tensor_is_named() -> None:
    with pytest.raises(ValueError, match="no tensor given for 'k'"):
        SPEC.interpret({"q": torch.ones(2, 32, 5, 128)})


def test_compound_sizes_are_checked_too() -> None:
    types = {
        "past": tensor_type("bp", ("B", "P")),
        "keep": tensor_type("bj", ("B", Size("P") + Size("I"))),
        "new": tensor_type("bi", ("B", "I")),
    }
    tensors = {"past": torch.ones(2, 0), "keep": torch.ones(2, 3), "new": torch.ones(2, 3)}
    assert bind_sizes(types, tensors) == {"B": 2, "P": 0, "I": 3}
    with pytest.raises(ValueError, match=re.escape("axis j of keep is 4, but should be P + I = 3")):
        bind_sizes(types, {**tensors, "keep": torch.ones(2, 4)})


def test_cost_of_a_case_worked_out_by_hand() -> None:
    sizes = {"B": 2, "I": 3, "J": 5}
    assert SPEC.flops(sizes) == 2 * (2 * 32 * 3 * 5) * (128 + 128)
    # float16 query, key, value and result, one byte for each truth value
    assert SPEC.bytes(sizes) == 2 * (2 * 32 * 3 * 128 + 2 * 2 * 8 * 5 * 128 + 2 * 32 * 3 * 128) + 2 * 5


# Types


def test_types() -> None:
    found = tensor_type("bhid", ("B", 4, Size("I") + 1, 8), "bfloat16")
    assert str(found) == "[B,4,I + 1,8] bfloat16"
    assert found.size("i") == Size("I") + 1
    assert found.elements({"B": 2, "I": 2}) == 2 * 4 * 3 * 8
    assert found.bytes({"B": 2, "I": 2}) == 2 * found.elements({"B": 2, "I": 2})


BAD_TYPES: list[tuple[Callable[[], object], str]] = [
    (lambda: tensor_type("bh", ("B", 2), "float31"), "unknown dtype 'float31'; the known ones are float64"),
    (lambda: tensor_type("bhi", ("B", 2)), "3 axes (bhi) but 2 sizes"),
    (lambda: tensor_type("bh", ("B", 2)).size("j"), "no axis 'j' in [B,2] float32; the axes are ['b', 'h']"),
    (lambda: tensor_type("b", ("B",)).elements({}), "no value for size 'B'"),
]


@pytest.mark.parametrize(("make", "message"), BAD_TYPES, ids=[message for _, message in BAD_TYPES])
def test_bad_types_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_every_dtype_has_a_kind() -> None:
    assert {dtype: element_kind(dtype) for dtype in DTYPES if element_kind(dtype) is not Kind.FLOAT} == {
        "bool": Kind.BOOL,
        "int64": Kind.INT,
        "int32": Kind.INT,
        "int8": Kind.INT,
        "uint8": Kind.INT,
    }
    for dtype, kind in DTYPES.items():
        assert kind.is_floating_point == (element_kind(dtype) is Kind.FLOAT)


def test_specs_are_values() -> None:
    assert dataclasses.replace(SPEC) == SPEC and hash(dataclasses.replace(SPEC)) == hash(SPEC)
