"""What each option of the back end does: plans, budgets, verification, explanations, Inductor's settings."""

from __future__ import annotations

import dataclasses
import gc
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import attncompile
from attncompile import backend
from attncompile.backend import FallbackWarning, read_options
from attncompile.codegen.lowering import Lowering
from attncompile.ir import Spec
from attncompile.plan.schema import Plan, SitePlan, save_plan
from tests.backend.test_backend import small_llama, tokens

WINDOW = "sparsify.window(size=4)"


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def calls(model: Callable[..., Any], *lengths: int) -> list[torch.Tensor]:
    """Logits of left-padded calls, those of padding left out."""
    found = []
    with torch.no_grad():
        for length in lengths or (11,):
            call = tokens(2, length)
            found.append(model(**call).logits[call["attention_mask"].bool()])
    return found


def entry(name: str, *applied: str, operator: str = "sdpa", reason: str = "") -> SitePlan:
    return SitePlan(site=name, fingerprint="", before="", after="", operator=operator, reason=reason, applied=applied)


def plan(*sites: SitePlan) -> Plan:
    return Plan(schema=1, model="llama", target="torch", provider="cpu", sites=sites)


def test_a_plan_gives_each_site_its_passes(tmp_path: Path) -> None:
    asked = plan(
        entry("model.layers.0.self_attn", "fuse", WINDOW),
        entry("model.layers.1.self_attn", operator="original", reason="it was slower"),
    )
    save_plan(asked, tmp_path / "plan.json")
    for given in (asked, tmp_path / "plan.json", str(tmp_path / "plan.json")):
        torch._dynamo.reset()
        compiled = attncompile.compile(small_llama(), dynamic=True, rest="eager", plan=given)
        with pytest.warns(FallbackWarning, match=r"model\.layers\.1\.self_attn \(the plan leaves it .* it was slower"):
            calls(compiled)
        first, second = attncompile.explain(compiled).sites
        assert first.applied == ("fuse", WINDOW) and "j > i − 4" in first.after
        assert (second.operator, second.after) == ("original", "")


@pytest.mark.parametrize(("named", "fits"), [("layers.0.self_attn", True), ("decoder.model.layers.0.self_attn", True),
                                             ("0.self_attention", False)])  # fmt: skip
