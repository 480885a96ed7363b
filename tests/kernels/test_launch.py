"""The launch helper: where it runs a kernel, and what it refuses."""

from types import SimpleNamespace

import pytest
import torch

from rlhf_kernels.runtime.launch import launch, row_groups


class Recorder:
    """Stands for a Triton kernel: keeps the grids that it is launched with."""

    fn = SimpleNamespace(__name__="recorder")

    def __init__(self):
        self.grids = []

    def __getitem__(self, grid):
        return lambda *args, **meta: self.grids.append((grid, args, meta))


def test_launches_what_there_is_to_do():
    kernel = Recorder()
    launch(kernel, (70_000, 2), torch.ones(1), 1, BLOCK=2)
    launch(kernel, (0, 2), torch.ones(1))
    assert kernel.grids == [((70_000, 2), (1,), {"BLOCK": 2})]


@pytest.mark.parametrize("grid", [(1, 65_536), (1, 1, 65_536), (2**31,)])
def test_a_grid_that_cuda_has_not_is_refused(grid):
    """Some launchers do nothing there, and say nothing."""
    with pytest.raises(ValueError, match=r"recorder: a grid of .* is beyond \(2\^31-1, 65535, 65535\)"):
        launch(Recorder(), grid, torch.ones(1))


@pytest.mark.parametrize(
    ("cut", "copied"),
    [
        (lambda t: t, False),
        (lambda t: t[:, :-1], False),
        (lambda t: t[:, :-1, ::2], False),
        (lambda t: t[:, :-1, :-1], True),
        (lambda t: t[0, :, 1:], False),
        (lambda t: t[..., 0, :], False),
        (lambda t: t[0, 0, 0], False),
        (lambda t: t[:, :, :1].expand(-1, -1, 4, -1), False),
        (lambda t: t[:1, :1].expand(3, 5, -1, -1), False),
        (lambda t: t.transpose(0, 1), True),
        (lambda t: t[0].transpose(0, 1), False),
        (lambda t: t.mT, True),
        (lambda t: t[:0], False),
    ],
)
def test_rows_in_groups_are_where_they_lie(cut, copied):
    t = cut(torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5))
    held, stride, group, apart = row_groups(t)
    assert (held is not t) == copied
    flat = torch.as_strided(held, (held.untyped_storage().nbytes() // 8,), (1,), 0)
    for r, row in enumerate(t.reshape(-1, t.shape[-1])):
        at = held.storage_offset() + r // group * apart + r % group * stride
        assert torch.equal(flat[at : at + t.shape[-1]], row)
