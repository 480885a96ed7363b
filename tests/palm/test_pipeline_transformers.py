"""The pipeline with models and tokenizers of Hugging Face."""

import json

import pytest
import torch

from palm_rlhf.pipeline import ClassifierScorer, load_template
from palm_rlhf.pipeline.scoring import Answer
from palm_rlhf.rewards.classifier import Classifier
from palm_rlhf.tokens import load_tokenizer
from palm_rlhf.trainers.log import read_metrics
from rlhf_kernels import stacks
from tests.palm.command_line import called, refused, tokenizer_file

stacks.activate()
transformers = pytest.importorskip("transformers", reason="transformers is not installed (make peers)")

# As those of Llama 3 and of ChatML are written, with what templates use of the language.
LLAMA = (
    "{{- bos_token }}{%- if messages[0]['role'] == 'system' %}\n    {%- set rest = messages[1:] %}\n"
    "{%- else %}{%- set rest = messages %}{%- endif %}\n"
    "{%- for message in rest %}\n"
    "    {{- '<|start|>' + message['role'] + '<|end|>\\n\\n' + message['content'] | trim + eos_token }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|start|>assistant<|end|>\\n\\n' }}\n{%- endif %}\n"
)
CHATML = (
    "{% for message in messages %}\n"
    "    {% if loop.index0 > 5 %}\n        {% break %}\n    {% endif %}\n"
    "<|im_start|>{{ message.role }}\n{{ message.content | tojson }}<|im_end|>\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def saved_tokenizer(folder, template=None):
    """A tokenizer of transformers in a folder, made on the fly."""
    tokenizer_file(folder / "raw.json", "<bos>", "<eos>", "<pad>")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "raw.json"), bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return tokenizer


