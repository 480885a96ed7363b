"""rotary and its tables: what the specs' loops do not ask."""

import math

import pytest
import torch
from torch.autograd.profiler import profile

import rlhf_kernels
from rlhf_kernels import RotaryTable, RotaryTables, rotary, rotary_tables
from rlhf_kernels.runtime.native import host
from tests.golden.load import golden

BACKENDS = pytest.mark.parametrize("backend", ["native", "torch", "triton", "reference"])
XPOS = pytest.mark.parametrize("xpos", [None, 16], ids=["plain", "xpos"])
PALM_TABLES, PALM_CALLS = (
    golden("rotary", function=f"palm_rlhf_pytorch.palm.{name}")
    for name in ("RotaryEmbedding", "apply_rotary_pos_emb")
)
PAIRING = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])


def tables_of(T, D=8, xpos=None, **options):
    return rotary_tables(torch.arange(T), D, xpos_scale_base=xpos, **options)


def palms_tables(kwargs):
    T, base = kwargs["T"], kwargs["xpos_scale_base"]
    return rotary_tables(torch.arange(T), kwargs["D"], xpos_scale_base=base, xpos_center=T // 2)


@pytest.mark.parametrize("record", PALM_TABLES, ids=lambda r: r["case"])
def test_tables_are_palms(record):
    tables = palms_tables(record["kwargs"])
    angles, scale = record["outputs"]["angles"], record["outputs"]["scale"]
    half = angles.shape[-1] // 2
    for table, factor in ((tables.query, scale), (tables.key, 1 / scale)):
        for ours, function in ((table.cos, torch.cos), (table.sin, torch.sin)):
            expected = (function(angles) * factor)[:, :half]
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("record", PALM_CALLS, ids=lambda r: r["case"])
@BACKENDS
def test_is_palms_rotary(record, backend):
    tables = palms_tables(record["kwargs"])
    table = tables.query if record["case"].endswith("queries") else tables.key
    x = record["inputs"]["x"].requires_grad_()
    with rlhf_kernels.backend(backend):
        out = rotary(x, table)
        (grad,) = torch.autograd.grad(out, x, record["inputs"]["grad_out"])
    torch.testing.assert_close(out, record["outputs"]["out"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, record["grads"]["x"], rtol=1e-5, atol=1e-5)


@BACKENDS
@XPOS
@PAIRING
def test_products_depend_on_the_distance_alone(backend, xpos, interleaved):
    q, k = torch.randn(8), torch.randn(8)
    here, there = (tables_of(12, xpos=xpos, xpos_center=center) for center in (0, 7))
    with rlhf_kernels.backend(backend):
        a, b, c, d = (
            rotary(x.expand(12, 8), table, interleaved=interleaved)
            for x, table in ((q, here.query), (k, here.key), (q, there.query), (k, there.key))
        )
    products = a @ b.T
    for distance in range(-11, 12):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(c @ d.T, products, rtol=2e-5, atol=2e-5)


def test_xpos_products_decay():
    """Of equal queries and keys, by the mean of the pairs' factors."""
    tables = tables_of(64, 16, xpos=32)
    x = torch.ones(64, 16)
    products = (rotary(x, tables.query) @ rotary(x, tables.key).T)[:, 0]
    pairs = torch.arange(8.0)
    decay = ((2 * pairs + 0.4 * 16) / (1.4 * 16)) ** (torch.arange(64.0)[:, None] / 32)
    turned = torch.cos(torch.arange(64.0)[:, None] * 10000 ** (-pairs / 8))
    torch.testing.assert_close(products, (2 * decay * turned).sum(-1), rtol=1e-4, atol=1e-4)


@BACKENDS
def test_neighbours_are_permuted_halves(backend):
    x, table = torch.randn(2, 3, 5, 12), tables_of(5, 12).query
    order = torch.arange(12).view(2, 6).T.flatten()  # where the halves' elements stand as neighbours
    with rlhf_kernels.backend(backend):
        neighbours = rotary(x[..., order], table, interleaved=True)
        torch.testing.assert_close(neighbours, rotary(x, table)[..., order], rtol=1e-6, atol=1e-6)


@BACKENDS
@PAIRING
def test_rows_with_positions_of_their_own(backend, interleaved):
    """A left-padded row turns as it would alone."""
    x = torch.randn(3, 2, 6, 8)
    pads = torch.tensor([0, 2, 5])
    positions = (torch.arange(6) - pads[:, None]).clamp(min=0)
    with rlhf_kernels.backend(backend):
        out = rotary(x, rotary_tables(positions, 8).query, interleaved=interleaved)
        for row, pad in enumerate(pads.tolist()):
            alone = rotary(x[row, :, pad:], tables_of(6 - pad).query, interleaved=interleaved)
            torch.testing.assert_close(out[row, :, pad:], alone, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["native", "torch"])
@PAIRING
@pytest.mark.parametrize("opaque", [False, True], ids=["eager", "operator"])
def test_gradients_of_any_order(backend, interleaved, opaque):
    table = tables_of(3, 6, xpos=4).query
    x = torch.randn(2, 2, 3, 6, dtype=torch.float64, requires_grad=True)

    def call(x):
        if opaque:
            return torch.ops.rlhf_kernels.rotary(x, *table, interleaved, False)
        return rotary(x, table, interleaved=interleaved)

    with rlhf_kernels.backend(backend):
        assert torch.autograd.gradcheck(call, x)
        assert torch.autograd.gradgradcheck(call, x)


def test_the_gradient_turns_back():
    x = torch.randn(4, 8, requires_grad=True)
    table = tables_of(4).query
    out = rotary(x, table)
    torch.testing.assert_close(torch.autograd.grad(out, x, out)[0], x.detach())


def copies(call):
    with profile() as seen:
        call()
    return [event.name for event in seen.function_events if event.name in ("aten::clone", "aten::copy_")]


def test_transposed_views_are_not_copied():
    table = tables_of(5).query
    x = torch.randn(2, 5, 3, 2, 8).permute(0, 3, 2, 1, 4)
    assert not copies(lambda: rotary(x, table))
    assert rotary(x, table).is_contiguous()
    columns = torch.randn(2, 3, 5, 16)[..., ::2]
    assert copies(lambda: rotary(columns, table))


def test_float32_tables_of_exact_angles():
    """In float32 alone position * frequency is wrong by 0.03 at a million."""
    position, D = 1_000_003, 8
    table = rotary_tables(torch.tensor([position]), D).query
    for i in range(D // 2):
        angle = position * 10000 ** (-2 * i / D)
        assert table.cos[0, i].item() == pytest.approx(math.cos(angle), abs=1e-7)
        assert table.sin[0, i].item() == pytest.approx(math.sin(angle), abs=1e-7)
    assert table.cos.dtype == table.sin.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32, torch.float64])
def test_positions_of_these_dtypes_are_one(dtype):
    ours = rotary_tables(torch.arange(300, 310).to(dtype), 8, xpos_scale_base=64)
    for table, expected in zip(ours, rotary_tables(torch.arange(300, 310), 8, xpos_scale_base=64)):
        assert table.cos.equal(expected.cos)
        assert table.sin.equal(expected.sin)


@PAIRING
def test_numpy_function_is_the_same(interleaved):
    x, table = torch.randn(2, 3, 5, 18), tables_of(5, 18).query
    ours = host().rotary(x.numpy(), table.cos.numpy(), table.sin.numpy(), interleaved)
    assert torch.from_numpy(ours).equal(rotary(x, table, interleaved=interleaved))
    with pytest.raises(ValueError, match=r"cos and sin must be \[T, D/2\]"):
        host().rotary(x.numpy(), table.cos.numpy()[1:], table.sin.numpy(), interleaved)


GOOD = tables_of(6).query
X = torch.randn(2, 3, 6, 8)


@pytest.mark.parametrize(
    ("x", "tables", "error", "message"),
    [
        (X.tolist(), GOOD, TypeError, "x must be a tensor, got list"),
        (X.int(), GOOD, TypeError, "x must be float32, bfloat16, float16 or float64, got int32"),
        (X[..., :7], GOOD, ValueError, "even D, got (2, 3, 6, 7)"),
        (X[0, 0, 0], GOOD, ValueError, "[..., T, D]"),
        (X, tables_of(6), TypeError, "RotaryTable (cos, sin), got RotaryTables. Pass the .query or the .key"),
        (X, GOOD.cos, TypeError, "got Tensor"),
        (X, (GOOD.cos, None), TypeError, "sin must be a float32 tensor, got NoneType"),
        (
            X,
            RotaryTable(GOOD.cos.half(), GOOD.sin),
            TypeError,
            "cos must be a float32 tensor, got torch.float16",
        ),
        (X, tables_of(7).query, ValueError, "(6, 4) or (2, 6, 4) for x (2, 3, 6, 8), got (7, 4)"),
        (X, RotaryTable(GOOD.cos, GOOD.sin.expand(2, 6, 4)), ValueError, "cos and sin must have one shape"),
        (X, RotaryTable(GOOD.cos.to("meta"), GOOD.sin), ValueError, "x is on cpu and cos on meta"),
    ],
)
def test_refuses(x, tables, error, message):
    with pytest.raises(error) as caught:
        rotary(x, tables)
    assert message in str(caught.value)
    assert str(caught.value).startswith("rotary(): ")


@pytest.mark.parametrize("opaque", [False, True], ids=["eager", "operator"])
def test_refuses_gradients_of_tables(opaque):
    cos = GOOD.cos.clone().requires_grad_()
    call = torch.ops.rlhf_kernels.rotary if opaque else lambda x, *table: rotary(x, table[:2])
    with pytest.raises(ValueError, match="a table requires a gradient"):
        call(X, cos, GOOD.sin, False, False)


@pytest.mark.parametrize(
    ("positions", "D", "options", "error", "message"),
    [
        ([0, 1], 8, {}, TypeError, "positions must be a tensor, got list"),
        (
            torch.arange(4.0).bfloat16(),
            8,
            {},
            TypeError,
            "torch.bfloat16: neighbours above 256 are one number",
        ),
        (torch.ones(4, dtype=torch.bool), 8, {}, TypeError, "got torch.bool"),
        (torch.zeros(1, 2, 3), 8, {}, ValueError, "[T] or [B, T], got (1, 2, 3)"),
        (torch.arange(4), 7, {}, ValueError, "even number above 0, got 7"),
        (torch.arange(4), 8, {"base": 0}, ValueError, "base must be positive and finite, got 0"),
        (torch.arange(4), 8, {"xpos_scale_base": -1.0}, ValueError, "xpos_scale_base must be positive"),
    ],
)
def test_tables_refuse(positions, D, options, error, message):
    with pytest.raises(error) as caught:
        rotary_tables(positions, D, **options)
    assert message in str(caught.value)


def test_tables_are_pairs():
    assert rotary(X, tuple(GOOD)).equal(rotary(X, GOOD))
    plain, scaled = tables_of(3), tables_of(3, xpos=4)
    assert isinstance(plain, RotaryTables)
    assert plain.query is plain.key
    assert not scaled.query.cos.equal(scaled.key.cos)


@pytest.mark.parametrize("strict", [False, True], ids=["traced", "dynamo"])
def test_export_sees_the_operator(strict):
    """Traced without Dynamo too, where only the fake tensors and modes tell that something compiles."""

    class Turn(torch.nn.Module):
        def forward(self, x):
            return rotary(x, GOOD)

    program = torch.export.export(Turn(), (X,), strict=strict)
    assert torch.ops.rlhf_kernels.rotary.default in [node.target for node in program.graph.nodes]
    assert program.module()(X).equal(rotary(X, GOOD))
