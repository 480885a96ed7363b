"""From prompts to pairs: what the stages of the pipeline write, drop, resume and refuse."""

import inspect
import json
import sys

import pytest
import torch

from palm_rlhf.algorithms.offline_table import PAIR_ALGORITHMS
from palm_rlhf.models.checkpoint import load_palm, save_palm
from palm_rlhf.models.palm import PaLM
from palm_rlhf.models.value import Policy
from palm_rlhf.padding import side_by_side
from palm_rlhf.pipeline import (
    ModelSampler,
    PairOptions,
    Sampler,
    SamplingOptions,
    VLLMSampler,
    choose,
    files,
    load_template,
    sample_rows,
    select,
    split,
)
from palm_rlhf.pipeline.chat import Bare
from palm_rlhf.pipeline.scoring import Answer, RewardModelScorer, answers_of, as_generation
from palm_rlhf.rewards import ModelReward, RewardModel
from palm_rlhf.tasks.pairs import read_pairs
from palm_rlhf.tasks.rows import encoded, read_rows
from palm_rlhf.tokens import ByteTokenizer, load_tokenizer
from palm_rlhf.trainers.offline import OfflineConfig, OfflineTrainer
from palm_rlhf.trainers.reward import RewardConfig, RewardTrainer
from tests.palm.command_line import called, refused, tokenizer_file
from tests.palm.conftest import SIZES

