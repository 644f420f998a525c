"""What a back end that is left on must not do: leak, or change what belongs to others."""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import attncompile as package
from attncompile.backend import Backend, FallbackWarning, attncompile, read_options
from attncompile.backend.compilation import alive
from attncompile.frontends.torch_internals import inductor
from attncompile.verify import require_as_good_as_eager
from tests.apart import run_apart


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Attention(nn.Module):
    """Attention with a window, as research code spells it."""

    def __init__(self, channels: int = 16, heads: int = 2, window: int = 5) -> None:
        super().__init__()
        self.project = nn.Linear(channels, 3 * channels)
        self.heads, self.window = heads, window

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.project(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        position = torch.arange(x.shape[1], device=x.device)
        ahead = position[None, :] > position[:, None]
        behind = position[None, :] <= position[:, None] - self.window
        scores = (query @ key.mT / query.shape[-1] ** 0.5).masked_fill(ahead | behind, float("-inf"))
        return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)


def model_of(number: int) -> Attention:
    """One of several models that differ in sizes, window and weights."""
    torch.manual_seed(number)
    return Attention(8 * (number + 2), 2, 3 + number).eval()


def inputs_of(model: Attention, length: int = 11) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randn(2, length, model.project.in_features, generator=generator)


def require_same(actual: torch.Tensor, model: Attention, x: torch.Tensor) -> None:
    """As near to the model in float64 as the model itself is."""
    with torch.no_grad():
        exact, expected = _double(model)(x.double()), model(x)
    require_as_good_as_eager(actual, exact, expected, x.shape[-1] + x.shape[1], "the compiled model")


def _double(model: Attention) -> Attention:
    wide = Attention(model.project.in_features, model.heads, model.window).double()
    wide.load_state_dict(model.state_dict())
    return wide


def compiled_of(model: nn.Module, **options: Any) -> Any:
    """Compiled with our back end, and everything but attention as it is unless said."""
    return torch.compile(model, backend=attncompile, options={"rest": "eager", **options})


# --- leaks --------------------------------------------------------------------------------------------------

HELD = (torch.fx.GraphModule, torch.fx.Graph, torch.fx.Node, nn.Module)


def held() -> Counter[str]:
    """How many graphs, nodes, modules, tensors and objects of ours are alive, by type."""
    gc.collect()
    found: Counter[str] = Counter()
    for thing in gc.get_objects():
        kind = type(thing)
        ours = str(getattr(kind, "__module__", "")).startswith("attncompile.")
        if ours or issubclass(kind, (*HELD, torch.Tensor)):
            found[f"{kind.__module__}.{kind.__qualname__}"] += 1
    return found


def resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def as_it_is(module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """A back end that does nothing: what Dynamo itself leaves behind is not ours."""
    return module.forward


def cycle(backend: Any, cycles: int) -> None:
    """Compile, call and forget a model of a mebibyte again and again: whatever kept it would show."""
    for _ in range(cycles):
        with torch.no_grad():
            torch.compile(Attention(296).eval(), backend=backend)(torch.randn(1, 7, 296))
        torch._dynamo.reset()


def inductor_alone(module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """Inductor without us: what it leaves behind is not ours either."""
    return inductor(module, inputs)


def compile_and_reset(cycles: int, rest: str = "eager") -> None:
    """AssertionError when something of a model that was compiled and forgotten stays."""
    grown: list[Counter[str]] = []
    more: list[int] = []
    for backend in (as_it_is if rest == "eager" else inductor_alone, Backend(read_options({"rest": rest}))):
        cycle(backend, 5)  # caches fill
        before, memory = held(), resident()
        cycle(backend, cycles)
        grown.append(held() - before)
        more.append(resident() - memory)
    assert not grown[1] - grown[0] and not alive(), f"left behind: {grown[1] - grown[0]}, {alive()}"
    own = more[1] if rest == "eager" else more[1] - more[0]
    assert own < cycles * 2**20 / 2, f"{own} bytes more after {cycles} cycles"


@pytest.mark.parametrize("cycles", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_compiling_and_resetting_leaves_nothing_behind(cycles: int) -> None:
    run_apart(f"from tests.backend.test_hygiene import compile_and_reset; compile_and_reset({cycles})")


@pytest.mark.slow
def test_compiling_with_inductor_and_resetting_leaves_no_more_behind_than_inductor() -> None:
    code = """
from torch._functorch import config as autograd
from torch._inductor import config
from tests.backend.test_hygiene import compile_and_reset

with config.patch(fx_graph_cache=False), autograd.patch(enable_autograd_cache=False):
    compile_and_reset(8, "inductor")
"""
    run_apart(code)


@pytest.mark.slow
def test_compiling_with_inductors_caches_and_resetting_leaves_no_more_behind_than_inductor(tmp_path: Path) -> None:
    """As people run it: what Inductor made is read from its caches from the second time on."""
    code = "from tests.backend.test_hygiene import compile_and_reset; compile_and_reset(200, 'inductor')"
    run_apart(code, TORCHINDUCTOR_CACHE_DIR=str(tmp_path))


# --- what belongs to others ---------------------------------------------------------------------------------


def global_state() -> dict[str, Any]:
    """Everything of torch's and Python's that a user may have set, and that a compilation must leave alone."""
    return {
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "random": torch.get_rng_state().tolist(),
        "sdp": (
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
            torch.backends.cuda.cudnn_sdp_enabled(),
        ),
        "mkldnn": torch.backends.mkldnn.enabled,
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "autocast": torch.is_autocast_enabled("cpu"),
        "dynamo": torch._dynamo.config.get_config_copy(),
        "inductor": torch._inductor.config.get_config_copy(),
        "warnings": list(warnings.filters),
        "logging": {name: logging.getLogger(name).level for name in ("", "torch", "attncompile", "transformers")},
        "disabled": logging.root.manager.disable,
        "environment": dict(os.environ),
        "recursion": sys.getrecursionlimit(),
        "hooks": (sys.excepthook, threading.excepthook),
        "path": list(sys.path),
    }


@pytest.mark.parametrize("rest", ["eager", "inductor"])
@pytest.mark.parametrize("verify", ["off", "full"])
def test_global_state_is_left_as_it_was_found(rest: str, verify: str) -> None:
    import torch._inductor.config

    model = model_of(0)
    x = inputs_of(model)
    # Inductor sets things of its own when it is first used; those are its business
    torch.compile(model, backend=rest)(x)
    torch._dynamo.reset()
    before = global_state()
    with torch.no_grad():
        compiled_of(model, rest=rest, verify=verify)(x)
    after = global_state()
    assert [name for name in before if before[name] != after[name]] == []


CACHED = """
import json, sys
import torch, torch._inductor.config
from torch._dynamo.utils import counters
from tests.backend.test_hygiene import Attention, inputs_of, model_of
import attncompile

torch._inductor.config.fx_graph_cache = True
torch._functorch.config.enable_autograd_cache = True
if len(sys.argv) > 1 and sys.argv[1] == "load":
    torch.compiler.load_cache_artifacts(open(sys.argv[2], "rb").read())
model = model_of(1)
compiled = attncompile.compile(model)
with torch.no_grad():
    result = compiled(inputs_of(model))
if len(sys.argv) > 1 and sys.argv[1] == "save":
    open(sys.argv[2], "wb").write(torch.compiler.save_cache_artifacts()[0])
sites = attncompile.explain(compiled).compilations[0].sites
print(json.dumps({
    "result": result.tolist(),
    "operators": [site.operator for site in sites],
    "hits": counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"],
}))
"""


def cached_run(folder: Path, *arguments: str, **environment: str) -> dict[str, Any]:
    """A process that compiles with Inductor's caches in a folder."""
    printed = run_apart(CACHED, *arguments, TORCHINDUCTOR_CACHE_DIR=str(folder), **environment)
    answer: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return answer


def require_cached(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first["operators"] == second["operators"] == ["blockwise"]
    assert first["hits"] == 0 and second["hits"] > 0
    assert first["result"] == second["result"]
    require_same(torch.tensor(second["result"]), model_of(1), inputs_of(model_of(1)))


@pytest.mark.parametrize("precompiles", ["0", pytest.param("1", marks=pytest.mark.slow)])
def test_a_second_process_with_caches_rewrites_too(tmp_path: Path, precompiles: str) -> None:
    """With ``torch._dynamo.config.caching_precompile`` too, which keeps Dynamo's own work and asks for no back end."""
    first, second = (cached_run(tmp_path / "cache", TORCH_CACHING_PRECOMPILE=precompiles) for _ in range(2))
    require_cached(first, second)


@pytest.mark.slow
def test_cache_artifacts_go_to_another_machine(tmp_path: Path) -> None:
    artifacts = str(tmp_path / "artifacts")
    require_cached(cached_run(tmp_path / "here", "save", artifacts), cached_run(tmp_path / "there", "load", artifacts))


def places_of_passes() -> list[str]:
    """Settings of Inductor that hold one pass over the graph, whatever this version calls them."""
    import torch._inductor.config as config

    known = config.get_config_copy()
    names = [name for name in known if name.endswith(("_custom_pre_pass", "_custom_post_pass", "_custom_pass"))]
    return [name for name in names if not name.startswith("_") and known[name] is None]


@pytest.mark.parametrize("rest", ["inductor", "alone"])
@pytest.mark.parametrize("trains", [False, True])
def test_passes_that_a_user_gave_inductor_stay_in_force(rest: str, trains: bool) -> None:
    """Those that run without us run with us, and nothing is put in their place. (``alone``: the list is not empty.)"""
    import torch._inductor.config as config
    from torch._inductor.custom_graph_pass import CustomGraphPass

    seen: set[str] = set()

    class Recorded(CustomGraphPass):
        def __init__(self, where: str) -> None:
            self.where = where

        def __call__(self, graph: torch.fx.Graph) -> None:
            seen.add(self.where)

        def uuid(self) -> str:
            return f"recorded {self.where}"

    given = {place: Recorded(place) for place in places_of_passes()}
    model = model_of(0)
    with config.patch(fx_graph_cache=False, **given), torch.set_grad_enabled(trains):
        found = torch.compile(model, backend=inductor_alone if rest == "alone" else attncompile)(inputs_of(model))
        assert all(getattr(config, place) is own for place, own in given.items())
    always = {"post_grad_custom_pre_pass", "post_grad_custom_post_pass", "pre_grad_custom_pass"}
    joint = {"joint_custom_pre_pass", "joint_custom_post_pass"}  # of forward and backward together
    assert (always | joint if trains else always) <= seen
    require_same(found.detach(), model, inputs_of(model))


def test_a_pass_of_another_that_changes_the_graph_has_its_effect() -> None:
    """As torchao's do, which replace what they know: here every sum of a bias becomes a difference."""
    import torch._inductor.config as config
    from torch._inductor.pattern_matcher import Arg, CallFunction, PatternMatcherPass, register_graph_pattern

    patterns = PatternMatcherPass("negated")

    @register_graph_pattern(CallFunction(torch.ops.aten.addmm.default, Arg(), Arg(), Arg()), pass_dict=patterns)
    def negated(match: Any, bias: Any, left: Any, right: Any) -> None:
        match.replace_by_example(lambda bias, left, right: left @ right - bias, [bias, left, right])

    model, other = model_of(0), model_of(0)
    with torch.no_grad():
        other.project.bias.neg_()
        with config.patch(fx_graph_cache=False, post_grad_custom_pre_pass=patterns.apply):
            compiled = package.compile(model)
            result = compiled(inputs_of(model))
    assert [site.operator for site in package.explain(compiled).sites] == ["blockwise"]
    require_same(result, other, inputs_of(model))


# --- how torch.compile is used ------------------------------------------------------------------------------


def test_models_with_different_options_live_in_one_process() -> None:
    model = model_of(1)
    x = inputs_of(model, 24)
    plain = package.compile(model, rest="eager")
    narrow = package.compile(model, rest="eager", passes="fuse,sparsify.window(size=2, sinks=0)")
    with torch.no_grad():
        for _ in range(2):
            require_same(plain(x), model, x)
            windowed = Attention(model.project.in_features, model.heads, 2)
            windowed.load_state_dict(model.state_dict())
            require_same(narrow(x), windowed, x)
    first, second = package.explain(plain), package.explain(narrow)
    applied = [found.compilations[0].sites[0].applied for found in (first, second)]
    assert "sparsify" not in str(applied[0]) and "sparsify" in str(applied[1])


def broken(model: Attention) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that Dynamo takes in two pieces."""

    def run(x: torch.Tensor) -> torch.Tensor:
        first = model(x)
        torch._dynamo.graph_break()
        return model(first)

    return run


def test_both_sides_of_a_graph_break_are_rewritten() -> None:
    model = model_of(0)
    x = inputs_of(model)
    compiled = package.compile(broken(model), rest="eager")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        result = compiled(x)
        middle = model(x)
    require_same(result, model, middle)
    assert [len(c.sites) for c in package.explain(compiled).compilations] == [1, 1]


@pytest.mark.parametrize("rest", ["eager", "inductor"])
def test_what_was_done_is_known_as_long_as_the_graph(rest: str) -> None:
    model = model_of(0)
    compiled = package.compile(model, rest=rest)
    with torch.no_grad():
        compiled(inputs_of(model))
    gc.collect()
    explained = package.explain(compiled).compilations
    assert [site.operator for compilation in explained for site in compilation.sites] == ["blockwise"]
    numbers = {compilation.number for compilation in explained}
    del compiled, explained
    torch._dynamo.reset()
    gc.collect()
    assert not numbers & {compilation.number for compilation in alive()}


@pytest.mark.parametrize("rest", ["eager", "inductor"])
def test_one_graph_in_inference_mode_with_marked_sizes(rest: str) -> None:
    model = model_of(2)
    compiled = torch.compile(model, backend=attncompile, fullgraph=True, options={"rest": rest})
    with torch.inference_mode():
        first = inputs_of(model, 12)
        torch._dynamo.mark_dynamic(first, 1)
        require_same(compiled(first), model, first.clone())
        with torch._dynamo.config.patch(error_on_recompile=True):
            for length in (13, 40):
                x = inputs_of(model, length)
                require_same(compiled(x), model, x)
