"""Rewrites: Spec to Spec, one module for each family."""
