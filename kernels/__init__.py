"""Hand-written kernel skeletons and the operators that run them.

A skeleton is the part of a generated module that no Spec changes: the loops, the online softmax, the loads
and stores. It is a dataclass with one field for everything that a Spec decides (expressions already written
as source text), and its ``source()`` is the text of the kernel. Triton itself is only imported by the modules
that come out.
"""
