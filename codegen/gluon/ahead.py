"""Compiling Gluon modules ahead of time: for sm_90, where no GPU need be there."""

from __future__ import annotations

from typing import Any

from attncompile.codegen.gluon.generate import HopperModule
from attncompile.codegen.triton.ahead import ELEMENTS, Compiled, Target, resources
from attncompile.codegen.triton.cache import load_module
from attncompile.ir.types import DTYPES

HOPPER = Target("cuda", 90, 32)


def compile_ahead(module: HopperModule, dtype: str) -> tuple[Compiled, ...]:
    """Compile the module's kernels for Hopper, the attention last.

    Captured tensors are taken to be aligned to 16 bytes and contiguous along their last axis.

    Args:
        module: the generated module.
        dtype: element type of query, key and value: ``float16`` or ``bfloat16``.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    loaded = load_module(module)
    skeleton, (kernel,) = module.skeleton, module.kernels
    function = loaded.attend_forward
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    aligned: list[str] = []
    channels, features, keys = skeleton.channel_space, skeleton.feature_space, skeleton.tile.keys
    codes = skeleton.narrow.dtype if skeleton.narrow else dtype
    values = ((features, keys), "float8_e4m3") if skeleton.turned_values else ((keys, features), dtype)
    tiles = {"query": ((64, channels), codes), "key": ((keys, channels), codes)}
    tiles |= {"value": values, "out": ((64, features), dtype)}
    for name in skeleton.descriptors():
        tile, element = tiles[name]
        shape = ", ".join(map(str, (1, 1, *tile)))
        layout = loaded.tile_layout(*tile, DTYPES[element].itemsize)
        signature[name] = f"tensordesc<{ELEMENTS[element]}[{shape}],{layout!r}>"
    for name, element in kernel.pointers:
        signature[name] = "*" + ELEMENTS[dtype if element == "operand" else element]
        aligned.append(name)
    ranks = dict(skeleton.captured)
    for name in kernel.strides:
        pointer, _, axis = name.rpartition("_stride_")
        if pointer in ranks and int(axis) == ranks[pointer] - 1:
            signature[name] = "constexpr"
            constants[name] = 1
        else:
            signature[name] = "i32"
            aligned.append(name)
    signature |= dict.fromkeys(kernel.integers, "i32")
    ordered = {name: signature[name] for name in function.arg_names}
    attributes = {(function.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    built = triton.compile(
        GluonASTSource(function, ordered, constexprs=constants, attrs=attributes),
        target=GPUTarget(HOPPER.backend, HOPPER.arch, HOPPER.warp),
        options={"num_warps": 4, "maxnreg": skeleton.tile.limit},
    )
    own = _compiled(kernel.name, built)
    return (*_small(loaded, module, signature, constants, aligned), own) if skeleton.marks else (own,)


def _compiled(name: str, built: Any) -> Compiled:
    registers, spills = resources(built.asm, HOPPER)
    return Compiled(name, str(HOPPER), int(built.metadata.shared), registers, spills, dict(built.asm))


def _small(
    loaded: Any, module: HopperModule, known: dict[str, str], constants: dict[str, Any], aligned: list[str]
) -> list[Compiled]:
    """The kernels that list key blocks and deal out tiles."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    tile = module.skeleton.tile
    space = 1 << (tile.queries - 1).bit_length()
    chosen = {"ROWS": tile.queries, "ROW_SPACE": space, "KEYS": tile.keys, "CHUNK": 16, "SPACE": 64, **constants}
    made = []
    for name in ("mark_blocks", "order_tiles"):
        function = getattr(loaded, name)
        arguments = {n: "constexpr" if n in chosen else known.get(n, "i32") for n in function.arg_names}
        attributes = {(function.arg_names.index(n),): [["tt.divisibility", 16]] for n in aligned if n in arguments}
        source = ASTSource(
            function, arguments, constexprs={n: chosen[n] for n in arguments if n in chosen}, attrs=attributes
        )
        made.append(_compiled(name, triton.compile(source, target=GPUTarget(HOPPER.backend, HOPPER.arch, HOPPER.warp))))
    return made
