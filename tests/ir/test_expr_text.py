from __future__ import annotations

import math
import pickle
import re

import pytest
from hypothesis import given

from attncompile.ir.expr import (
    FALSE,
    SCORE,
    TRUE,
    Apply,
    Const,
    Expr,
    Index,
    Load,
    Size,
    apply,
    conjunction,
    conjuncts,
    loads,
    rewrite,
    substitute,
    symbols,
    walk,
    where,
)
from attncompile.ir.operators import OPERATORS, ROWS, Kind
from attncompile.ir.simplify import simplify
from attncompile.ir.text import parse_expr, parse_exprs, print_expr
from tests.ir.expressions import KINDS, WHOLE_LANGUAGE, any_expressions

b, h, i, j = Index("b"), Index("h"), Index("i"), Index("j")


def read(text: str) -> Expr:
    return parse_expr(text, KINDS)


@given(any_expressions(WHOLE_LANGUAGE))
def test_canonical_expressions_read_back(expr: Expr) -> None:
    canonical = simplify(expr)
    assert read(print_expr(canonical)) == canonical


@given(any_expressions(WHOLE_LANGUAGE))
def test_any_expression_reads_back_as_an_equal_one(expr: Expr) -> None:
    again = read(print_expr(expr))
    assert again.kind is expr.kind
    assert simplify(again) == simplify(expr)


@given(any_expressions(WHOLE_LANGUAGE))
def test_equal_expressions_hash_alike_and_survive_pickling(expr: Expr) -> None:
    again = pickle.loads(pickle.dumps(expr))
    assert again == expr
    assert hash(again) == hash(expr)
    assert again.order == expr.order


