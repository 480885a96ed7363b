"""A small random Llama of transformers, patched alone and not: the same loss, left padding included.

    python examples/patch_transformers.py

Needs transformers 5.23 or 5.24, or `make peers` in a checkout. `patch("transformers")` patches all models.
"""

from __future__ import annotations

import time

import torch

import rlhf_kernels
from rlhf_kernels import stacks

stacks.activate()  # the peers of a checkout; has no effect where transformers is installed


def main() -> None:
    """Prints what is replaced, the losses, and the time of a step of both."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=8192,
        )
    )  # fmt: skip
    tokens = torch.randint(8192, (4, 128))
    mask = torch.ones_like(tokens)
    mask[1, :40] = 0  # left padding
    labels = tokens.masked_fill(mask == 0, -100)

    def step() -> tuple[float, float]:
        model.zero_grad()
        began = time.perf_counter()
        loss = model(input_ids=tokens, attention_mask=mask, labels=labels).loss
        loss.backward()
        return loss.item(), time.perf_counter() - began

    step()
    theirs, before = step()
    with rlhf_kernels.patch(model) as patched:
        print(patched)
        step()
        ours, after = step()
    print(f"loss {theirs:.6f} and {ours:.6f}, a step {before * 1e3:.0f} -> {after * 1e3:.0f} ms")
    assert abs(ours - theirs) <= 1e-5 * abs(theirs)


if __name__ == "__main__":
    main()
