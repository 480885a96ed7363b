"""Sampling: cache, padding, stops and neighbours change no token, and a learner finds what is recorded."""

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from palm_rlhf.generation import Generation, best_of, generate, joined, left_padded
from palm_rlhf.models.value import Policy

# Of different lengths, so that all but one are padded on the left.
PROMPTS = [[3, 4, 5, 6, 7, 8], [9], [10, 11, 12], [1, 2, 1, 2], [5, 5]]
VARIANTS = [
    {},
    {"qk_rmsnorm": True},
    {"finetune_scopes": ("actor",), "lora_r": 3},
    {"rotary_xpos_scale_base": 16},
]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scope_of(options) -> str | None:
    return next(iter(options.get("finetune_scopes", ())), None)


def some_stops(model, prompts, scope, count: int = 3) -> list[int]:
    """Tokens that end some of the responses early and others late."""
    free = generate(model, prompts, max_new_tokens=12, temperature=0, scope=scope)
    return free.responses[:, 2:8].flatten().unique()[:count].tolist()


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_greedy_with_the_cache_is_greedy_without(make_palm, options, seed):
    model, scope = make_palm(seed, **options), scope_of(options)
    stops = some_stops(model, PROMPTS, scope)
    for stop in (None, stops):
        found, expected = (
            generate(model, PROMPTS, max_new_tokens=16, temperature=0, stop=stop, scope=scope, cache=cache)
            for cache in (True, False)
        )
        assert torch.equal(found.tokens, expected.tokens)
        assert torch.equal(found.mask, expected.mask)
        assert torch.equal(found.stopped, expected.stopped)
        torch.testing.assert_close(found.logprob, expected.logprob, atol=1e-5, rtol=1e-5)
    assert found.stopped.any()


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_sampling_with_the_cache_is_sampling_without(make_palm, options):
    model, scope = make_palm(**options), scope_of(options)
    found, expected = (
        generate(model, PROMPTS, max_new_tokens=24, samples=4, temperature=1.3, top_p=0.95, stop=[2, 3, 4, 5],
                 scope=scope, cache=cache, generator=seeded())
        for cache in (True, False)
    )  # fmt: skip
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.mask, expected.mask)
    torch.testing.assert_close(found.logprob, expected.logprob, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.log_mass, expected.log_mass, atol=1e-5, rtol=1e-5)


def test_rows_that_stopped_leave_the_cache(make_palm, monkeypatch):
    """The same with rows dropped at once, late, or never; and they are dropped."""
    from palm_rlhf.models.cache import KVCache

    model, calls, keep = make_palm(), [], KVCache.keep
    monkeypatch.setattr(KVCache, "keep", lambda self, rows: calls.append(len(rows)) or keep(self, rows))
    found = {}
    for share in (0.0, 0.25, 2.0):
        calls.clear()
        monkeypatch.setattr(sys.modules["palm_rlhf.generation"], "_DROP", share)
        found[share] = generate(
            model, PROMPTS * 4, max_new_tokens=20, temperature=1.5, stop=[2, 3, 4], generator=seeded()
        )
        assert bool(calls) == (share < 1)
        assert calls == sorted(calls, reverse=True)
    for other in (found[0.0], found[2.0]):
        assert torch.equal(other.tokens, found[0.25].tokens)
        assert torch.equal(other.mask, found[0.25].mask)
        torch.testing.assert_close(other.logprob, found[0.25].logprob, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 0.7}, {"top_k": 5}, {"temperature": 0.7, "top_p": 0.8}], ids=str
)
def test_the_learner_finds_the_logprob_that_was_recorded(make_palm, options, sampling):
    model, scope = make_palm(**options), scope_of(options)
    g = generate(model.train(), PROMPTS, max_new_tokens=12, samples=3, stop=[2, 3], scope=scope, pad=7,
                 generator=seeded(), **sampling)  # fmt: skip
    found, entropy = Policy(model, scope)(g.tokens, g.mask, g.prompt_width, sampling.get("temperature", 1.0))
    mask = g.response_mask
    torch.testing.assert_close(found[mask], g.logprob[mask], atol=1e-5, rtol=0)
    assert (entropy[mask] > 0).all()
    assert not g.logprob[~mask].any()
    assert not g.log_mass[~mask].any()


