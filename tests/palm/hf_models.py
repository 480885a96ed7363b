"""Small random models of transformers, made once a process, and a tokenizer for them."""

from functools import cache

import pytest
import torch

from rlhf_kernels import stacks
from tests.palm.command_line import tokenizer_file

stacks.activate()
pytest.importorskip("transformers", reason="transformers is not installed (make peers)")

from rlhf_kernels.stacks.transformers import configuration  # noqa: E402

VOCABULARY = 97
FAMILIES = ("llama", "qwen3", "gpt_neox")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def random_model(config, dtype=torch.float32):
    """A causal model with weights so large that everything in it matters."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def absolute():
    """GPT-2's configuration: its positions are learned, each by itself, and its maps are no nn.Linear."""
    from transformers import GPT2Config

    none = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 64}
    return GPT2Config(**sizes, **none, bos_token_id=1, eos_token_id=2)


@cache
def _built(family):
    from palm_rlhf.models.hf import HFModel

    return HFModel(random_model(configuration(family) if family in FAMILIES else absolute()))


def build(family, scopes=(), **options):
    """A model of its own of this family, with adapters that do something."""
    import copy

    model = copy.deepcopy(_built(family))
    for scope in scopes:
        pytest.importorskip("peft", reason="peft is not installed (make peers)")
        model.add_finetune_params(scope, 2, **options)
        for parameter in model.finetune_parameters(scope):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def save_folder(path, family="llama", vocabulary=300):
    """A small random model with a tokenizer and a chat template, as transformers keeps them."""
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    from palm_rlhf.models.hf import quiet

    path.mkdir(parents=True)
    special = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
    file = tokenizer_file(path / "tokenizer.json", *special, vocabulary=vocabulary)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(file), pad_token="<pad>", bos_token="<s>", eos_token="<|im_end|>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    with quiet():
        AutoModelForCausalLM.from_config(configuration(family, vocab_size=vocabulary)).save_pretrained(path)
    return path
