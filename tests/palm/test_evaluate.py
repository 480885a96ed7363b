"""What evaluation measures, against its definitions, and the command that measures it."""

import json
import math

import pytest
import torch

from palm_rlhf.evaluate import (
    distinct,
    draw,
    first_words,
    judged_win_rate,
    kl_divergence,
    mean_interval,
    perplexity,
    reward_accuracy,
    wilson,
    win_rate,
)
from palm_rlhf.models.checkpoint import read_tensors, save_palm
from palm_rlhf.pipeline import ModelSampler, SamplingOptions, load_template, select
from palm_rlhf.pipeline.scoring import RuleScorer
from palm_rlhf.rewards import ProgrammaticReward
from palm_rlhf.tasks.pairs import Pair
from palm_rlhf.tokens import ByteTokenizer
from tests.palm.command_line import called, make_inputs, refused

BYTES = ByteTokenizer()


def test_wilsons_interval():
    # Newcombe (1998), table I: 81/263 and 15/148, without continuity correction.
    assert [round(x, 4) for x in wilson(81, 263)[1:3]] == [0.2553, 0.3662]
    assert [round(x, 4) for x in wilson(15, 148)[1:3]] == [0.0624, 0.1605]
    assert wilson(0, 20).low == 0 < wilson(0, 20).high
    assert wilson(20, 20).high == 1 > wilson(20, 20).low
    assert wilson(2.5, 5).value == 0.5
    with pytest.raises(ValueError, match="at least one thing"):
        wilson(0, 0)


def test_intervals_of_means_hold_what_they_promise():
    generator = torch.Generator().manual_seed(0)
    inside = 0
    for _ in range(400):
        found = mean_interval(torch.randn(50, generator=generator).add(3).tolist())
        inside += found.low < 3 < found.high
    assert 0.91 < inside / 400 < 0.98
    assert mean_interval([2.0]) == (2.0, 2.0, 2.0, 1)


def test_distinct_counts_n_grams_within_texts():
    texts = ["a b a b", "b a", ""]
    assert distinct(texts, 1) == 2 / 6
    assert distinct(texts, 2) == 2 / 4  # ab, ba, ab, ba: not over the border
    assert list(first_words(texts, 5)) == ["a b a b", "b", ""]
    assert distinct(first_words(texts, 3), 1) == 2 / 3


def test_perplexity_of_a_text_in_windows(make_palm):
    palm = make_palm(num_tokens=256).train()
    text = "so much depends upon"
    found = perplexity(palm, BYTES, text, length=8, batch=2)
    assert palm.training
    palm.eval()
    ids, total = torch.tensor(BYTES.encode(text)), 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, 8):
            window = ids[start : start + 9][None]
            logprob = palm(window).log_softmax(-1)[0, :-1]
            total -= float(logprob.gather(1, window[0, 1:, None]).sum())
    assert found["tokens"] == len(ids) - 1
    assert found["nats_per_token"] == pytest.approx(total / (len(ids) - 1), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(total / (len(ids) - 1)), rel=1e-4)
    # A byte a token: the same but for the unit.
    assert found["bits_per_byte"] == pytest.approx(found["nats_per_token"] / math.log(2), rel=1e-9)
    lines = perplexity(palm, BYTES, ["so much", "depends"], stop=4)
    assert lines["tokens"] == 7 + 7  # each with its stop, without its first
    with pytest.raises(ValueError, match="needs 2 tokens"):
        perplexity(palm, BYTES, "a")


def some(palm, prompts=("ab", "longer", "c", "dd"), samples=6, seed=0):
    chosen, _ = select(
        [[{"role": "user", "content": p}] for p in prompts], load_template("none", BYTES), BYTES
    )
    options = SamplingOptions(temperature=1.0, top_p=None, max_new_tokens=12)
    return draw(
        chosen, ModelSampler(palm, stop=4), BYTES, options, samples=samples, seed=seed, stop=4, batch=3
    )


