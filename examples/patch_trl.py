"""TRL's fused head, with which SFT, DPO, KTO, GRPO and RLOO score tokens: patched and not, the same loss.

    python examples/patch_trl.py

Needs TRL 1.16, or `make peers` in a checkout. The model is a small random Llama with 50,257 tokens.
"""

from __future__ import annotations

import time
import warnings

import torch

import rlhf_kernels
from rlhf_kernels import stacks

stacks.activate()  # the peers of a checkout; has no effect where TRL is installed


def step(model: torch.nn.Module, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Loss, the gradient of the embeddings, seconds."""
    model.zero_grad()
    began = time.perf_counter()
    out = model(input_ids=tokens, labels=tokens, fused_lm_head=True)
    (out.loss - 0.01 * out.entropy.mean()).backward()
    return out.loss.detach(), model.get_input_embeddings().weight.grad.clone(), time.perf_counter() - began


def main() -> None:
    """Prints what is replaced, the differences, and the time of both."""
    warnings.simplefilter("ignore")
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=50257,
        )
    )
    add_fused_lm_head(model, temperature=0.9, outputs=("log_probs", "entropy"))
    tokens = torch.randint(50257, (2, 64))
    step(model, tokens)
    loss, gradient, before = step(model, tokens)
    with rlhf_kernels.patch("trl") as patched:
        print(patched)
        step(model, tokens)
        ours, own, after = step(model, tokens)
    errors = [float((a - b).abs().max() / a.abs().max()) for a, b in ((loss, ours), (gradient, own))]
    print(f"loss {loss:.4f}: difference {errors[0]:.1e}, gradient {errors[1]:.1e}", end="; ")
    print(f"a step {before * 1e3:.0f} -> {after * 1e3:.0f} ms")
    assert max(errors) < 1e-5


if __name__ == "__main__":
    main()
