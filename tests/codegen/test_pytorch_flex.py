"""FlexAttention: its functions are printed from the expressions, and mean the same."""

from __future__ import annotations

import warnings

import pytest
import torch

from attncompile.codegen.pytorch import lower, why_not
from attncompile.codegen.pytorch.flex import PYTHON, FlexForm, flex_form, flex_source
from attncompile.ir import Kind
from attncompile.ir.evaluate import Environment, evaluate
from attncompile.ir.expr import SCORE, TRUE, Apply, Expr, Index, apply
from attncompile.ir.operators import OPERATORS
from attncompile.verify import require_as_good_as_eager
from attncompile.verify.sites import longest_sum
from tests.cases import BY_NAME, CASES, Case

QUERY, KEY = Index("i"), Index("j")
SAMPLES: dict[Kind, tuple[Expr, ...]] = {
    Kind.FLOAT: (SCORE, SCORE * 0.5 + 1.0, SCORE - 2.0),
    Kind.INT: (QUERY, KEY + 1, QUERY - KEY),
    Kind.BOOL: (QUERY > KEY, KEY > 1, QUERY >= KEY),
}


def test_every_operator_has_a_form() -> None:
    assert set(PYTHON) == set(OPERATORS)


def _applied(name: str) -> list[Apply]:
    """The operator on arguments of every kind that it takes."""
    row = OPERATORS[name]
    count = row.arity or 3
    kinds = [[kind] * count for kind in Kind] if name != "where" else [[Kind.BOOL, k, k] for k in Kind]
    made = []
    for chosen in kinds:
        if row.result(chosen) is not None:
            made.append(apply(name, *(SAMPLES[kind][place] for place, kind in enumerate(chosen))))
    return [node for node in made if isinstance(node, Apply)]


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_every_operator_means_the_same(name: str) -> None:
    i, j, score = torch.tensor(5), torch.tensor(2), torch.tensor(0.7)
    environment = Environment({"i": i, "j": j}, score=score, dtype=torch.float32)
    assert _applied(name)
    for node in _applied(name):
        real = apply("float", node)
        source = flex_source(FlexForm(real, TRUE, None, None, "", False))
        namespace: dict[str, object] = {}
        exec(source, namespace)
        score_mod, _ = namespace["make"](torch, {}, {})  # type: ignore[operator]
        torch.testing.assert_close(score_mod(score, 0, 0, i, j), evaluate(real, environment), equal_nan=True)


@pytest.mark.parametrize("case", [case for case in CASES if why_not(case.spec, "cpu", "flex") is None],
                         ids=lambda case: case.name)
def test_table(case: Case) -> None:
    """Uncompiled: the operator's own definition."""
    spec, tensors = case.spec, case.tensors(seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is slow without compilation
        found = lower(spec, "cpu", "flex").run(*(tensors[value.name] for value in spec.inputs))
    results = found if isinstance(found, tuple) else (found,)
    length = longest_sum(spec, tensors)
    for one, wanted, eager in zip(results, spec.interpret(tensors), spec.interpret(tensors, torch.float32),
                                  strict=True):
        require_as_good_as_eager(one, wanted, eager, length, case.name)


# row, why not
REFUSALS = (
    ("sigmoid", "the normaliser sigmoid"),
    ("weight-edit", "of each weight"),
    ("gqa-strided", "the key heads h % 2"),
    ("scan", "exactly one attention"),
)


@pytest.mark.parametrize(("row", "reason"), REFUSALS)
def test_refusals(row: str, reason: str) -> None:
    assert reason in str(why_not(BY_NAME[row].spec, "cpu", "flex"))


def test_source_is_readable() -> None:
    source = lower(BY_NAME["causal-padding"].spec, "cpu", "flex").source
    assert source == '''def make(torch, tensors, sizes):
    t_attention_mask = tensors['attention_mask']

    def score_mod(score, b, h, q_idx, kv_idx):
        return (0.25 * score)

    def mask_mod(b, h, q_idx, kv_idx):
        return ((kv_idx <= q_idx) & (t_attention_mask[b, kv_idx] != 0))

    return score_mod, mask_mod
'''


@pytest.mark.parametrize(("row", "blocks", "empty"), [
    ("causal", True, ""),
    ("causal-padding", True, ""),  # 0, which is what flex gives
    ("empty-rows-nan", True, "nan"),
    ("empty-rows-lowest", True, "mean"),
    ("empty-rows-constant", True, "mean"),
    ("empty-rows-shifted", False, ""),  # such a row reads all keys, so the mask may not leave out blocks
])
def test_rows_without_a_key(row: str, blocks: bool, empty: str) -> None:
    spec = BY_NAME[row].spec
    attend = spec.attend()
    assert attend is not None
    form = flex_form(attend, spec.types())
    assert isinstance(form, FlexForm)
    assert (form.mask != TRUE, form.empty) == (blocks, empty)