def test_divergence_is_that_of_the_distributions(make_palm):
    palm, other = make_palm(num_tokens=256), make_palm(seed=1, num_tokens=256)
    drawn = some(palm)
    assert kl_divergence(drawn, palm, palm, pad=0) == (0.0, 0.0, 0.0, 4)
    expected = []
    for answer in drawn.answers:  # one by one, without padding
        ids = torch.tensor([[*answer.prompt_tokens, *answer.tokens]])
        with torch.no_grad():
            mine, theirs = ((model(ids)[0].double() / 0.7).log_softmax(-1) for model in (palm, other))
        at = slice(len(answer.prompt_tokens) - 1, -1)
        expected.append(float((mine.exp() * (mine - theirs))[at].sum()))
    assert len({len(answer.tokens) for answer in drawn.answers}) > 1
    found = kl_divergence(drawn, palm, other, pad=0, temperature=0.7, batch=7)
    assert found == pytest.approx(mean_interval(drawn.by_prompt(expected)), rel=1e-4)
    assert found.low > 0


def test_a_win_is_a_higher_score_and_prompts_are_counted():
    assert win_rate([1, 1, 0, 2], [0, 1, 1, 1])[0] == (1 + 0.5 + 0 + 1) / 4
    assert win_rate([1, 1, 0, 2], [0, 1, 1, 1], samples=2) == wilson(0.75 + 0.5, 2)


def test_a_judge_is_asked_in_both_orders(make_palm):
    ours, theirs = some(make_palm(num_tokens=256)), some(make_palm(seed=1, num_tokens=256))
    found, swayed = judged_win_rate(lambda prompt, first, second: 1.0, ours, theirs)
    assert (found.value, swayed, found.n) == (0.5, 1.0, 4)
    marked = {answer.response for answer in ours.answers} - {answer.response for answer in theirs.answers}
    assert len(marked) > 5

    def fair(prompt, first, second):
        return 0.5 + 0.5 * (first in marked) - 0.5 * (second in marked)

    found, swayed = judged_win_rate(fair, ours, theirs)
    won = sum(0.5 + 0.5 * (answer.response in marked) for answer in ours.answers)
    assert found.value == pytest.approx(won / len(ours.answers))
    assert swayed == 0
    with pytest.raises(ValueError, match="expected the chance"):
        judged_win_rate(lambda prompt, first, second: 2, ours, theirs)


