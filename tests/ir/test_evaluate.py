from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
import torch

from attncompile.ir.evaluate import Environment, evaluate, index_grid
from attncompile.ir.expr import Expr
from attncompile.ir.operators import ROWS, Kind, Operator
from attncompile.ir.text import parse_expr

KINDS = {"keep": Kind.BOOL, "table": Kind.FLOAT, "count": Kind.INT}


def read(text: str) -> Expr:
    return parse_expr(text, KINDS)


def test_the_grid_broadcasts() -> None:
    grid = index_grid({"b": 2, "i": 3, "j": 4})
    assert [tuple(index.shape) for index in grid.values()] == [(2, 1, 1), (1, 3, 1), (1, 1, 4)]
    causal = evaluate(read("j ≤ i"), Environment(grid))
    assert causal.tolist() == [
        [[True, False, False, False], [True, True, False, False], [True, True, True, False]]
    ]
    assert evaluate(read("b + i·j"), Environment(grid)).shape == (2, 3, 4)


def test_loads_are_clamped_into_their_tensor() -> None:
    table = torch.tensor([1.0, 2.0, 3.0])
    values = evaluate(read("table[i − 2]"), Environment({"i": torch.arange(7)}, tensors={"table": table}))
    assert values.tolist() == [1, 1, 1, 2, 3, 3, 3]


def test_where_reads_only_what_it_chooses() -> None:
    environment = Environment({"j": torch.arange(4)}, tensors={"table": torch.tensor([1.0, 2.0])})
    assert evaluate(read("where(j < 2, table[j], −table[j − 2])"), environment).tolist() == [1, 2, -1, -2]


def test_elements_are_read_as_their_kind() -> None:
    tensors = {
        "keep": torch.tensor([0, 1, 2]),
        "count": torch.tensor([1.9, -1.9, 0.0]),
        "table": torch.tensor([1, 2, 3], dtype=torch.int8),
    }
    environment = Environment({"j": torch.arange(3)}, tensors=tensors, dtype=torch.float16)
    assert evaluate(read("keep[j]"), environment).tolist() == [False, True, True]
    assert evaluate(read("count[j]"), environment).tolist() == [1, -1, 0]
    assert evaluate(read("table[j]"), environment).dtype is torch.float16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_real_values_have_the_dtype_asked_for(dtype: torch.dtype) -> None:
    environment = Environment({"i": torch.arange(3)}, score=torch.zeros(3), dtype=dtype)
    for text in (
        "s",
        "s + i",
        "i / 3",
        "exp(i)",
        "where(i < 2, i, 0.5)",
        "float(i < 2)",
        "max(i, 0.5)",
        "1.5",
        "rsqrt(64)",
    ):
        assert evaluate(read(text), environment).dtype is dtype
    assert evaluate(read("i // 2 + max(i, 1)"), environment).dtype is torch.int64


SPECIAL = [
    ("min(nan, 1.0)", math.nan),
    ("max(1.0, nan)", math.nan),
    ("nan ≠ nan", True),
    ("nan = nan", False),
    ("not (nan < 1.0)", True),
    ("(−7) // 2", -4),
    ("7 // −2", -4),
    ("(−7) % 4", 1),
    ("7 % −4", -1),
    ("nan^0", 1.0),
    ("1^nan", 1.0),
    ("(−inf)^0.5", math.inf),
    ("sqrt(−inf)", math.nan),
    ("rsqrt(0.0)", math.inf),
    ("log(0)", -math.inf),
    ("int(2.9)", 2),
    ("int(−2.9)", -2),
    ("int(true)", 1),
    ("round(0.5)", 0.0),
    ("round(1.5)", 2.0),
    ("where(true, 1, 2.5)", 1.0),
    ("true = false", False),
    ("2 = 2.0", True),
    ("0.0·inf", math.nan),
]


@pytest.mark.parametrize(("text", "expected"), SPECIAL, ids=[text for text, _ in SPECIAL])
def test_special_values(text: str, expected: float) -> None:
    found = evaluate(read(text), Environment()).item()
    assert type(found) is type(expected)
    assert found == expected or (found != found and expected != expected)


