"""Attention from its statement."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

import attncompile
from attncompile.verify import derive_tolerance, require_within

PACKED = """
packed   attend  q[1,8,I,16]  k,v[1,2,I,16]  float32
  score   0.25·s
  mask    document[i] = document[j] and j ≤ i
  kv_head h // 4
  norm    softmax (float32), empty rows zero
  given   document[I]:int32
"""

VARIANTS = {
    "packed": PACKED,
    "alibi": "x   attend  q,k,v[B,8,I,16]  float32\n  score  0.25·s + slope[h]·(j − i)\n  mask   j ≤ i\n"
    "  norm   softmax (float32)\n  given  slope[8]:float32",
    "softcap": "x   attend  q[B,4,I,16]  k[B,4,J,16]  v[B,4,J,24]  float32\n  score  20.0·tanh(0.0125·s)\n"
    "  norm   softmax (float32)",
    "sigmoid": "x   attend  q,k,v[B,4,I,16]  float32\n  score  0.25·s − 3.0\n  mask   j ≤ i\n"
    "  norm   sigmoid (float32)",
    "window": "x   attend  q,k,v[B,4,I,16]  float32\n  score  0.25·s\n  mask   j ≤ i and j > i − 9\n"
    "  norm   softmax (float32)",
}


def cumulative(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def documents(cu_seqlens: torch.Tensor) -> torch.Tensor:
    numbers = torch.arange(len(cu_seqlens) - 1, dtype=torch.int32)
    return torch.repeat_interleave(numbers, cu_seqlens.diff())


def inputs_of(spec: attncompile.Spec, **sizes: int) -> dict[str, torch.Tensor]:
    from attncompile.ir.sample import random_tensors

    return random_tensors(spec, {"B": 2, "I": 37, "J": 41, **sizes})


def require_as_plain(
    found: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor, what: str, terms: int = 48
) -> None:
    """As near to float64 as the plain computation, but for one more sum of so many terms in another order."""
    require_within(found, exact, derive_tolerance(exact, plain, terms).bound, what)


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_values_and_gradients_are_those_of_the_definition(name: str) -> None:
    attend = attncompile.attention(VARIANTS[name])
    tensors = inputs_of(attend.stated)
    if "document" in tensors:
        tensors["document"] = documents(cumulative([5, 1, 20, 11]))
    names = [key for key, tensor in tensors.items() if tensor.is_floating_point()]
    for key in names:
        tensors[key].requires_grad_()
    found, plain = attend(**tensors), attend.reference(**tensors, dtype=torch.float32)
    wide = {key: tensor.detach().double().requires_grad_() if key in names else tensor
            for key, tensor in tensors.items()}  # fmt: skip
    (exact,) = attend.stated.interpret(wide)
    assert isinstance(found, torch.Tensor) and isinstance(plain, torch.Tensor)
    require_as_plain(found, plain, exact, "output")
    given = torch.randn_like(found)
    forms = ((found, tensors, given), (plain, tensors, given), (exact, wide, given.double()))
    gradients = [torch.autograd.grad(out, [inputs[key] for key in names], cotangent)
                 for out, inputs, cotangent in forms]  # fmt: skip
    for key, *three in zip(names, *gradients, strict=True):
        require_as_plain(*three, key)


def test_packed_sequences_are_attention_of_each_alone() -> None:
    lengths = [3, 30, 1, 14]
    tensors = inputs_of(attncompile.parse_spec(PACKED), I=sum(lengths))
    cu_seqlens = cumulative(lengths)
    found = attncompile.attention(PACKED)(tensors["q"], tensors["k"], tensors["v"], document=documents(cu_seqlens))
    for start, stop in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        query, key, value = (tensors[name][:, :, start:stop] for name in "qkv")
        parts, attend = (query, key, value), torch.nn.functional.scaled_dot_product_attention
        plain = attend(*parts, is_causal=True, enable_gqa=True)
        exact = attend(*(part.double() for part in parts), is_causal=True, enable_gqa=True)
        require_as_plain(found[:, :, start:stop], plain, exact, f"tokens {start} to {stop}")


def test_it_is_a_part_of_a_compiled_model() -> None:
    attend = attncompile.attention(PACKED)

    def block(hidden: torch.Tensor, document: torch.Tensor) -> torch.Tensor:
        query = hidden.unflatten(-1, (8, 16)).transpose(1, 2)
        return attend(query, query[:, :2], query[:, 2:4], document=document).transpose(1, 2).flatten(2) * 2.0

    compiled = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (20, 33):
        hidden, document = torch.randn(1, length, 128), documents(cumulative([length - 7, 7]))
        torch.testing.assert_close(compiled(hidden, document), block(hidden, document))


@pytest.mark.parametrize("document", [
    torch.zeros(1, dtype=torch.int32), torch.zeros(12, dtype=torch.int32), torch.zeros(9), torch.zeros(3, 3),
])  # fmt: skip
def test_a_compiled_model_refuses_what_a_call_refuses(document: torch.Tensor) -> None:
    """A single number for all tokens would be broadcast otherwise, and be wrong."""
    attend = attncompile.attention(PACKED)
    query, key = torch.randn(1, 8, 9, 16), torch.randn(1, 2, 9, 16)
    compiled = torch.compile(lambda given: attend(query, key, key, document=given), backend="aot_eager", dynamic=True)
    with pytest.raises(Exception, match="document of packed"):
        compiled(document)


def test_passes_are_run_or_refused() -> None:
    attend = attncompile.attention(VARIANTS["window"], passes="sparsify.window(size=4)")
    assert "i − 4" in str(attend) and "i − 4" not in str(attend.stated)
    with pytest.raises(ValueError, match="pass regroup\\.boxes does not apply to packed: "):
        attncompile.attention(PACKED, passes="regroup.boxes")
    assert attend.lowering("cpu").reason


@pytest.mark.parametrize(("changed", "message"), [
    ({"document": None}, "packed takes q, k, v, document; document is missing"),
    ({"documents": torch.zeros(9)}, "'documents' is none of them"),
    ({"document": torch.zeros(9)}, "document of packed is float32, but is stated as int32"),
    ({"document": torch.zeros(8, dtype=torch.int32)}, "axis .* of document is 8, but I is 9"),
    ({"k": torch.zeros(1, 4, 9, 16)}, "axis g of k is 4, but should be 2"),
    ({"k": 3}, "k of packed is int 3, not a tensor"),
    ({"q": torch.zeros(1, 8, 9, 16, device="meta")}, "k is on cpu, q on meta"),
])  # fmt: skip
def test_wrong_inputs_are_named(changed: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {name: torch.zeros(1, 8 if name == "q" else 2, 9, 16) for name in "qkv"}
    given["document"] = torch.zeros(9, dtype=torch.int32)
    given = {name: tensor for name, tensor in {**given, **changed}.items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        attncompile.attention(PACKED)(**given)


def test_wrong_statements_are_named() -> None:
    with pytest.raises(ValueError, match="mask"):
        attncompile.attention(PACKED.replace("j ≤ i", "j ≤ "))
    with pytest.raises(ValueError, match="takes q, k, v, document; 5 tensors were given"):
        attncompile.attention(PACKED)(*[torch.zeros(1)] * 5)


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(Path(__file__).parents[1] / "examples" / "own_attention.py"), run_name="__main__")
    assert "tokens 701 to 1500" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_on_a_card(name: str) -> None:
    attend = attncompile.attention(VARIANTS[name].replace("float32\n  score", "float16\n  score"))
    tensors = inputs_of(attend.stated, I=300, J=333)
    if "document" in tensors:
        tensors["document"] = documents(cumulative([100, 1, 150, 49]))
    tensors = {key: tensor.cuda() for key, tensor in tensors.items()}
    found, exact = attend(**tensors), attend.reference(**tensors)
    plain = attend.reference(**tensors, dtype=torch.float16)
    assert isinstance(found, torch.Tensor) and isinstance(plain, torch.Tensor) and isinstance(exact, torch.Tensor)
    require_as_plain(found, plain, exact, name, terms=333)
