"""Masked normalisation: mean 0 and variance 1 over the real elements."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from rlhf_kernels.ops.normalize.arguments import as_flags, moved_back, moved_last, reduced
from rlhf_kernels.runtime.checks import boolean, floating, positive
from rlhf_kernels.runtime.dispatch import Op
from rlhf_kernels.runtime.library import Operator

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Arguments that make `masked_normalize` the function of that stack.
NORMALIZE_PRESETS: dict[str, dict[str, Any]] = {
    "palm-rlhf-pytorch": {"eps": 1e-5, "eps_mode": "clamp", "unbiased": False, "zero_masked": False},
    "openrlhf": {"eps": 1e-8, "eps_mode": "clamp", "unbiased": False, "zero_masked": True, "dim": 1},
    "trl": {"eps": 1e-8, "eps_mode": "add", "unbiased": True, "zero_masked": False},
    "verl": {"eps": 1e-8, "eps_mode": "add", "unbiased": True, "zero_masked": False},
}

_OP = Op("masked_normalize", __name__, {"cpu": ("native", "torch"), "cuda": ("native", "triton", "torch")})
_ARGUMENTS = "Tensor x, Tensor? mask, int trailing, float eps, int flags"


def _fake(x: Tensor, *options: Any) -> Tensor:
    return x.new_empty(x.shape)


def _backward_fake(grad: Tensor, x: Tensor, *options: Any) -> Tensor:
    return x.new_empty(x.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, mask, *ctx.options = inputs
    ctx.save_for_backward(x, mask)


def _gradients(ctx: Any, backward: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return backward(grad, *ctx.saved_tensors, *ctx.options), None, None, None, None


_normalize = Operator(
    _OP,
    f"({_ARGUMENTS}) -> Tensor",
    _fake,
    backward_schema=f"(Tensor grad, {_ARGUMENTS}) -> Tensor",
    backward_fake=_backward_fake,
    setup_context=_setup,
    gradients=_gradients,
    replay=lambda grad, *inputs: (inputs, (grad,)),
    native="masked_normalize",
).call


def masked_normalize(
    x: Tensor,
    mask: Tensor | None = None,
    *,
    dim: int | tuple[int, ...] | None = None,
    eps: float = 1e-5,
    eps_mode: Literal["clamp", "add"] = "clamp",
    unbiased: bool = False,
    center: bool = True,
    zero_masked: bool = False,
    group: ProcessGroup | None = None,
) -> Tensor:
    """`(x - mean) / std` with the mean and variance of the real elements, as PPO whitens its advantages.

    What stands in masked slots, NaN and inf included, reaches no other output and no other gradient. The
    gradient that arrives at a masked output which is neither zeroed nor NaN or inf goes through the mean and
    the variance like any other. NORMALIZE_PRESETS names the arguments that other stacks' functions amount to.

    Args:
        x: any shape, floating-point.
        mask: True where real, same shape as x; None where everything is.
        dim: the dimensions to normalise along, an int or a tuple; None for the whole tensor.
        eps: positive; keeps the variance away from zero.
        eps_mode: "clamp" divides by sqrt(max(var, eps)), "add" by sqrt(var + eps).
        unbiased: divide the squares by n - 1 instead of n. Where only one element is real the variance is 0,
            not inf or NaN.
        center: False adds the mean again after the division, as `shift_mean=False` does in TRL and verl.
        zero_masked: put 0 into masked slots; otherwise they go through the same map as the real ones. With no
            real element the mean and the variance are 0.
        group: a torch.distributed process group whose ranks' elements count as one tensor, concatenated along
            `dim`; every rank must call, with as many rows. Differentiable; runs on plain PyTorch.

    Returns:
        x's shape and dtype; arithmetic is in float32 or better (float64 for float64).

    Raises:
        TypeError: x is no floating-point tensor, mask no boolean one, dim no int or tuple of ints.
        ValueError: mask does not fit x, dim does not exist, eps is not positive, eps_mode is unknown.
    """
    floating("masked_normalize", "x", x)
    if mask is not None:
        boolean("masked_normalize", "mask", mask, x.shape, x, "the shape of x")
    positive("masked_normalize", "eps", eps)
    flags = as_flags(eps_mode, unbiased, center, zero_masked)
    if dim is None and group is None:
        return _normalize(x, mask, x.dim(), eps, flags)
    return _along(x, mask, reduced(dim, x.dim()), eps, flags, group)


def _along(
    x: Tensor, mask: Tensor | None, dims: tuple[int, ...], eps: float, flags: int, group: ProcessGroup | None
) -> Tensor:
    """Moves `dims` to the end where they are not there."""
    last = dims == tuple(range(x.dim() - len(dims), x.dim()))
    if not last:
        x, mask = moved_last(x, dims), None if mask is None else moved_last(mask, dims)
    if group is None:
        out = _normalize(x, mask, len(dims), eps, flags)
    else:
        from rlhf_kernels.ops.normalize.group import forward  # torch.distributed costs an import

        out = forward(x, mask, len(dims), eps, flags, group)
    return out if last else moved_back(out, dims)
