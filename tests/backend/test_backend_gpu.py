"""The back end on a CUDA device: the same models, with generated kernels."""

from __future__ import annotations

import warnings

import pytest
import torch

from attncompile import backend
from attncompile.backend import FallbackWarning, attncompile
from attncompile.backend.choose import choose_lowering
from attncompile.backend.rewrite import Decision
from attncompile.codegen import gluon
from attncompile.codegen.triton import load
from attncompile.codegen.triton.lower import on_hopper
from attncompile.ir import parse_spec
from attncompile.verify import derive_tolerance, require_within
from tests.backend.test_backend import seen_by, small_bert, small_llama, tokens

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("rest", ["eager", "inductor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_padded_decoder_runs_generated_kernels(
    attention: str, dtype: torch.dtype, rest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    decisions: list[Decision] = []
    monkeypatch.setattr(backend, "decide", seen_by(decisions))
    model = small_llama(attention).to("cuda", dtype)
    compiled = torch.compile(model, backend=attncompile, dynamic=True, options={"rest": rest})
    exact = small_llama("sdpa").double().to("cuda")
    exact.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        for length in (33, 120):
            call = {name: tensor.cuda() for name, tensor in tokens(2, length).items()}
            kept = call["attention_mask"].bool()
            reference, eager = exact(**call).logits[kept], model(**call).logits[kept]
            bound = derive_tolerance(reference, eager, 2 * length).bound
            require_within(compiled(**call).logits[kept], reference, bound, f"logits at {length}")
    assert decisions and all(d.lowering is not None and d.lowering.target == "triton" for d in decisions)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_generation_gives_the_tokens_of_eager(attention: str) -> None:
    model = small_llama(attention).cuda()
    call = {name: tensor.cuda() for name, tensor in tokens(2, 7).items()}
    with torch.no_grad():
        expected = model.generate(**call, max_new_tokens=8, do_sample=False)
        model.forward = torch.compile(
            model.forward, backend=attncompile, dynamic=True, options={"rest": "eager"}
        )
        assert torch.equal(model.generate(**call, max_new_tokens=8, do_sample=False), expected)


def test_an_encoder_equals_eager() -> None:
    model = small_bert().cuda()
    compiled = torch.compile(model, backend=attncompile, dynamic=True, options={"rest": "eager"})
    call = {name: tensor.cuda() for name, tensor in tokens(3, 40, "right").items()}
    exact = small_bert().double().cuda()
    exact.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    with torch.no_grad():
        reference, eager = exact(**call).last_hidden_state, model(**call).last_hidden_state
        bound = derive_tolerance(reference, eager, 40).bound
        require_within(compiled(**call).last_hidden_state, reference, bound, "the encoder's last state")


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("channels", [64, 128])
def test_sizes_choose_between_sdpa_and_the_generated_kernel(channels: int, dynamic: bool) -> None:
    heads = 2048 // channels
    spec = parse_spec(
        f"x   attend  q,k,v[B,{heads},I,{channels}]  bfloat16\n"
        "  score  0.125·s\n  mask   j ≤ i\n  norm   softmax (float32)"
    )
    lowering = choose_lowering(spec, "cuda")
    run = torch.compile(lambda *tensors: lowering.run(*tensors) * 1.0, dynamic=dynamic, fullgraph=True)
    module = load(gluon.generate(spec, queries=4200)) if on_hopper(torch.device("cuda")) else None
    for length in (130, 4200):
        stored = [torch.randn(1, length, heads, channels, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
        tensors = [tensor.transpose(1, 2) for tensor in stored]
        with torch.no_grad():
            found = run(*tensors)
            sdpa = torch.nn.functional.scaled_dot_product_attention(*tensors, is_causal=True, scale=0.125)
            exact = torch.nn.functional.scaled_dot_product_attention(
                *(tensor.double() for tensor in tensors), is_causal=True, scale=0.125
            )
            require_within(found, exact, derive_tolerance(exact, sdpa, 4 * length).bound, f"{length} queries")
            if module is not None:
                same = torch.equal(found, module(*tensors) if length > 4096 else sdpa)
                assert same, f"{length} queries were not computed by the one that is faster for them"
