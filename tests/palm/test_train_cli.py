"""`palm-rlhf train` with other rows of the table than PPO, rollouts that are kept, rewards by name."""

import json
import re

import pytest
import torch

from palm_rlhf.commands.common import load_function, load_model
from palm_rlhf.commands.rewards import named_reward, reward_version
from palm_rlhf.commands.runs import Run
from palm_rlhf.generation import generate
from palm_rlhf.pipeline.sampling import read_prompt_texts
from palm_rlhf.pipeline.scoring import as_generation
from palm_rlhf.rewards import ModelReward, load_reward_model
from palm_rlhf.rollout.store import RolloutStore
from palm_rlhf.tasks.pairs import read_pairs
from palm_rlhf.trainers.log import read_metrics
from tests.palm.command_line import PPO, REWARD, called, make_inputs, refused, same_tensors, without_clock
from tests.palm.test_text_rewards import BYTES, texts

GRPO = ["--steps", "2", "--prompts", "2", "--samples", "3", "--minibatch", "3"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Inputs and an SFT run. To be left as they are."""
    return make_inputs(tmp_path_factory.mktemp("made"))


def start(made):
    """What a run on prompts begins with."""
    words = ["--model", made / "text", "--prompts-file", made / "prompts.txt", "--max-new-tokens", 4]
    return [*words, "--reward", f"{made / 'reward.py'}:letters", "--quiet"]


def test_grpo_samples_groups_and_resumes_bit_for_bit(made, tmp_path):
    words = ["train", "grpo", *start(made), "--kl-target", 0.1, "--no-anneal", *GRPO]
    one, other = tmp_path / "one", tmp_path / "other"
    assert called(*words, "--out", one, "--steps", 3) == 0
    assert called(*words, "--out", other) == 0
    assert called(*words, "--out", other, "--steps", 3) == 0
    same_tensors(one / "model.safetensors", other / "model.safetensors")
    assert without_clock(one) == without_clock(other)
    rows = read_metrics(one / "metrics.jsonl")
    assert rows[0]["kl_coef"] == 0.04
    assert rows[0]["kl_coef"] != rows[2]["kl_coef"]
    config = json.loads((one / "config.json").read_text())
    # The row's own defaults, where no flag says otherwise.
    assert (config["average"], config["samples"], config["prompts"]) == ("sequence-mean", 3, 2)


def test_a_row_says_what_it_needs(made, tmp_path, capsys):
    words = [*start(made), "--out", tmp_path / "run", "--steps", 1]
    said = refused(capsys, "train", "rloo", *words, "--samples", 1)
    assert said.startswith("rloo compares responses to the same prompt and needs at least 2 of them")
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "so much"}\n{"messages": [{"role": "user", "content": "rain"}]}\n')
    assert read_prompt_texts(file) == ["so much", "rain"]
    file.write_text('{"prompt": "so much"}\n{"messages": [{"role": "system", "content": "rain"}]}\n')
    for command in (["train", "ppo", *words], ["generate", "--model", made / "text"]):
        said = refused(capsys, *command, "--prompts-file", file)
        assert "prompt 2 is a dialogue of several messages, or not the user's" in said


def test_ppg_with_a_critic_of_bins_runs_its_phase(made, tmp_path):
    words = ["train", "ppg", *start(made), "--prompts", 4, "--minibatch", 4, "--steps", 2]
    words += ["--auxiliary-every", 2, "--critic-bins", 5, "--critic-low", 0, "--critic-high", 1]
    words += ["--no-lora"]
    assert called(*words, "--out", tmp_path / "run") == 0
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert ["clone_kl" in row for row in rows] == [False, True]
    assert called("generate", "--model", tmp_path / "run", "--prompt", "so") == 0


def test_dpo_learns_from_a_file_of_pairs_and_its_model_writes(made, tmp_path, capsys):
    words = ["train", "dpo", "--model", made / "text", "--pairs", made / "pairs.jsonl", "--held-back", 0.2]
    words += ["--batch", 4, "--lr", 0.01, "--quiet"]
    assert called(*words, "--out", tmp_path / "dpo", "--epochs", 3) == 0
    said = capsys.readouterr().out
    assert "on 2 held-out pairs: loss 0.6931 to 0." in said
    rows = read_metrics(tmp_path / "dpo" / "metrics.jsonl")
    assert abs(rows[0]["margin"]) < 1e-5 < rows[-1]["margin"]
    assert called("generate", "--model", tmp_path / "dpo", "--prompt", "so") == 0


def test_what_is_wrong_with_pairs_is_said(made, tmp_path, capsys):
    words = ["train", "rebel", "--model", made / "text", "--out", tmp_path / "run", "--quiet"]
    assert refused(capsys, *words) == "--pairs must be given. See palm-rlhf train rebel --help."
    said = refused(capsys, *words, "--pairs", made / "pairs.jsonl")
    assert said.startswith("rebel learns from differences of rewards, and 10 of 10 pairs have none")
    assert refused(capsys, "train", "dop").startswith("there is no algorithm 'dop'. Did you mean 'dpo'?")


def test_rollouts_are_kept_listed_and_shown(made, tmp_path, capsys):
    out, words = tmp_path / "run", ["train", "grpo", *start(made), *GRPO]
    assert called(*words, "--out", out, "--keep-rollouts") == 0
    capsys.readouterr()
    assert called("rollouts", "--run", out, "--json") == 0
    rows = [json.loads(row) for row in capsys.readouterr().out.splitlines()]
    metrics = read_metrics(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1]
    assert [row["reward"] for row in rows] == pytest.approx([row["reward"] for row in metrics])
    assert all(row["responses"] == 6 and 0 < row["tokens"] <= 24 for row in rows)
    assert called("rollouts", "--run", out) == 0
    assert "12 responses in 2 rollouts" in capsys.readouterr().out
    assert called("rollouts", "--run", out, "--step", -1, "--show", 3, "--json") == 0
    best = [json.loads(row) for row in capsys.readouterr().out.splitlines()]
    assert called("rollouts", "--run", out, "--step", 1, "--show", 6, "--worst", "--json") == 0
    worst = [json.loads(row) for row in capsys.readouterr().out.splitlines()]
    rewards = [row["reward"] for row in worst]
    assert rewards == sorted(rewards)
    assert [row["reward"] for row in best] == rewards[::-1][:3]
    assert all(row["reward"] == sum(c.isalpha() for c in row["response"]) for row in worst)
    (out / "model.safetensors").unlink()
    assert called("rollouts", "--run", out, "--step", 0) == 0, (
        "the run is not finished: the first model's tokens"
    )
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", capsys.readouterr().out)
    assert "no rollout of step 7; there are: 0 to 1" in refused(capsys, "rollouts", "--run", out, "--step", 7)
    assert "Train with --keep-rollouts" in refused(capsys, "rollouts", "--run", made / "text")


def test_pairs_of_rollouts_are_the_tokens_that_were_sampled(made, tmp_path, capsys):
    out, file = tmp_path / "run", tmp_path / "pairs.jsonl"
    words = ["train", "grpo", *start(made), *GRPO, "--temperature", 0.9, "--out", out, "--keep-rollouts"]
    assert called(*words) == 0
    assert called("rollouts", "--run", out, "--pairs", file) == 0
    drawn = set()
    for rollout in RolloutStore(out / "rollouts"):
        g = rollout.generation
        drawn |= {(tuple(g.prompt(row)), tuple(g.response(row))) for row in range(len(rollout))}
    pairs = read_pairs(file)
    assert pairs
    for pair in pairs:
        prompt, *responses = pair.tokens
        assert {(prompt, response) for response in responses} <= drawn
        assert BYTES.decode(prompt) == pair.prompt
    capsys.readouterr()
    words = ["train", "dpo", "--model", made / "text", "--quiet", "--pairs", file, "--test-pairs", file]
    assert called(*words, "--out", tmp_path / "dpo") == 0
    assert "was sampled at temperature 0.9" in capsys.readouterr().err


def test_rewards_by_name(made, tmp_path, capsys):
    (tmp_path / "words.tsv").write_text("so\t1\nmuch\t3\n")
    file = tmp_path / "several.json"
    says = {"combine": "sum", "weights": [1, 10], "rewards": [f"lexicon:{tmp_path}/words.tsv", "words:-1"]}
    file.write_text(json.dumps(says))
    g = texts(("a", "so much"), ("b", "so"))
    assert named_reward(str(file), BYTES, BYTES.stop)(g).tolist() == [2 - 10, 1]
    assert named_reward("matches:much", BYTES, BYTES.stop)(g).tolist() == [1, 0]
    (tmp_path / "words.json").write_text('{"so": 1, "much": 3}')
    assert named_reward(f"lexicon:{tmp_path}/words.json", BYTES, BYTES.stop)(g).tolist() == [2, 1]
    words = ["generate", "--model", made / "text", "--prompt", "so", "--json", "--max-new-tokens", 8]
    assert called(*words, "--best-of", 3, "--reward", "characters:-2") == 0
    best = json.loads(capsys.readouterr().out)
    assert best["reward"] == -max(0, len(best["response"]) - 2)
    assert load_function("matches:x")("", "x") == 1
    for name, problem in (
        ("lexicon:", "needs a file of words with weights after the colon"),
        ("matches:(", "is no regular expression"),
        ("words:5", "needs bounds, as in words:5-20"),
        ("polite", "FILE.py:function, or as one of lexicon:..., sentiment:..."),
        (f"sentiment:{tmp_path}/words.tsv", "expected a sentence, a tab and 0 or 1"),
        (f"implicit:{tmp_path}", "is no run that began with a model"),
    ):
        assert problem in refused(capsys, *words, "--best-of", 2, "--reward", name), name
    file.write_text('{"rewards": ["words:-1"], "how": "mean"}')
    assert "must hold" in refused(capsys, *words, "--best-of", 2, "--reward", file)
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"rewards": [str(file)]}))
    for more, problem in (
        ({"weights": 3}, '"weights" must be a list of numbers, one for each reward, got 3'),
        ({"weights": ["1"]}, "must be a list of numbers"),
        ({"k": "x"}, "\"k\" must be a number of deviations, got 'x'"),
        ({"k": None}, "got None"),
        ({"rewards": [str(file)]}, f"{file} is a member of itself: take its name out of {file}"),
        ({"rewards": [str(other)]}, f"{file} is a member of itself: take its name out of {other}"),
    ):
        file.write_text(json.dumps({"rewards": ["words:-1"], **more}))
        assert problem in refused(capsys, *words, "--best-of", 2, "--reward", file)
    with pytest.raises(ValueError, match="member of itself"):
        reward_version(str(file))


def test_a_run_of_dpo_is_an_implicit_reward_that_a_policy_learns_from(made, tmp_path):
    words = ["--model", made / "text", "--quiet"]
    dpo = ["train", "dpo", *words, "--pairs", made / "pairs.jsonl", "--held-back", 0.2, "--batch", 4]
    dpo += ["--lr", 0.01, "--beta", 0.3, "--temperature", 0.5]
    assert called(*dpo, "--out", tmp_path / "dpo") == 0
    reward = named_reward(f"implicit:{tmp_path / 'dpo'}", BYTES, BYTES.stop)
    assert (reward.beta, reward.temperature) == (0.3, 0.5)
    assert reward(texts(("so", " much"))).abs() > 1e-6
    scores_by_several(made, tmp_path, reward)
    told = ["--prompts-file", made / "prompts.txt", "--reward", f"implicit:{tmp_path / 'dpo'}"]
    assert called("train", "ppo", *words, *told, "--max-new-tokens", 4, *PPO, "--out", tmp_path / "ppo") == 0


def scores_by_several(made, folder, reward):
    """The pipeline's scores by `implicit:` and by an ensemble are the trainers' rewards."""
    samples, scored, several = (folder / name for name in ("s.jsonl", "c.jsonl", "several.json"))
    words = ["--model", made / "text", "--prompts-file", made / "prompts.txt", "--max-new-tokens", 5]
    assert called("sample", *words, "--samples", 3, "--quiet", "--out", samples) == 0
    rule = folder / "rule.py"
    rule.write_text(REWARD)
    names = [f"implicit:{folder / 'dpo'}", f"{rule}:letters"]
    several.write_text(json.dumps({"combine": "min", "rewards": names}))
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    g = as_generation(
        [row["prompt_tokens"] for row in rows for _ in row["responses"]],
        [tokens for row in rows for tokens in row["response_tokens"]], 0,
    )  # fmt: skip
    letters = torch.tensor([float(sum(map(str.isalpha, text))) for row in rows for text in row["responses"]])
    for name, expected in ((names[0], reward(g)), (several, torch.minimum(reward(g), letters))):
        scored.unlink(missing_ok=True)
        assert called("score", "--samples", samples, "--reward", name, "--quiet", "--out", scored) == 0
        found = [json.loads(line)["scores"] for line in scored.read_text().splitlines()]
        assert torch.tensor(found).flatten().tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    # What a member reads belongs to what the scores depend on.
    told = json.loads(scored.with_name("c.jsonl.config.json").read_text())["reward_version"]
    assert told == reward_version(str(several))
    rule.write_text(REWARD + "\n")
    assert [now == then for now, then in zip(reward_version(str(several)), told)] == [True, True, False]


def test_a_reward_model_is_normalised_on_samples_of_its_model(made, tmp_path, capsys, monkeypatch):
    pairs = [json.loads(row) | {"prompt": ""} for row in (made / "pairs.jsonl").read_text().splitlines()]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    words = ["reward", "--model", made / "text", "--pairs", file, "--held-back", 0.4, "--lr", 0.01, "--quiet"]
    words += ["--batch", 2, "--normalize", 6, "--normalize-tokens", 5]
    assert called(*words, "--out", tmp_path / "reward") == 0
    assert "rewards of 6 responses after training: mean" in capsys.readouterr().out
    model = load_reward_model(tmp_path / "reward" / "model.safetensors")
    # The samples again, by their seeds: without prompts a text follows the end of another.
    writer = load_model(made / "text", tokenizer=None)
    prompts, options = [[writer.stop]] * 6, {"max_new_tokens": 5, "stop": writer.stop}
    rewards = ModelReward(model)(generate(writer.model, prompts, seeds=range(6), **options)).double()
    assert abs(rewards.mean()) < 1e-5
    assert rewards.var(correction=0) == pytest.approx(1, abs=1e-4)
    # Where all rewards are equal afterwards the model is kept, and not normalised.
    trains = Run.train

    def levelled(self, learner, *arguments, **options):
        rows = trains(self, learner, *arguments, **options)
        learner.model.to_pred.weight.data.zero_()
        return rows

    monkeypatch.setattr(Run, "train", levelled)
    assert called(*words, "--out", tmp_path / "level") == 0
    assert "rewards after training are not normalised: " in capsys.readouterr().out
    assert (tmp_path / "level" / "model.safetensors").exists()
    problem = "--normalize needs at least 2 responses"
    assert problem in refused(capsys, *words[:-4], "--normalize", 1, "--out", tmp_path / "other")
