"""sample: the distribution, the truncation and what is reported of them."""

import math

import pytest
import torch

import rlhf_kernels
from rlhf_kernels import logprob, sample

PROBABILITIES = torch.tensor([0.05, 0.4, 0.0, 0.25, 0.2, 0.1], dtype=torch.float64)
BACKENDS = pytest.mark.parametrize("backend", ["torch", "native", "reference"])


def draws(n, *, dtype=torch.float32, **options):
    """n draws from PROBABILITIES."""
    logits = PROBABILITIES.log().to(dtype).expand(n, -1)
    return sample(logits, generator=torch.Generator().manual_seed(7), **options)


def kept(**options):
    """The tokens that truncation leaves of PROBABILITIES, found by drawing at 1,000 levels."""
    uniform = (torch.arange(1000) + 0.5) / 1000
    tokens = sample(PROBABILITIES.log().expand(1000, -1), uniform=uniform, **options)[0]
    return set(tokens.tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 3},
        {"top_p": 0.8},
        {"top_k": 4, "top_p": 0.9},
    ],
    ids=str,
)
def test_distribution(options, dtype):
    """Pearson's chi-square: 5 degrees of freedom exceed 20.5 once in 1,000 times."""
    n = 20000
    tokens, found, mass = draws(n, dtype=dtype, **options)
    rounded = PROBABILITIES.log().to(dtype).double()
    expected = (rounded / options.get("temperature", 1.0)).softmax(0)
    support = torch.zeros(6).index_fill(0, torch.tensor(sorted(kept(**options))), 1)
    truncated = expected * support / (expected * support).sum()
    counts = torch.bincount(tokens, minlength=6)
    assert not counts[support == 0].any()
    real = truncated > 0
    assert ((counts - n * truncated)[real].square() / (n * truncated)[real]).sum() < 20.5
    torch.testing.assert_close(found.double(), expected.log()[tokens], rtol=0, atol=1e-5)
    torch.testing.assert_close((found - mass).double(), truncated.log()[tokens], rtol=0, atol=1e-5)


@BACKENDS
@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        ({"top_k": 1}, {1}),
        ({"top_k": 2}, {1, 3}),
        ({"top_k": 5}, {0, 1, 3, 4, 5}),
        ({"top_k": 100}, {0, 1, 3, 4, 5}),
        ({"top_p": 1e-9}, {1}),
        ({"top_p": 0.399}, {1}),
        ({"top_p": 0.401}, {1, 3}),
        ({"top_p": 0.849}, {1, 3, 4}),
        ({"top_p": 0.851}, {1, 3, 4, 5}),
        ({"top_p": 1.0}, {0, 1, 3, 4, 5}),
        # top_p counts from what top_k left: 0.4 / 0.65 = 0.615
        ({"top_k": 2, "top_p": 0.61}, {1}),
        ({"top_k": 2, "top_p": 0.62}, {1, 3}),
        # and from the distribution at the temperature: 0.16 / 0.275 = 0.582
        ({"temperature": 0.5, "top_p": 0.58}, {1}),
        ({"temperature": 0.5, "top_p": 0.59}, {1, 3}),
        ({"temperature": 0.0}, {1}),
    ],
    ids=str,
)
def test_support(options, tokens, backend):
    with rlhf_kernels.backend(backend):
        assert kept(**options) == tokens


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 6}, {"top_k": 99}, {"top_p": 1.0}, {"top_p": 1 - 1e-12}], ids=str
)
def test_log_mass_is_zero_where_nothing_is_cut(options):
    logits = torch.randn(5, 6)
    assert not sample(logits, **options)[2].any()


def test_logprob_is_the_learners():
    logits = 3 * torch.randn(64, 1000)
    token, found, _ = sample(logits, temperature=0.7, top_p=0.9)
    torch.testing.assert_close(found, logprob(logits, token, temperature=0.7)[0], rtol=0, atol=1e-5)


def test_greedy_is_the_largest_logit_with_its_probability_at_temperature_one():
    logits = torch.randn(9, 50)
    token, found, mass = sample(logits, temperature=0)
    assert token.equal(logits.argmax(-1))
    assert found.equal(mass)
    torch.testing.assert_close(found, logits.log_softmax(-1).amax(-1))
    assert sample(torch.zeros(3, 4), temperature=0.0)[0].tolist() == [0, 0, 0]


def test_equal_logits_are_cut_from_the_right():
    """Exactly k tokens stay: 16-bit logits are full of ties."""
    logits = torch.tensor([[0.0, 1.0, 1.0, 1.0, 0.0, 1.0]]).expand(400, -1)
    uniform = (torch.arange(400) + 0.5) / 400
    for options in ({"top_k": 3}, {"top_p": 0.5}):
        token, _, mass = sample(logits, uniform=uniform, **options)
        assert set(token.tolist()) == {1, 2, 3}
        torch.testing.assert_close(mass.exp(), logits.softmax(-1)[:, 1:4].sum(-1))


