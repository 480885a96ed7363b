"""Packed sequences: the same numbers as with padding, without computing it."""

import pytest
import torch

from palm_rlhf.algorithms.offline_table import PAIR_ALGORITHMS
from palm_rlhf.algorithms.row import Whole
from palm_rlhf.algorithms.table import ALGORITHMS
from palm_rlhf.generation import generate
from palm_rlhf.models.packing import PackedModel, hidden_rows, packing, pays, placed, set_packed
from palm_rlhf.models.value import Policy, ValueModel
from palm_rlhf.tasks.pairs import Pair
from palm_rlhf.tokens import ByteTokenizer
from palm_rlhf.trainers.offline import OfflineConfig, OfflineTrainer
from palm_rlhf.trainers.online import OnlineConfig, OnlineTrainer

quiet = pytest.mark.filterwarnings("ignore::rlhf_kernels.runtime.dispatch.FallbackWarning")
PROMPTS = [[3, 4, 5, 6, 7, 8], [9], [10, 11, 12], [1, 2, 1, 2]]


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of several lengths, padded on both sides; one fills its row, one is a single token, one empty."""
    first, last = torch.tensor([0, 4, 2, 5, 3]), torch.tensor([11, 9, 10, 6, 3])
    columns = torch.arange(11)
    mask = (columns >= first[:, None]) & (columns < last[:, None])
    tokens = torch.randint(1, 23, mask.shape, generator=torch.Generator().manual_seed(5))
    return tokens, mask


def test_packing_knows_where_every_token_is():
    _, mask = batch()
    found = packing(mask)
    assert found.cu_seqlens.tolist() == [0, 11, 16, 24, 25, 25]
    assert torch.equal(found.index, mask.flatten().nonzero().squeeze(1))
    assert found.positions.tolist() == [*range(11), *range(5), *range(8), 0]
    assert found.longest == 11
    # A hole keeps its place: the rectangle counts columns.
    hole = torch.tensor([[False, True, False, True]])
    assert packing(hole).positions.tolist() == [0, 2]


def test_rows_are_placed_where_they_came_from():
    _, mask = batch()
    rows = torch.arange(1.0, 26.0).requires_grad_()
    found = placed(rows, mask)
    assert torch.equal(found[mask], rows)
    assert not found[~mask].any()
    (found * 2).sum().backward()
    assert torch.equal(rows.grad, torch.full((25,), 2.0))
    assert placed(torch.ones(25, 3), mask).shape == (5, 11, 3)


@quiet
@pytest.mark.parametrize(
    "options",
    [{}, {"qk_rmsnorm": True}, {"finetune_scopes": ("a",)}, {"rotary_xpos_scale_base": 4}, {"causal": False}],
    ids=["plain", "qk_rmsnorm", "lora", "xpos", "encoder"],
)
def test_packed_hidden_states_are_those_of_the_rectangle(make_palm, options):
    model = make_palm(**options).double()
    scope = "a" if options.get("finetune_scopes") else None
    tokens, mask = batch()
    padded, packed = (
        hidden_rows(model, tokens, mask, mask, scope=scope, packed=flag) for flag in (False, True)
    )
    assert packed.shape == (25, 32)
    # The tables of angles are in float32, and the rectangle counts its columns.
    torch.testing.assert_close(packed, padded, atol=1e-6, rtol=1e-6)
    alone = [model.hidden_states(row[real][None], scope=scope)[0] for row, real in zip(tokens, mask)]
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-12, rtol=1e-12)


def test_a_packed_row_does_not_see_the_others(make_palm):
    model, (tokens, mask) = make_palm(), batch()
    alone, seen = tokens.clone(), []
    alone[1:] = alone[1:] % 7 + 3
    for given in (tokens, alone):
        seen.append(hidden_rows(model, given, mask, mask, packed=True))
    assert torch.equal(seen[0][:11], seen[1][:11])
    assert not torch.equal(seen[0][11:], seen[1][11:])


class Counting(torch.nn.Module):
    """A model that says how many tokens it was made to read."""

    def __init__(self, model) -> None:
        super().__init__()
        self.model, self.read, self.packs = model, 0, model.packs
        self.dim, self.head, self.num_tokens = model.dim, model.head, model.num_tokens

    def hidden_states(self, tokens, **options):
        self.read += tokens.numel()
        return self.model.hidden_states(tokens, **options)

    def packed_hidden_states(self, tokens, *given, **options):
        self.read += tokens.numel()
        return self.model.packed_hidden_states(tokens, *given, **options)


def test_no_padding_is_computed(palm):
    model, (tokens, mask) = Counting(palm), batch()
    tokens, mask = tokens[:3], mask[:3]
    read = {}
    for packed in (False, True):
        policy = Policy(model)
        set_packed(packed, policy)
        model.read = 0
        policy(tokens, mask, 5)
        read[packed] = model.read
    # Of the rectangle the last column, packed the last token of every row: nothing follows it.
    assert read == {False: 3 * 10, True: 11 + 5 + 8 - 3}


def test_it_is_done_where_it_pays(make_palm):
    tokens, mask = batch()
    wide = make_palm(dim=320, depth=1)
    assert pays(mask, wide)
    assert not pays(mask[:1], wide), "without padding there is nothing to gain"
    assert not pays(mask, make_palm()), "a narrow model loses more by a call for each sequence"

    class Other(torch.nn.Module):
        dim = 320

    assert not pays(mask, Other())
    with pytest.raises(ValueError, match=r"packed=True, but Other cannot read packed sequences"):
        set_packed(True, Policy(Other()))
    assert isinstance(wide, PackedModel)
    counting = Counting(wide)
    Policy(counting)(tokens[:3], mask[:3], 5)
    assert counting.read == 21


@quiet
def test_a_hole_before_a_scored_token_is_refused_or_left_to_the_rectangle(make_palm):
    model, (tokens, mask) = make_palm(dim=256, depth=1).double(), batch()
    tokens, mask = tokens[:3], mask[:3].clone()
    mask[0, 7] = False
    policy, expected = Policy(model), Policy(model)
    set_packed(False, expected)
    torch.testing.assert_close(policy(tokens, mask, 5), expected(tokens, mask, 5), atol=1e-12, rtol=0)
    set_packed(True, policy)
    with pytest.raises(ValueError, match="a hole"):
        policy(tokens, mask, 5)


def test_dropout_of_attention_is_refused(make_palm):
    model, (tokens, mask) = make_palm(attn_dropout=0.5).train(), batch()
    with pytest.raises(ValueError, match=r"set_dropout\(0\)"):
        hidden_rows(model, tokens, mask, mask, packed=True)
    wide = make_palm(dim=320, depth=1, attn_dropout=0.5)
    assert pays(mask, wide)
    assert not pays(mask, wide.train()), "left to the rectangle, which has it"
    assert hidden_rows(wide, tokens, mask, mask).isfinite().all()


def gradients(loss: torch.Tensor, *parts) -> torch.Tensor:
    parameters = [p for part in parts for p in part.trained()]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_in_float32_packing_changes_no_loss_and_no_gradient_beyond_1e_6(make_palm, name):
    """Every algorithm is held to it in float64, with the order of the batch, by test_table.py."""
    model = make_palm(spread=0.05, finetune_scopes=("actor", "critic"))
    config = OnlineConfig(prompts=4, samples=2, max_new_tokens=9)
    policy, critic = Policy(model, "actor"), ValueModel(model, "critic")
    trainer = OnlineTrainer(
        ALGORITHMS[name], policy, lambda g: g.response_mask.sum(1).float() % 3, PROMPTS, config=config,
        reference=Policy(model), critic=critic, stop=2,
    )  # fmt: skip
    torch.nn.init.normal_(critic.value_head.weight, generator=torch.Generator().manual_seed(0))
    rollout = trainer.estimated(trainer.rollout())
    parts = (policy, critic) if trainer.algorithm.critic else (policy,)
    with torch.no_grad():
        for i, parameter in enumerate(p for part in parts for p in part.trained()):
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    whole, found = Whole(rollout.mask.sum(), len(rollout), 9), {}
    assert not rollout.generation.mask.all()
    for packed in (False, True):
        set_packed(packed, *parts)
        loss = trainer.algorithm.objective(rollout, trainer.outputs(rollout), trainer.options, whole)
        found[packed] = loss.total.detach(), gradients(loss.total, *parts)
    # GRPO's terms nearly cancel: one float32 rounding of them is up to 1e-5 of their sum.
    size = torch.maximum(found[False][0].abs(), rollout.advantages.abs().mean())
    assert (found[True][0] - found[False][0]).abs() < 1e-6 * size
    assert apart(found[True][1], found[False][1]) < 1e-6


def test_in_float32_packing_changes_no_loss_and_no_gradient_of_dpo_beyond_1e_6(make_palm):
    model = make_palm(spread=0.05, num_tokens=256, finetune_scopes=("actor",))
    pairs = [
        Pair("yes, certainly", "no", "is it?"),
        Pair("so", "or so", "why"),
        Pair("a", "bcd", "what is this?"),
    ]
    found = {}
    for packed in (False, True):
        trainer = OfflineTrainer(
            PAIR_ALGORITHMS["dpo"], Policy(model, "actor"), pairs, ByteTokenizer(),
            config=OfflineConfig(packed=packed), reference=Policy(model),
        )  # fmt: skip
        losses, _ = trainer.algorithm.objective(trainer.scores(trainer._rows), trainer.options)
        found[packed] = losses.detach(), gradients(losses.mean(), trainer.policy)
    assert apart(found[True][0], found[False][0]) < 1e-6
    assert apart(found[True][1], found[False][1]) < 1e-6


def test_the_learner_finds_packed_what_the_sampler_recorded(make_palm):
    model = make_palm()
    g = generate(model, PROMPTS, max_new_tokens=9, stop=[2, 3, 4, 5], temperature=0.8, seeds=[1, 2, 3, 4])
    policy = Policy(model)
    set_packed(True, policy)
    found, entropy = policy(g.tokens, g.mask, g.prompt_width, 0.8)
    torch.testing.assert_close(found.detach(), g.logprob, atol=1e-5, rtol=0)
    assert not found[~g.response_mask].any()
    assert entropy[g.response_mask].gt(0).all()
