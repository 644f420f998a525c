"""The three real checkpoints, in both of transformers' implementations, from torch.export and from Dynamo."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from attncompile.frontends.aten import aten_graph
from attncompile.frontends.capture import capture_dynamo, capture_export
from attncompile.frontends.checkpoint import open_model
from attncompile.ir import Position, Project, print_expr
from attncompile.lift import Program, Site, lift_graph
from attncompile.lift.block import rotary_base
from attncompile.lift.sites import find_sites

Implementation = Literal["eager", "sdpa"]
LOWEST = "−3.4028234663852886e+38"


@pytest.fixture(scope="module")
def lifted() -> Callable[[Path, Implementation], Program]:
    """Lift a folder, once per module."""
    known: dict[tuple[Path, Implementation], Program] = {}

    def lift(folder: Path, implementation: Implementation) -> Program:
        if (folder, implementation) not in known:
            opened = open_model(folder, attn_implementation=implementation)
            captured = capture_export(opened.model, *opened.example())
            known[folder, implementation] = lift_graph(aten_graph(captured), opened.name, captured.notes)
        return known[folder, implementation]

    return lift


def said(program: Program) -> list[tuple[str, str, str, str]]:
    """Score, mask, KV head and fill of every site, each different one once."""
    found = []
    for site in program.sites:
        assert site.spec is not None, site.refusal
        attend = site.spec.attend()
        assert attend is not None
        score, mask, kv_head = (print_expr(e, 4) for e in (attend.score, attend.mask, attend.kv_head))
        found.append((score, mask, kv_head, print_expr(attend.fill)))
    return list(dict.fromkeys(found))


def steps(site: Site) -> dict[str, list[str]]:
    """What surrounds a site: the kinds of its steps, by operand."""
    return {name: [step.kind for step in site.steps if step.operand == name] for name in ("q", "k", "v", "out")}


def hidden(implementation: Implementation) -> str:
    """transformers hides with the lowest number in its eager attention, and with a truth mask for sdpa."""
    return LOWEST if implementation == "eager" else "−inf"


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_minilm(minilm_folder: Path, lifted: Callable[..., Program], implementation: Implementation) -> None:
    program = lifted(minilm_folder, implementation)
    assert (len(program.sites), program.count("lifted")) == (6, 6)
    assert said(program) == [("0.1768·s", "attention_mask[b, j] ≠ 0", "h", hidden(implementation))]
    for site in program.sites:
        assert [type(op) for op in site.block] == [Project] * 3
        assert steps(site) == {"q": ["linear"], "k": ["linear"], "v": ["linear"], "out": ["linear"]}
        assert site.source and site.name.startswith("encoder.layer.")
    assert len({site.spec and str(site.spec.types()["q"]) for site in program.sites}) == 1
    assert (
        program.sites[0].spec is not None and str(program.sites[0].spec.types()["q"]) == "[B,12,I,32] float32"
    )


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_smollm2(
    smollm2_folder: Path, lifted: Callable[..., Program], implementation: Implementation
) -> None:
    program = lifted(smollm2_folder, implementation)
    assert (len(program.sites), program.count("lifted")) == (30, 30)
    assert said(program) == [
        ("0.125·s", "j ≤ i and attention_mask[b, j] ≠ 0", "h // 3", hidden(implementation))
    ]
    types = program.sites[0].spec.types() if program.sites[0].spec else {}
    assert (str(types["q"]), str(types["k"])) == ("[B,9,I,64] float32", "[B,3,I,64] float32")
    for site in program.sites:
        rotated = ["linear", "rotary"]
        assert steps(site) == {"q": rotated, "k": rotated, "v": ["linear"], "out": ["linear"]}
        rotary = [op for op in site.block if isinstance(op, Position)]
        assert [(op.tensor, op.convention, op.channels) for op in rotary] == [
            ("q", "half", 64),
            ("k", "half", 64),
        ]
        assert all(rotary_base(program.graph, op) == pytest.approx(100_000) for op in rotary)
        assert sum(isinstance(op, Project) for op in site.block) == 3
    proofs = [site.proof for site in program.sites if site.proof]
    assert proofs[0].shared_with == "" and {proof.shared_with for proof in proofs[1:]} == {
        program.sites[0].name
    }


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_whisper(
    whisper_folder: Path, lifted: Callable[..., Program], implementation: Implementation
) -> None:
    program = lifted(whisper_folder, implementation)
    assert (len(program.sites), program.count("lifted")) == (12, 12)
    kinds: dict[str, set[tuple[str, str, str]]] = {}
    for site in program.sites:
        assert site.spec is not None
        attend, types = site.spec.attend(), site.spec.types()
        assert attend is not None and print_expr(attend.score) == "0.125·s"
        assert steps(site) == {"q": ["linear"], "k": ["linear"], "v": ["linear"], "out": ["linear"]}
        part = ".".join(p for p in site.name.split(".") if not p.isdigit()).removeprefix("model.")
        kinds.setdefault(part, set()).add(
            (print_expr(attend.mask), str(types["q"].size("i")), str(types["k"].size("j")))
        )
    assert kinds["encoder.layers.self_attn"] == {("true", "1500", "1500")}
    assert kinds["decoder.layers.encoder_attn"] == {("true", "I", "1500")}
    ((mask, queries, keys),) = kinds["decoder.layers.self_attn"]
    assert mask.startswith("j ≤ i") and (queries, keys) == ("I", "I")


def from_dynamo(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The graphs that Dynamo makes of a call, captured."""
    captured: list[Any] = []

    def backend(graph_module: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        captured.append(capture_dynamo(graph_module, example_inputs))
        return graph_module.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, dynamic=True)(*args, **kwargs)
    torch._dynamo.reset()
    return captured


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "name",
    [
        "minilm",
        pytest.param("smollm2", marks=pytest.mark.slow),
        pytest.param("whisper", marks=pytest.mark.slow),
    ],
)
def test_dynamo_says_the_same(
    name: str, implementation: Implementation, lifted: Callable[..., Program], request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(f"{name}_folder")
    opened = open_model(folder, attn_implementation=implementation)
    args, kwargs = opened.example()
    programs = [
        lift_graph(aten_graph(c), name, blocks=False) for c in from_dynamo(opened.model, args, kwargs)
    ]
    sites = [site for program in programs for site in program.sites]
    assert {site.status for site in sites} == {"lifted"}, [site.refusal for site in sites]
    exported = lifted(folder, implementation)
    assert len(sites) == len(exported.sites)

    def shapes(found: Any) -> list[tuple[str, str, int]]:
        # captured tensors have other names, and export proves lengths equal that Dynamo does not
        return [
            (print_expr(a.score), print_expr(a.kv_head), len(site.spec.captured()))
            for site in found
            if (a := site.spec.attend())
        ]

    assert sorted(shapes(sites)) == sorted(shapes(exported.sites))


def test_shared_masks_are_interpreted_once(smollm2_folder: Path, lifted: Callable[..., Program]) -> None:
    """The layers of a model share what is not theirs: thirty layers ask little more of the interpreter than
    one.
    """
    graph = lifted(smollm2_folder, "eager").graph
    fresh = aten_like(graph)
    find_sites(fresh)
    known = sum(len(elements) for elements in fresh._elements.values())
    assert known < 3 * len(graph.nodes)


def aten_like(graph: Any) -> Any:
    """The same graph without what an earlier lifting has worked out."""
    import dataclasses

    return dataclasses.replace(graph)
