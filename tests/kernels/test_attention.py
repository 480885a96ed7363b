"""Attention beyond what every op is asked: edges, layouts, errors, independence of the batch."""

import pytest
import torch
import torch.nn.functional as F

from rlhf_kernels import RotaryTable, RotaryTables, attention, backend, rotary, rotary_tables
from rlhf_kernels.engine.spec import TARGETS
from rlhf_kernels.ops.attention import triton_config as config
from rlhf_kernels.ops.attention.spec import key_mask
from rlhf_kernels.runtime.dispatch import BackendError

BACKENDS = ("torch", "triton")


def _inputs(batch=2, heads=2, groups=1, queries=40, keys=40, size=32, dtype=torch.float32, grad=True):
    shapes = ((heads, queries), (groups, keys), (groups, keys))
    return [torch.randn(batch, *shape, size).to(dtype).requires_grad_(grad) for shape in shapes]


@pytest.mark.parametrize("name", ["reference", *BACKENDS])
def test_head_reads_its_group(name):
    """Head h reads group h // (H // G): as if the groups were repeated."""
    q, k, v = _inputs(heads=6, groups=3, grad=False)
    with backend(name):
        got = attention(q, k, v, causal=True)
    want = F.scaled_dot_product_attention(
        q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), is_causal=True
    )
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", ["reference", *BACKENDS])
def test_last_query_sees_every_key(name):
    q, k, v = _inputs(queries=3, keys=37, grad=False)
    with backend(name):
        causal, full = attention(q, k, v, causal=True), attention(q, k, v)
    torch.testing.assert_close(causal[:, :, -1], full[:, :, -1])
    assert not torch.allclose(causal[:, :, 0], full[:, :, 0])


@pytest.mark.parametrize("name", ["reference", *BACKENDS])
def test_row_without_keys_is_zero(name):
    q, k, v = _inputs(queries=40, keys=25)
    mask = torch.ones(2, 25, dtype=torch.bool)
    mask[0] = False
    with backend(name):
        out, lse = attention(q, k, v, causal=True, key_mask=mask, return_lse=True)
        gradients = torch.autograd.grad(out.sum(), (q, k, v))
    for values in (out[0], out[1, :, :15], *(g[0] for g in gradients), gradients[0][1, :, :15]):
        assert (values == 0).all()
    assert lse[0].isneginf().all()
    assert lse[1, :, :15].isneginf().all()
    assert lse[1, :, 15:].isfinite().all()
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("name", BACKENDS)
def test_masked_slots_may_hold_anything(name):
    q, k, v = _inputs(queries=35, keys=70)
    mask = key_mask("random", 2, 70)
    hidden = ~mask[:, None, :, None]
    clean = [
        q,
        k.detach().masked_fill(hidden, 0).requires_grad_(),
        v.detach().masked_fill(hidden, 0).requires_grad_(),
    ]
    dirty = [q, k.detach().masked_fill(hidden, torch.nan).requires_grad_(),
             v.detach().masked_fill(hidden, torch.inf).requires_grad_()]  # fmt: skip
    with backend(name):
        outs = [attention(*x, causal=True, key_mask=mask) for x in (clean, dirty)]
        gradients = [torch.autograd.grad(o.square().sum(), x) for o, x in zip(outs, (clean, dirty))]
    assert torch.equal(*outs)
    for a, b in zip(*gradients):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_single_key_takes_all(name, causal):
    """The output is the value and the scores get no gradient."""
    q, k, v = _inputs(queries=33, keys=1)
    with backend(name):
        out = attention(q, k, v, causal=causal)
        dq, dk, dv = torch.autograd.grad(out.sum(), (q, k, v))
    seen = 1 if causal else 33
    torch.testing.assert_close(out[:, :, -seen:], v.expand(2, 2, seen, 32))
    torch.testing.assert_close(dv, torch.full_like(dv, 2.0 * seen))
    assert max(dq.abs().max(), dk.abs().max()) < 1e-4


@pytest.mark.parametrize("name", BACKENDS)
def test_gradient_of_the_log_sum_exp_alone(name):
    q, k, v = _inputs()
    with backend(name):
        lse = attention(q, k, v, causal=True, return_lse=True)[1]
        got = torch.autograd.grad(lse.sum(), (q, k, v), allow_unused=True, materialize_grads=True)
    with backend("reference"):
        lse = attention(*(x.double() for x in (q, k, v)), causal=True, return_lse=True)[1]
    want = torch.autograd.grad(lse.sum(), (q, k, v), allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["reference", "torch"])
