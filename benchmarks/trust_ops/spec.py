"""Two cases: passes over data that stay in the cache, and passes that walk through memory."""

import torch

from rlhf_kernels.engine.spec import Case, Cost, Inputs, OpSpec, randn
from trust_ops import kernel_torch, reference, trust_passes

CASES = (
    Case("cached_16x512", {"N": 16, "F": 512}, {"walk": False}, "smoke", (torch.float32,)),
    Case("walking_6400x512", {"N": 6400, "F": 512}, {"walk": True}, "smoke", (torch.float32,)),
)


def make(case, dtype, generator, device):
    """Normal inputs."""
    x = randn((case.sizes["N"], 2 * case.sizes["F"]), dtype, generator, device)
    return Inputs({"x": x, "walk": case.options["walk"]})


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
