"""Compiling Gluon modules ahead of time: for sm_90, where no GPU need be there."""

from __future__ import annotations

from typing import Any

from attncompile.codegen.gluon.backward import HopperGradients
from attncompile.codegen.gluon.generate import HopperModule
from attncompile.codegen.triton.ahead import ELEMENTS, TARGETS, Compiled, compile_kernel, described
from attncompile.codegen.triton.cache import load_module
from attncompile.ir.types import DTYPES
from attncompile.kernels.hopper_backward import LIMIT

HOPPER = next(target for target in TARGETS if target.arch == 90)


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
    boxes = skeleton.boxes
    for name in skeleton.descriptors():
        tile, element = tiles[name]
        sizes: tuple[int, ...] = (1, 1, *tile)
        # without rounded operands a module takes 16 bits for granted
        width = (1,) if DTYPES[element].itemsize == 1 else ()
        layout = loaded.tile_layout(*tile, *width)
        if boxes:
            box = (*boxes.lead(), *(boxes.query_box if name in ("query", "out") else boxes.key_box))
            sizes, layout = (*box, tile[1]), loaded.box_layout(box, tile[1])
        shape = ", ".join(map(str, sizes))
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
    own = described(kernel.name, HOPPER, built, ordered, constants)
    moving = (compile_kernel(getattr(loaded, each.name), each, HOPPER, dtype) for each in module.moving)
    small = _small(loaded, module, signature, constants, aligned) if skeleton.marks else []
    return (*moving, *small, own)


def compile_gradients_ahead(module: HopperGradients, dtype: str) -> Compiled:
    """Compile the kernel of a module with gradients for Hopper, without those that go before and after.

    Args:
        module: the generated module.
        dtype: element type of query, key and value: ``float16`` or ``bfloat16``.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    loaded, skeleton = load_module(module), module.skeleton
    function, tile = loaded.attend_backward_kernel, skeleton.tile
    signature: dict[str, str] = {}
    for name in skeleton.descriptors():
        rows = tile.queries if name in ("query", "grad_out") else 64
        layout, shape = loaded.tile_layout(rows, tile.channels), f"1, 1, {rows}, {tile.channels}"
        element = ELEMENTS[dtype]
        if name == "row_values":
            layout, shape, element = loaded.row_layout(), "1, 64", "fp32"
        signature[name] = f"tensordesc<{element}[{shape}],{layout!r}>"
    signature |= {"query_sums": "*fp32", "work": "*i64", "work_width": "i32"}
    signature |= dict.fromkeys(skeleton.integers(), "i32")
    ordered = {name: signature[name] for name in function.arg_names}
    attributes = {(function.arg_names.index(name),): [["tt.divisibility", 16]] for name in ("query_sums", "work")}
    built = triton.compile(
        GluonASTSource(function, ordered, constexprs={}, attrs=attributes),
        target=GPUTarget(HOPPER.backend, HOPPER.arch, HOPPER.warp),
        options={"num_warps": 4, "maxnreg": LIMIT},
    )
    return described("attend_backward_kernel", HOPPER, built, ordered, {})


def _small(
    loaded: Any, module: HopperModule, known: dict[str, str], constants: dict[str, Any], aligned: list[str]
) -> list[Compiled]:
    """The kernels that list key blocks and order tiles."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    tile = module.skeleton.tile
    space = 1 << (tile.queries - 1).bit_length()
    chosen = {"ROWS": tile.queries, "ROW_SPACE": space, "KEYS": tile.keys, "SPACE": 8, "CHUNK": 128, **constants}
    warps = {"key_extremes": 1, "mark_blocks": 1, "order_tiles": 4}
    known = {**known, "extremes": "*i64"}
    made = []
    for name in (name for name in warps if hasattr(loaded, name)):
        function = getattr(loaded, name)
        arguments = {n: "constexpr" if n in chosen else known.get(n, "i32") for n in function.arg_names}
        attributes = {(function.arg_names.index(n),): [["tt.divisibility", 16]] for n in aligned if n in arguments}
        source = ASTSource(
            function, arguments, constexprs={n: chosen[n] for n in arguments if n in chosen}, attrs=attributes
        )
        built = triton.compile(
            source, target=GPUTarget(HOPPER.backend, HOPPER.arch, HOPPER.warp), options={"num_warps": warps[name]}
        )
        made.append(described(name, HOPPER, built, arguments, chosen))
    return made
