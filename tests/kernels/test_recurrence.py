"""linear_recurrence and what rests on it: identities, rows, gradients, errors. Cases are in test_specs."""

import pytest
import torch

import rlhf_kernels as rk

BACKENDS = pytest.mark.parametrize("backend", ["torch", "native", "triton"])


def trajectory(rows=4, steps=50):
    log_ratio, rewards, values = 0.3 * torch.randn(rows, steps), *torch.randn(2, rows, steps)
    return log_ratio, rewards, values, torch.rand(rows, steps) < 0.1, torch.randn(rows)


@BACKENDS
@pytest.mark.parametrize("reverse", [True, False])
def test_a_row_does_not_depend_on_its_batch(backend, reverse):
    a, b, initial = torch.randn(18, 70) * 0.5, torch.randn(18, 70), torch.randn(18)
    with rk.backend(f"linear_recurrence={backend}", strict=True):
        whole = rk.linear_recurrence(a, b, reverse=reverse, initial=initial)
        for rows in (slice(0, 1), slice(3, 5), slice(17, 18)):
            part = rk.linear_recurrence(a[rows], b[rows], reverse=reverse, initial=initial[rows])
            assert part.equal(whole[rows])


@BACKENDS
@pytest.mark.parametrize("steps", [1, 17, 70, 1041])
def test_vtrace_of_a_row_with_flags_anywhere(backend, steps):
    """Episodes that end at, before and after masked steps, in every block, alone and in a batch."""
    log_ratio, rewards, values, done, last = trajectory(19, steps)
    mask = torch.rand(19, steps) < 0.6
    given = [x.masked_fill(~mask, float("nan")) for x in (log_ratio, rewards, values)]
    flags = {"mask": mask, "done": done | (torch.rand(19, steps) < 0.2), "next_value": last}
    numbers = {"gamma": 0.97, "lam": 0.9, "rho_clip": 1.3, "c_clip": 1.1}
    with rk.backend(f"vtrace={backend}", strict=True):
        whole = rk.vtrace(*given, **flags, **numbers)
        for row in (slice(3, 4), slice(17, 19)):
            part = {name: x[row] for name, x in flags.items()}
            alone = rk.vtrace(*(x[row] for x in given), **part, **numbers)
            assert all(x.equal(y[row]) for x, y in zip(alone, whole))
    with rk.backend("vtrace=reference"):
        wide = {"mask": mask, "done": flags["done"], "next_value": last.double()}
        expected = rk.vtrace(*(x.double() for x in given), **wide, **numbers)
    for found, want in zip(whole, expected):
        torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-5)


@BACKENDS
def test_vtrace_with_gradients_where_numbers_overflow_or_an_episode_ends_before_nan(backend):
    log_ratio, rewards, values = torch.zeros(2, 5), torch.ones(2, 5), torch.ones(2, 5)
    log_ratio[0, 2] = 95.0  # beyond what exp holds in float32: clipped, so without a gradient
    done = torch.zeros(2, 5, dtype=torch.bool)
    done[:, -1] = True
    last = torch.tensor([float("nan"), float("inf")])
    found = []
    for name, dtype in ((backend, torch.float32), ("reference", torch.float64)):
        wrt = [x.to(dtype, copy=True).requires_grad_() for x in (log_ratio, rewards, values)]
        with rk.backend(f"vtrace={name}", strict=True):
            outputs = rk.vtrace(*wrt, done=done, next_value=last.to(dtype))
        gradients = torch.autograd.grad([o.sum() for o in outputs], wrt)
        assert all(t.isfinite().all() for t in (*outputs, *gradients))
        found.append((*outputs, *gradients))
    for got, want in zip(*found):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


