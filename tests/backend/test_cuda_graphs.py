"""CUDA graphs of a compiled decoder, replayed again and again with other inputs: numbers as without them, and as eager.

On a CPU Inductor records none: the same calls run there, and give the same numbers.
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import StaticCache

import attncompile
from attncompile.backend import FallbackWarning
from attncompile.verify import derive_tolerance, require_within
from tests.backend.test_calls import InFloat64
from tests.backend.test_generation import require_rewritten, small

ROOT = Path(__file__).resolve().parents[2]

LONGEST_SUM = 64
"""Terms of the longest sum in the model: the inner channels of its perceptrons."""

ROOM, PROMPT, STEPS = 24, 6, 9

DEVICES = [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)]

GRAPHS: dict[str, dict[str, Any]] = {
    "an option": {"options": {"cudagraphs": True}},
    "a mode of torch.compile": {"mode": "reduce-overhead"},
}
WITHOUT: dict[str, Any] = {"options": {}}


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def compiled(function: Callable[..., Any], how: dict[str, Any]) -> Callable[..., Any]:
    """Compiled whole, with fixed sizes, as CUDA graphs want it."""
    return torch.compile(function, backend=attncompile.backend.attncompile, fullgraph=True, dynamic=False, **how)


def require_recorded(device: str) -> None:
    """On a GPU: graphs were recorded, and none was given up, such as for an input that is written in place."""
    if device == "cuda":
        from torch._inductor.cudagraph_trees import get_manager

        assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
        manager = get_manager(torch.cuda.current_device(), create_if_none_exists=False)
        assert manager is not None and manager.new_graph_id().id > 0, "no CUDA graph was recorded"


@dataclass(frozen=True)
class Text:
    """What a decoder reads: a prompt whose last row is padded at the left, and then a token at a time.

    Attributes:
        prompt: ``[rows, PROMPT]``.
        mask: ``[rows, ROOM]``: as long as the cache, so that all steps have the same sizes.
        following: ``[rows, STEPS]``.
    """

    prompt: torch.Tensor
    mask: torch.Tensor
    following: torch.Tensor


def small_of(kind: str, device: str, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny decoder, whose attention SDPA computes unless its file has its own."""
    return small(kind, "sdpa" if kind == "llama" else "eager").to(device, dtype)


def text(device: str, number: int, rows: int = 2) -> Text:
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(3, 99, (rows, PROMPT + STEPS), generator=generator).to(device)
    mask = torch.ones(rows, ROOM, dtype=torch.int64, device=device)
    mask[-1, : 1 + number % 3] = 0
    return Text(ids[:, :PROMPT], mask, ids[:, PROMPT:])


class Decoder:
    """A decoder with a static cache that stays where it is, and is filled anew by each text."""

    def __init__(self, kind: str, device: str, dtype: torch.dtype = torch.float32) -> None:
        self.model = small_of(kind, device, dtype)
        self.cache = StaticCache(self.model.config, max_cache_len=ROOM)

    def step(self, token: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Logits ``[rows, 1, vocabulary]`` of a token behind what the cache holds, which it adds to."""
        found = self.model(input_ids=token, attention_mask=mask, past_key_values=self.cache, use_cache=True)
        return found.logits  # type: ignore[no-any-return]

    def read(self, given: Text, step: Callable[..., torch.Tensor]) -> torch.Tensor:
        """Logits of all steps ``[rows, STEPS, vocabulary]``; the prompt is read eagerly, as transformers has it."""
        made = []
        with torch.no_grad():
            self.cache.reset()
            self.step(given.prompt, given.mask)
            for place in range(STEPS):
                torch.compiler.cudagraph_mark_step_begin()
                # a replay writes where the last one wrote
                made.append(step(given.following[:, place : place + 1].contiguous(), given.mask).clone())
        return torch.cat(made, dim=1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("how", GRAPHS)
@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_steps_with_a_static_cache_are_replayed(kind: str, how: str, device: str) -> None:
    """Three texts one after another through the same graphs: with and without them, and in float64.

    No sliding window: such a cache counts in Python, and what counts in Python is compiled for each number.
    """
    plain, exact = Decoder(kind, device), Decoder(kind, device, torch.float64)
    recorded, unrecorded = Decoder(kind, device), Decoder(kind, device)
    steps = compiled(recorded.step, GRAPHS[how]), compiled(unrecorded.step, WITHOUT)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        for number in range(3):
            given = text(device, number)
            with InFloat64():
                truth = exact.read(given, exact.step)
            eager = plain.read(given, plain.step)
            bound = derive_tolerance(truth, eager, LONGEST_SUM).bound
            found, other = recorded.read(given, steps[0]), unrecorded.read(given, steps[1])
            require_within(found, truth, bound, f"text {number} with CUDA graphs")
            require_within(other, truth, bound, f"text {number} without")
    require_rewritten(recorded.model)
    require_recorded(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("how", GRAPHS)
def test_generate_with_a_static_cache(how: str, device: str) -> None:
    """As transformers calls it: a prompt and its steps, twice, with the tokens of the model as it is."""
    if device == "cuda":
        require_recorded_by_inductor()
    generated_with(attncompile.backend.attncompile, GRAPHS[how], device)


def generated_with(backend: Callable[..., Any] | str, how: dict[str, Any], device: str) -> None:
    """The test's body, of which Inductor by itself is asked for the same."""
    model = small_of("llama", device)
    calls = [
        {"input_ids": text(device, number).prompt, "attention_mask": text(device, number).mask[:, :PROMPT]}
        for number in range(2)
    ]
    searched = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False}
    expected = [model.generate(**call, **searched) for call in calls]
    model.forward = torch.compile(model.forward, backend=backend, fullgraph=True, dynamic=False, **how)
    static = {"cache_implementation": "static", "disable_compile": True}  # or transformers compiles on a GPU by itself
    found = [model.generate(**call, **searched, **static) for call in calls]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    if backend != "inductor":
        sites = attncompile.explain(model).sites
        assert sites and all(site.operator != "original" for site in sites)