def plain_logits(model, g: Generation, row: int, temperature: float) -> torch.Tensor:
    """[R, V]: what one row's response was drawn from, computed without padding, cache or batch."""
    prompt, response = g.prompt(row), g.response(row)
    ids = torch.tensor([prompt + response[:-1]])
    return model(ids)[0, len(prompt) - 1 :].detach().double() / temperature


@pytest.mark.parametrize(("top_k", "top_p"), [(4, None), (None, 0.6), (6, 0.7), (None, None)])
def test_log_mass_is_the_probability_that_truncation_kept(palm, top_k, top_p):
    g = generate(
        palm, PROMPTS, max_new_tokens=8, temperature=0.9, top_k=top_k, top_p=top_p, generator=seeded()
    )
    for row in range(len(PROMPTS)):
        p = plain_logits(palm, g, row, 0.9).softmax(-1)
        ordered, order = p.sort(-1, descending=True)
        kept = torch.arange(p.shape[1]) < (top_k or p.shape[1])
        ordered = torch.where(kept, ordered, 0.0)
        if top_p is not None:
            share = ordered / ordered.sum(-1, keepdim=True)
            ordered = torch.where(share.cumsum(-1) - share < top_p, ordered, 0.0)
        drawn = torch.tensor(g.response(row))
        torch.testing.assert_close(g.log_mass[row].double(), ordered.sum(-1).log(), atol=1e-5, rtol=0)
        logprob = p.gather(1, drawn[:, None]).log().squeeze(1)
        torch.testing.assert_close(g.logprob[row].double(), logprob, atol=1e-5, rtol=0)
        rank = (order == drawn[:, None]).int().argmax(-1, keepdim=True)
        assert (ordered.gather(1, rank) > 0).all(), "a token that truncation cut"


@given(data=st.data())
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_row_does_not_depend_on_the_rows_around_it(palm, data):
    """The same place in a batch is the same random numbers: other prompts around it, and other lengths."""
    prompt = st.lists(st.integers(0, 22), min_size=1, max_size=6)
    mine, others, more = (
        data.draw(prompt),
        data.draw(st.lists(prompt, min_size=3, max_size=3)),
        data.draw(prompt),
    )
    options = {"max_new_tokens": 10, "temperature": 1.2, "stop": [4, 5, 6]}
    first = generate(palm, [others[0], mine, others[1]], generator=seeded(), **options)
    second = generate(palm, [others[2], mine, more], generator=seeded(), **options)
    assert first.response(1) == second.response(1)
    width = min(first.logprob.shape[1], second.logprob.shape[1])
    torch.testing.assert_close(first.logprob[1, :width], second.logprob[1, :width], atol=1e-5, rtol=0)


def test_a_stop_token_in_the_prompt_ends_nothing(palm):
    prompts = [[4, 2, 6], [2], [2, 2]]
    free = generate(palm, prompts, max_new_tokens=6, temperature=0)
    unused = next(t for t in range(23) if t not in free.responses.flatten().tolist())
    prompts = [[unused, 3, 4], [unused], [5, unused]]
    free = generate(palm, prompts, max_new_tokens=6, temperature=0)
    assert unused not in free.responses.flatten().tolist()
    found = generate(palm, prompts, max_new_tokens=6, temperature=0, stop=unused)
    assert torch.equal(found.tokens, free.tokens)
    assert not found.stopped.any()
    assert found.response_mask.all()


@pytest.mark.parametrize("cache", [True, False])
def test_nothing_comes_after_a_stop(palm, cache):
    stops = {2, 3, 4}
    g = generate(palm, PROMPTS * 3, max_new_tokens=16, temperature=1.5, stop=stops, pad=9, cache=cache,
                 generator=seeded())  # fmt: skip
    assert g.stopped.any()
    assert not g.stopped.all()
    for row in range(len(PROMPTS) * 3):
        response = g.response(row)
        assert not stops & set(response[:-1])
        assert (response[-1] in stops) == bool(g.stopped[row])
        assert g.response_mask[row].tolist() == [True] * len(response) + [False] * (
            g.responses.shape[1] - len(response)
        )
        assert (g.responses[row][~g.response_mask[row]] == 9).all()
        if not g.stopped[row]:
            assert len(response) == 16


def test_it_ends_when_all_rows_have_stopped(palm):
    steps = []
    g = generate(palm, PROMPTS, max_new_tokens=50, stop=list(range(23)), on_token=steps.append)
    assert g.tokens.shape == (5, 7)
    assert steps == [1]
    assert g.stopped.all()
    generate(palm, PROMPTS, max_new_tokens=4, on_token=steps.append)
    assert steps == [1, 1, 2, 3, 4]