def test_vtrace_in_a_graph_with_gradients():
    """The forward is the C++ operator there; the backward goes through linear_recurrence."""
    log_ratio, rewards, values, done, last = trajectory(3, 20)
    wrt = [x.requires_grad_() for x in (log_ratio, rewards, values, last)]

    def loss(log_ratio, rewards, values, last):
        targets, advantages = rk.vtrace(log_ratio, rewards, values, done=done, next_value=last, gamma=0.9)
        return (targets * targets).sum() + advantages.sin().sum()

    found = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*wrt), wrt)
    with rk.backend("vtrace=reference"):
        expected = torch.autograd.grad(loss(*wrt), wrt)
    for got, want in zip(found, expected):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reverse", [True, False])
@pytest.mark.parametrize("steps", [1, 33])
def test_gradients_of_an_expanded_output(reverse, steps):
    """Sums hand gradients on that take no memory; each way, with an initial state and without."""
    shapes = ((3, steps), (3, steps), (3,))
    a, b, initial = (torch.randn(n, dtype=torch.float64, requires_grad=True) for n in shapes)
    for given in ({}, {"initial": initial}):
        wrt = (a, b, *given.values())
        found = torch.autograd.grad(rk.linear_recurrence(a, b, reverse=reverse, **given).sum(), wrt)
        with rk.backend("linear_recurrence=reference"):
            expected = torch.autograd.grad(rk.linear_recurrence(a, b, reverse=reverse, **given).sum(), wrt)
        for got, want in zip(found, expected):
            torch.testing.assert_close(got, want)


def test_identities():
    _, rewards, values, done, last = trajectory()
    gamma = 0.9
    g = rk.discounted_return(rewards, done=done, next_value=last, gamma=gamma)
    torch.testing.assert_close(g, rk.linear_recurrence(gamma * (~done).float(), rewards, initial=last))
    options = {"done": done, "next_value": last, "gamma": gamma}
    torch.testing.assert_close(rk.lambda_return(rewards, values, lam=1.0, **options), g)
    advantages, returns = rk.gae(rewards, values, lam=0.7, **options)
    torch.testing.assert_close(rk.lambda_return(rewards, values, lam=0.7, **options), returns)
    # On policy, with a trace of lam, V-trace's correction is gae's.
    targets, _ = rk.vtrace(torch.zeros_like(values), rewards, values, lam=0.7, **options)
    torch.testing.assert_close(targets - values, advantages)
    _, to_go = rk.vtrace(torch.zeros_like(values), rewards, values, **options)
    torch.testing.assert_close(to_go, g - values, rtol=1e-4, atol=1e-5)


X = torch.zeros(2, 5)


@pytest.mark.parametrize(
    ("name", "args", "options", "error", "text"),
    [
        ("linear_recurrence", (X, X.int()), {}, TypeError, "b must be float32.*got int32"),
        ("linear_recurrence", (X, X[0]), {}, ValueError, r"b must be \[batch, time\], got \(5,\)"),
        ("linear_recurrence", (X[:, 1:], X), {}, ValueError, "a must have the shape of b"),
        (
            "linear_recurrence",
            (X, X),
            {"initial": torch.zeros(3)},
            ValueError,
            r"each row, \(2,\), got \(3,\)",
        ),
        (
            "linear_recurrence",
            (X, X),
            {"initial": X[:, 0].half()},
            TypeError,
            "initial must have the dtype of b",
        ),
        ("discounted_return", (X,), {"next_value": X}, ValueError, "one number for each row"),
        ("lambda_return", (X, X), {"next_value": X}, ValueError, "one number for each row"),
        ("vtrace", (X, X[:1], X), {}, ValueError, "rewards must have the shape of values"),
        ("vtrace", (X, X, X), {"rho_clip": 0.5}, ValueError, "rho_clip must be at least c_clip"),
        ("vtrace", (X, X, X), {"mask": X}, TypeError, "mask must be boolean"),
    ],
)
def test_bad_input(name, args, options, error, text):
    with pytest.raises(error, match=rf"{name}\(\): .*{text}|gae\(\): .*{text}"):
        getattr(rk, name)(*args, **options)
