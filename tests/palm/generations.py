"""What `generate` gives, made by hand."""

import torch

from palm_rlhf.generation import Generation


def generation(prompts, responses, pad=0):
    """As `generate` gives it: left-padded prompts, right-padded responses."""
    width, longest = max(map(len, prompts)), max(map(len, responses))
    rows = [[pad] * (width - len(p)) + p + r + [pad] * (longest - len(r)) for p, r in zip(prompts, responses)]
    real = [
        [False] * (width - len(p)) + [True] * (len(p) + len(r)) + [False] * (longest - len(r))
        for p, r in zip(prompts, responses)
    ]
    zeros = torch.zeros(len(prompts), longest)
    return Generation(
        torch.tensor(rows),
        torch.tensor(real),
        width,
        zeros,
        zeros,
        torch.ones(len(prompts), dtype=torch.bool),
    )
