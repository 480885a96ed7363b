"""Models of transformers as ours: generation against their own, and memory with layers computed again.

    python benchmarks/hf_models.py              about a minute; JSON lines on standard output

A Llama of random weights, float32, one thread. Generation: the same model in one process, rounds in turn,
medians and the median of the rounds' ratios. Memory: by how much the most that a process ever held grows in
one forward and backward of the log-probabilities, adapters on every projection; a process each.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import statistics
import subprocess
import sys
import time

import torch

from palm_rlhf.generation import generate
from palm_rlhf.models.hf import HFModel
from palm_rlhf.models.value import Policy
from palm_rlhf.trainers.learner import train_only
from rlhf_kernels import patch, stacks

ROUNDS, NEW = 5, 48


def llama(layers: int) -> HFModel:
    """So many layers, 256 wide, V 4096."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=256, intermediate_size=1024, num_hidden_layers=layers,
        num_attention_heads=8, max_position_embeddings=512, bos_token_id=1, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return HFModel(AutoModelForCausalLM.from_config(config).eval())


def generation() -> dict[str, object]:
    """16 prompts of 11 or 16 tokens, 48 new ones."""
    ours = llama(4)
    theirs, patched = copy.deepcopy(ours.model), copy.deepcopy(ours)
    patch(patched.model)
    prompt = torch.randint(3, 4096, (16, 16))
    mask = torch.ones_like(prompt)
    mask[::2, :5] = 0
    sides = {
        "transformers": lambda: theirs.generate(
            input_ids=prompt, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=NEW,
            output_logits=True, return_dict_in_generate=True,
        ),
        "ours": lambda: generate(ours, prompt, mask=mask, max_new_tokens=NEW),
        "ours, patched": lambda: generate(patched, prompt, mask=mask, max_new_tokens=NEW),
    }  # fmt: skip
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(ROUNDS + 1):
        for name, run in sides.items():
            began = time.perf_counter()
            run()
            if number:  # the first warms up
                times[name].append(time.perf_counter() - began)
    ratios = {
        name: statistics.median(a / b for a, b in zip(times["transformers"], times[name]))
        for name in list(sides)[1:]
    }
    return {"generation_s": {n: statistics.median(t) for n, t in times.items()}, "speedup": ratios}


def memory(again: bool) -> dict[str, object]:
    """8 layers, [8, 256] tokens."""
    model = llama(8)
    model.add_finetune_params("actor", 8, "all")
    if again:
        model.checkpoint_layers()
    policy = Policy(model, "actor")
    train_only(policy.trained(), policy)
    tokens = torch.randint(3, 4096, (8, 256))
    policy(tokens[:1, :32], None, 8)[0].sum().backward()
    before, began = _most(), time.perf_counter()
    policy(tokens, None, 8)[0].sum().backward()
    return {"checkpoint_layers": again, "mb": _most() - before, "s": time.perf_counter() - began}


def _most() -> float:
    """Megabytes that this process held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> int:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", choices=("generation", "kept", "again"), help="one of the three parts")
    only = parser.parse_args().only
    stacks.activate()
    torch.set_num_threads(1)
    if only is None:
        parts = ("generation", "kept", "again")
        return max(subprocess.call([sys.executable, __file__, "--only", part]) for part in parts)
    print(json.dumps(generation() if only == "generation" else memory(only == "again")), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
