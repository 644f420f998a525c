"""``source.json``: what a conversion was made from, so that `attncompile verify` can open it again.

The weights are named by a hash. An original that has changed since is then told from a conversion that is wrong.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from attncompile.convert.memory import Reading
from attncompile.frontends.checkpoint import AttentionImplementation, OpenedModel, open_model
from attncompile.frontends.errors import InputError
from attncompile.verify.certificate import Record, read_record, write_record

SOURCE = "source.json"


class Source(Record):
    """What was converted.

    Attributes:
        schema_version: 1; written as ``schema``.
        target: folder, ``.onnx`` file or ``file.py:function``, with its whole path.
        kind: ``torch`` or ``onnx``.
        attn_implementation: which of its own implementations a Hugging Face folder was loaded with.
        allow_pickle: its weights were read from pickle, because the user allowed it; a verification asks again.
        cache: the conversion has its cache among its inputs and outputs; shared: one buffer is both;
            last_logits: it gives the logits of each row's last token alone.
        text: file of running text that the result was judged by, with its whole path; empty for the one that every
            machine has.
        text_hash: of that file.
        weights: hash of the model's weights, or of the ``.onnx`` file.
    """

    model_config = Record.model_config | {"populate_by_name": True, "serialize_by_alias": True}

    schema_version: Literal[1] = Field(1, alias="schema")
    target: str
    kind: Literal["torch", "onnx"]
    attn_implementation: AttentionImplementation
    allow_pickle: bool = False
    cache: bool = False
    shared: bool = False
    last_logits: bool = False
    text: str = ""
    text_hash: str = ""
    weights: str


def write_source(
    target: str | Path,
    opened: OpenedModel,
    attn_implementation: AttentionImplementation,
    allow_pickle: bool,
    folder: Path,
    *,
    cache: bool = False,
    shared: bool = False,
    last_logits: bool = False,
    text: Path | None = None,
) -> None:
    """Write ``source.json``."""
    file, colon, function = str(target).rpartition(":")
    whole = Path(file if colon and file.endswith(".py") else target).expanduser().resolve()
    source = Source(
        schema=1,
        target=f"{whole}:{function}" if colon and file.endswith(".py") else str(whole),
        kind=opened.kind,
        attn_implementation=attn_implementation,
        # only what was needed: a checkpoint with safetensors is opened without the permission
        allow_pickle=allow_pickle and opened.path.is_dir() and not any(opened.path.glob("*.safetensors")),
        cache=cache,
        shared=shared,
        last_logits=last_logits,
        text=str(text.expanduser().resolve()) if text is not None else "",
        text_hash=_digest(text.expanduser()) if text is not None else "",
        weights=weights_digest(opened),
    )
    write_record(source, folder / SOURCE)


def read_source(folder: Path) -> Source:
    """Read ``source.json``. Raises InputError when it is missing or damaged."""
    try:
        return read_record(Source, folder / SOURCE, "record of what was converted")
    except ValueError as error:
        raise InputError(str(error), folder, "convert the model again") from error


def source_text(source: Source) -> Path | None:
    """The text that a result was judged by; ``None`` for the one that every machine has.

    Raises:
        InputError: when the file is no longer there, or has changed.
    """
    if not source.text:
        return None
    file = Path(source.text)
    if not file.is_file() or _digest(file) != source.text_hash:
        raise InputError(
            "the text that the conversion was judged by is no longer there, or has changed", file, "convert again"
        )
    return file


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def reopen(folder: Path, *, allow_pickle: bool = False) -> OpenedModel:
    """The original of a conversion, opened again, unchanged.

    Args:
        folder: what the conversion wrote.
        allow_pickle: the user's permission to read a pickle. That of the conversion does not count: the folder may
            come from somebody else.

    Raises:
        InputError: when it is not there any more, has changed, or needs the permission.
    """
    source = read_source(folder)
    if source.allow_pickle and not allow_pickle:
        raise InputError(
            "the weights of what was converted are only there as pickle, which can run code",
            source.target,
            "pass --allow-pickle (in Python allow_pickle=True) to read them as plain tensors",
        )
    opened = open_model(source.target, attn_implementation=source.attn_implementation, allow_pickle=allow_pickle)
    if opened.kind == "torch":
        opened.model.eval()
    require_weights(source, opened, folder)
    return opened


def require_weights(source: Source, opened: OpenedModel, folder: Path) -> None:
    """Raises InputError when a model has not the weights that were converted."""
    if weights_digest(opened) != source.weights:
        beside = opened.path.resolve() == folder.resolve()
        raise InputError(
            "the weights in it are not those that were converted"
            if beside
            else "the weights of the original are not those that were converted",
            folder if beside else source.target,
            "convert the model again"
            if beside
            else "convert it again; a function must give the same weights each time, so let it set a seed",
        )


def weights_digest(opened: OpenedModel) -> str:
    """Hash of names, dtypes, shapes and contents of a model's weights; of an ``.onnx`` file with its data."""
    digest = hashlib.sha256()
    if opened.kind == "onnx":
        for path in (opened.path, *sorted(_external_files(opened.model, opened.path.parent))):
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()
    state: dict[str, Any] = opened.model.state_dict()
    reading = Reading()
    for name, tensor in sorted(state.items()):
        if isinstance(tensor, torch.Tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
            reading.read(tensor)
    return digest.hexdigest()


def _external_files(model: Any, folder: Path) -> set[Path]:
    """Files beside an ONNX file that hold its weights. Opening it has checked that they lie in its folder."""
    return {
        folder / entry.value
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }


__all__ = [
    "SOURCE",
    "Source",
    "read_source",
    "reopen",
    "require_weights",
    "source_text",
    "weights_digest",
    "write_source",
]
