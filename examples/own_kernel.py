"""A kernel of one's own under the engine: declared once, then checked, timed, tuned and guarded.

TRITON_INTERPRET=1 rlhf-kernels check examples/own_kernel.py      right? Without a GPU too.
rlhf-kernels bench examples/own_kernel.py --out own.jsonl         how fast, against eager and torch.compile?
rlhf-kernels tune examples/own_kernel.py                          the best block; read back by the op
rlhf-kernels budget examples/own_kernel.py --update               registers, spills, loads for four GPUs
rlhf-kernels budget examples/own_kernel.py                        the guard: 1 where a kernel got worse
"""

import torch
import triton
import triton.language as tl

from rlhf_kernels.engine.own import Case, Cost, Inputs, KernelBuild, Knob, own_op, randn


def relu2(x, gate):
    """relu(gate)^2 x, elementwise."""
    return torch.relu(gate).square() * x


@triton.jit
def relu2_kernel(x_ptr, gate_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.maximum(tl.load(gate_ptr + at, mask=at < n).to(tl.float32), 0.0)
    x = tl.load(x_ptr + at, mask=at < n).to(tl.float32)
    tl.store(out_ptr + at, (gate * gate * x).to(out_ptr.dtype.element_ty), mask=at < n)


def on_gpu(x, gate, *, block=1024):
    out = torch.empty_like(x)
    relu2_kernel[(triton.cdiv(x.numel(), block),)](x, gate, out, x.numel(), block)
    return out


def on_cpu(x, gate, *, block=1 << 14):
    out = torch.empty_like(x)
    for a, b, c in zip(*(t.view(-1).split(block) for t in (x, gate, out))):
        torch.mul(torch.relu(b).square_(), a, out=c)
    return out


def make(case, dtype, generator, device):
    return Inputs({name: randn(case.sizes.values(), dtype, generator, device) for name in ("x", "gate")})


def cost(case, dtype, direction):
    n = case.sizes["N"] * case.sizes["F"]
    return Cost(flops=3 * n, bytes=3 * n * dtype.itemsize)


def builds():
    kinds = {"x_ptr": "*bf16", "gate_ptr": "*bf16", "out_ptr": "*bf16", "n": "i32"}
    for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
        yield KernelBuild("bf16", relu2_kernel, kinds, {"BLOCK": 1024}, target, aligned=tuple(kinds))


CASES = (
    Case("ragged_3x1111", {"N": 3, "F": 1111}, tier="smoke"),
    Case("mlp_2048x4096", {"N": 2048, "F": 4096}),
)
KNOBS = (Knob("block", "triton", (1024, 512, 4096)), Knob("block", "native", (1 << 14, 1 << 12, 1 << 16)))
SPECS = (
    own_op("relu2", relu2, {"native": on_cpu, "triton": on_gpu}, make=make, cost=cost, cases=CASES,
           kernels=builds, knobs=KNOBS),
)  # fmt: skip
