"""What a model reads beside its main input: pictures beside text, or text beside pictures."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

READ = ("input_ids", "pixel_values", "input_features", "input_values")
"""What a model may read several of at once."""


def with_others(model: Any, given: Mapping[str, Any], make: Callable[[str], Any]) -> dict[str, Any]:
    """Arguments of one call, with what else the model needs to run.

    A language model that may be shown pictures runs on text alone, and is called so; one that compares text with
    pictures does not, and gets both. That is found out by calling it, where its signature leaves it open.

    Args:
        model: a model of transformers.
        given: its main input and what belongs to it.
        make: makes the input of a name; raises LookupError for one that cannot be made.

    Returns:
        ``given``, or that and the first of the others that it runs with.
    """
    signature = inspect.signature(model.forward).parameters
    others = [name for name in READ if name in signature and name not in given]
    if not others or _runs(model, given):
        return dict(given)
    for name in others:
        try:
            more = {**given, name: make(name)}
        except LookupError:
            continue
        if name == "input_ids" and "attention_mask" in signature:
            more["attention_mask"] = make("attention_mask")
        if _runs(model, more):
            return more
    return dict(given)  # whoever calls it says why it does not run


def _runs(model: Any, arguments: Mapping[str, Any]) -> bool:
    """Whether a call ends. A model's own code says in its own way what it lacks, by exceptions of any class."""
    try:
        with torch.no_grad():
            model(**arguments)
    except Exception:
        return False  # the conversion calls it again, and tells the reason
    return True


__all__ = ["with_others"]
