"""Lifting: from a native graph to a program of Specs."""

from attncompile.lift.lift import lift_graph
from attncompile.lift.program import Binding, Layout, Program, Proof, Region, Site, join_programs
from attncompile.lift.refusals import passed_over

__all__ = [
    "Binding",
    "Layout",
    "Program",
    "Proof",
    "Region",
    "Site",
    "join_programs",
    "lift_graph",
    "passed_over",
]
