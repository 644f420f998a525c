"""Compiling generated modules ahead of time, for GPUs that need not be there."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attncompile.codegen.triton.cache import load_module
from attncompile.codegen.triton.generate import GeneratedModule, Kernel

ELEMENTS = {
    "float64": "fp64",
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "float8_e4m3": "fp8e4nv",
    "int64": "i64",
    "int32": "i32",
    "int16": "i16",
    "int8": "i8",
    "uint8": "u8",
    "bool": "i1",
}
"""Triton's names of element types."""


@dataclass(frozen=True)
class Target:
    """A GPU to compile for.

    Attributes:
        backend: ``cuda`` or ``hip``.
        arch: compute capability as a number (90), or the name of an AMD architecture.
        warp: threads of a warp.
        memory: bytes of shared memory that a program may have.
    """

    backend: str
    arch: int | str
    warp: int
    memory: int

    def __str__(self) -> str:
        return f"sm_{self.arch}" if self.backend == "cuda" else str(self.arch)

    @property
    def binary(self) -> str:
        """What the file name of a binary ends in."""
        return "cubin" if self.backend == "cuda" else "hsaco"


TARGETS = (
    Target("cuda", 80, 32, 163 * 1024),
    Target("cuda", 89, 32, 99 * 1024),
    Target("cuda", 90, 32, 227 * 1024),
    Target("cuda", 100, 32, 227 * 1024),
    Target("hip", "gfx942", 64, 64 * 1024),
)
"""GPUs that the kernels are made for. Shared memory: CUDA C++ Programming Guide, technical specifications per compute
capability; CDNA 3 instruction set architecture (local data share)."""

MUCH_MEMORY = 160 * 1024
"""With less shared memory than this a kernel is compiled with at most two pipeline stages."""


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel.

    Attributes:
        kernel, target: what was compiled, and for what.
        shared: bytes of shared memory of a program.
        registers: registers of a thread, where the binary tells.
        spills: bytes of stack of a thread, where the binary tells: registers that did not fit are kept there.
        texts: intermediate forms and the binary, by extension (``ttir``, ``ptx``, ``cubin``, ``amdgcn``, …).
        symbol: what the function is called in the binary.
        threads: of a program.
        arguments: name and type of each argument that is passed to the function, in order.
        constants: values that it was compiled with, by the names of its other arguments.
    """

    kernel: str
    target: str
    shared: int
    registers: int | None
    spills: int | None
    texts: Mapping[str, Any]
    symbol: str
    threads: int
    arguments: tuple[tuple[str, str], ...]
    constants: Mapping[str, Any]


def described(
    kernel: str, target: Target, built: Any, signature: Mapping[str, str], constants: Mapping[str, Any]
) -> Compiled:
    """What is known of a kernel that Triton has compiled.

    Args:
        kernel: its name in the module.
        target: the GPU.
        built: what ``triton.compile`` gave.
        signature: Triton's type of each argument, ``constexpr`` for one that is compiled in.
        constants: values of those.
    """
    registers, spills = resources(built.asm, target)
    return Compiled(
        kernel=kernel,
        target=str(target),
        shared=int(built.metadata.shared),
        registers=registers,
        spills=spills,
        texts=dict(built.asm),
        symbol=str(built.metadata.name),
        threads=int(built.metadata.num_warps) * target.warp,
        arguments=tuple((name, kind) for name, kind in signature.items() if kind != "constexpr"),
        constants={name: constants[name] for name, kind in signature.items() if kind == "constexpr"},
    )


def compile_ahead(module: GeneratedModule, target: Target, dtype: str) -> tuple[Compiled, ...]:
    """Compile every kernel of a module.

    Tensors are taken to be contiguous along their last axis and aligned to 16 bytes, as they usually are.

    Args:
        module: the generated module.
        target: the GPU.
        dtype: element type of query, key and value: ``float16``, ``bfloat16`` or ``float32``.

    Raises:
        ValueError: for a dtype that the kernels do not take.
        RuntimeError: when Triton's interpreter is on (``TRITON_INTERPRET``): it replaces the compiler.
    """
    loaded = load_module(module)
    return tuple(compile_kernel(getattr(loaded, kernel.name), kernel, target, dtype) for kernel in module.kernels)


def compile_kernel(function: Any, kernel: Kernel, target: Target, dtype: str) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not hasattr(function, "arg_names") or not hasattr(function, "cache_key"):
        raise RuntimeError("TRITON_INTERPRET is set: kernels are interpreted, there is nothing to compile")
    if dtype not in kernel.constants:
        raise ValueError(f"the kernel takes {', '.join(kernel.constants)}, not {dtype}")
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    aligned: list[str] = []
    for name, element in kernel.pointers:
        signature[name] = "*" + ELEMENTS[dtype if element == "operand" else element]
        aligned.append(name)
    for name in kernel.strides:
        last = _is_last_stride(name, kernel.strides)
        signature[name] = "constexpr" if last else "i32"
        if last:
            constants[name] = 1
        else:
            aligned.append(name)
    signature.update(dict.fromkeys(kernel.integers, "i32"))
    tile, given = kernel.tiles[dtype], dict(kernel.constants[dtype])
    if target.backend == "hip" and kernel.on_hip is not None:
        tile = kernel.on_hip(tile)
        blocks = {"BLOCK_I": tile.queries, "BLOCK_J": tile.keys}
        given |= {name: size for name, size in blocks.items() if name in given}
    for name, value in given.items():
        signature[name] = "constexpr"
        constants[name] = value
    if "CAPABILITY" in function.arg_names:  # the one constant that depends on the target
        signature["CAPABILITY"] = "constexpr"
        constants["CAPABILITY"] = target.arch if target.backend == "cuda" else 0
    ordered = {name: signature[name] for name in function.arg_names}
    attributes = {(function.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    stages = min(tile.stages, 2) if target.memory < MUCH_MEMORY else tile.stages
    built = triton.compile(
        ASTSource(function, ordered, constexprs=constants, attrs=attributes),
        target=GPUTarget(target.backend, target.arch, target.warp),
        options={"num_warps": tile.warps, "num_stages": stages, "enable_fp_fusion": True},
    )
    return described(kernel.name, target, built, ordered, constants)


def _is_last_stride(name: str, strides: tuple[str, ...]) -> bool:
    """Whether it is the stride of its tensor's last axis: the next one belongs to another tensor."""
    position = strides.index(name)
    following = strides[position + 1] if position + 1 < len(strides) else ""
    return name.rsplit("_", 1)[0] != following.rsplit("_", 1)[0]


def resources(texts: Mapping[str, Any], target: Target) -> tuple[int | None, int | None]:
    """Registers and bytes of stack of a thread, read from a binary; ``None`` where that does not tell."""
    if target.backend == "hip":
        found = re.search(r"\.vgpr_count:\s+(\d+)", texts.get("amdgcn", ""))
        spilled = re.search(r"\.vgpr_spill_count:\s+(\d+)", texts.get("amdgcn", ""))
        return (int(found[1]) if found else None), (4 * int(spilled[1]) if spilled else None)
    tool = cuobjdump()
    if tool is None or "cubin" not in texts:
        return None, None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(texts["cubin"])
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=False).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    return (int(found[1]), int(found[2])) if found else (None, None)


def cuobjdump() -> str | None:
    """The ``cuobjdump`` that comes with Triton, or one on the path."""
    import triton

    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(bundled) if bundled.is_file() else shutil.which("cuobjdump")