def test_gradcheck(name):
    q, k, v = _inputs(1, 4, 2, 5, 7, 3, torch.float64)
    mask = torch.tensor([[True, False, True, True, True, False, True]])
    with backend(name):
        assert torch.autograd.gradcheck(
            lambda *x: attention(*x, causal=True, key_mask=mask, return_lse=True), (q, k, v)
        )


@pytest.mark.parametrize("rotated", [False, True])
def test_bits_repeat_and_do_not_depend_on_the_batch(rotated):
    q, k, v = _inputs(batch=2, queries=37, keys=40)
    mask = key_mask("tail", 2, 40)
    options = {"causal": True, "window": 30, "softcap": 9.0} if rotated else {"causal": True}
    if rotated:
        tables = rotary_tables(torch.arange(40), 32, xpos_scale_base=64, xpos_center=20)
        options["rotary"] = RotaryTables(RotaryTable(*(t[3:] for t in tables.query)), tables.key)
    results = []
    with backend("triton"):
        for rows in (slice(0, 2), slice(0, 2), slice(1, 2)):
            own = [x.detach()[rows].requires_grad_() for x in (q, k, v)]
            out = attention(*own, key_mask=mask[rows], **options)
            results.append((out, *torch.autograd.grad(out.sum(), own)))
    for a, b, c in zip(*results):
        assert torch.equal(a, b)
        assert torch.equal(a[1:], c)


@pytest.mark.parametrize("name", ["reference", *BACKENDS])
@pytest.mark.parametrize("causal", [False, True])
def test_window_counts_from_the_own_place(name, causal):
    """Equal scores: the output is the mean of the keys that are seen, and tells them."""
    q, k, _ = _inputs(1, 1, 1, 41, 43, 64, grad=False)
    v = F.pad(torch.eye(43), (0, 21))[None, None]
    with backend(name):
        out = attention(q * 0, k, v, causal=causal, window=18)[0, 0]
    for t, row in enumerate(out):
        place = t + 43 - 41
        seen = [s for s in range(43) if place - 18 < s < (place + 1 if causal else place + 18)]
        assert row.nonzero().flatten().tolist() == seen
        torch.testing.assert_close(row[seen], torch.full((len(seen),), 1 / len(seen)))


@pytest.mark.parametrize("name", ["reference", *BACKENDS])
def test_softcap_bounds_the_scores(name):
    q, k = torch.zeros(1, 1, 4, 32), torch.zeros(1, 1, 2, 32)
    q[..., 0], k[0, 0, 0, 0] = torch.tensor([-1e4, -0.3, 1e-3, 2.0]), 1.0
    with backend(name):
        out, lse = attention(q, k, F.one_hot(torch.arange(2), 32)[None, None].float(), scale=1.0, softcap=1.5,
                             return_lse=True)  # fmt: skip
    score = 1.5 * (q[0, 0, :, 0] / 1.5).tanh()
    torch.testing.assert_close(out[0, 0, :, 0], score.sigmoid())
    torch.testing.assert_close(lse[0, 0], torch.log1p(score.exp()))


@pytest.mark.parametrize("name", BACKENDS)
def test_rotary_is_that_of_the_op(name):
    q, k, v = _inputs(queries=40, keys=50)
    tables = rotary_tables(torch.arange(50), 32, xpos_scale_base=32, xpos_center=25)
    tables = RotaryTables(RotaryTable(*(t[10:] for t in tables.query)), tables.key)
    results = []
    with backend(name):
        for apart in (False, True):
            turned = (rotary(q, tables.query), rotary(k, tables.key)) if apart else (q, k)
            out = attention(*turned, v, causal=True, rotary=None if apart else tables)
            results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["reference", "torch"])
def test_gradcheck_of_every_option(name):
    q, k, v = _inputs(1, 2, 1, 4, 6, 4, torch.float64)
    tables = rotary_tables(torch.arange(6), 4)
    tables = RotaryTables(RotaryTable(*(t[2:] for t in tables.query)), tables.key)

    def call(*x):
        return attention(*x, causal=True, window=3, softcap=2.0, rotary=tables, return_lse=True)

    with backend(name):
        assert torch.autograd.gradcheck(call, (q, k, v))


