"""``package.json``: how the package of a conversion is called, and what it needs to run.

A package of AOTInductor takes and returns tensors alone, by name. The record says which argument of the model each is,
what the other arguments were when the model was exported, and how its own result is put together again. AOTInductor
itself looks at nothing: a tensor of another dtype, rank, layout or device would be read as if it were the right one. So
every call is held against the record first.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field

from attncompile.frontends.torch_internals import flatten, structure_of_text, unflatten
from attncompile.verify.certificate import Record


class TensorInput(Record):
    """A tensor that the package takes.

    Attributes:
        name: in the package.
        dtype: such as ``int64``.
        shape: extents; a name stands for one that varies and is equal wherever the name is.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class FixedInput(Record):
    """An argument that is no tensor: the package computes with this value."""

    name: str
    value: bool | int | float | str | None


class PackageRecord(Record):
    """What a package is.

    Attributes:
        schema_version: 1; written as ``schema``.
        torch: version of PyTorch that made it.
        device: where it runs.
        machine: processor that it was compiled for, such as ``x86_64``.
        instructions: vector instructions that it uses.
        parameters: names by which the model's arguments are given in order; ``positional`` of them were given so.
        positional: how many arguments come by position.
        keywords: names of those that come by keyword.
        structure: of the arguments, as torch writes it.
        leaves: the arguments taken apart, in order.
        sizes: smallest and largest value of each size that varies; ``null`` for no upper bound.
        outputs: names of the tensors that the package returns.
        result: structure of the model's own result; empty where that is what the package returns.
        fixed: leaves of the result that are no tensors, by position.
    """

    model_config = Record.model_config | {"populate_by_name": True, "serialize_by_alias": True}

    schema_version: Literal[1] = Field(1, alias="schema")
    torch: str
    device: Literal["cpu"]
    machine: str
    instructions: str
    parameters: tuple[str, ...]
    positional: int
    keywords: tuple[str, ...]
    structure: str
    leaves: tuple[TensorInput | FixedInput, ...]
    sizes: dict[str, tuple[int, int | None]]
    outputs: tuple[str, ...]
    result: str
    fixed: dict[int, bool | int | float | str | None] = Field(default_factory=dict)


