"""Their specs."""

import torch

from planted_ops import kernel_torch, planted_double, planted_wrong, reference
from rlhf_kernels.engine.spec import Case, Cost, Inputs, Knob, OpSpec, randn

CASES = (
    Case("small", {"N": 256, "F": 64}, tier="smoke", dtypes=(torch.float32, torch.bfloat16)),
    Case("rows", {"N": 64, "F": 8}, tier="large", dtypes=(torch.float32,), checked={"rows": (0, 63)}),
    Case("empty", {"N": 0, "F": 8}, tier="awkward", dtypes=(torch.float32,)),
)


def make(case, dtype, generator, device):
    """Normal inputs."""
    return Inputs({"x": randn(case.sizes.values(), dtype, generator, device)})


def narrow(inputs, checked):
    """The checked rows."""
    rows = list(checked["rows"])
    return inputs.map(lambda t: t[rows]), lambda output: output[rows]


def cost(case, dtype, direction):
    """Reads and writes every element."""
    n = case.sizes["N"] * case.sizes["F"]
    return Cost(flops=n, bytes=2 * n * dtype.itemsize)


def _spec(name, function, knobs=()):
    return OpSpec(
        name, "planted", "2 x", function, reference.forward, kernel_torch.forward, make, cost, CASES,
        narrow=narrow, knobs=knobs,
    )  # fmt: skip


SPECS = (
    _spec("planted_double", planted_double, (Knob("waste", "native", (0, 1, 2), ("forward",)),)),
    _spec("planted_wrong", planted_wrong),
)