PRINTED = [
    ("j ≤ i", j <= i),
    ("i − j", i - j),
    ("−i + j", apply("add", -i, j)),
    ("i − 2·j − 3", simplify(i - 2 * j - 3)),
    ("(i + j)·2", (i + j) * 2),
    ("i // 4 % 2", i // 4 % 2),
    ("i // (4 % j)", i // (Const(4) % j)),
    ("(−i) // 4", -i // 4),
    ("−i // 4", -(i // 4)),
    ("(−2)^s", apply("pow", -2, SCORE)),
    ("−2^s", -apply("pow", 2, SCORE)),
    ("s·−2^s", apply("mul", SCORE, -apply("pow", 2, SCORE))),
    ("s^−0.5", apply("pow", SCORE, -0.5)),
    ("s + (i − j)", SCORE + (i - j)),
    ("s·(i·j)", SCORE * (i * j)),
    ("(i·j)·s", apply("mul", i * j, SCORE)),
    ("not i < j", ~(i < j)),
    ("not (i < j or keep[b, j])", ~((i < j) | Load("keep", (b, j), Kind.BOOL))),
    ("i < j and (j < 3 or i = j)", (i < j) & ((j < 3) | apply("eq", i, j))),
    ("(i < j) = (j < 3)", apply("eq", i < j, j < 3)),
    ("where(j ≤ i, s, −inf)", where(j <= i, SCORE, -math.inf)),
    ("30.0·tanh(0.5·s)", apply("mul", 30.0, apply("tanh", apply("mul", 0.5, SCORE)))),
    ("true", TRUE),
    ("nan", Const(math.nan)),
    ("1e-05", Const(1e-5)),
    ("−0.0", Const(-0.0)),
    ("layer.0.slopes[h]·(j − i)", Load("layer.0.slopes", (h,), Kind.FLOAT) * (j - i)),
    ("offset[] + I", Load("offset", (), Kind.INT) + Size("I")),
]


@pytest.mark.parametrize(("text", "expr"), PRINTED, ids=[text for text, _ in PRINTED])
def test_printed_form(text: str, expr: Expr) -> None:
    if "−2^s" not in text or text == "(−2)^s":
        assert print_expr(expr) == text
    assert simplify(read(text)) == simplify(expr)


SPELLINGS = [
    ("j <= i and j >= 0", "j ≤ i and j ≥ 0"),
    ("i != j or i == j", "i ≠ j or i = j"),
    ("-i * 2 - j", "−i · 2 − j"),
    ("  s*.5 ", "s·0.5"),
    ("1E3·s", "1000.0·s"),
]


@pytest.mark.parametrize(("ascii_text", "text"), SPELLINGS)
def test_ascii_spellings(ascii_text: str, text: str) -> None:
    assert read(ascii_text) == read(text)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_operator_prints_and_reads_back(row: object) -> None:
    assert isinstance(row, type(ROWS[0]))
    leaves: dict[Kind, list[Expr]] = {
        Kind.BOOL: [j <= i, Load("keep", (b, j), Kind.BOOL), i < 3],
        Kind.INT: [i, j, b],
        Kind.FLOAT: [SCORE, Const(0.5), Const(2.0)],
    }
    tried = 0
    for first in Kind:
        for rest in Kind:
            kinds = [first, *[rest] * ((row.arity or 3) - 1)]
            if row.result(kinds) is None:
                continue
            expr = apply(row.name, *(leaves[kind][place] for place, kind in enumerate(kinds)))
            assert read(print_expr(expr)) == expr
            tried += 1
    assert tried


def test_digits_shorten_real_constants_only() -> None:
    assert print_expr(SCORE * 0.08838834764831845 + i * 123456, digits=3) == "s·0.0884 + i·123456"


BAD = [
    ("", "expected a value, found the end", 1),
    ("i +", "expected a value, found the end", 4),
    ("i ? j", "cannot read '?'", 3),
    ("(i + j", "expected ')', found the end", 7),
    ("i j", "unexpected 'j'", 3),
    ("i < j < 3", "unexpected '<'", 7),
    ("keep[b, j", "expected ']', found the end", 10),
    ("keep[b; j]", "cannot read ';'", 7),
    ("mask[b, j]", "unknown tensor 'mask'; the known ones are", 1),
    ("i < cosh(s)", "unknown operator 'cosh'", 5),
    ("exp(s, s)", "operator 'exp' takes 1 argument, got 2", 1),
    ("min()", "operator 'min' takes one or more arguments, got 0", 1),
    ("i + (i < j)", "operator 'add' does not take arguments of these kinds: i : int, i < j : bool", 3),
    ("s // 2", "operator 'floordiv' does not take arguments of these kinds", 3),
    ("not i", "operator 'not' does not take arguments of these kinds: i : int", 1),
    ("j ≤ i and j", "operator 'and' does not take arguments of these kinds", 7),
    ("−(i < j)", "operator 'mul' does not take arguments of these kinds", 1),
    ("where(i, 1, 2)", "operator 'where' does not take arguments of these kinds", 1),
    ("i + or", "expected a value, found 'or'", 5),
    ("i + a.b", "'a.b' cannot name an index", 5),
    ("(" * 5000 + "i", "nested too deeply", None),
]


@pytest.mark.parametrize(("text", "message", "column"), BAD, ids=[text[:20] or "empty" for text, *_ in BAD])
def test_bad_text_is_refused_with_its_column(text: str, message: str, column: int | None) -> None:
    where = "" if column is None else f" at column {column} of {text!r}"
    with pytest.raises(ValueError, match=re.escape(message) + ".*" + re.escape(where)):
        read(text)


def test_lists_of_expressions() -> None:
    assert parse_exprs("B, min(I, J), 4") == (Size("B"), apply("min", Size("I"), Size("J")), Const(4))
    assert parse_exprs(" ") == ()
    with pytest.raises(ValueError, match="expected a value, found the end at column 3"):
        parse_exprs("B,")


BAD_NAMES = [
    (Index, "I"),
    (Index, "s"),
    (Index, "not"),
    (Index, "a b"),
    (Index, ""),
    (Size, "i"),
    (Size, "S-1"),
    (Size, ""),
]


@pytest.mark.parametrize(("symbol", "name"), BAD_NAMES)
def test_names_that_would_not_read_back_are_refused(symbol: type[Index], name: str) -> None:
    with pytest.raises(ValueError, match=f"{name!r} cannot name"):
        symbol(name)


def test_literals_of_different_kinds_differ() -> None:
    assert len({Const(1), Const(1.0), TRUE, Const(0), Const(0.0), Const(-0.0), FALSE}) == 7
    assert Const(math.nan) == Const(math.nan)


def test_sums_of_one_kind_are_flat_and_an_integer_sum_in_a_real_one_is_not() -> None:
    assert (i + j + b).children == (i, j, b)
    assert (SCORE + (i + j)).children == (SCORE, i + j)


def test_substitution_happens_at_once() -> None:
    assert substitute(i - j, {i: j, j: i}) == j - i
    keep = Load("keep", (b, j), Kind.BOOL)
    assert substitute(keep & (j <= i), {j: j + 1}) == Load("keep", (b, j + 1), Kind.BOOL) & (j + 1 <= i)


def test_rewriting_goes_bottom_up() -> None:
    seen: list[Expr] = []
    assert rewrite(i + j, lambda node: seen.append(node)) == i + j
    assert seen == [i, j, i + j]


def test_what_an_expression_reads() -> None:
    keep = Load("keep", (b, j), Kind.BOOL)
    mask = keep & (j < Size("J")) & keep
    assert symbols(mask) == {b, j, Size("J")}
    assert loads(mask) == (keep,)
    assert next(walk(mask)) == mask
    assert conjuncts(mask) == (keep, j < Size("J"), keep)
    assert conjunction(conjuncts(mask)) == mask
    assert conjuncts(TRUE) == () and conjunction(()) == TRUE


def test_every_operator_row_is_whole() -> None:
    assert len(OPERATORS) == len(ROWS)
    for row in ROWS:
        assert "{0}" in row.triton
        assert bool(row.symbol) == bool(row.precedence)
        assert isinstance(apply("add", 1, 2), Apply)