def test_numbers_may_change_under_dynamic_compilation():
    """One graph for all lengths and windows; PyTorch makes one for every float that an operator takes."""
    torch._dynamo.reset()
    graphs = []

    def record(graph, example):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(
        lambda q, k, v, scale, window: attention(q, k, v, causal=True, scale=scale, window=window),
        fullgraph=True, dynamic=True, backend=record,
    )  # fmt: skip
    for queries, scale, window in ((9, 0.5, 4), (11, 0.5, 5), (17, 0.5, 9), (9, 0.7, 4)):
        q, k, v = _inputs(queries=queries, keys=queries, grad=False)
        torch.testing.assert_close(
            compiled(q, k, v, scale, window), attention(q, k, v, causal=True, scale=scale, window=window)
        )
    assert len(graphs) == 2


@pytest.mark.parametrize("name", BACKENDS)
def test_heads_join_without_a_copy(name):
    q, k, v = _inputs(heads=4, grad=False)
    with backend(name):
        out = attention(q, k, v)
    assert out.transpose(1, 2).view(2, 40, 4 * 32).data_ptr() == out.data_ptr()


def test_transposed_and_expanded_inputs():
    """The last dimension need not be contiguous either, nor anything of the gradient."""
    q, k, v = (
        x.detach().transpose(2, 3).contiguous().transpose(2, 3).requires_grad_() for x in _inputs(keys=1)
    )
    k, v = (x.expand(2, 1, 50, 32) for x in (k, v))
    results = []
    for name in ("reference", "triton"):
        with backend(name):
            out = attention(q, k, v, causal=True)
            results.append((out, *torch.autograd.grad(out.sum(), (q, k, v))))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_other_head_sizes_fall_back():
    q, k, v = _inputs(size=40, grad=False)
    with backend("attention=triton"), pytest.warns(UserWarning, match="head size 40"):
        attention(q, k, v)
    with backend("attention=triton", strict=True), pytest.raises(BackendError, match="head size 40"):
        attention(q, k, v)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"q": torch.zeros(2, 3, 32)}, ValueError, r"q must be \[B, H, T, D\]"),
        ({"q": torch.zeros(2, 2, 5, 32).long()}, TypeError, "q must be float32"),
        ({"k": torch.zeros(2, 1, 7, 16)}, ValueError, "k must have q's batch and head size"),
        ({"v": torch.zeros(2, 1, 8, 32)}, ValueError, "v must have the shape of k"),
        ({"k": torch.zeros(2, 1, 7, 32).half()}, ValueError, "q's dtype"),
        ({"q": torch.zeros(2, 3, 5, 32), "k": torch.zeros(2, 2, 7, 32), "v": torch.zeros(2, 2, 7, 32)},
         ValueError, "multiple of k's"),
        ({"key_mask": torch.zeros(2, 7)}, TypeError, "key_mask must be boolean"),
        ({"key_mask": torch.zeros(2, 5).bool()}, ValueError, "one entry for each key"),
        ({"scale": 0.0}, ValueError, "scale must be positive"),
        ({"scale": float("nan")}, ValueError, "scale must be positive"),
        ({"softcap": -1.0}, ValueError, "softcap must be positive"),
        ({"window": 0}, ValueError, "window must be at least 1"),
        ({"window": 2.5}, TypeError, "window must be a whole number"),
        ({"rotary": rotary_tables(torch.arange(7), 32).query}, TypeError, "rotary must be RotaryTables"),
        ({"rotary": rotary_tables(torch.arange(7), 32)}, ValueError, r"cos must be \[T, D/2\].* for q"),
    ],
)  # fmt: skip
def test_what_is_refused(change, error, match):
    args = {"q": torch.zeros(2, 2, 5, 32), "k": torch.zeros(2, 1, 7, 32), "v": torch.zeros(2, 1, 7, 32)}
    with pytest.raises(error, match=match):
        attention(**args | change)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("size", config.HEAD_SIZES)
def test_padded_rows_end_with_a_tile(target, size, dtype):
    """One backward kernel pads its rows for the other."""
    if not config.serves(dtype, size):
        pytest.skip("there are no tiles")
    for turned in {False, config.turns(target, dtype, size)}:
        writer, reader = (
            config.chosen(f"{name}_gradient", target, dtype, size, turned) for name in ("query", "key")
        )
        assert writer.block_m % reader.block_m == 0


def test_a_graph_for_any_number_of_heads():
    """As many for keys as for queries, which the trace may know by a symbol alone."""
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q: attention(q, q, q, causal=True),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for heads in (2, 3, 5):
        q = torch.randn(2, heads, 6, 8)
        torch.testing.assert_close(compiled(q), attention(q, q, q, causal=True))
