"""Passes over data that stays in the cache and through memory, each with so many passes to plant."""

import torch

from rlhf_kernels.engine.spec import Case, Cost, Inputs, OpSpec, randn
from trust_ops import LEVELS, kernel_torch, reference, trust_passes

CASES = tuple(
    Case(
        f"{name}_{rows}x512_{level}",
        {"N": rows, "F": 512},
        {"walk": walk, "extra": level},
        "smoke",
        (torch.float32,),
    )
    for level in LEVELS
    for name, rows, walk in (("cached", 16, False), ("walking", 7680, True))
)


def make(case, dtype, generator, device):
    """Normal inputs."""
    x = randn((case.sizes["N"], 2 * case.sizes["F"]), dtype, generator, device)
    return Inputs({"x": x, **case.options})


def cost(case, dtype, direction):
    """Least bytes: x is read once."""
    n = case.sizes["N"] * 2 * case.sizes["F"]
    return Cost(flops=n, bytes=n * dtype.itemsize)


SPECS = (
    OpSpec(
        "trust_passes", "trust", "swiglu, a hundred passes", trust_passes, reference.forward,
        kernel_torch.forward, make, cost, CASES,
    ),
)  # fmt: skip
