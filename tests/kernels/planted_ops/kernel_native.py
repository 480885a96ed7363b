"""A kernel with a knob: it wastes time with 0, does not with 1, and is fast and wrong with 2."""

import torch


def forward(x, *, waste=0):
    """2 x."""
    if waste == 2:
        return x.clone()
    for _ in range(0 if waste else 20):
        torch.exp(x)
    return 2 * x
