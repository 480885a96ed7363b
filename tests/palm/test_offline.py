"""The offline trainer, for every row of its table: it learns, and padding, order and parts change nothing."""

import random
from dataclasses import replace
from itertools import chain

import pytest
import torch

from palm_rlhf.algorithms.offline_table import PAIR_ALGORITHMS
from palm_rlhf.models.value import Policy
from palm_rlhf.tasks.pairs import Pair
from palm_rlhf.trainers.checkpoints import Checkpoints
from palm_rlhf.trainers.log import RunLog
from palm_rlhf.trainers.loop import run
from palm_rlhf.trainers.offline import OfflineConfig, OfflineTrainer

CONFIG = OfflineConfig(batch=8, lr=2e-2, epochs=2, anneal=False)
quiet = pytest.mark.filterwarnings("ignore::rlhf_kernels.runtime.dispatch.FallbackWarning")
every_row = pytest.mark.parametrize("name", PAIR_ALGORITHMS)


class Letters:
    """a to z are 3 to 28."""

    name, vocabulary, pad, stop = "letters", 29, 0, 1

    def encode(self, text):
        return [ord(letter) - 94 for letter in text]

    def decode(self, tokens):
        return "".join(chr(token + 94) for token in tokens if token > 2)


def pairs(count=16, seed=0, prompt=True):
    """Prompts and responses of several lengths; the better one has more a's, and the margin says how many."""
    draw = random.Random(seed)
    found = []
    while len(found) < count:
        one, other = ("".join(draw.choices("abcd", k=draw.randint(2, 6))) for _ in range(2))
        gap = one.count("a") - other.count("a")
        if gap > 0:
            ask = "".join(draw.choices("pqrs", k=draw.randint(1, 5))) if prompt else ""
            found.append(Pair(one, other, ask, margin=gap / 2))
    return found


def make(make_palm, name, config=CONFIG, lora=True, dtype=torch.float32, given=None, options=None, **more):
    scopes = ("actor",) if lora else ()
    model = make_palm(num_tokens=29, dim=16, dim_head=8, depth=1, finetune_scopes=scopes).to(dtype)
    if lora:
        # As new adapters are: the policy begins as its reference.
        for block in model.finetune_modules["actor"]:
            for lora_part in block:
                torch.nn.init.zeros_(lora_part.B)
    policy = Policy(model, "actor" if lora else None)
    algorithm = PAIR_ALGORITHMS[name]
    more.setdefault("reference", Policy(model))
    chosen = algorithm.options(**(options or {}))
    return OfflineTrainer(
        algorithm,
        policy,
        pairs() if given is None else given,
        Letters(),
        config=config,
        options=chosen,
        **more,
    )


