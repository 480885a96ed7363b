"""Models of transformers on the command line: what docs/models.md says, tokenizers, chats, mistakes."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from palm_rlhf.commands.common import HFOptions, Loaded, load_model, save_model
from palm_rlhf.commands.steps import begun_with, load_any, models_of_run
from palm_rlhf.tokens import FileTokenizer, HFTokenizer, load_tokenizer, prompt_ids, prompt_text, same_tokens
from tests.palm.command_line import REWARD, called, refused
from tests.palm.hf_models import save_folder

pytest.importorskip("peft", reason="peft is not installed (make peers)")

DOCS = Path(__file__).parents[2] / "docs" / "models.md"


@pytest.fixture(autouse=True)
def without_curves(monkeypatch):
    """Drawing takes longer than all else here."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small Llama with its tokenizer. To be left as it is."""
    return save_folder(tmp_path_factory.mktemp("hf") / "llama")


def test_the_commands_of_the_documentation_work(tmp_path, monkeypatch, capsys):
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)
    first, second = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    exec(compile(first, str(DOCS), "exec"), {})
    (commands,) = re.findall(r"```sh\n(.*?)```", DOCS.read_text(), re.DOTALL)
    lines = commands.strip().splitlines()
    assert {line.split()[2] for line in lines} >= {"grpo", "dpo", "ppo"}
    for line in lines:
        words = shlex.split(line)[1:]
        assert called(*words, *(["--quiet"] if words[0] != "generate" else [])) == 0, line
    assert "What is red?" in capsys.readouterr().out
    exec(compile(second, str(DOCS), "exec"), made := {})
    assert made["logprob"].shape == made["drawn"].responses.shape
    # Only the last layer learned, and what transformers reads is the result.
    start, end = (load_file(f"runs/{run}/model/model.safetensors") for run in ("grpo", "dpo"))
    assert {name for name in start if not torch.equal(start[name], end[name])} == {
        name for name in start if name.startswith("model.layers.1.")
    }
    theirs = dict(AutoModelForCausalLM.from_pretrained("runs/dpo/model").named_parameters())
    assert all(torch.equal(theirs[name], tensor) for name, tensor in end.items())
    # The chat was asked for once.
    loaded = load_model(Path("runs/dpo"), tokenizer=None)
    assert loaded.tokenizer.chat
    assert prompt_ids(loaded.tokenizer, "x") == made["tokenizer"].prompt("x")


def test_a_run_goes_on_bit_for_bit(folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("so much\nglazed with rain\n")
    (tmp_path / "reward.py").write_text(REWARD)
    words = ["train", "grpo", "--model", f"hf:{folder}", "--prompts-file", tmp_path / "prompts.txt"]
    words += ["--reward", f"{tmp_path / 'reward.py'}:letters", "--quiet", "--no-anneal", "--prompts", 2]
    words += ["--samples", 2, "--minibatch", 2, "--max-new-tokens", 4]
    one, other = tmp_path / "one", tmp_path / "other"
    assert called(*words, "--out", one, "--steps", 2) == 0
    for steps in (1, 2):
        assert called(*words, "--out", other, "--steps", steps) == 0
    mine, theirs = (load_file(run / "model" / "model.safetensors") for run in (one, other))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())
    begun = load_file(folder / "model.safetensors")
    assert any(not torch.equal(tensor, begun[name]) for name, tensor in mine.items())


def test_a_tokenizer_knows_how_its_model_is_asked(folder, tmp_path):
    plain, chat = load_tokenizer(folder), load_tokenizer(f"hf:{folder}", chat=True, system="Be kind.")
    ids = plain.encode("so much")
    assert plain.decode([*ids, plain.stop]) == "so much"
    assert (plain.token(plain.stop), plain.token(plain.pad)) == ("<|im_end|>", "<pad>")
    assert plain.prompt("so much") == [*plain.start, *ids]
    asked = chat.prompt("so much")
    assert chat.tokenizer.decode(asked) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nso much<|im_end|>\n<|im_start|>assistant\n"
    )
    assert chat.prompt([{"role": "user", "content": "so much"}]) == asked
    assert prompt_text(chat, asked) == "so much"
    assert chat.prompt("") == plain.prompt("") == []
    # A turn may end otherwise than a text: the template says so.
    theirs = load_tokenizer(folder).tokenizer
    theirs.eos_token = "</s>"
    for kind, end in ((True, "<|im_end|>"), (False, "</s>")):
        assert (made := HFTokenizer(theirs, chat=kind)).token(made.stop) == end
    file = FileTokenizer(folder / "tokenizer.json", stop="<|im_end|>")
    assert file.encode("so much") == ids
    assert prompt_ids(file, "so much") == ids
    assert same_tokens(file, plain)
    other = save_folder(tmp_path / "other", vocabulary=290)
    assert not same_tokens(load_tokenizer(other), plain)
    with pytest.raises(ValueError, match="a system's message belongs to a chat"):
        load_tokenizer(folder, system="x")
    with pytest.raises(ValueError, match="a chat needs a tokenizer of transformers"):
        load_tokenizer("bytes", chat=True)
    (folder_of_none := tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="has no tokenizer of transformers"):
        load_tokenizer(folder_of_none)