def test_the_pad_token_may_be_a_real_one(palm):
    """Masks tell padding from tokens, not ids: prompts and responses may hold the pad token; it may stop."""
    options = {"max_new_tokens": 10, "temperature": 1.4, "stop": [3, 8]}
    results = [
        generate(palm, [[3, 3, 4], [3], [5, 3]], pad=pad, generator=seeded(3), **options) for pad in (0, 3)
    ]
    for row in range(3):
        assert results[0].response(row) == results[1].response(row)
        assert results[0].prompt(row) == results[1].prompt(row)
    assert torch.equal(results[0].mask, results[1].mask)
    assert torch.equal(results[0].logprob, results[1].logprob)


def test_samples_of_a_prompt_are_neighbours(palm):
    g = generate(palm, PROMPTS, max_new_tokens=8, samples=3, generator=seeded())
    assert [g.prompt(row) for row in range(15)] == [prompt for prompt in PROMPTS for _ in range(3)]
    assert len({tuple(g.response(row)) for row in range(3)}) == 3


def test_best_of_takes_the_first_of_the_best(palm):
    def reward(drawn: Generation) -> torch.Tensor:
        return (drawn.responses % 3 == 0).sum(1).float()

    options = {"max_new_tokens": 6, "temperature": 1.3}
    every = generate(palm, PROMPTS, samples=5, generator=seeded(), **options)
    best, scores = best_of(palm, PROMPTS, reward, samples=5, generator=seeded(), **options)
    for row, prompt in enumerate(PROMPTS):
        group = reward(every)[5 * row : 5 * row + 5].tolist()
        assert best.prompt(row) == prompt
        assert scores[row] == max(group)
        assert best.response(row) == every.response(5 * row + group.index(max(group)))


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda drawn: torch.tensor([1.0, math.nan, 3.0, 2.0]), "a reward is not finite"),
        (lambda drawn: torch.rand(1), r"a number for each of 4 responses, and this one gave \(1,\)"),
        (lambda drawn: torch.rand(4, 1), r"this one gave \(4, 1\)"),
        (lambda drawn: [1.0] * 4, "this one gave list"),
    ],
)
def test_best_of_refuses_what_is_not_one_finite_number_a_response(palm, reward, message):
    with pytest.raises(ValueError, match=message):
        best_of(palm, PROMPTS[:1], reward, samples=4, max_new_tokens=2)


def test_a_generator_gives_the_same_again(palm):
    def draw(generator):
        return generate(palm, PROMPTS, max_new_tokens=10, stop=[3], generator=generator).tokens

    assert torch.equal(draw(seeded(1)), draw(seeded(1)))
    assert not torch.equal(draw(seeded(1))[:, :8], draw(seeded(2))[:, :8])
    generator = seeded(1)
    assert not torch.equal(draw(generator)[:, :8], draw(generator)[:, :8])
    before = torch.get_rng_state()
    draw(seeded(1))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(3)
    first = draw(None)
    torch.manual_seed(3)
    assert torch.equal(draw(None), first)


def test_a_response_follows_from_its_seed_alone(palm):
    """Among others, alone, with samples beside it, in a longer run: the same seed is the same response."""
    seeds = [7, 2**62, 7, 0, 2**32 + 7]
    options = {"max_new_tokens": 12, "temperature": 1.2, "stop": [4, 5, 6]}
    together = generate(palm, PROMPTS, seeds=seeds, **options)
    assert together.seeds.tolist() == seeds
    assert {len(together.response(row)) for row in range(5)} != {12}, "some stop early"
    for row, (prompt, seed) in enumerate(zip(PROMPTS, seeds)):
        alone = generate(palm, [prompt], seeds=torch.tensor([seed]), **options)
        assert alone.response(0) == together.response(row)
        count = len(alone.response(0))
        torch.testing.assert_close(alone.logprob[0], together.logprob[row, :count], atol=1e-5, rtol=0)
    several = generate(palm, [PROMPTS[1], PROMPTS[3]], samples=3, seeds=[1, 2, 3, 4, 0, 6], **options)
    assert several.response(4) == together.response(3)
    assert len({tuple(several.response(row)) for row in range(3)}) == 3
    short = generate(palm, PROMPTS, seeds=seeds, **(options | {"max_new_tokens": 5}))
    assert all(short.response(row) == together.response(row)[:5] for row in range(5))
    whole = joined([together.rows(slice(0, 2)), together.rows(slice(2, 5))])
    assert whole.seeds.tolist() == together.rows(slice(None)).seeds.tolist() == seeds


