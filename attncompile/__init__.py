"""A compiler for attention: find it, state it, rewrite it, emit it, check it."""

__version__ = "0.1.0"