class PackagedModel(torch.nn.Module):
    """A package, called as the model was that it was made from. It has no parameters and gives no gradients.

    A tensor argument may have other sizes where the export let them vary; an argument that is no tensor may be left
    out, or has the value that it was exported with.
    """

    def __init__(self, record: PackageRecord, package: Callable[..., Any]) -> None:
        """``package`` is what :func:`torch._inductor.aoti_load_package` gave.

        Raises:
            ValueError: when the model's result is of a type that cannot be found.
        """
        super().__init__()
        self.record, self.package = record, package
        self.structure = structure_of(record.structure)
        numbered = unflatten(list(range(len(record.leaves))), self.structure)
        self.by_position = len(flatten(numbered[0])[0])
        self.result = structure_of(record.result) if record.result else None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns.

        Raises:
            ValueError: in one sentence, for a call that the package does not compute.
        """
        ordered, named = self.checked(self.leaves_of(args, kwargs))
        returned = self.package(*ordered, **named)
        if self.result is None:
            return returned
        found = iter([returned[name] for name in self.record.outputs])
        count = len(self.record.outputs) + len(self.record.fixed)
        leaves = [self.record.fixed[n] if n in self.record.fixed else next(found) for n in range(count)]
        return unflatten(leaves, self.result)

    def leaves_of(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """The arguments of a call, taken apart as those of the export were."""
        record = self.record
        names = (*record.parameters[: record.positional], *record.keywords)
        if len(args) > len(record.parameters):
            raise ValueError(f"this model takes {len(record.parameters)} arguments by position, got {len(args)}")
        given = dict(zip(record.parameters, args, strict=False))
        twice = next((name for name in kwargs if name in given), None)
        if twice is not None:
            raise ValueError(f"the argument {twice} is given by position and by name")
        given |= kwargs
        unknown = next((name for name in given if name not in names), None)
        if unknown is not None:
            raise ValueError(f"this model was packaged without the argument {unknown}; it takes {', '.join(names)}")
        fixed = {leaf.name: leaf.value for leaf in record.leaves if isinstance(leaf, FixedInput)}
        missing = next((name for name in names if name not in given and name not in fixed), None)
        if missing is not None:
            raise ValueError(f"the argument {missing} is missing; this model was packaged with {', '.join(names)}")
        whole = {name: given[name] if name in given else fixed[name] for name in names}
        by_position = tuple(whole[name] for name in record.parameters[: record.positional])
        leaves, structure = flatten((by_position, {name: whole[name] for name in record.keywords}))
        if structure != self.structure:
            raise ValueError(f"this model was packaged with arguments like {self.structure}, this call has {structure}")
        return leaves

    def checked(self, leaves: Sequence[Any]) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        """The tensors among the leaves as the package takes them: by position and by name, contiguous."""
        ordered: list[torch.Tensor] = []
        named: dict[str, torch.Tensor] = {}
        sizes: dict[str, int] = {}
        for number, (leaf, given) in enumerate(zip(self.record.leaves, leaves, strict=True)):
            if isinstance(leaf, FixedInput):
                if type(given) is not type(leaf.value) or given != leaf.value:
                    raise ValueError(f"{leaf.name} is {given!r}, but this model was packaged with {leaf.value!r}")
                continue
            tensor = self.fitting(leaf, given, sizes)
            if number < self.by_position:
                ordered.append(tensor)
            else:
                named[leaf.name] = tensor
        return ordered, named

    def fitting(self, leaf: TensorInput, given: Any, sizes: dict[str, int]) -> torch.Tensor:
        """The tensor, contiguous, if the package takes it; ``sizes`` are those seen so far and are added to."""
        if not isinstance(given, torch.Tensor):
            raise ValueError(f"{leaf.name} is {given!r}, but this model was packaged with a tensor")
        if given.device.type != self.record.device:
            raise ValueError(f"{leaf.name} is on {given.device}, but the package runs on the {self.record.device}")
        if str(given.dtype) != f"torch.{leaf.dtype}":
            raise ValueError(f"{leaf.name} is {given.dtype}, but this model was packaged for torch.{leaf.dtype}")
        if given.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{leaf.name} wants a gradient, and a package gives none; call it under torch.no_grad()")
        wanted = ", ".join(map(str, leaf.shape))
        if given.dim() != len(leaf.shape):
            raise ValueError(f"{leaf.name} is {list(given.shape)}, but this model was packaged for [{wanted}]")
        for size, extent in zip(leaf.shape, given.shape, strict=True):
            known = size if isinstance(size, int) else sizes.setdefault(size, extent)
            if extent != known:
                other = "" if isinstance(size, int) else f", and {size} is {known} in another argument"
                raise ValueError(f"{leaf.name} is {list(given.shape)}, but the package takes [{wanted}]{other}")
            low, high = self.record.sizes.get(size, (1, None)) if isinstance(size, str) else (extent, extent)
            if extent < low or (high is not None and extent > high):
                most = "any number" if high is None else high
                raise ValueError(f"{size} is {extent} in {leaf.name}; the package takes {low} to {most}")
        return given.detach().contiguous()


def structure_of(text: str) -> Any:
    """A structure that torch wrote, of whose types those of transformers are imported.

    Raises:
        ValueError: naming a type that cannot be found.
    """
    for name in _types(json.loads(text)):
        if name.startswith("transformers."):
            try:
                importlib.import_module(name.rpartition(".")[0])
            except ImportError:
                raise ValueError(f"the model's result is a {name}, which is not installed") from None
    try:
        return structure_of_text(text)
    except (NotImplementedError, ValueError) as error:
        said = (str(error).splitlines() or [""])[0]
        raise ValueError(f"the model's arguments or result are of a type that is not known here ({said})") from None


def _types(tree: Any) -> list[str]:
    """Names of the types in a structure's JSON."""
    if isinstance(tree, list):
        return [name for part in tree for name in _types(part)]
    if not isinstance(tree, dict):
        return []
    own = [tree["type"]] if isinstance(tree.get("type"), str) else []
    return own + _types(tree.get("children_spec", []))


__all__ = ["FixedInput", "PackageRecord", "PackagedModel", "TensorInput", "structure_of"]
