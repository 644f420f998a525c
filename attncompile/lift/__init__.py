"""Lifting: from a native graph to a program of Specs."""
