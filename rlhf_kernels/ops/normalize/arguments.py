"""The arguments as the kernels take them: trailing dimensions, and the options as bits of one integer.

Each argument of an operator costs a call 0.1 us, so four switches travel as one.
"""

from __future__ import annotations

from torch import Tensor

ADD_EPS, UNBIASED, CENTER, ZERO_MASKED = 1, 2, 4, 8


def as_flags(eps_mode: str, unbiased: bool, center: bool, zero_masked: bool) -> int:
    """The options as bits. ValueError for an unknown eps_mode."""
    if eps_mode != "clamp" and eps_mode != "add":
        raise ValueError(f"masked_normalize(): eps_mode must be 'clamp' or 'add', got {eps_mode!r}")
    return (
        (ADD_EPS if eps_mode == "add" else 0)
        | (UNBIASED if unbiased else 0)
        | (CENTER if center else 0)
        | (ZERO_MASKED if zero_masked else 0)
    )


def reduced(dim: int | tuple[int, ...] | None, rank: int) -> tuple[int, ...]:
    """`dim` as ascending, non-negative dimensions; None means all of them.

    Raises:
        TypeError: dim is no int and no tuple of ints.
        ValueError: a dimension out of range or named twice, or an empty tuple.
    """
    if dim is None:
        return tuple(range(rank))
    if isinstance(dim, int) and -rank <= dim < rank:
        return (dim % rank,)
    dims = (dim,) if isinstance(dim, int) else dim
    if not isinstance(dims, (tuple, list)) or not all(isinstance(d, int) for d in dims):
        raise TypeError(f"masked_normalize(): dim must be an int, a tuple of ints or None, got {dim!r}")
    found = sorted(d + rank if d < 0 else d for d in dims)
    if not found or found[0] < 0 or found[-1] >= rank or len(set(found)) < len(found):
        raise ValueError(
            f"masked_normalize(): dim must name different dimensions of x, which has {rank}, "
            f"got {dim!r}. Pass None for all of them."
        )
    return tuple(found)


def moved_last(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """A view with `dims` last, in their order."""
    return x.movedim(dims, tuple(range(-len(dims), 0)))


def moved_back(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The inverse of `moved_last`."""
    return x.movedim(tuple(range(-len(dims), 0)), dims)