def require_recorded_by_inductor() -> None:
    """Skip where Inductor, without us, cannot record what generate() calls.

    PyTorch 2.11 ends there in a segmentation fault: a kernel is launched on an input that is no tensor. So it is tried
    in a process of its own.
    """
    body = (
        "from tests.backend.test_cuda_graphs import generated_with\n"
        "generated_with('inductor', {'mode': 'reduce-overhead'}, 'cuda')\n"
    )
    tried = subprocess.run([sys.executable, "-c", body], cwd=ROOT, capture_output=True, text=True, check=False)
    if tried.returncode:
        said = (tried.stderr.strip().splitlines() or [""])[-1][:200]
        pytest.skip(f"PyTorch {torch.__version__}: Inductor alone ends with exit status {tried.returncode}: {said}")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("how", GRAPHS)
@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_a_training_step_is_replayed(kind: str, how: str, device: str) -> None:
    """Losses and gradients of five batches, of which the first two warm up and record."""
    plain, recorded, unrecorded = (small_of(kind, device).train() for _ in range(3))
    exact = small_of(kind, device, torch.float64).train()

    def loss_of(model: Any) -> Callable[..., torch.Tensor]:
        def loss(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            labels = torch.where(mask[:, :-1] == 1, ids[:, 1:], -100)  # nobody learns from a row of padding
            return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten())

        return loss

    functions = {
        "eager": (plain, loss_of(plain)),
        "with CUDA graphs": (recorded, compiled(loss_of(recorded), GRAPHS[how])),
        "without": (unrecorded, compiled(loss_of(unrecorded), WITHOUT)),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        for number in range(5):
            given = text(device, number)
            with InFloat64():
                exactly = trained(exact, loss_of(exact), given)
            made = {name: trained(*entry, given) for name, entry in functions.items()}
            for place, (truth, eager) in enumerate(zip(exactly, made["eager"], strict=True)):
                bound = derive_tolerance(truth, eager, LONGEST_SUM).bound
                for name in ("with CUDA graphs", "without"):
                    require_within(made[name][place], truth, bound, f"batch {number}, tensor {place}, {name}")
    require_rewritten(recorded)
    require_recorded(device)


def trained(model: Any, loss_of: Callable[..., torch.Tensor], given: Text) -> list[torch.Tensor]:
    """Copies of the loss of a batch and of its gradients."""
    model.zero_grad(set_to_none=True)
    torch.compiler.cudagraph_mark_step_begin()
    loss = loss_of(given.prompt, given.mask[:, :PROMPT])
    loss.backward()
    return [loss.detach().clone(), *(value.grad.clone() for value in model.parameters() if value.grad is not None)]


def test_what_a_cache_keeps_in_place_is_known_to_what_records() -> None:
    """Inductor gives a graph up that writes to its inputs, but for those that stay where they are."""
    decoder, kept = Decoder("llama", "cpu"), []

    def rest(module: torch.fx.GraphModule, inputs: Any, settings: Any) -> Callable[..., Any]:
        inputs_of_graph = [node for node in module.graph.nodes if node.op == "placeholder"]
        kept.append([node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type") for node in inputs_of_graph])
        return module.forward

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attncompile.backend, "inductor", rest)
        given = text("cpu", 0)
        decoder.read(given, compiled(decoder.step, GRAPHS["an option"]))
    (marks,) = kept
    cached = 3 * len(decoder.cache.layers)  # keys, values, and how many there are
    own = len([*decoder.model.parameters(), *decoder.model.buffers()])
    assert sum(mark is not None for mark in marks) == cached + own - 1  # a second table of frequencies is not read
