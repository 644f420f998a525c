"""Kernels of a module that are yet to be compiled are compiled at the same time, and then run in their order."""

from __future__ import annotations

import contextlib
import types
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from attncompile.codegen.triton import generate
from attncompile.codegen.triton.cache import load_module
from tests.kernels.decode_cases import PLAIN_CASES

ORDER = ["together", "compile first", "compile second", "done", "run first 2", "run second 3"]


class _Kernel:
    """A kernel that notes what is done with it."""

    arg_names = ("number", "BLOCK")

    def __init__(self, name: str, said: list[str]) -> None:
        self.__name__, self.said = name, said

    def warmup(self, number: int, grid: tuple[int, ...], **options: Any) -> _Compiled:
        self.said.append(f"compile {self.__name__}")
        return self._compiled()[0]

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self._compiled()[1]

    def _compiled(self) -> tuple[_Compiled, Any]:
        def run(number: int, *constants: int, **options: Any) -> Any:
            self.said.append(f"run {self.__name__} {number}")
            return compiled

        compiled = _Compiled(run, self)
        return compiled, run


class _Compiled:
    """Its compiled form."""

    def __init__(self, run: Any, kernel: _Kernel) -> None:
        self._run, self._kernel = run, kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self._run

    @property
    def run(self) -> Any:
        """Triton makes what launches the kernel when this is first asked for."""
        self._kernel.said.append(f"launcher {self._kernel.__name__}")
        return self._run


class _Future:
    """A kernel that a thread compiles, as Triton's asynchronous mode gives it."""

    def __init__(self, kernel: _Compiled) -> None:
        self._kernel = kernel

    def result(self) -> _Compiled:
        return self._kernel


class _FutureKernel(_Kernel):
    """Its ``warmup`` gives what it will be."""

    def warmup(self, number: int, grid: tuple[int, ...], **options: Any) -> Any:
        return _Future(super().warmup(number, grid, **options))


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module whose Triton only notes when kernels are compiled together."""
    found = load_module(generate(PLAIN_CASES[0].spec))

    class Together:
        def __init__(self, threads: Any) -> None:
            self.said = SAID

        def __enter__(self) -> None:
            self.said.append("together")

        def __exit__(self, *error: object) -> None:
            self.said.append("done")

    compiler = types.SimpleNamespace(CompiledKernel=_Compiled)
    fake = types.SimpleNamespace(JITFunction=_Kernel, AsyncCompileMode=Together, compiler=compiler)
    monkeypatch.setattr(found, "triton", fake)
    monkeypatch.setattr(found, "COMPILED", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda number: contextlib.nullcontext())
    SAID.clear()
    return found


SAID: list[str] = []


def _run(module: Any, *kernels: _Kernel) -> list[str]:
    SAID.clear()
    later: list[Any] = []
    for number, kernel in enumerate(kernels, 2):
        module.launch(kernel, (1,), number, later=later, BLOCK=16)
    module.launch_rest(later)
    return list(SAID)


@pytest.mark.parametrize("made", [_Kernel, _FutureKernel])
def test_two_new_kernels_are_compiled_together_and_then_run_in_order(module: Any, made: type[_Kernel]) -> None:
    first, second = (made(name, SAID) for name in ("first", "second"))
    said = _run(module, first, second)
    assert [line for line in said if not line.startswith("launcher")] == ORDER
    assert sorted(said[said.index("done") + 1 : -2]) == ["launcher first", "launcher second"], "in threads, any order"
    assert _run(module, first, second) == ORDER[-2:], "what is compiled runs at once"


def test_what_follows_a_new_kernel_waits_for_it(module: Any) -> None:
    first, second = (_Kernel(name, SAID) for name in ("first", "second"))
    _run(module, second)
    said = _run(module, first, second)
    assert [line for line in said if line.startswith("run")] == ORDER[-2:]


def test_one_new_kernel_needs_no_threads(module: Any) -> None:
    assert _run(module, _Kernel("first", SAID)) == ["run first 2"]
