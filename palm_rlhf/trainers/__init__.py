"""Loops that train: they know steps, checkpoints and metrics, and no algorithm by name."""
