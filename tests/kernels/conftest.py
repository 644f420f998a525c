"""One interpreter process for all kernel tests of a worker."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.kernels.interpreter import Interpreter


@pytest.fixture(scope="session")
def interpreter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Interpreter]:
    """Triton's interpreter, in a process of its own."""
    pytest.importorskip("triton")
    process = Interpreter(tmp_path_factory.mktemp("kernels"))
    yield process
    process.close()