def test_checkpoints_and_start_of_a_run_are_asked_as_its_result(folder, tmp_path):
    run, task = tmp_path / "run", ["--task", "calculator", "--factors", 4, 4, "--quiet"]
    words = ["train", "grpo", "--model", f"hf:{folder}", *task, "--chat", "--system", "Be kind."]
    words += ["--prompts", 2, "--samples", 2, "--minibatch", 4, "--steps", 2, "--save-every", 1]
    assert called(*words, "--out", run) == 0
    models = models_of_run(run)
    assert [path.name for path in models] == [folder.name, "step-00000001", "run"]
    for loaded in (begun_with(run), *map(load_any, models[1:])):
        assert (loaded.tokenizer.chat, loaded.tokenizer.system) == (True, "Be kind.")
        assert loaded.tokenizer.decode([loaded.stop]) == "\n"
    # A message that is given counts.
    assert load_any(models[1], hf=HFOptions(system="Be brief.")).tokenizer.system == "Be brief."
    words = ["evaluate", "--run", run, *task, "--limit", 2, "--max-new-tokens", 2, "--out", tmp_path / "out"]
    assert called(*words) == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "responses.jsonl").read_text().splitlines()]
    asked = [row["prompt"] for row in rows]
    assert asked[:2] == asked[2:4] == asked[4:]
    assert all("system\nBe kind." in prompt for prompt in asked)


def test_a_chat_with_a_model_that_was_trained_plainly_ends_a_turn_as_its_template(folder, tmp_path):
    plain = load_model(folder, tokenizer=None)
    plain.tokenizer.tokenizer.eos_token = "</s>"
    tokenizer = HFTokenizer(plain.tokenizer.tokenizer)
    save_model(tmp_path, Loaded(plain.model, tokenizer, tokenizer.stop))
    for chat, end in ((False, "</s>"), (True, "<|im_end|>")):
        loaded = load_model(tmp_path, tokenizer=None, hf=HFOptions(chat=chat))
        assert loaded.tokenizer.token(loaded.stop) == loaded.tokenizer.token(loaded.tokenizer.stop) == end
    # One that was given counts, and so does what a chat was trained with.
    loaded = load_model(tmp_path, tokenizer=None, stop="<s>", hf=HFOptions(chat=True))
    assert loaded.tokenizer.token(loaded.stop) == "<s>"
    save_model(tmp_path / "chat", loaded)
    again = load_model(tmp_path / "chat", tokenizer=None, hf=HFOptions(chat=True))
    assert again.stop == loaded.stop


def test_options_reach_the_model(folder):
    loaded = load_model(folder, tokenizer="bytes", hf=HFOptions(dtype="bfloat16", patch=True))
    assert loaded.model.head.weight.dtype is torch.bfloat16
    assert any("forward" in vars(module) for module in loaded.model.modules())
    assert loaded.tokenizer.name == "bytes"


def test_mistakes_cost_one_sentence(folder, tmp_path, capsys, monkeypatch):
    ask = ["--prompt", "x", "--max-new-tokens", 2]
    said = refused(capsys, "generate", "--model", tmp_path / "none", *ask)
    assert said.endswith("A model on the hub is given as hf:NAME, such as hf:Qwen/Qwen2.5-0.5B.")
    said = refused(capsys, "generate", "--model", f"hf:{tmp_path}/none", *ask)
    assert said == f"there is no folder {tmp_path}/none with a model of transformers"
    (tmp_path / "palm.pt").write_bytes(b"")
    said = refused(capsys, "generate", "--model", tmp_path / "palm.pt", "--patch", *ask)
    assert said.startswith("--dtype, --patch and --checkpoint-layers are for models of transformers")
    said = refused(capsys, "generate", "--model", folder, "--tokenizer", "bytes", "--chat", *ask)
    assert said == "a chat needs a tokenizer of transformers with a chat template, got bytes"
    pairs = [{"prompt": f"{n}?", "chosen": "yes", "rejected": "no"} for n in range(10)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    words = ["train", "dpo", "--model", folder, "--pairs", tmp_path / "pairs.jsonl"]
    words += ["--out", tmp_path / "dpo"]
    said = refused(capsys, *words, "--lora-targets", "nothing")
    assert said.startswith("LlamaForCausalLM has no projection 'nothing' for adapters. Choose from all,")
    said = refused(capsys, *words, "--no-lora", "--lora-targets", "all")
    assert said == "--lora-targets and --lora-alpha are of adapters: they need --lora"
    said = refused(capsys, *words, "--no-lora", "--dtype", "bfloat16")
    assert said.startswith(
        "weights in bfloat16 do not learn here: an update of Adam's size is rounded away. "
    )
    said = refused(capsys, *words, "--no-lora", "--last-layers", 5)
    assert said == "the model has 2 layers: from 1 to 2 of the last ones can learn, got 5"
    for missing in ("peft", "transformers"):
        monkeypatch.setitem(sys.modules, missing, None)
        said = refused(capsys, *words)
        assert said.startswith(f"{missing} is not installed, which this command needs: pip install ")
