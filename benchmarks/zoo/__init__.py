"""Tiny models of every attention architecture in transformers, and how many attentions each one computes."""
