"""What other tools make of the same models for ONNX Runtime: peers of a conversion.

``optimizer`` is `onnxruntime.transformers.optimizer`, on torch's export and on the one of the TorchScript exporter,
whose graphs its patterns were written for; Olive's pass for transformers calls the same function. ``onnxscript`` is
`onnxscript.rewriter.ort_fusions`. Both with the options that their documentation gives for the model.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir
import torch

from attncompile.frontends.checkpoint import open_model


@dataclass(frozen=True)
class Shape:
    """What the optimizer has to be told.

    Attributes:
        kind: of model, as it calls it: what is closest where it has no own.
        heads, hidden: sizes.
    """

    kind: str
    heads: int
    hidden: int


class Plain(torch.nn.Module):
    """A model with tensors by position and the first of its results alone, as the TorchScript exporter takes it."""

    def __init__(self, model: torch.nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        """The first result."""
        found = self.model(**dict(zip(self.names, tensors, strict=True)), use_cache=False, return_dict=True)
        return next(iter(found.values()))  # type: ignore[no-any-return]


def fused_peers(target: str, exported: Path, names: tuple[str, ...], shape: Shape, folder: Path) -> dict[str, Path]:
    """Files of the peers that can be made; what cannot be is told on the standard output.

    Args:
        target: what `attncompile` opens, with eager attention.
        exported: torch's export of it; names: its inputs.
        shape: of the model.
        folder: where the files go.
    """
    made: dict[str, Path] = {}

    def attempt(name: str, make: Any) -> None:
        path = folder / f"{name.replace(' ', '-')}.onnx"
        try:
            with _quietly():
                make(path)
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:200]}", flush=True)
        else:
            made[name] = path

    attempt("onnxscript", lambda path: _onnxscript(exported, path))
    attempt("optimizer", lambda path: _optimizer(exported, path, shape))

    def scripted(path: Path) -> None:
        plain = folder / "torchscript.onnx"
        _torchscript(target, names, plain)
        _optimizer(plain, path, shape)

    attempt("optimizer TorchScript", scripted)
    return made


def _onnxscript(source: Path, path: Path) -> None:
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    model, _ = optimize_for_ort(onnx_ir.load(source))
    onnx_ir.save(model, path, external_data=f"{path.name}.data")


def _optimizer(source: Path, path: Path, shape: Shape) -> None:
    from onnxruntime.transformers.optimizer import optimize_model

    found = optimize_model(str(source), model_type=shape.kind, num_heads=shape.heads, hidden_size=shape.hidden)
    found.save_model_to_file(str(path), use_external_data_format=True)


def _torchscript(target: str, names: tuple[str, ...], path: Path) -> None:
    opened = open_model(target, attn_implementation="eager")
    model = Plain(opened.model, names).eval() if len(names) > 1 else opened.model.eval()
    inputs: tuple[torch.Tensor, ...]
    if len(names) > 1:
        ids = torch.randint(5, 900, (2, 9))
        given: Mapping[str, torch.Tensor] = {"attention_mask": torch.ones_like(ids)}
        zero = torch.zeros_like(ids)
        inputs = tuple(ids if name == "input_ids" else given.get(name, zero) for name in names)
    else:
        args, kwargs = opened.example()
        inputs = tuple(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
    axes = {name: {0: "batch", 1: "length"} if len(names) > 1 else {0: "batch"} for name in names}
    with torch.no_grad():
        torch.onnx.export(
            model, inputs, str(path), dynamo=False, input_names=list(names), output_names=["first"], dynamic_axes=axes,
            opset_version=17,
        )  # fmt: skip


@contextmanager
def _quietly() -> Iterator[None]:
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


__all__ = ["Shape", "fused_peers"]
