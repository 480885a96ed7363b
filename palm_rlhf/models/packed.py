"""Products with few rows on a CPU: weights in oneDNN's own layout, as torch.compile packs those it freezes.

A cached step multiplies a handful of rows by every weight of the model. With 17 MB of weights (4 layers, 256
wide), 16 rows and one thread, PyTorch's eager product (MKL) takes 3.1 ms and oneDNN's with packed weights 1.6.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

# Rows that the layout is chosen for.
_ROWS = 16
# A packed weight is a copy: above this many elements the memory counts for more than the time.
_MOST = 1 << 26


@cache
def available() -> bool:
    """Whether this build of PyTorch has the two operators that torch.compile's CPU code calls."""
    ops = torch.ops.mkldnn
    return torch.backends.mkldnn.is_available() and all(
        hasattr(ops, name) for name in ("_reorder_linear_weight", "_linear_pointwise")
    )


def pack(weight: Tensor) -> Tensor | None:
    """A copy of a weight [N, K] for `linear`; None where it is better left as it is."""
    suits = weight.device.type == "cpu" and weight.dtype == torch.float32 and 0 < weight.numel() <= _MOST
    if not suits or torch.is_autocast_enabled("cpu") or not available():
        return None
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS)


def linear(x: Tensor, packed: Tensor) -> Tensor:
    """`x @ weight^T` without a gradient, for x [..., K]."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
