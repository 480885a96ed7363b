"""Linear layers by `runtime.onednn` where it suits, elsewhere by `F.linear`; for single rows see `Held`."""

from __future__ import annotations

import ctypes
import mmap
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlhf_kernels.runtime.onednn import packed, product, suits

# Rows that the packed layout is chosen for.
_ROWS = 16
# A packed weight is a copy: above this many elements the memory counts for more than the time.
_MOST = 1 << 26
# Columns of a block of `Held`.
_BLOCK = 16
# Bytes of a large page.
_PAGE = 1 << 21


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        to_x, to_weight = ctx.needs_input_grad
        grad_x = product(grad, weight.t()) if to_x else None
        # Here both operands would have to be copied: MKL takes them as they are.
        rows, columns = (t.reshape(-1, t.shape[-1]) for t in (x, grad))
        return grad_x, columns.t() @ rows if to_weight else None


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight^T` for x [..., K] and weight [N, K]; differentiable once."""
    if not suits(x, weight):
        return F.linear(x, weight)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _Linear.apply(x, weight)
    return product(x, weight)


def pack(weight: Tensor) -> Tensor | None:
    """A copy of a weight [N, K] for `packed_linear`; None where it is better left as it is."""
    if not suits(weight) or weight.numel() > _MOST:
        return None
    return packed(weight, _ROWS)


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight^T + bias` without a gradient, of a weight that was packed."""
    return product(x, packed, bias)


@cache
def _madvise() -> Any:
    """Linux's `madvise`; None elsewhere."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


def _in_large_pages(weight: Tensor) -> Tensor:
    """A contiguous copy, for which Linux is asked for pages of 2 MB: one row reads it in 3/4 of the time.

    It is a wish: where there are none, or the memory was in use before, pages are what they are.
    """
    madvise = _madvise()
    if madvise is None or weight.nbytes < _PAGE:
        return weight.contiguous()
    room = torch.empty(weight.nbytes + _PAGE, dtype=torch.uint8)
    start = -room.data_ptr() % _PAGE
    madvise(room.data_ptr() + start, (room.nbytes - start) // _PAGE * _PAGE, mmap.MADV_HUGEPAGE)
    return room[start : start + weight.nbytes].view(weight.dtype).view(weight.shape).copy_(weight)


class Held:
    """A weight [N, K] for many products without a gradient, in a layout that few rows read fast.

    For one row, blocks of 16 columns [N / 16, K, 16], each a product of its own: MKL, which walks over K with
    a few columns at a time, then reads memory from its beginning to its end. At [1, 2560] x [2560, 512] that
    takes 1.05 to 1.25 times as long as a sum over the weight, `F.linear` 1.3 to 1.7 times; at [1, 512] x
    [512, 4736] 0.8 to 1.3 and 1.6 to 2.8 times. For more rows it is oneDNN's layout. It is a copy either
    way; where neither suits, it is the weight itself.

    Args:
        weight: [N, K].
        rows: of most of the products.
    """

    def __init__(self, weight: Tensor, rows: int) -> None:
        size, depth = weight.shape
        self.weight: Tensor | None = weight.detach()
        self.blocks = self.packed = None
        if rows > 1:
            self.packed = pack(weight)
        elif suits(weight) and size % _BLOCK == 0 and weight.numel() <= _MOST:
            self.blocks = self.weight.view(-1, _BLOCK, depth).transpose(1, 2)
            self.blocks = _in_large_pages(self.blocks)
        if self.blocks is not None or self.packed is not None:
            self.weight = None

    def __call__(self, x: Tensor) -> Tensor:
        """`x @ weight^T` for x [..., K] -> [..., N]."""
        if self.blocks is None:
            return F.linear(x, self.weight) if self.packed is None else packed_linear(x, self.packed)
        rows = x.reshape(1, -1, x.shape[-1]).expand(len(self.blocks), -1, -1)
        size = len(self.blocks) * _BLOCK
        return torch.bmm(rows, self.blocks).transpose(0, 1).reshape(*x.shape[:-1], size)
