"""Specs as text: state an attention, look at its mask, rewrite it, and write a pass of one's own.

python examples/masks_and_passes.py
"""

from __future__ import annotations

import dataclasses

from pydantic import Field

from attncompile.ir import Spec, parse_expr, parse_spec
from attncompile.lift.render import mask_picture, site_density
from attncompile.passes import Options, Pass, make_call, parse_passes, run_passes

CAUSAL = """
example   attend  q[B,8,I,64]  k,v[B,2,I,64]  bfloat16
  score  0.125·s
  mask   j <= i
  kv_head h // 4
  norm   softmax (float32)
"""


class Documents(Options):
    """Options of the pass below."""

    length: int = Field(512, ge=1, description="positions of one document")


def split(spec: Spec, options: Documents) -> Spec:
    """Let a position see its own document only: the mask gets one more condition."""
    attend = spec.attend()
    assert attend is not None
    same = parse_expr(f"i // {options.length} = j // {options.length}")
    narrowed = dataclasses.replace(attend, mask=attend.mask & same)
    return dataclasses.replace(spec, operations=(narrowed,)).verify()


SPLIT = Pass(
    name="example.documents",
    summary="Split a long text into documents of equal length.",
    contract="calibrated",
    phases=("prefill",),
    options=Documents,
    why_not=lambda spec, options: None if spec.attend() else "it is no single attention",
    apply=split,
)


def main() -> None:
    spec = parse_spec(CAUSAL)
    print(f"{spec}\n{site_density(spec, 4096)}\n")

    windowed = run_passes(spec, parse_passes("fuse,sparsify.window(size=1024,sinks=4)")).spec
    print(f"{windowed}\n{site_density(windowed, 4096)}\n{mask_picture(windowed, 4096)}\n")

    # In a package of its own, the entry-point group `attncompile.passes` would make this pass known by name.
    documents = run_passes(spec, [make_call(SPLIT, {"length": 1024})]).spec
    print(f"{documents}\n{site_density(documents, 4096)}\n{mask_picture(documents, 4096)}")


if __name__ == "__main__":
    main()