def classifier(folder, labels=1, template=None, **options):
    """A tiny Llama with a head for so many labels, and its tokenizer, in a folder."""
    tokenizer = saved_tokenizer(folder, template)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, num_labels=labels, pad_token_id=tokenizer.pad_token_id,
        **options,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForSequenceClassification(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return model, tokenizer


ANSWERS = [
    Answer([{"role": "user", "content": "so much"}], "so much", " depends", (), ()),
    Answer(
        [{"role": "user", "content": "a red wheel barrow"}], "a red wheel barrow", " glazed with rain", (), ()
    ),
    Answer([{"role": "user", "content": "x"}], "x", "", (), ()),
]


@pytest.mark.parametrize("template", [LLAMA, CHATML], ids=["llama", "chatml"])
def test_a_template_renders_as_in_transformers(tmp_path, template):
    theirs = saved_tokenizer(tmp_path, template)
    ours = load_template("auto", load_tokenizer(tmp_path / "tokenizer.json"))
    for dialogue in (
        [{"role": "user", "content": " Größe? \n"}],
        [{"role": "system", "content": "s"}, *({"role": "user", "content": f"{i} <b>"} for i in range(8))],
    ):
        expected = theirs.apply_chat_template(dialogue, tokenize=False, add_generation_prompt=True)
        assert ours(dialogue) == expected


@pytest.mark.parametrize("pads", [True, False], ids=["pad", "no-pad"])
def test_a_classifiers_scores_are_its_logits_whatever_is_beside_them(tmp_path, pads):
    model, tokenizer = classifier(tmp_path)
    if not pads:
        tokenizer.pad_token = model.config.pad_token_id = None
        tokenizer.save_pretrained(tmp_path)
        model.config.save_pretrained(tmp_path)
    found = ClassifierScorer(Classifier(tmp_path, batch=2))(ANSWERS)
    for answer, score in zip(ANSWERS, found, strict=True):
        ids = tokenizer(answer.prompt + answer.response, return_tensors="pt")
        with torch.no_grad():
            assert abs(model(**ids).logits.item() - score) < 1e-4
    assert len(set(found)) == 3


def test_of_several_labels_one_is_good(tmp_path):
    model, tokenizer = classifier(tmp_path, labels=3, id2label={0: "bad", 1: "dull", 2: "good"},
                                  label2id={"bad": 0, "dull": 1, "good": 2})  # fmt: skip
    found = ClassifierScorer(Classifier(tmp_path, label="good"))(ANSWERS)
    with torch.no_grad():
        ids = tokenizer(ANSWERS[0].prompt + ANSWERS[0].response, return_tensors="pt")
        chance = model(**ids).logits.softmax(-1)[0, 2]
    assert abs(torch.logit(chance).item() - found[0]) < 1e-4
    assert ClassifierScorer(Classifier(tmp_path, label="2"))(ANSWERS) == found
    with pytest.raises(ValueError, match="has the labels bad, dull, good: say which is good"):
        ClassifierScorer(Classifier(tmp_path))


def test_a_long_text_loses_its_beginning_and_is_counted(tmp_path):
    model, tokenizer = classifier(tmp_path, template="{% for m in messages %}{{ m.content }}{% endfor %}")
    scorer = ClassifierScorer(Classifier(tmp_path, max_tokens=4))
    found = scorer([*ANSWERS, Answer([], "", "a red wheel barrow", (), ())])
    assert scorer.cut == 3
    ids = tokenizer("a red wheel barrow" + "glazed with rain", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        assert abs(model(torch.tensor([ids[-4:]])).logits.item() - found[1]) < 1e-4


def test_what_is_no_classifier_is_said(tmp_path, capsys):
    saved_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(ValueError, match="is no sequence-classification model"):
        ClassifierScorer(Classifier(tmp_path))
    assert refused(capsys, "score", "--samples", tmp_path / "s.jsonl", "--out", "x.jsonl").startswith(
        "the text"
    )


def causal(folder):
    """A tiny Llama that writes text, with its tokenizer and a chat template, in a folder."""
    folder.mkdir()
    tokenizer = saved_tokenizer(folder, LLAMA)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128, bos_token_id=0,
        eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return folder


def test_the_chain_on_a_llama(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    llama = causal(tmp_path / "llama")
    (tmp_path / "judge").mkdir()
    classifier(tmp_path / "judge", template=LLAMA)
    prompts = [{"messages": [{"role": "user", "content": f"wheel barrow {i}"}]} for i in range(9)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    sampling = ["--prompts-file", "p.jsonl", "--max-new-tokens", 6, "--quiet"]
    assert called("sample", "--model", llama, *sampling, "--samples", 4, "--out", "s.jsonl") == 0
    rows = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    theirs = transformers.AutoTokenizer.from_pretrained(llama)
    expected = theirs.apply_chat_template(
        prompts[0]["messages"], add_generation_prompt=True, return_dict=False
    )
    assert rows[0]["prompt_tokens"] == expected
    scored = ["score", "--samples", "s.jsonl", "--reward", f"hf:{tmp_path / 'judge'}", "--out", "r.jsonl"]
    assert called(*scored, "--quiet") == 0
    assert called("pairs", "--scored", "r.jsonl", "--out", "pairs.jsonl", "--test", 2) == 0
    assert "--chat --model RUN" in capsys.readouterr().out
    train = ["train", "rebel", "--model", llama, "--pairs", "pairs.jsonl", "--test-pairs", "pairs.test.jsonl"]
    train += [
        "--temperature",
        0.8,
        "--batch",
        4,
        "--lr",
        0.05,
        "--epochs",
        3,
        "--no-lora",
        "--out",
        "rebel",
        "--quiet",
    ]
    assert called(*train) == 0
    learned = read_metrics(tmp_path / "rebel" / "metrics.jsonl")
    assert abs(learned[0]["margin"]) < 1e-5 < abs(learned[-1]["margin"])
    line = json.loads((tmp_path / "pairs.jsonl").read_text().splitlines()[0])
    with torch.no_grad():
        ids = torch.tensor([line["prompt_tokens"] + line["chosen_tokens"]])
        logits = transformers.AutoModelForCausalLM.from_pretrained(llama)(ids).logits / 0.8
        begin = len(line["prompt_tokens"])
        logprob = logits.log_softmax(-1)[0, begin - 1 : -1].gather(1, ids[0, begin:, None]).sum()
    assert abs(logprob.item() - line["chosen_logprob"]) < 1e-4
    capsys.readouterr()
    words = ["evaluate", "--run", "rebel", *sampling, "--reward-model", tmp_path / "judge", "--json"]
    assert called(*words) == 0
    first, second = json.loads(capsys.readouterr().out)["models"]
    assert [first["model"], second["model"]] == [str(llama), "rebel"]
    assert abs(first["kl"]["value"]) < 1e-6 < 1e-4 < second["kl"]["value"]
    last = sorted((tmp_path / "rebel" / "checkpoints").iterdir())[-1]
    assert called("evaluate", "--model", "rebel", last, *sampling, "--json") == 0
    assert abs(json.loads(capsys.readouterr().out)["models"][1]["kl"]["value"]) < 1e-6
    assert second["win_rate"]["n"] == 9