def moved(trainer):
    """The trainer, its policy some way from the reference."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.policy.trained():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype))
    return trainer


def result(trainer, rows):
    """The mean loss and figures, and one vector of all gradients."""
    for parameter in trainer.policy.trained():
        parameter.grad = None
    found = trainer._losses(rows, learn=True)
    gradient = torch.cat([p.grad.flatten() for p in trainer.policy.trained()])
    return torch.tensor(list(found.values()), dtype=torch.float64), gradient


def same(found, expected):
    for mine, theirs in zip(found, expected):
        assert (mine - theirs).norm() <= 1e-6 * theirs.norm(), float((mine - theirs).norm() / theirs.norm())


@every_row
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_every_row_lowers_its_loss_and_raises_the_margin(make_palm, name, lora):
    trainer = make(make_palm, name, lora=lora, config=replace(CONFIG, epochs=4, lr=2e-2 if lora else 3e-3))
    steps = [trainer.step(index) for index in range(trainer.steps)]
    first, last = steps[0], steps[-1]
    if trainer.algorithm.reference:
        # The policy begins as its own reference.
        assert abs(first["margin"]) < 1e-5
    assert last["loss"] < first["loss"]
    assert last["margin"] > first["margin"] + 0.05
    assert last["accuracy"] > max(0.6, first["accuracy"])


@quiet
@every_row
def test_padding_order_parts_and_packing_change_no_loss_and_no_gradient(make_palm, name):
    trainer = moved(make(make_palm, name, dtype=torch.float64))
    rows = trainer._rows[:8]
    expected = result(trainer, rows)
    assert expected[1].norm() > 1e-4
    same(result(trainer, rows[::-1]), expected)
    trainer.policy.packed = True
    same(result(trainer, rows), expected)
    trainer.policy.packed = None
    # In one part all rows have the padding of the longest; alone they have none.
    for size in (1, 3):
        trainer.config = replace(CONFIG, micro_batch=size)
        same(result(trainer, rows), expected)


def test_scores_are_those_of_every_response_alone(make_palm):
    trainer = moved(make(make_palm, "dpo", options={"beta": 0.3}, config=replace(CONFIG, temperature=0.7)))
    model, given = trainer.policy.model, pairs()
    found = trainer.scores(trainer._rows[:5])
    for i, pair in enumerate(given[:5]):
        for side in ("chosen", "rejected"):
            ids = torch.tensor([[*Letters().encode(pair.prompt + getattr(pair, side)), 1]])
            for column, scope in ((side, "actor"), (f"reference_{side}", None)):
                logits = model(ids, finetune_scope=scope)[0, len(pair.prompt) - 1 : -1] / 0.7
                target = ids[0, len(pair.prompt) :, None]
                expected = logits.log_softmax(-1).gather(1, target).sum()
                torch.testing.assert_close(getattr(found, column)[i], expected, atol=1e-5, rtol=1e-5)
            assert getattr(found, f"{side}_tokens")[i] == len(getattr(pair, side)) + 1
    assert found.difference.tolist() == [pair.margin for pair in given[:5]]


def test_the_divergence_of_kto_is_from_responses_to_other_prompts_and_of_the_whole_update(make_palm):
    trainer = moved(make(make_palm, "kto"))
    rows, given = trainer._rows[:6], pairs()
    assert rows[0].other == [*Letters().encode(given[1].chosen), 1]
    policy, reference = (
        sum(trainer._summed(p, [row.prompt], [row.other]) for row in rows).detach() / 6
        for p in (trainer.policy, Policy(trainer.policy.model))
    )
    found = float(trainer._divergence(rows))
    assert found == pytest.approx(max(0.0, float(policy - reference)), abs=1e-5)
    trainer.config = replace(CONFIG, micro_batch=2)
    assert float(trainer._divergence(rows)) == pytest.approx(found, abs=1e-6)


def test_the_other_response_of_kto_answers_another_prompt_and_fits(make_palm):
    given = [Pair("a", "b", "p"), Pair("aa", "b", "p"), Pair("c", "d", "q"), Pair("aaaa", "b", "p")]
    letters = Letters().encode
    rows = make(make_palm, "kto", given=given)._rows
    assert [row.other for row in rows] == [[*letters(text), 1] for text in ("c", "c", "aaaa", "c")]
    rows = make(make_palm, "kto", given=given[:2])._rows
    assert [row.other for row in rows] == [[*letters(text), 1] for text in ("aa", "a")], "there is no other"
    given = [Pair("a", "b", "pppppppp"), Pair("aaaaaaaa", "b", "q")]
    trainer = make(make_palm, "kto", given=given, config=replace(CONFIG, max_tokens=8))
    assert [len(row.prompt) + len(row.other) for row in trainer._rows] == [8, 3]
    assert trainer._rows[0].other == letters("aa")


def test_a_dialogue_without_a_prompt_responds_to_what_both_begin_with(make_palm):
    given = [Pair("abcx", "abd"), Pair("q", "r"), Pair("aab", "aa")]
    trainer = make(make_palm, "simpo", given=given)
    letters = Letters().encode
    rows = [(row.prompt, row.chosen, row.rejected) for row in trainer._rows]
    assert rows[0] == ([1, *letters("ab")], [*letters("cx"), 1], [*letters("d"), 1])
    assert rows[1] == ([1], [*letters("q"), 1], [*letters("r"), 1])
    assert rows[2] == ([1, *letters("aa")], [*letters("b"), 1], [1])
    trainer = make(make_palm, "simpo", given=given[2:], config=replace(CONFIG, stop=False))
    assert trainer._rows[0][:3] == ([1, *letters("a")], letters("ab"), letters("a"))


def test_long_prompts_lose_their_beginning_and_then_responses_their_end(make_palm):
    given = [Pair("aaaa", "bb", "pqrs"), Pair("abcdabcd", "b", "p")]
    trainer = make(make_palm, "dpo", given=given, config=replace(CONFIG, max_tokens=6))
    letters = Letters().encode
    assert trainer._rows[0][:3] == (letters("s"), [*letters("aaaa"), 1], [*letters("bb"), 1])
    assert trainer._rows[1][:3] == (letters("p"), letters("abcda"), [*letters("b"), 1])


def test_only_what_learns_has_gradients_and_the_reference_stays(make_palm):
    trainer = make(make_palm, "dpo")
    model = trainer.policy.model
    before = {name: x.clone() for name, x in model.state_dict().items()}
    kept = trainer._reference.clone()
    trainer.step(0)
    changed = {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}
    assert changed
    assert all(name.startswith("finetune_modules.actor") for name in changed)
    assert torch.equal(trainer._reference, kept)
    assert all(p.grad is None for n, p in model.named_parameters() if "finetune_modules" not in n)


def test_a_stopped_run_goes_on_bit_for_bit(make_palm, tmp_path):
    weights = []
    for name, stops in (("one", (4,)), ("other", (1, 3, 4))):
        for steps in stops:
            trainer = make(make_palm, "kto", held_out=pairs(4, seed=5))
            log = RunLog(tmp_path / name, tensorboard=False)
            run(trainer, log, Checkpoints(tmp_path / name / "c"), steps=steps, progress=False)
        weights.append(torch.cat([p.flatten() for p in trainer.policy.trained()]))
    assert trainer.steps == 4
    assert torch.equal(*weights)


def test_a_pass_takes_every_pair_once_and_what_is_held_back_judges(make_palm):
    trainer = make(make_palm, "dpo", config=replace(CONFIG, batch=5, eval_every=3), held_out=pairs(6, seed=9))
    assert trainer.steps == 8
    found = [trainer.step(index) for index in range(8)]
    assert [i for i, row in enumerate(found) if "held_out_loss" in row] == [2, 5, 7]
    fresh = make(make_palm, "dpo", config=replace(CONFIG, batch=5))
    taken = [fresh._next_indices() for _ in range(4)]
    assert sorted(chain(*taken)) == list(range(16))
    with pytest.raises(ValueError, match="no pairs are held back"):
        fresh.evaluate()


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("dpo", [], "there are no pairs"),
        ("rebel", [Pair("a", "b", "p")], 'give each a "margin"'),
        ("rebel", [Pair("a", "b", "p", margin=2.0), Pair("c", "d", "p")], "1 of 2 pairs have none"),
        ("sppo-soft", [Pair("a", "b", "p")], 'give each a "margin"'),
        ("dpo", [Pair("~~~~", "b", "p")], "token ids must be from 0 to 28, got 32"),
    ],
)
def test_pairs_that_cannot_be_learned_from_are_refused(make_palm, name, given, message):
    name, _, soft = name.partition("-")
    with pytest.raises(ValueError, match=message):
        make(make_palm, name, given=given, options={"soft": True} if soft else None)
    # Only they need a margin.
    if name == "sppo":
        make(make_palm, name, given=given)


@pytest.mark.parametrize(
    ("field", "value"), [("batch", 0), ("max_tokens", 1), ("lr", 0.0), ("temperature", float("nan"))]
)
def test_a_configuration_without_sense_is_refused(field, value):
    with pytest.raises(ValueError, match=field):
        OfflineConfig(**{field: value})
