"""An op with kernels at fault, for test_budget.py. Not a test: workers of the budget import it."""

import os

import numpy
import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from rlhf_kernels.engine.spec import Case, Cost, HostKernel, Inputs, KernelBuild, OpSpec


@triton.jit
def scores_kernel(q_ptr, k_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr):
    """out = q k^T for one tile."""
    rows, columns, dims = tl.arange(0, M), tl.arange(0, N), tl.arange(0, D)
    q = tl.load(q_ptr + rows[:, None] * D + dims[None, :])
    k = tl.load(k_ptr + columns[:, None] * D + dims[None, :])
    scores = tl.dot(q, tl.trans(k))
    tl.store(out_ptr + rows[:, None] * N + columns[None, :], scores)


@gluon.jit
def copy_kernel(x_ptr, out_ptr, N: gl.constexpr):
    """out = x, 16 bytes a thread where the pointers allow it."""
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    at = gl.arange(0, N, layout=layout)
    gl.store(out_ptr + at, gl.load(x_ptr + at))


class Aborting:
    """A kernel that takes the compiler's process down with it, as some mistakes in Gluon do."""

    @property
    def arg_names(self):
        os.abort()


def scores(
    name, rows, columns, dtype="bf16", tensor_core=True, target="sm_90", num_warps=4, kernel=scores_kernel
):
    """A build of the kernel above with one tile size."""
    pointers = {"q_ptr": f"*{dtype}", "k_ptr": f"*{dtype}", "out_ptr": "*fp32"}
    constants = {"M": rows, "N": columns, "D": 64}
    return KernelBuild(
        name, kernel, pointers, constants, target, num_warps, tensor_core=tensor_core, aligned=tuple(pointers)
    )  # fmt: skip


def kernels():
    """Healthy ones for every target, two in Gluon, and three with a fault."""
    for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
        yield scores("healthy", 64, 64, target=target)
    pointers = {"x_ptr": "*fp32", "out_ptr": "*fp32"}
    for name, aligned in (("aligned", tuple(pointers)), ("unaligned", ())):
        yield KernelBuild(name, copy_kernel, pointers, {"N": 512}, "sm_90", aligned=aligned, gluon=True)
    yield scores("lost_hgmma", 32, 64)
    yield scores("aborts", 64, 64, kernel=Aborting())
    yield scores("spills", 128, 256, dtype="fp32", tensor_core=False, num_warps=2)


def _rows(host):
    """More elements than the planted budget was counted with: one in 256 times PLANTED_MORE."""
    x = numpy.linspace(-4, 4, 4096 + 16 * int(os.environ.get("PLANTED_MORE", "0")), dtype=numpy.float32)
    return lambda: host.swiglu(x, x)


def _nothing(*args, **kwargs):
    raise AssertionError("a planted op is never called")


SPECS = (
    OpSpec(
        name="planted",
        family="planted",
        summary="kernels at fault",
        function=_nothing,
        reference=_nothing,
        torch_form=_nothing,
        make=lambda case, dtype, generator, device: Inputs({"x": torch.zeros(2)}),
        cost=lambda case, dtype, direction: Cost(1, 1),
        cases=(Case("one", {}),),
        kernels=kernels,
        host_kernels=(HostKernel("rows", _rows),),
    ),
)