@pytest.mark.parametrize("options", [{}, {"top_k": 4}, {"top_p": 0.9}], ids=str)
def test_the_ends_of_the_unit_interval(options):
    logits = torch.tensor([-math.inf, 0.3, 0.1, 0.2, -math.inf, 0.0, -math.inf]).expand(3, -1)
    uniform = torch.tensor([0.0, 1 - 2.0**-53, 1 - 2.0**-24], dtype=torch.float64)
    assert sample(logits, uniform=uniform, **options)[0].tolist() == [1, 5, 5]


@BACKENDS
def test_numbers_outside_of_the_unit_interval_are_the_nearest_inside(backend):
    logits = torch.tensor([-math.inf, 0.0, 1.0, -math.inf]).expand(5, -1)
    uniform = torch.tensor([1.0, 1.5, math.inf, -0.5, 0.0]).to(torch.bfloat16)
    with rlhf_kernels.backend(backend):
        assert sample(logits, uniform=uniform)[0].tolist() == [2, 2, 2, 1, 1]


def test_the_tail_of_a_large_vocabulary_is_drawn():
    """200,000 tokens share 0.02 % beside a likely one; float32 sums would lump a hundred of them together."""
    v = 200_001
    logits = torch.zeros(4, v)
    logits[:, 0] = math.log(1e9)
    uniform = (1e9 + torch.tensor([0.5, 77_777.5, 150_000.5, 199_999.5], dtype=torch.float64)) / (1e9 + v - 1)
    token = sample(logits, uniform=uniform)[0]
    torch.testing.assert_close(token, torch.tensor([1, 77_778, 150_001, 200_000]), rtol=0, atol=1)


def test_the_generator_decides():
    logits = torch.randn(64, 300)
    first, second = (sample(logits, generator=torch.Generator().manual_seed(3))[0] for _ in range(2))
    assert first.equal(second)
    assert not first.equal(sample(logits, generator=torch.Generator().manual_seed(4))[0])
    numbers = torch.rand(64, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    assert first.equal(sample(logits, uniform=numbers)[0])
    torch.manual_seed(5)
    default = sample(logits)[0]
    torch.manual_seed(5)
    assert default.equal(sample(logits)[0])


@pytest.mark.parametrize("options", [{}, {"top_p": 0.7}, {"top_k": 50, "top_p": 0.7}], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_does_not_depend_on_its_batch(options, threads):
    logits, uniform = 2 * torch.randn(3, 40001), torch.rand(3)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole = sample(logits, uniform=uniform, **options)
        rows = [sample(logits[i : i + 1], uniform=uniform[i : i + 1], **options) for i in range(3)]
    finally:
        torch.set_num_threads(before)
    for k in range(3):
        assert torch.cat([row[k] for row in rows]).equal(whole[k])


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.9}], ids=str)
def test_a_spoilt_row_spoils_no_other(options):
    logits = torch.randn(4, 20)
    logits[1], logits[2, 5] = -math.inf, math.nan
    token, found, _ = sample(logits, uniform=torch.full((4,), 0.5), **options)
    assert token.min() >= 0
    assert token.max() < 20
    assert found.isfinite().tolist() == [True, False, False, True]


def test_an_extreme_temperature_is_no_overflow():
    logits = torch.tensor([[300.0, 299.0, -300.0]])
    token, found, _ = sample(logits, temperature=1e-37)
    assert (token.item(), found.item()) == (0, 0.0)
    assert sample(logits, temperature=1e30)[1].item() == pytest.approx(-math.log(3))


def test_results_have_no_gradient():
    logits = torch.randn(3, 5, requires_grad=True)
    for result in (
        *sample(logits),
        *torch.ops.rlhf_kernels.sample(logits, torch.rand(3).double(), 1.0, None, None),
    ):
        assert not result.requires_grad


def test_draws_inside_a_compiled_function():
    compiled = torch.compile(lambda z: sample(z, top_k=1), fullgraph=True, backend="aot_eager")
    logits = torch.randn(8, 30)
    assert compiled(logits)[0].equal(logits.argmax(-1))


LOGITS = torch.zeros(2, 5)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"logits": LOGITS.int()}, TypeError, "logits must be float32.*got int32"),
        ({"logits": torch.zeros(2, 3, 5)}, ValueError, r"logits must be \[B, V\].*logits\[:, -1\]"),
        ({"logits": LOGITS[:, :0]}, ValueError, r"at least one token, got \(2, 0\)"),
        ({"temperature": -1.0}, ValueError, "temperature must be positive and finite, got -1.0"),
        ({"top_k": 0}, ValueError, "top_k must be an int of at least 1, got 0. Pass None"),
        ({"top_k": 2.5}, ValueError, "top_k must be an int of at least 1, got 2.5"),
        ({"top_p": 0.0}, ValueError, "top_p must be positive and finite, got 0.0"),
        ({"top_p": 1.5}, ValueError, r"top_p must be in \(0, 1\], got 1.5"),
        ({"uniform": torch.rand(3)}, ValueError, r"one number for each row, \(2,\), got \(3,\)"),
        ({"uniform": 0.5}, TypeError, "uniform must be a tensor, got float"),
        ({"generator": 0}, TypeError, r"a torch.Generator, got int. .*torch.Generator\(\).manual_seed"),
    ],
)
def test_bad_input(change, error, text):
    with pytest.raises(error, match=rf"sample\(\): .*{text}"):
        sample(**({"logits": LOGITS} | change))
