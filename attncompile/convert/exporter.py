"""What torch's ONNX exporter does in vain, or again for every export, left out.

The names are those of onnxscript and of torch, and none of them is promised: where one is missing, nothing is left out.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

from onnxscript import rewriter


@contextlib.contextmanager
def without_searches() -> Iterator[None]:
    """Leave out the exporter's rewrites that search the whole graph for every node of it.

    A rule for several results at once (two slices that are one split, of 46 rules the only one) takes a third of the
    export of a model of 2,000 nodes, and four times as long for one of twice as many. The others are copied: a rule
    keeps the graph that it looked at last, with all that this keeps. The names are onnxscript's own; where it has other
    ones, nothing is left out.
    """
    rules = getattr(rewriter, _RULES, None)
    try:
        few = [_copied(rule) for rule in rules or () if rule._target_pattern.has_single_output_node]
    except AttributeError:
        few = []
    if not few:
        yield
        return
    setattr(rewriter, _RULES, tuple(few))
    try:
        yield
    finally:
        setattr(rewriter, _RULES, rules)


_RULES = "_DEFAULT_REWRITE_RULES"


def _copied(rule: Any) -> Any:
    """The same rule, which looks at graphs with a matcher of its own."""
    made = copy.copy(rule)
    made._matcher = copy.copy(rule._matcher)
    return made


@contextlib.contextmanager
def functions_listed_once() -> Iterator[None]:
    """Read onnxscript's 500 functions of torch's operators once for a process.

    Each export lists them anew and parses the source of every one for its domain, which takes as long as a small model
    takes to trace. Nobody changes an entry of the list; who has functions of his own gives them to the export.
    """
    try:
        from torch.onnx._internal._lazy_import import onnxscript_apis as framework

        functions = _listed(framework.get_torchlib_ops)
        framework.get_torchlib_ops = lambda: list(functions)
    except (ImportError, AttributeError):
        yield
        return
    try:
        yield
    finally:
        vars(framework).pop("get_torchlib_ops", None)  # what stood in front of the module's own


@functools.cache
def _listed(listing: Callable[[], list[Any]]) -> tuple[Any, ...]:
    return tuple(listing())


__all__ = ["functions_listed_once", "without_searches"]
