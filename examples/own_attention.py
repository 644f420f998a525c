"""A variant of one's own from its statement: sequences of different lengths in one row, a window, a softcap.

python examples/own_attention.py
"""

from __future__ import annotations

import torch

import attncompile

STATEMENT = """
variant   attend  q[1,8,I,64]  k,v[1,2,I,64]  float32
  score   30.0·tanh(s·0.125 / 30.0)
  mask    document[i] = document[j] and j ≤ i and j > i − 256
  kv_head h // 4
  norm    softmax (float32), empty rows zero
  given   document[I]:int32
"""


def main() -> None:
    attend = attncompile.attention(STATEMENT)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{attend}\n\non {device}: {attend.lowering(device).operator}\n{attend.lowering(device).reason}\n")

    cu_seqlens = torch.tensor([0, 700, 701, 1500])
    numbers = torch.arange(len(cu_seqlens) - 1, dtype=torch.int32)
    document = torch.repeat_interleave(numbers, cu_seqlens.diff()).to(device)
    length = int(cu_seqlens[-1])
    query, key, value = (torch.randn(1, heads, length, 64, device=device, requires_grad=True) for heads in (8, 2, 2))

    out = attend(query, key, value, document=document)
    exact = attend.reference(query, key, value, document=document)
    assert isinstance(out, torch.Tensor) and isinstance(exact, torch.Tensor)
    print(f"largest difference from the definition in float64: {float((out - exact).detach().abs().max()):.1e}")
    for start, stop in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        part = [tensor[:, :, start:stop] for tensor in (query, key, value)]
        alone = attend(*part, document=torch.zeros(stop - start, dtype=torch.int32, device=device))
        assert isinstance(alone, torch.Tensor)
        apart = float((out[:, :, start:stop] - alone).detach().abs().max())
        print(f"tokens {start} to {stop}: {apart:.1e} from that one alone")
    out.sum().backward()
    assert query.grad is not None
    print(f"norm of the queries' gradient: {float(query.grad.norm()):.3f}")


if __name__ == "__main__":
    main()