def test_tokens_are_drawn_with_the_probabilities_of_the_model(palm):
    g = generate(palm, [[3, 4]], samples=4000, max_new_tokens=1, temperature=0.8, generator=seeded())
    expected = F.softmax(palm(torch.tensor([[3, 4]]))[0, -1] / 0.8, -1)
    found = torch.bincount(g.responses[:, 0], minlength=23) / 4000
    assert ((found - expected).abs() < 5 * (expected / 4000).sqrt() + 1e-3).all()


def test_prompts_in_a_tensor_with_a_mask_are_prompts_in_lists(palm):
    tokens, mask = left_padded(PROMPTS, pad=6)
    expected = generate(palm, PROMPTS, max_new_tokens=8, generator=seeded(), pad=6)
    for ids, given_mask in ((tokens, mask), (tokens.int(), mask), (tokens, mask.long())):
        found = generate(palm, ids, mask=given_mask, max_new_tokens=8, generator=seeded(), pad=6)
        assert torch.equal(found.tokens, expected.tokens)
        assert found.tokens.dtype is torch.int64
        assert torch.equal(found.mask, expected.mask)
    as_tensors = generate(
        palm, [torch.tensor(p) for p in PROMPTS], max_new_tokens=8, generator=seeded(), pad=6
    )
    assert torch.equal(as_tensors.tokens, expected.tokens)


def test_no_new_tokens(palm):
    g = generate(palm, PROMPTS, max_new_tokens=0)
    assert g.responses.shape == g.logprob.shape == (5, 0)
    assert not g.stopped.any()
    assert [x.shape for x in Policy(palm)(g.tokens, g.mask, g.prompt_width)] == [(5, 0)] * 2


def test_the_model_stays_in_training_mode_and_its_weights_as_they_were(make_palm):
    model = make_palm(finetune_scopes=("a",), attn_dropout=0.3, ff_dropout=0.3).train()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    first = generate(model, PROMPTS, max_new_tokens=8, temperature=0, scope="a")
    assert torch.equal(
        first.tokens, generate(model, PROMPTS, max_new_tokens=8, temperature=0, scope="a").tokens
    )
    assert all(part.training for part in model.modules())
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert not first.logprob.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(make_palm, dtype):
    model = make_palm().to(dtype)
    g = generate(model, PROMPTS, max_new_tokens=10, stop=[3], generator=seeded())
    assert g.logprob.dtype is torch.float32
    found, _ = Policy(model)(g.tokens, g.mask, g.prompt_width)
    bound = 0.1 if dtype is torch.bfloat16 else 1e-5
    torch.testing.assert_close(found.float()[g.response_mask], g.logprob[g.response_mask], atol=bound, rtol=0)


def test_autocast(make_palm):
    model = make_palm(finetune_scopes=("a",))
    with torch.autocast("cpu", torch.bfloat16):
        g = generate(model, PROMPTS, max_new_tokens=10, stop=[3], generator=seeded(), scope="a")
        found, _ = Policy(model, "a")(g.tokens, g.mask, g.prompt_width)
    torch.testing.assert_close(found[g.response_mask], g.logprob[g.response_mask], atol=0.2, rtol=0)


def test_a_generation_gives_prompts_and_responses_without_padding(palm):
    g = generate(palm, PROMPTS, max_new_tokens=6, temperature=1.5, stop=[2, 3, 4], generator=seeded())
    some = g.rows(torch.tensor([3, 1]))
    assert [some.prompt(0), some.prompt(1)] == [PROMPTS[3], PROMPTS[1]]
    assert some.response(1) == g.response(1)
    assert torch.equal(some.logprob[0], g.logprob[3])
    response = g.response(0)
    assert g.response(0, without=iter(response[:1])) == [token for token in response if token != response[0]]