def test_a_plan_may_name_a_site_from_elsewhere(named: str, fits: bool) -> None:
    compiled = attncompile.compile(small_llama(), dynamic=True, rest="eager", plan=plan(entry(named, WINDOW)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        calls(compiled)
    said = [str(warning.message) for warning in caught if "the plan names none of the sites" in str(warning.message)]
    assert bool(said) == (not fits)
    assert [WINDOW in site.applied for site in attncompile.explain(compiled).sites] == [fits, False]


@pytest.mark.parametrize("verify", ["off", "sites"])
def test_a_budget_keeps_lossy_passes_out(verify: str) -> None:
    passes = f"fuse,{WINDOW}"
    model = small_llama()
    compiled = attncompile.compile(model, dynamic=True, rest="eager", passes=passes, budget=0.01, verify=verify)
    with pytest.warns(FallbackWarning, match=r"self_attn, model.layers.1.self_attn: exact passes alone, since its out"):
        torch.testing.assert_close(calls(compiled), calls(model))
    assert [site.applied for site in attncompile.explain(compiled).sites] == [("fuse",)] * 2
    wide = attncompile.compile(model, dynamic=True, rest="eager", passes=passes, budget=100.0, verify=verify)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        calls(wide)
    assert [site.applied for site in attncompile.explain(wide).sites] == [("fuse", WINDOW)] * 2


def spoilt(spec: Spec, device: str) -> Lowering:
    """A lowering whose first row is wrong."""
    right = ORIGINAL(spec, device)

    def run(*tensors: torch.Tensor, **options: Any) -> torch.Tensor:
        result: Any = right.run(*tensors, **options)
        return torch.cat([1.5 * result[:, :, :1], result[:, :, 1:]], dim=2)

    return dataclasses.replace(right, run=run)


ORIGINAL = backend.choose_lowering


@pytest.mark.parametrize("verify", ["sites", "full"])
def test_canary_a_wrong_kernel_is_put_back_by_verification(verify: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "choose_lowering", spoilt)
    model = small_llama()
    compiled = attncompile.compile(model, dynamic=True, rest="eager", verify=verify)
    with pytest.warns(FallbackWarning, match="2 of 2 .* keep their original .* is off by .*; please report this"):
        torch.testing.assert_close(calls(compiled, 11, 17), calls(model, 11, 17))


def test_canary_a_wrong_graph_is_put_back_at_its_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "choose_lowering", spoilt)
    monkeypatch.setattr(backend, "verified", lambda decisions, *_, **__: (decisions, ()))
    model = small_llama()
    compiled = attncompile.compile(model, dynamic=True, rest="eager", verify="full")
    with pytest.warns(FallbackWarning, match="the compiled graph runs as it was: result . is off by"):
        torch.testing.assert_close(calls(compiled, 11, 17), calls(model, 11, 17))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_what_is_right_passes_every_verification(attention: str, dtype: torch.dtype) -> None:
    model = small_llama(attention).to(dtype)
    compiled = attncompile.compile(model, dynamic=True, rest="eager", verify="full")
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        calls(compiled, 11, 17)
    assert all(site.operator != "original" for site in attncompile.explain(compiled).sites)


def test_what_autocast_makes_of_a_site_passes_verification() -> None:
    model = small_llama("eager")
    compiled = attncompile.compile(model, dynamic=True, rest="eager", verify="full")
    with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        calls(compiled)
    assert all(site.operator != "original" for site in attncompile.explain(compiled).sites)


def test_a_cache_that_is_written_in_place_is_written_once_under_verification() -> None:
    def step(cache: torch.Tensor, new: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        cache.index_add_(2, place, new)
        return torch.nn.functional.scaled_dot_product_attention(new, cache, cache)

    cache, new, place = torch.randn(1, 2, 9, 8), torch.randn(1, 2, 1, 8), torch.tensor([4])
    other = cache.clone()
    compiled = attncompile.compile(step, rest="eager", verify="full")
    torch.testing.assert_close(compiled(cache, new, place), step(other, new, place))
    assert torch.equal(cache, other)


def test_explain_tells_a_models_own_graphs() -> None:
    torch._dynamo.reset()
    gc.collect()
    others = set(attncompile.explain().compilations)  # Dynamo keeps what follows a break in a function of other tests

    def left() -> tuple[Any, ...]:
        return tuple(made for made in attncompile.explain().compilations if made not in others)

    first, second = (attncompile.compile(small_llama(), dynamic=True, rest="eager") for _ in range(2))
    calls(first), calls(second)
    one, other = attncompile.explain(first), attncompile.explain(second)
    assert len(one.compilations) == len(other.compilations) == 1 and one.compilations != other.compilations
    assert left() == one.compilations + other.compilations
    text = str(one)
    for part in ("graph", "2 attention sites", "model.layers.0.self_attn and 1 more like it", "why: ", "kv_head h // 3",
                 "pass fuse", "FLOP", "B 2, I 11"):  # fmt: skip
        assert part in text, part
    del one, other
    torch._dynamo.reset()
    gc.collect()
    assert attncompile.explain(first).compilations == left() == ()
    assert "no compiled graph" in str(attncompile.explain(first))


def test_every_site_has_its_cost_whatever_its_sizes_are() -> None:
    """A graph of fixed sizes, one of any length, and a site that stays as it was."""
    fixed = attncompile.compile(small_llama(), dynamic=False, rest="eager")
    kept_plan = plan(entry("model.layers.1.self_attn", operator="original", reason="it was slower"))
    kept = attncompile.compile(small_llama(), dynamic=True, rest="eager", plan=kept_plan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        calls(fixed), calls(kept)
    (first, *_), (rewritten, original) = attncompile.explain(fixed).sites, attncompile.explain(kept).sites
    assert first.sizes == {} and original.after == "" and original.sizes == rewritten.sizes != {}
    costs = [site.cost() for site in (first, rewritten, original)]
    assert all(cost is not None and cost.after == costs[0].after for cost in costs)
    assert "FLOP and" in str(attncompile.explain(fixed)) and "at its fixed sizes; " in str(attncompile.explain(fixed))
    assert str(attncompile.explain(kept)).count("  costs ") == 2
    assert dataclasses.replace(first, sizes=None).cost() is None


def test_explain_finds_the_graphs_of_a_module_that_torch_compiled() -> None:
    model, other = small_llama(), small_llama(hidden_act="gelu")
    other.resize_token_embeddings(77)
    compiled = torch.compile(model, backend="attncompile", dynamic=True, options={"rest": "eager"})
    calls(compiled)
    assert len(attncompile.explain(compiled).sites) == len(attncompile.explain(model).sites) == 2
    assert attncompile.explain(other).sites == ()
    with pytest.raises(ValueError, match="does not say which graphs are its own"):
        attncompile.explain(torch.compile(torch.nn.functional.relu, backend="attncompile"))


def test_a_graph_without_attention_is_told_too() -> None:
    """It was compiled and looked at: that is not the same as a model that was never called."""

    def pooled(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bi,bid->bd", (x @ w).softmax(-1), x)

    def both(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.scaled_dot_product_attention(x, x, x)
        torch._dynamo.graph_break()
        return pooled(x, w)

    x, w = torch.randn(2, 5, 8), torch.randn(8)
    for function, sites in ((torch.nn.functional.relu, 0), (pooled, 0), (both, 1)):
        torch._dynamo.reset()
        compiled = attncompile.compile(lambda *given, run=function: run(*given), rest="eager")
        given = (x,) if function is torch.nn.functional.relu else (x, w)
        with warnings.catch_warnings():
            warnings.simplefilter("error", FallbackWarning)
            torch.testing.assert_close(compiled(*given), function(*given))
        explanation = attncompile.explain(compiled)
        text = str(explanation)
        assert len(explanation.sites) == sites and "no attention found among" in text, text
        assert "no compiled graph" not in text
        passed_over = "no attention: softmax over axis 1 of 2 (softmax) with no product before it, read by the product"
        assert (passed_over in text) == (function is not torch.nn.functional.relu), text


def test_an_explanation_is_written_to_a_file(tmp_path: Path) -> None:
    compiled = attncompile.compile(small_llama(), dynamic=True, rest="eager", explain=tmp_path / "attention.txt")
    calls(compiled)
    assert "model.layers.0.self_attn" in (tmp_path / "attention.txt").read_text(encoding="utf-8")


def test_an_explanation_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    model = small_llama()
    compiled = attncompile.compile(model, dynamic=True, rest="eager", explain=folder / "attention.txt")
    folder.rmdir()
    with pytest.warns(FallbackWarning, match=r"what was done is not in .*attention\.txt.*No such file"):
        torch.testing.assert_close(calls(compiled), calls(model))
    assert [site.operator == "original" for site in attncompile.explain(compiled).sites] == [False, False]


def test_what_could_not_be_told_is_not_said_to_be_rewritten(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed:
        def write(self, text: str) -> int:
            raise BrokenPipeError("nobody reads this")

        def flush(self) -> None: ...

    model = small_llama()
    compiled = attncompile.compile(model, dynamic=True, rest="eager", verbose=True)
    expected = calls(model)
    with monkeypatch.context() as patch, pytest.warns(FallbackWarning, match="internal error .BrokenPipeError"):
        patch.setattr("sys.stdout", Closed())
        torch.testing.assert_close(calls(compiled), expected)
    assert attncompile.explain(compiled).sites == ()


def test_fullgraph_and_disable_are_those_of_torch_compile() -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    x = torch.randn(1, 2, 5, 8)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        attncompile.compile(broken, rest="eager", fullgraph=True)(x)
    model = small_llama()
    disabled = attncompile.compile(model, disable=True)
    calls(disabled)
    assert attncompile.explain(disabled).sites == ()


@pytest.mark.parametrize("made", [lambda: backend.attncompile, lambda: backend.Backend(read_options(None))],
                         ids=["function", "object"])  # fmt: skip
def test_cuda_graphs_are_given_back_when_dynamo_is_reset(
    made: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor import cudagraph_trees

    monkeypatch.setattr(backend, "inductor", lambda module, *_: module.forward)
    torch._dynamo.reset()
    given_back: list[str] = []
    monkeypatch.setattr(cudagraph_trees, "reset_cudagraph_trees", lambda: given_back.append("all"))
    calls(torch.compile(small_llama(), backend=made()))
    assert given_back == []
    torch._dynamo.reset()
    assert given_back == ["all"]


@pytest.mark.parametrize(
    ("how", "wanted"),
    [
        ({"mode": "reduce-overhead"}, {"triton.cudagraphs": True}),
        ({"options": {"mode": "reduce-overhead"}}, {"triton.cudagraphs": True}),
        ({"options": {"cudagraphs": True}}, {"triton.cudagraphs": True}),
        ({"options": {"mode": "max-autotune-no-cudagraphs"}}, {"max_autotune": True}),
        ({}, {}),
    ],
    ids=str,
)
def test_modes_and_cuda_graphs_are_for_the_rest(
    how: dict[str, Any], wanted: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[dict[str, Any]] = []

    def inductor(module: torch.fx.GraphModule, inputs: Any, settings: dict[str, Any] | None) -> Callable[..., Any]:
        given.append(settings or {})
        return module.forward

    monkeypatch.setattr(backend, "inductor", inductor)
    calls(torch.compile(small_llama(), backend=backend.attncompile, **how))
    assert len(given) == 1 and wanted.items() <= given[0].items() and bool(wanted) == bool(given[0])


def test_torch_logs_has_a_line_for_each_site(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "attncompile"):
        calls(attncompile.compile(small_llama(), dynamic=True, rest="eager"))
    assert sum("model.layers." in record.message for record in caplog.records) == 2


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"plan": "nowhere/plan.json"}, "option 'plan' .*nowhere"),
        ({"plan": ""}, "option 'plan' .*an empty path"),
        ({"plan": 5}, "option 'plan' .*a Plan, or the path of a plan.json, got 5"),
        ({"budget": True}, "option 'budget' .*it is a number, such as 0.01, got True"),
        ({"fullgraph": True}, r"unknown option 'fullgraph' .*it is an argument of torch.compile itself: .*fullgraph=…"),
        ({"budget": -1.0}, "option 'budget' .*greater than or equal to 0"),
        ({"verify": "site"}, "option 'verify' .*'sites'"),
        ({"passes": "fus"}, r"option 'passes' .*unknown pass 'fus' \(did you mean 'fuse'\?\)"),
        ({"mode": "fastest"}, "option 'mode' .*the modes are .*max-autotune"),
        ({"rest": "eager", "cudagraphs": True}, "cudagraphs is for Inductor, but rest is 'eager'"),
        ({"mode": "max-autotune-no-cudagraphs", "cudagraphs": True}, "contradict each other"),
        ({"explain": ""}, "option 'explain' .*the file that is written"),
        ({"explain": "."}, "option 'explain' .*not a folder"),
        ({"explain": Path("nowhere/at/all.txt")}, "option 'explain' .*no folder 'nowhere/at'"),
        ({5: 1}, r"unknown option 5 .*\(valid: passes"),
        ([("rest", "eager")], "names with values, got .*rest"),
        ({"explan": "x"}, "unknown option 'explan'.*did you mean 'explain'"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(next(iter(value))),
)
def test_a_wrong_option_is_named(given: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_options(given)


def test_a_mode_of_torch_compile_is_the_option() -> None:
    with pytest.raises(Exception, match=r"option 'mode' of the attncompile back end: the modes are .*max-autotune"):
        calls(torch.compile(small_llama(), backend=backend.attncompile, mode="fastest"))