def test_accuracy_on_pairs_counts_ties_half():
    scorer = RuleScorer(ProgrammaticReward(lambda prompt, response: len(prompt + response), on="tokens"))
    pairs = [Pair("long", "x"), Pair("x", "long"), Pair("ab", "cd"), Pair("abc", "ab", prompt="q")]
    assert reward_accuracy(scorer, pairs) == wilson(2.5, 4)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Inputs and an SFT run. To be left as they are."""
    return make_inputs(tmp_path_factory.mktemp("made"))


def test_a_run_is_compared_from_its_start_to_its_result(made, tmp_path, capsys):
    run = tmp_path / "grpo"
    start = [
        "--model",
        made / "text",
        "--prompts-file",
        made / "prompts.txt",
        "--max-new-tokens",
        4,
        "--quiet",
    ]
    start += ["--reward", f"{made / 'reward.py'}:letters"]
    words = [
        *start,
        "--prompts",
        2,
        "--samples",
        4,
        "--minibatch",
        8,
        "--policy-lr",
        0.03,
        "--lora-alpha",
        32,
        "--keep",
        4,
        "--out",
        run,
    ]
    assert called("train", "grpo", *words, "--steps", 4, "--save-every", 1) == 0
    capsys.readouterr()
    words = ["evaluate", "--run", run, *start[2:], "--samples", 8, "--out", tmp_path / "out"]
    assert called(*words, "--text", made / "text.txt", "--lines", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    names = [entry["name"] for entry in found["models"]]
    assert names == ["text", "step-00000001", "step-00000002", "step-00000003", "grpo"]
    first, middle, *_, last = found["models"]
    assert abs(first["kl"]["value"]) < 1e-5
    assert first["perplexity"] != middle["perplexity"]
    assert abs(first["perplexity"] - middle["perplexity"]) < 20
    assert last["reward"]["n"] == last["win_rate"]["n"] == 2
    assert "win_rate" not in first
    # The result's file and the checkpoint that it was made of, of adapters alone, are the same model.
    folder = sorted((run / "checkpoints").iterdir())[-1]
    assert all(".actor." in name for name in read_tensors(folder / "policy.safetensors")[0])
    assert called("evaluate", "--model", run, folder, *start[2:], "--json") == 0
    same = json.loads(capsys.readouterr().out)["models"]
    assert same[0]["reward"] == same[1]["reward"]
    assert abs(same[1]["kl"]["value"]) < 1e-6
    said = []
    for model in (run, folder):
        words = ["--model", model, "--prompt", "so", "--temperature", 0, "--max-new-tokens", 8]
        assert called("generate", *words) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    for name in ("frontier.png", "win_rate.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["models"] == found["models"]
    assert len((tmp_path / "out" / "responses.jsonl").read_text().splitlines()) == 5 * 2 * 8


def test_the_table_and_a_judge_with_two_seats(made, tmp_path, capsys):
    (tmp_path / "judge.py").write_text("def first_wins(prompt, first, second):\n    return 1\n")
    words = [
        "evaluate",
        "--model",
        made / "text",
        made / "text" / "model.safetensors",
        "--limit",
        1,
        "--quiet",
    ]
    words += ["--prompts-file", made / "prompts.txt", "--max-new-tokens", 3]
    capsys.readouterr()
    assert called(*words, "--judge", f"{tmp_path / 'judge.py'}:first_wins") == 0
    head, first, second = capsys.readouterr().out.splitlines()
    assert " ".join(head.split()) == "model win rate KL, nats tokens stopped distinct-1 distinct-2 swayed"
    assert first.split()[:2] == ["text", "-"]
    assert second.split()[:2] == ["model", "50.0%"]
    assert second.split()[-1] == "100.0%"
    assert "nan" not in first + second, "there are no two words"


def test_a_reward_model_is_judged_on_pairs_as_in_its_training(made, tmp_path, capsys):
    words = [
        "--model",
        made / "text",
        "--pairs",
        made / "pairs.jsonl",
        "--quiet",
        "--out",
        tmp_path / "reward",
    ]
    assert called("reward", *words, "--held-back", 0.5, "--batch", 5, "--lr", 0.01) == 0
    said = capsys.readouterr().out
    from palm_rlhf.tasks.pairs import read_examples, split_examples

    _, judge = split_examples(read_examples(made / "pairs.jsonl"), 0.5, 0)
    held = tmp_path / "held.jsonl"
    held.write_text("".join(json.dumps(
        {"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected}) + "\n" for p in judge))  # fmt: skip
    assert called("evaluate", "--reward-model", tmp_path / "reward", "--pairs", held, "--json") == 0
    found = json.loads(capsys.readouterr().out)["reward_model"]["accuracy"]
    assert f"accuracy {found['value']:.4f}" in said
    assert found["n"] == 5


def test_mistakes_cost_one_sentence(made, tmp_path, capsys):
    model = ["evaluate", "--model", made / "text"]
    said = {
        "there is nothing to evaluate": ["evaluate"],
        "say what models are to do": model,
        "--run and --model exclude each other": [*model, "--run", "x"],
        "is no run of palm-rlhf train": ["evaluate", "--run", tmp_path, "--text", "x"],
        "began with no model": ["evaluate", "--run", made / "text", "--text", "x"],
        "give --reward-model RUN": ["evaluate", "--pairs", made / "pairs.jsonl"],
        "--judge compares responses": [*model, "--text", made / "text.txt", "--judge", "x.py:y"],
        "must take (prompt, first, second)": [
            *model, "--prompts-file", made / "prompts.txt", "--judge", f"{made / 'reward.py'}:letters"
        ],
        "give --model or --run": ["evaluate", "--text", "x", "--pairs", "y", "--rule", "calculator"],
    }  # fmt: skip
    for reason, words in said.items():
        assert reason in refused(capsys, *words)


def test_a_checkpoint_of_another_width_is_refused(made, make_palm, tmp_path, capsys):
    save_palm(tmp_path / "narrow.safetensors", make_palm(), tokenizer="bytes", stop=4)
    words = ["--text", made / "text.txt"]
    said = refused(capsys, "evaluate", "--model", tmp_path / "narrow.safetensors", *words)
    assert "has 256 tokens and the model 23" in said
