"""Measured claims, and the real checkpoints that they and the tests run on."""
