"""Attention over tokens in another order: the module of the attention alone, between kernels that move the tokens."""

from __future__ import annotations

import ast

from attncompile.codegen.triton.expressions import Scope, print_triton
from attncompile.codegen.triton.module import (
    OPERAND_DTYPES,
    Binding,
    Kernel,
    allocation,
    constant,
    documentation,
    expectations,
    launcher,
)
from attncompile.codegen.triton.moved import Regrouped
from attncompile.codegen.triton.tiles import Tile
from attncompile.ir import Attend, Regroup, Spec, simplify
from attncompile.kernels.regroup import ROWS, MoveTokens
from attncompile.kernels.source import signature


def around(spec: Spec, parts: Regrouped, inner: str) -> tuple[str, tuple[Kernel, ...]]:
    """Source of the whole module, and the kernels that it adds.

    Args:
        spec: the whole.
        parts: of it.
        inner: source of the module of the attention alone.
    """
    binding = Binding.of(spec, (), (), (*MoveTokens.words(), "attend", "attend_moved", "moved", "moved_tokens"))
    attend = parts.attention.operations[0]
    assert isinstance(attend, Attend)
    types = spec.types()
    moves = {name: parts.before[name] for name in (attend.query, attend.key, attend.value)}
    names = {attend.query: "move_queries", attend.key: "move_keys", attend.value: "move_keys"}
    if moves[attend.key].at != moves[attend.value].at:
        names[attend.value] = "move_values"
    kernels = {
        names[name]: _kernel(names[name], each, constant(types[each.tensor].sizes[2])) for name, each in moves.items()
    }
    kernels["move_back"] = _kernel("move_back", parts.after, constant(types[parts.after.tensor].sizes[2]))
    query = binding.tensors[moves[attend.query].tensor]
    lines = expectations(spec, binding, query)
    given = []
    for name, move in moves.items():
        source = binding.tensors[move.tensor]
        sizes = ", ".join(binding.size(size) for size in types[name].sizes)
        made = f"torch.empty(({sizes}), dtype={source}.dtype, device={source}.device)"
        given.append(f"moved_tokens({names[name]}, {source}, {made})")
    captured = [binding.tensors[value.name] for value in parts.attention.inputs[3:]]
    batch, heads, places, channels = (binding.size(size) for size in types[parts.after.out].sizes)
    lines += [
        *signature("moved = attend_moved", [*given, *captured], "", inside=4).splitlines(),
        allocation("out", batch, places, heads, int(channels), query),
        "return moved_tokens(move_back, moved, out)",
    ]
    inputs = [binding.tensors[value.name] for value in spec.inputs]
    body = inner[inner.index('"""\n', 3) + 4 :].replace("def attend(", "def attend_moved(", 1)
    if "import triton.language as tl" not in body:
        body = body.replace("import triton\n", "import triton\nimport triton.language as tl\n", 1)
    ast.parse(body)
    sections = [
        documentation(spec, inputs, "Tokens are copied to their places before, and back after."),
        body.rstrip("\n"),
        *("\n" + kernel.source() for kernel in kernels.values()),
        "\n" + MoveTokens.launcher(),
        "\n" + launcher(spec, inputs, lines),
    ]
    return "\n\n".join(sections) + "\n", tuple(_arguments(kernel, types[attend.value].sizes[3]) for kernel in
                                              kernels.values())  # fmt: skip


def _kernel(name: str, move: Regroup, tokens: int) -> MoveTokens:
    extents = {"i": simplify(move.size)}
    printed = print_triton(move.at, Scope({"i": "i"}, {}, {}, {}, extents))
    return MoveTokens(name, printed.lines, printed.value, tokens, constant(move.size), str(move.at))


def _arguments(kernel: MoveTokens, size: object) -> Kernel:
    channels = int(str(size))
    constants = {"D": channels, "CHANNELS": 1 << (channels - 1).bit_length()}
    return Kernel(
        kernel.name,
        (("source", "operand"), ("moved", "operand")),
        MoveTokens.strides(),
        ("heads",),
        dict.fromkeys(OPERAND_DTYPES, constants),
        dict.fromkeys(OPERAND_DTYPES, Tile(ROWS, ROWS, 4, 1)),
    )


__all__ = ["around"]