BYTES = ByteTokenizer()
RULE = "def letters(prompt, response):\n    return sum(c.isalpha() for c in response)\n"
PROMPTS = [f"{word} {i}" for i, word in enumerate(["so", "much depends", "upon", "a red", "wheel"] * 2)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model file over bytes, whose responses differ, and prompts and a rule beside it. Left as they are."""
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    palm = PaLM(**(SIZES | {"num_tokens": 256}))
    for parameter in palm.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape))
    with torch.no_grad():  # a likely end, so that some responses stop and some do not
        hidden = palm.hidden_states(torch.tensor([BYTES.encode("so much depends")])).mean((0, 1))
        palm.head.weight[BYTES.stop] = 4.5 * hidden / hidden.square().sum()
    save_palm(folder / "model.safetensors", palm, tokenizer="bytes", stop=BYTES.stop)
    (folder / "prompts.txt").write_text("".join(line + "\n" for line in PROMPTS))
    (folder / "rule.py").write_text(RULE)
    return folder


def sample(model, out, *more):
    words = ["sample", "--model", model / "model.safetensors", "--prompts-file", model / "prompts.txt"]
    words += ["--samples", 4, "--max-new-tokens", 6, "--batch", 4, "--quiet", "--out", out]
    return called(*words, *more)


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def sampled(palm, prompts, samples=3, **options):
    chosen, _ = select([[{"role": "user", "content": p}] for p in prompts], Bare(), BYTES)
    options = SamplingOptions(max_new_tokens=5, **options)
    sampler = ModelSampler(palm, stop=4)
    return sample_rows(chosen, sampler, BYTES, options, samples=samples, seed=1, stop=4)


def interrupted(monkeypatch):
    """Ctrl-C at the third batch that is sampled; the sizes of them all."""
    drawn, batches = ModelSampler.__call__, []

    def dies(self, *arguments):
        batches.append(len(arguments[0]))
        if len(batches) == 3:
            raise KeyboardInterrupt
        return drawn(self, *arguments)

    monkeypatch.setattr(ModelSampler, "__call__", dies)
    return batches


def test_a_killed_sample_goes_on_and_the_file_is_the_same(model, tmp_path, monkeypatch, capsys):
    assert sample(model, tmp_path / "whole.jsonl") == 0
    drawn = ModelSampler.__call__
    interrupted(monkeypatch)
    cut = tmp_path / "cut.jsonl"
    assert sample(model, cut) == 130
    assert f"stopped after 8 of 10 prompts, which are in {cut}.part" in capsys.readouterr().err
    assert not cut.exists()
    # As a kill in the middle of a write leaves it: a batch of which one row is whole, and half of another.
    part = tmp_path / "cut.jsonl.part"
    part.write_bytes(b"".join(part.read_bytes().splitlines(keepends=True)[:5]) + b'{"id": 5, "pro')
    monkeypatch.undo()
    counted = []

    def counts(self, *arguments):
        counted.append(len(arguments[0]))
        return drawn(self, *arguments)

    monkeypatch.setattr(ModelSampler, "__call__", counts)
    assert sample(model, cut) == 0
    assert counted == [16, 8]  # the first batch was there
    assert cut.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not part.exists()
    assert sample(model, cut) == 0
    assert counted == [16, 8]
    said = refused(capsys, "sample", "--model", model / "model.safetensors", "--prompts-file",
                   model / "prompts.txt", "--out", cut, "--samples", 3)  # fmt: skip
    assert "was begun with" in said
    assert "another --out" in said


def test_the_chain_in_parquet_is_the_chain_in_json_lines(model, tmp_path, monkeypatch):
    """Killed, and killed once more before the working file is gone; what is read back are the same rows."""
    pytest.importorskip("pyarrow", reason="pyarrow, the extra 'parquet', is not installed")
    batches = interrupted(monkeypatch)
    prompts = tmp_path / "prompts.parquet"
    rows = [
        {"messages": [{"role": "user", "content": text}], "more": i or None} for i, text in enumerate(PROMPTS)
    ]
    prompts.write_bytes(encoded(prompts, rows))
    assert sample(model, tmp_path / "s.parquet", "--prompts-file", prompts) == 130
    part = tmp_path / "s.parquet.part"
    done = part.read_bytes()
    assert len(done.splitlines()) == 8
    assert not (tmp_path / "s.parquet").exists()
    assert sample(model, tmp_path / "s.parquet", "--prompts-file", prompts) == 0
    assert batches == [16, 16, 8, 8]
    part.write_bytes(done)
    assert sample(model, tmp_path / "s.parquet", "--prompts-file", prompts) == 0
    assert sample(model, tmp_path / "s.jsonl") == 0
    assert len(batches) == 7  # three of the last call alone
    assert not part.exists()
    found = {}
    for kind in ("parquet", "jsonl"):
        names = [tmp_path / f"{stage}.{kind}" for stage in ("s", "c", "p", "p.test")]
        words = ["--reward", f"{model / 'rule.py'}:letters", "--quiet"]
        assert called("score", "--samples", names[0], "--out", names[1], *words) == 0
        assert called("pairs", "--scored", names[1], "--out", names[2], "--test", 2) == 0
        found[kind] = [[row for _, row in read_rows(name, "")] for name in names]
        found[kind].append(read_pairs(names[2]))
    assert found["parquet"] == found["jsonl"]
    assert len(found["jsonl"][3]) == 2


def test_parquet_without_pyarrow_is_refused_before_anything_is_sampled(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    words = ["--model", model / "model.safetensors", "--quiet", "--out", tmp_path / "s.parquet"]
    said = refused(capsys, "sample", *words, "--prompts-file", model / "prompts.txt")
    assert "pip install 'rlhf-kernels[parquet]', or name the file .jsonl" in said
    said = refused(capsys, "score", "--samples", tmp_path / "s.parquet", "--out", tmp_path / "c.jsonl")
    assert "needs pyarrow" in said
    assert not list(tmp_path.iterdir())


def test_shards_are_parts_of_the_whole(model, tmp_path):
    assert sample(model, tmp_path / "whole.jsonl", "--samples", 2) == 0
    for shard in ("1/3", "2/3", "3/3"):
        assert sample(model, tmp_path / f"{shard[0]}.jsonl", "--samples", 2, "--shard", shard) == 0
    parts = [row for n in "123" for row in rows_of(tmp_path / f"{n}.jsonl")]
    whole = rows_of(tmp_path / "whole.jsonl")
    assert [row["id"] for row in whole] == list(range(10))
    for row, part in zip(whole, parts, strict=True):
        # In batches of other sizes sums are rounded otherwise.
        assert torch.allclose(*(torch.tensor(r.pop("logprobs")) for r in (row, part)), atol=1e-5)
        assert row == part
    seeds = [seed for row in whole for seed in row["seeds"]]
    assert len(set(seeds)) == 20


def test_the_learner_finds_what_the_sampler_recorded(model, tmp_path):
    out, name = tmp_path / "samples.jsonl", tmp_path / "pairs.jsonl"
    assert sample(model, out) == 0
    scored = tmp_path / "scored.jsonl"
    words = ["--reward", f"{model / 'rule.py'}:letters", "--batch", 4, "--quiet"]
    assert called("score", "--samples", out, "--out", scored, *words) == 0
    assert called("pairs", "--scored", scored, "--out", name, "--test", 2) == 0
    lines, test = rows_of(name), rows_of(tmp_path / "pairs.test.jsonl")
    assert len(test) == 2
    assert not {line["prompt"] for line in lines} & {line["prompt"] for line in test}
    palm = load_palm(model / "model.safetensors")
    config = OfflineConfig(temperature=0.8)
    trainer = OfflineTrainer(PAIR_ALGORITHMS["rebel"], Policy(palm), read_pairs(name), BYTES, config=config)
    with torch.no_grad():
        found = trainer.scores(trainer._rows)
    ends = set()
    for side, mine in (("chosen", found.chosen), ("rejected", found.rejected)):
        assert torch.allclose(mine, torch.tensor([line[f"{side}_logprob"] for line in lines]), atol=1e-5)
        ends |= {line[f"{side}_tokens"][-1] == BYTES.stop for line in lines}
    assert ends == {True, False}  # or a stop token behind every response would not be seen
    assert torch.equal(found.difference, torch.tensor([line["margin"] for line in lines]))


def test_prompts_and_responses_meet_in_one_column():
    tokens, mask, width = side_by_side([[1, 2, 3], [4]], [[5], []], pad=9)
    assert (tokens.tolist(), width) == ([[1, 2, 3, 5], [9, 9, 4, 9]], 3)
    assert mask.tolist() == [[True, True, True, True], [False, False, True, False]]
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        side_by_side([[1], []], [[1], [1]])


def row(scores, responses=("a", "b", "c"), tokens=None, stopped=None, prompt="p", wide=1):
    tokens = [[ord(c) for c in text] for text in responses] if tokens is None else tokens
    stopped = [True] * len(responses) if stopped is None else stopped
    return {
        "id": 0, "prompt": prompt, "messages": [], "prompt_tokens": [1] * wide, "responses": list(responses),
        "response_tokens": tokens, "stopped": stopped, "logprobs": [0.0] * len(responses), "scores": scores,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "options", "best", "dropped"),
    [
        (row([1, 3, 2]), {}, ("b", "a"), {}),
        (row([2, 2, 1, 1], "abcd"), {}, ("a", "c"), {}),
        (row([1, 3, 2], ["a", "bbb", "c"]), {"max_response_tokens": 2}, ("c", "a"), {"over-long": 1}),
        (row([1, 3, 2], ["a", "b", "b"]), {}, ("b", "a"), {"duplicate": 1}),
        (row([1, 3, 2], stopped=[1, 0, 1]), {"unfinished": False}, ("c", "a"), {"unfinished": 1}),
        (row([1, 3, 2], ["", "b", "c"], [[], [1], [2]]), {}, ("b", "c"), {"empty": 1}),
        (row([1, 3], "ab", wide=3), {"max_prompt_tokens": 2}, None, {"over-long prompt": 1}),
        (row([1, 3], "aa"), {}, None, {"duplicate": 1, "fewer than two responses left": 1}),
        (row([2, 2], "ab"), {}, None, {"scores too close": 1}),
        (row([2, 2.5], "ab"), {"min_margin": 0.5}, None, {"scores too close": 1}),
    ],
    ids=["usual", "ties", "long", "double", "unfinished", "empty", "prompt", "alone", "equal", "close"],
)
def test_what_is_chosen_and_what_is_dropped(given, options, best, dropped):
    found, reasons = choose([given], PairOptions(**options))
    assert [(pair["chosen"], pair["rejected"]) for pair in found] == ([best] if best else [])
    assert {k: n for part in reasons.values() for k, n in part.items() if n} == dropped
    if best:
        assert found[0]["margin"] == max(found[0]["chosen_score"] - found[0]["rejected_score"], 1e-9)


def test_a_prompt_is_on_one_side_of_the_split():
    pairs = [{"prompt": str(i // 3), "n": i} for i in range(30)]
    train, test = split(pairs, 6, seed=0)
    assert len(test) == 6
    assert sorted(pair["n"] for pair in train + test) == list(range(30))
    assert not {pair["prompt"] for pair in train} & {pair["prompt"] for pair in test}
    assert split(pairs, 0.2, seed=0) == (train, test)
    assert split(pairs, 0, seed=0) == (pairs, [])
    assert [len(side) for side in split(pairs[::3][:4], 0.1, seed=0)] == [3, 1]
    with pytest.raises(ValueError, match="--test 30 of 30 pairs leaves none"):
        split(pairs, 30, seed=0)


def test_a_response_reproduces_alone(make_palm):
    palm = make_palm(num_tokens=256)
    found = sampled(palm, ["ab", "much longer", "c"], temperature=0.9, top_p=0.95)
    drawn = ModelSampler(palm, stop=4)([found[1]["prompt_tokens"]], [found[1]["seeds"][2]],
                                       SamplingOptions(0.9, 0.95, None, 5))  # fmt: skip
    assert drawn[0].tokens == found[1]["response_tokens"][2]
    assert len({tuple(tokens) for tokens in found[1]["response_tokens"]}) > 1


def test_scores_of_a_reward_model_are_its_rewards(make_palm, tmp_path):
    palm = make_palm(num_tokens=256)
    reward = RewardModel(palm, use_lora=False)
    torch.nn.init.normal_(reward.prompt_embed)  # so that it matters what is prompt
    scorer = RewardModelScorer(ModelReward(reward), BYTES, 4, "bytes")
    answers = answers_of(sampled(palm, ["ab", "much longer"]))
    found = scorer(answers)
    for answer, score in zip(answers, found, strict=True):
        alone = as_generation([answer.prompt_tokens], [answer.tokens], 0)
        assert abs(float(ModelReward(reward)(alone)) - score) < 1e-5
    # Sampled with other tokens: the texts count, with a stop token where the response had one.
    text = Answer([{"role": "user", "content": "x"}], "ab", "cd", [7, 7, 7], [9], stopped=True)
    other = RewardModelScorer(ModelReward(reward), BYTES, 4, "another")
    expected = ModelReward(reward)(as_generation([list(b"ab")], [[*b"cd", 4]], 0))
    assert abs(other([text])[0] - float(expected)) < 1e-5
    bare = Answer([], "", "abcd", (), ())
    whole = torch.tensor([[*b"abcd", 4]])
    assert abs(other([bare, text])[0] - reward.eval()(whole).item()) < 1e-5


def test_templates(tmp_path):
    dialogue = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"},
                {"role": "user", "content": "Why"}]  # fmt: skip
    plain = load_template("plain", BYTES)
    assert plain(dialogue) == "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Why\n\nAssistant:"
    assert load_template("auto", BYTES)(dialogue[:1]) == "Hi"
    with pytest.raises(ValueError, match="a prompt of 3 messages needs a template"):
        load_template("none", BYTES)(dialogue)
    tokenizer = load_tokenizer(tokenizer_file(tmp_path / "tokenizer.json", "<eos>"))
    assert load_template("auto", tokenizer).name == "none"
    source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    config = {"eos_token": {"content": "<eos>"}, "chat_template": [{"name": "default", "template": source}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    own = load_template("auto", tokenizer)
    assert own(dialogue[:2]) == "<user>Hi<eos><assistant>Yes?<eos>"
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('no system here') }}")
    with pytest.raises(ValueError, match="no system here"):
        load_template("auto", tokenizer)(dialogue)
    (tmp_path / "bad.jinja").write_text("{% for")
    with pytest.raises(ValueError, match=r"bad\.jinja is no chat template"):
        load_template(str(tmp_path / "bad.jinja"), tokenizer)


def test_samplers_share_a_protocol_and_vllm_is_asked_for_by_name(model, tmp_path, capsys):
    asked = inspect.signature(Sampler.__call__)
    for kind in (ModelSampler, VLLMSampler):
        assert inspect.signature(kind.__call__) == asked
    try:
        import vllm  # noqa: F401
    except ImportError:
        words = ["--model", "nowhere", "--tokenizer", "bytes", "--prompts-file", model / "prompts.txt"]
        said = refused(capsys, "sample", *words, "--sampler", "vllm", "--out", tmp_path / "a.jsonl")
        assert said.startswith("vllm is not installed")


def test_mistakes_cost_one_sentence(model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start = ["sample", "--model", model / "model.safetensors", "--out", "s.jsonl", "--quiet"]
    prompts = ["--prompts-file", model / "prompts.txt", "--max-new-tokens", 4]
    said = {
        "give one kind of prompts": start,
        "--shard is i/n": [*start, *prompts, "--shard", "5/4"],
        "shard 1/11 of 10 prompts is empty": [*start, *prompts, "--shard", "1/11"],
        "none has at most 1 tokens": [*start, *prompts, "--max-prompt-tokens", 1],
        "--samples must be at least 1": [*start, *prompts, "--samples", 0],
        "--limit must be at least 1": [*start, *prompts, "--limit", 0],
        "s.csv is not named so. Name it .jsonl": [*start, *prompts, "--out", "s.csv"],
        "the text file s.jsonl cannot be read": ["score", "--samples", "s.jsonl", "--out", "x.jsonl"],
        "--out must be given": ["pairs"],
        "--scored must be given": ["pairs", "--out", "p.jsonl"],
    }
    for reason, words in said.items():
        assert reason in refused(capsys, *words)
    assert not list(tmp_path.iterdir())
    assert sample(model, tmp_path / "s.jsonl") == 0
    words = ["score", "--samples", "s.jsonl", "--quiet", "--json"]
    assert called(*words, "--out", "c.jsonl", "--reward", "characters:3-") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["best"] == 0
    said = refused(capsys, *words, "--out", "d.jsonl", "--reward", f"run:{model / 'model.safetensors'}")
    assert "expected a RewardModel" in said
    assert "give one thing that scores" in refused(
        capsys, "score", "--samples", "s.jsonl", "--out", "x.jsonl"
    )
    words = ["--samples", "s.jsonl", "--out", "x.jsonl", "--reward-model", model / "model.safetensors"]
    assert "expected a RewardModel" in refused(capsys, "score", *words)
    assert "is to be of palm-rlhf score" in refused(
        capsys, "pairs", "--scored", "s.jsonl", "--out", "p.jsonl"
    )
    assert "s.jsonl is the file of samples itself" in refused(
        capsys, "score", "--samples", "s.jsonl", "--out", tmp_path / "s.jsonl", "--reward", "words:1-"
    )
    said = refused(capsys, "pairs", "--scored", "c.jsonl", tmp_path / "c.jsonl", "--out", "p.jsonl")
    assert "holds what c.jsonl holds" in said
    train = ["train", "rebel", "--model", model / "model.safetensors", "--out", "r", "--pairs"]
    assert '"chosen" is missing' in refused(capsys, *train, "c.jsonl")
    words = ["score", "--samples", "s.jsonl", "--out", "f.jsonl", "--quiet", "--reward", "wrong.py:wrong"]
    (tmp_path / "wrong.py").write_text("def wrong(prompt, response):\n    return prompt.text\n")
    assert "raised AttributeError" in refused(capsys, *words)
    (tmp_path / "wrong.py").write_text("def wrong(prompt, response):\n    return len(response)\n")
    assert called(*words) == 0  # not one row depends on the mistake
    (tmp_path / "t.jsonl.part").write_text("")
    assert "t.jsonl is not complete" in refused(capsys, "score", "--samples", "t.jsonl", "--out", "x.jsonl")
    (tmp_path / "zero.py").write_text("def zero(prompt, response):\n    return 0\n")
    assert called("score", "--samples", "s.jsonl", "--out", "z.jsonl", "--reward", "zero.py:zero") == 0
    said = refused(capsys, "pairs", "--scored", "z.jsonl", "--out", "z.jsonl")
    assert "palm-rlhf pairs did not write it" in said
    said = refused(capsys, "pairs", "--scored", "z.jsonl", "--out", "p.jsonl")
    assert said.startswith("no pair is left of 10 prompts: ")
    assert said.endswith("10 prompts (scores too close)")


def test_pairs_of_other_tokens_are_refused(model, tmp_path, capsys):
    line = {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1.0, "prompt_tokens": [1],
            "chosen_tokens": [2], "rejected_tokens": [3]}  # fmt: skip
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(line | {"prompt": str(i)}) + "\n" for i in range(4)))
    made = {"tokenizer": "feedface", "sampling": {"temperature": 0.8}}
    files.config_path(pairs).write_text(json.dumps(made))
    words = ["train", "rebel", "--model", model / "model.safetensors", "--pairs", pairs, "--quiet"]
    words += ["--held-back", 0.5]
    assert "holds tokens of feedface" in refused(capsys, *words, "--out", tmp_path / "run")
    files.config_path(pairs).write_text(json.dumps(made | {"tokenizer": "bytes"}))
    assert called(*words, "--out", tmp_path / "run") == 0
    assert "--temperature 0.8 takes those that it was sampled with" in capsys.readouterr().err
    pairs.write_text(json.dumps(line | {"chosen_tokens": []}) + "\n")
    assert '"chosen_tokens" must be a list of token ids' in refused(capsys, *words, "--out", tmp_path / "new")


def sampled_pairs(path):
    """Pairs whose texts do not give their tokens again: bytes that are no UTF-8, responses without an end."""
    lines = [
        {"prompt": f"q{i}", "chosen": "\ufffd(", "rejected": "b", "margin": 1.0,
         "prompt_tokens": [*b"<q>", i], "chosen_tokens": [195, 40], "rejected_tokens": [98, BYTES.stop]}
        for i in range(8)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = {"tokenizer": "bytes", "sampling": {"temperature": 0.8}}
    files.config_path(path).write_text(json.dumps(made))
    return path


def test_a_reward_model_reads_the_sampled_tokens_in_training_and_when_it_is_judged(
    model, tmp_path, monkeypatch, capsys
):
    file = sampled_pairs(tmp_path / "pairs.jsonl")
    both = [[195, 40], [98, BYTES.stop]]
    palm = load_palm(model / "model.safetensors")
    trainer = RewardTrainer(RewardModel(palm), read_pairs(file), BYTES, config=RewardConfig())
    for i, row in enumerate(trainer._rows):
        assert row.texts == tuple(([*b"<q>", i, *response], 4) for response in both)
    words = ["reward", "--model", model / "model.safetensors", "--pairs", file, "--quiet", "--batch", 4]
    words += ["--held-back", 0.5, "--normalize", 4, "--normalize-tokens", 2, "--out", tmp_path / "reward"]
    asked, read = [], []
    from palm_rlhf.commands import reward

    drawn = reward.generate
    monkeypatch.setattr(reward, "generate", lambda m, p, **o: asked.extend(p) or drawn(m, p, **o))
    assert called(*words) == 0
    assert {tuple(prompt[:3]) for prompt in asked} == {tuple(b"<q>")}
    rewards = RewardModelScorer.__call__
    monkeypatch.setattr(
        RewardModelScorer, "__call__", lambda self, a: read.extend(map(self._tokens, a)) or rewards(self, a)
    )
    words = ["evaluate", "--reward-model", tmp_path / "reward", "--pairs", file, "--json"]
    assert called(*words) == 0
    assert read == [((*b"<q>", i), tuple(response)) for i in range(8) for response in both]
    files.config_path(file).write_text(json.dumps({"tokenizer": "feedface"}))
    read.clear()
    assert called(*words) == 0  # another's tokens: the texts, as ever
    assert read[0] == ([*b"q0"], [*"\ufffd(".encode(), BYTES.stop])
    words = ["reward", "--model", model / "model.safetensors", "--pairs", file, "--out", tmp_path / "other"]
    assert "holds tokens of feedface" in refused(capsys, *words)
    assert not (tmp_path / "other").exists()
