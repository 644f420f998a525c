"""What every test shares: one package, one thread a worker, seeds, the two markers, real checkpoints."""

from __future__ import annotations

import gc
import logging
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported: OpenMP reads this once. Workers of pytest-xdist share the machine's cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Nothing here comes from a model hub; without these a wrong path would try one and wait for the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch

import attncompile
from attncompile.kernels import operators
from benchmarks.checkpoints import checkpoint_folder

ROOT = Path(__file__).resolve().parent.parent

# The root is on sys.path so that `attncompile` and `benchmarks` are found in a checkout. Both are imported
# now, so it can go to the end: our folder `kernels` must not hide somebody else's package of that name from
# transformers, which looks for it.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT] + [str(ROOT)]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="run the tests marked slow too")
    parser.addoption("--run-gpu", action="store_true", help="run the tests marked gpu too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip slow and gpu tests unless the option or an expression given with -m asks for them."""
    for marker in ("slow", "gpu"):
        asked = config.getoption(f"--run-{marker}") or marker in config.option.markexpr
        if not asked:
            skip = pytest.mark.skip(reason=f"{marker}: add --run-{marker} to run it")
            for item in items:
                if item.get_closest_marker(marker):
                    item.add_marker(skip)


def pytest_report_header() -> str:
    """Which copy of the package is under test; a second copy in site-packages has fooled many."""
    folder = Path(attncompile.__file__).parent
    return f"attncompile {attncompile.__version__} from {folder}, torch {torch.__version__}"


def pytest_configure() -> None:
    # pytest hands its handler to every logger that keeps its records to itself. With one, torch writes down each step
    # of a trace with its stack, and each graph as text, for a log that no test reads.
    logging.Logger.manager.loggerDict.pop(torch._logging._internal.trace_log.name, None)
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


@pytest.fixture
def registrations(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What computes Specs on each device type, free to be changed by a test: afterwards it is as it was."""
    kept = ("_implementations", "_backwards", "_lists")
    caches = (operators._resolved, operators._resolved_backward, operators.resolved_lists)
    with monkeypatch.context() as changes:
        for name in kept:
            changes.setattr(operators, name, dict(getattr(operators, name)))
        yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What PyTorch's exporter gave for models of tests, in a folder that all workers share; conversions read it from
    when on a test asks for it.
    """
    from attncompile.convert import onnx as conversion  # the rooms that it needs are none of most tests
    from tests.e2e.exports import remembering

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "exports"
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversion, "export_onnx", remembering(conversion.export_onnx, folder))
        yield folder


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def _old_objects_are_left_out() -> None:
    """Garbage is looked for among what the module makes: a worker's millions of objects took two seconds each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def minilm_folder() -> Path:
    """all-MiniLM-L6-v2, a BERT of 6 layers and 12 heads, with tokenizer."""
    return checkpoint_folder("minilm")


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct, a Llama of 30 layers, 9 query and 3 key/value heads, with tokenizer."""
    return checkpoint_folder("smollm2")


@pytest.fixture(scope="session")
def whisper_folder() -> Path:
    """Whisper tiny.en, encoder and decoder of 4 layers and 6 heads, with tokenizer and feature extractor."""
    return checkpoint_folder("whisper")


@pytest.fixture(scope="session")
def speech_file() -> Path:
    """Ten seconds of English speech."""
    return checkpoint_folder("speech") / "speech.wav"


@pytest.fixture(scope="session")
def onnx_files() -> dict[str, Path]:
    """Third-party exports by name: `minilm-int8` (6 sites) and `paraphrase-minilm-l3` (3 sites)."""
    return {path.stem: path for path in sorted(checkpoint_folder("onnx").glob("*.onnx"))}


@pytest.fixture(scope="session")
def texts_folder() -> Path:
    """`essays.txt`, `kjv.txt` and `stdlib.py.txt`. The essays are for local tests only."""
    return checkpoint_folder("texts")
