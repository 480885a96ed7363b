"""Products by oneDNN against float64, with gradients, and where they give way to F.linear."""

import pytest
import torch
import torch.nn.functional as F

from rlhf_kernels.runtime import linear as module
from rlhf_kernels.runtime import onednn
from rlhf_kernels.runtime.linear import linear, pack, packed_linear

needs_onednn = pytest.mark.skipif(not onednn.available(), reason="this PyTorch has no oneDNN")
SHAPES = [((3, 5, 33), 17), ((1, 64), 300), ((2, 1, 48), 1), ((40,), 24), ((0, 7, 16), 9)]


def operands(shape, columns, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(dtype)
    return x, torch.randn(columns, shape[-1], generator=generator).to(dtype)


@pytest.mark.parametrize(("shape", "columns"), SHAPES)
def test_the_product_and_its_gradients_are_those_of_float64(shape, columns):
    x, weight = (t.requires_grad_() for t in operands(shape, columns))
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    out, expected = linear(x, weight), F.linear(*wide)
    torch.testing.assert_close(out, expected.float(), rtol=1e-5, atol=1e-5)
    for got, want in zip(
        torch.autograd.grad(out.square().sum(), (x, weight)),
        torch.autograd.grad(expected.square().sum(), wide),
    ):
        torch.testing.assert_close(got, want.float(), rtol=1e-4, atol=1e-4)


def test_a_frozen_weight_and_a_strided_input():
    x, weight = operands((6, 40), 24)
    x = x[:, ::2].requires_grad_()
    weight = weight[:, :20]
    linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(6, 20), rtol=1e-5, atol=1e-5)
    assert weight.grad is None
    assert linear(x.detach(), weight).grad_fn is None


@needs_onednn
@pytest.mark.parametrize(("shape", "columns"), SHAPES[:4])
def test_a_packed_weight_gives_the_same(shape, columns):
    x, weight = operands(shape, columns)
    table = torch.randn(2 * columns, 2)
    for bias in (
        None,
        torch.arange(columns) - 3.0,
        table[:columns, 1],
        table[::2, 0],
        table[0, :1].expand(columns),
    ):
        got, expected = packed_linear(x, pack(weight), bias), F.linear(x, weight, bias)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_other_dtypes_autocast_and_compilation_are_left_to_pytorch():
    for dtype in (torch.bfloat16, torch.float64):
        x, weight = operands((2, 8), 4, dtype)
        assert torch.equal(linear(x, weight), F.linear(x, weight))
        assert pack(weight) is None
    x, weight = operands((2, 8), 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
        assert pack(weight) is None
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight), F.linear(x, weight))


def test_a_weight_too_large_is_not_copied(monkeypatch):
    monkeypatch.setattr(module, "_MOST", 31)
    assert pack(torch.ones(4, 8)) is None


@needs_onednn
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    ("size", "layout"), [(48, {1: "blocks", 3: "packed"}), (33, {1: "weight", 3: "packed"})]
)
def test_a_held_weight_gives_the_same_for_any_rows(rows, size, layout):
    """In blocks of columns, packed by oneDNN, or as it is where it has no whole number of blocks."""
    _, weight = operands((1, 40), size)
    held = module.Held(weight, rows)
    assert [name for name, value in vars(held).items() if value is not None] == [layout[rows]]
    for shape in ((1, 40), (2, 1, 40), (1, 5, 40), (2, 3, 40), (40,), (0, 40)):
        x, _ = operands(shape, 1)
        torch.testing.assert_close(held(x), F.linear(x, weight), rtol=1e-5, atol=1e-5)
