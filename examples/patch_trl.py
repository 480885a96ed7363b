"""TRL's DPOTrainer as it is, patched and not: the same losses in less time.

    python examples/patch_trl.py

Needs TRL 1.16, or `make peers` in a checkout. The model is a small random Llama with 50,257 tokens; SFT, KTO,
GRPO and RLOO score their tokens through the same head. `python benchmarks/patched_steps.py trl-dpo` measures.
"""

from __future__ import annotations

import copy
import os
import random
import tempfile
import time
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded

import rlhf_kernels
from rlhf_kernels import stacks

stacks.activate()  # the peers of a checkout; has no effect where TRL is installed

VOCABULARY = 50257


def words(count: int) -> str:
    """Tokens of the toy tokenizer."""
    return "".join(f"w{random.randrange(3, VOCABULARY)} " for _ in range(count))


def tokenizer() -> object:
    """A word a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(3, VOCABULARY))]
    model = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def train(steps: int = 3) -> tuple[list[float], float]:
    """The losses of some steps on the same pairs from the same weights, and the seconds they took."""
    import torch
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import DPOConfig, DPOTrainer

    random.seed(0)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            vocab_size=VOCABULARY, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        )
    )  # fmt: skip
    lengths = {"prompt": 16, "chosen": 24, "rejected": 24}
    pairs = Dataset.from_dict({name: [words(count) for _ in range(8)] for name, count in lengths.items()})
    config = DPOConfig(
        output_dir=tempfile.mkdtemp(), max_steps=steps, per_device_train_batch_size=2, learning_rate=1e-3,
        logging_steps=1, use_cpu=True, bf16=False, report_to=[], save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = DPOTrainer(
        model, ref_model=copy.deepcopy(model), args=config, train_dataset=pairs, processing_class=tokenizer()
    )
    began = time.perf_counter()
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row], time.perf_counter() - began


def main() -> None:
    """Prints what is replaced, the losses and the time of both."""
    warnings.simplefilter("ignore")
    train(steps=1)  # what is slow the first time counts for neither
    theirs, before = train()
    with rlhf_kernels.patch("trl") as patched:
        print(patched)
        ours, after = train()
    print(f"losses {[round(x, 5) for x in theirs]} and {[round(x, 5) for x in ours]}")
    print(f"{len(ours)} steps {before:.2f} -> {after:.2f} s")
    assert len(ours) == len(theirs) == 3
    assert max(abs(a - b) for a, b in zip(theirs, ours)) < 1e-4


if __name__ == "__main__":
    main()
