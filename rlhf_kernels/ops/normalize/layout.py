"""Which dimensions a normalisation runs along: the kernels know trailing ones only."""

from __future__ import annotations

from torch import Tensor


def reduced(dim: int | tuple[int, ...] | None, rank: int) -> tuple[int, ...]:
    """`dim` as ascending, non-negative dimensions; None means all of them.

    Raises:
        TypeError: dim is no int and no tuple of ints.
        ValueError: a dimension out of range or named twice, or an empty tuple.
    """
    if dim is None:
        return tuple(range(rank))
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