BY_HAND: dict[str, Callable[..., float]] = {
    "or": lambda x, y: bool(x or y),
    "and": lambda x, y: bool(x and y),
    "not": lambda x: not x,
    "lt": lambda x, y: x < y,
    "le": lambda x, y: x <= y,
    "gt": lambda x, y: x > y,
    "ge": lambda x, y: x >= y,
    "eq": lambda x, y: x == y,
    "ne": lambda x, y: x != y,
    "add": lambda x, y: x + y,
    "mul": lambda x, y: x * y,
    "div": lambda x, y: x / y,
    "floordiv": lambda x, y: x // y,
    "mod": lambda x, y: x % y,
    "pow": lambda x, y: x**y,
    "min": min,
    "max": max,
    "where": lambda c, x, y: x if c else y,
    "float": float,
    "int": int,
    "abs": abs,
    "exp": math.exp,
    "exp2": lambda x: 2.0**x,
    "log": math.log,
    "log2": math.log2,
    "tanh": math.tanh,
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
    "erf": math.erf,
    "sqrt": math.sqrt,
    "rsqrt": lambda x: 1 / math.sqrt(x),
    "sin": math.sin,
    "cos": math.cos,
    "floor": math.floor,
    "ceil": math.ceil,
    "round": round,
}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_operator_is_what_python_says(row: Operator) -> None:
    arguments = {
        (Kind.BOOL,): [(True,), (False,)],
        (Kind.BOOL, Kind.BOOL): [(True, False), (True, True)],
        (Kind.INT, Kind.INT): [(7, 3), (-7, 3), (2, 2)],
        (Kind.FLOAT,): [(0.75,), (2.5,)],
        (Kind.FLOAT, Kind.FLOAT): [(0.75, 2.5), (2.5, 2.5)],
        (Kind.BOOL, Kind.FLOAT, Kind.FLOAT): [(True, 1.5, 2.5)],
    }
    tried = 0
    for kinds, rows in arguments.items():
        if len(kinds) != (row.arity or 2) or row.result(kinds) is None:
            continue
        for values in rows:
            texts = ["true" if v is True else "false" if v is False else f"({v})" for v in values]
            text = (
                f"{row.name}({', '.join(texts)})"
                if not row.symbol
                else (f"not {texts[0]}" if row.name == "not" else f" {row.symbol} ".join(texts))
            )
            assert evaluate(read(text), Environment()).item() == pytest.approx(BY_HAND[row.name](*values))
            tried += 1
    assert tried


def test_known_values_are_taken_as_given() -> None:
    known = {read("table[j]"): torch.tensor([5.0])}
    assert evaluate(read("table[j] + 1.0"), Environment(given=known)).tolist() == [6.0]


MISSING = [
    ("i", "no values for index 'i'; there are ['j']"),
    ("I", "no value for size 'I'; there are ['J']"),
    ("keep[j]", "no tensor 'keep'; there are ['table']"),
    ("table[j]", "table[j] has 1 indices, but the tensor has shape (2, 2)"),
    ("s", "the expression reads the score, but none was given"),
    ("w", "the expression reads the weight, but none was given"),
]


@pytest.mark.parametrize(("text", "message"), MISSING)
def test_what_is_missing_is_named(text: str, message: str) -> None:
    environment = Environment({"j": torch.arange(2)}, {"J": 2}, {"table": torch.ones(2, 2)})
    with pytest.raises(ValueError, match=re.escape(message)):
        evaluate(read(text), environment)


def test_large_constants_of_a_sum_cancel_before_the_score_is_added() -> None:
    """``s + 1e6·m − 1e6`` in float32 is ``s`` to the last bit where ``m`` is 1, in whatever order it is written."""
    score = torch.randn(64, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(64, dtype=torch.int64)
    for text in ("s + 1000000·m[j] − 1000000.0", "1000000·m[j] + s − 1000000.0"):
        expr = parse_expr(text, {"m": Kind.INT})
        found = evaluate(
            expr,
            Environment({"j": torch.arange(64)}, {}, {"m": mask}, dtype=torch.float32, score=score),
        )
        assert torch.equal(found, score)
