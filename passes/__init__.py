"""Rewrites: Spec to Spec, one module for each family."""

from attncompile.passes.frame import Options, Pass, PassCall, PassResult, Stamp, described, run_passes
from attncompile.passes.registry import all_passes, find_pass
from attncompile.passes.text import make_call, parse_passes

__all__ = [
    "Options", "Pass", "PassCall", "PassResult", "Stamp", "all_passes", "described", "find_pass", "make_call",
    "parse_passes", "run_passes",
]