@pytest.mark.parametrize(
    ("prompts", "options", "error"),
    [
        ([], {}, "no prompts"),
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1, 23]], {}, "from 0 to 22, got 23"),
        ([[1, -1]], {}, "got -1"),
        (torch.zeros(3, dtype=torch.int64), {}, r"\[batch, time\]"),
        (torch.zeros(2, 0, dtype=torch.int64), {}, "not empty"),
        (torch.zeros(2, 3), {}, "float32"),
        (torch.ones(2, 3, dtype=torch.int64), {"mask": torch.ones(2, 2, dtype=torch.bool)}, "mask"),
        (torch.ones(1, 3, dtype=torch.int64), {"mask": torch.tensor([[1, 1, 0]]).bool()}, "on the left"),
        ([1, 2, 3], {}, r"prompt 0 must be a list of token ids, got 1. One prompt alone is \[prompt\]"),
        ([[1], torch.ones(2, 3)], {}, r"prompt 1 must be a list of token ids, got \(2, 3\)"),
        (["so much"], {}, "prompt 0 must be token ids, got 'so much'. Encode a text"),
        ("so", {}, "prompt 0 must be token ids, got 's'"),
        ([[1]], {"stop": "a"}, "stop must be a token id or several, got 'a'. A text is encoded"),
        ([[1]], {"stop": ["a", 3]}, "stop must be a token id or several"),
        ([[1]], {"max_new_tokens": -1}, "max_new_tokens"),
        ([[1]], {"samples": 0}, "samples"),
        ([[1]], {"temperature": -1.0}, "temperature"),
        ([[1]], {"top_k": 0}, "top_k"),
        ([[1]], {"top_p": 1.5}, "top_p"),
        ([[1]], {"stop": 23}, "stop"),
        ([[1]], {"stop": [2, -5]}, "stop"),
        ([[1]], {"pad": 99}, "pad"),
        ([[1]], {"scope": "nobody"}, "nobody"),
        ([[1]], {"seeds": [1], "generator": seeded()}, "exclude each other"),
        ([[1], [2]], {"seeds": [1, 2, 3], "samples": 2}, "each of the 4 responses .* got 3"),
        ([[1]], {"seeds": [-1]}, "from 0 to 9223372036854775807, got -1"),
        ([[1]], {"seeds": [0.5]}, "integers, got 0.5"),
    ],
)  # fmt: skip
def test_bad_input_is_told(palm, prompts, options, error):
    with pytest.raises((ValueError, TypeError), match=error):
        generate(palm, prompts, **({"max_new_tokens": 2} | options))


def test_a_model_with_a_greatest_length_is_not_exceeded(palm):
    palm.max_length = 9
    assert generate(palm, PROMPTS, max_new_tokens=3).tokens.shape == (5, 9)
    with pytest.raises(ValueError, match="lower max_new_tokens"):
        generate(palm, PROMPTS, max_new_tokens=4)


def test_an_encoder_does_not_generate(make_palm):
    with pytest.raises(ValueError, match="causal"):
        generate(make_palm(causal=False), PROMPTS, max_new_tokens=2)


def test_the_cache_has_an_end(palm):
    cache = palm.new_cache(2, 4)
    palm.hidden_states(torch.ones(2, 3, dtype=torch.int64), cache=cache)
    with pytest.raises(ValueError, match="4 slots, 3 of them"):
        palm.hidden_states(torch.ones(2, 2, dtype=torch.int64), cache=cache)


def test_many_steps_at_once_follow_what_is_cached(palm, tokens):
    """A cache takes any number of tokens, with padding between them."""
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[0, :2] = mask[1, 3] = False
    expected = palm.hidden_states(tokens, mask=mask)
    cache, parts = palm.new_cache(3, 9), []
    for start, end in ((0, 3), (3, 4), (4, 9)):
        parts.append(palm.hidden_states(tokens[:, start:end], mask=mask[:, start:end], cache=cache))
    torch.testing.assert_close(torch.cat(parts, 1)[mask], expected[mask], atol=1e-5, rtol=1e-5)


def test_one_step_sees_no_hole_in_the_cache(palm, tokens):
    """Padding between tokens, not on the left alone: a start for each row does not say it."""
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[0, 2] = mask[1, 4:6] = False
    with torch.no_grad():
        expected = palm.hidden_states(tokens, mask=mask)[:, -1]
        cache = palm.new_cache(3, 9)
        palm.hidden_states(tokens[:, :-1], mask=mask[:, :-1], cache=cache)
        found = palm.hidden_states(tokens[:, -1:], cache=cache)[:, -1]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
