"""Records formulas that palm-rlhf-pytorch 0.8 has and the larger stacks have not, with their gradients.

    make peers && .peers/bin/python tests/golden/record_upstream.py

Simple Policy Optimization, entropy-shaped advantages, TPO and FlowRL are statements inside its trainers and
are executed from the installed source; score centering is a function; its critic is hl-gauss-pytorch's.
"""

from __future__ import annotations

import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER.parents[1]), str(FOLDER.parents[0])]

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from golden.inputs import generator, masks  # noqa: E402
from golden.record import Book  # noqa: E402
from torch import Tensor  # noqa: E402

from rlhf_kernels.stacks import activate  # noqa: E402
from rlhf_kernels.stacks.source import extract_statements, find_source  # noqa: E402

UPSTREAM = "palm-rlhf-pytorch"
SAMPLES, LENGTH, VOCABULARY = 4, 7, 9


def name(function: str) -> tuple[str, str, str]:
    """Package, version, and where in it."""
    return UPSTREAM, version(UPSTREAM), function


def draws(*seed: int, count: int, shape: tuple[int, ...]) -> list[Tensor]:
    """So many standard normal tensors."""
    return list(torch.randn((count, *shape), generator=generator(11, *seed), dtype=torch.float64).float())


def statements(file: str, method: str, first: str, last: str, arguments: tuple[str, ...]) -> Any:
    """Statements of one of its trainers."""
    from einops import rearrange
    from einx import add

    namespace: dict[str, Any] = {"torch": torch, "F": F, "rearrange": rearrange, "add": add}
    return extract_statements(
        find_source(f"palm_rlhf_pytorch/{file}"), f"{method}", first=first, last=last, arguments=arguments,
        namespace=namespace,
    )  # fmt: skip


def record_policy(book: Book) -> None:
    """Simple Policy Optimization per token, and advantages with entropy."""
    spo = statements(
        "grpo.py", "RLHFTrainer.learn", "ratios", "policy_loss",
        ("self", "action_log_probs", "old_log_probs", "advantages"),
    )  # fmt: skip
    shaped = statements(
        "grpo.py", "RLHFTrainer.learn", "entropy_reward", "advantages",
        ("entropy_scale", "kappa", "per_token_entropies", "action_masks", "advantages"),
    )  # fmt: skip

    def run_spo(logprob: Tensor, old_logprob: Tensor, advantages: Tensor, clip: float) -> Tensor:
        return spo(SimpleNamespace(eps_clip=clip), logprob, old_logprob, advantages)["policy_loss"]

    def run_shaped(advantages: Tensor, entropy: Tensor, mask: Tensor, scale: float, kappa: float) -> Tensor:
        return shaped(scale, kappa, entropy, mask, advantages)["advantages"]

    for i, (case, mask) in enumerate((n, m) for n, m in masks(SAMPLES, LENGTH) if n in ("full", "tail")):
        noise, old, advantages, entropy = draws(1, i, count=4, shape=(SAMPLES, LENGTH))
        given = {"logprob": -old.abs() + 0.4 * noise, "old_logprob": -old.abs(), "advantages": advantages}
        for clip in (0.1, 0.2):
            book.add(
                name("grpo.RLHFTrainer.learn: spo"), case, run_spo, given, {"clip": clip}, wrt=("logprob",),
                outputs=("loss",),
            )  # fmt: skip
        given = {"advantages": advantages[:, 0], "entropy": entropy.abs(), "mask": mask}
        kwargs = {"scale": 0.4, "kappa": 2.0}
        book.add(name("grpo.RLHFTrainer.learn: entropy"), case, run_shaped, given, kwargs)


def record_responses(book: Book) -> None:
    """TPO's target and loss for one group, FlowRL's loss."""
    target = statements("tpo.py", "RLHFTrainer.train", "old_log_p", "target_q",
                        ("self", "old_log_scores", "normalized_rewards"))  # fmt: skip
    loss = statements("tpo.py", "RLHFTrainer.learn", "policy_loss", "policy_loss", ("log_scores", "target_q"))
    balance = statements(
        "flowrl.py", "FlowRLTrainer.learn", "response_lengths", "loss",
        ("self", "action_masks", "action_log_probs", "ref_log_probs", "log_z_phi", "normalized_rewards",
         "importance_weight"),
    )  # fmt: skip

    def run_tpo(scores: Tensor, old_scores: Tensor, advantages: Tensor, eta: float) -> Tensor:
        q = target(SimpleNamespace(tpo_eta=eta), old_scores, advantages)["target_q"]
        return loss(scores[None], q[None])["policy_loss"][0]

    def run_flowrl(logprob, reference, log_z, advantages, weight, mask, beta):
        me = SimpleNamespace(beta=beta)
        return balance(me, mask, logprob * mask, reference * mask, log_z, advantages, weight)["loss"]

    for i, (case, mask) in enumerate((n, m) for n, m in masks(SAMPLES, LENGTH) if n in ("full", "tail")):
        one, other, third = draws(2, i, count=3, shape=(SAMPLES,))
        given = {"scores": 5 * one - 20, "old_scores": 5 * one + other - 20, "advantages": third}
        for eta in (0.5, 1.0):
            book.add(
                name("tpo.RLHFTrainer"),
                case,
                run_tpo,
                given,
                {"eta": eta},
                wrt=("scores",),
                outputs=("loss",),
            )
        logprob, reference = (-x.abs() for x in draws(3, i, count=2, shape=(SAMPLES, LENGTH)))
        given = {
            "logprob": logprob, "reference": reference, "log_z": one, "advantages": third,
            "weight": 1 + 0.1 * other, "mask": mask,
        }  # fmt: skip
        book.add(
            name("flowrl.FlowRLTrainer.learn"), case, run_flowrl, given, {"beta": 15.0},
            wrt=("logprob", "log_z"), outputs=("loss",),
        )  # fmt: skip


def record_centering(book: Book) -> None:
    """Score centering over the whole vocabulary and over the most probable tokens, weighted or not."""
    from palm_rlhf_pytorch.grpo import score_centering_loss

    def run(logits, sampler_logits, tokens, advantages, head, truncation):
        weight = torch.ones_like if truncation is None else (lambda r: r.clamp(max=truncation))
        return score_centering_loss(
            logits.log_softmax(-1),
            sampler_logits.softmax(-1),
            tokens,
            advantages,
            topk=head,
            weight_fn=weight,
        )

    for i, spread in enumerate((0.1, 1.0)):
        logits, noise = draws(4, i, count=2, shape=(SAMPLES, LENGTH, VOCABULARY))
        tokens = torch.randint(0, VOCABULARY, (SAMPLES, LENGTH), generator=generator(12, i))
        (advantages,) = draws(5, i, count=1, shape=(SAMPLES,))
        given = {
            "logits": logits, "sampler_logits": logits + spread * noise, "tokens": tokens,
            "advantages": advantages,
        }  # fmt: skip
        for head in (None, 3):
            for truncation in (None, 1.5):
                book.add(
                    name("grpo.score_centering_loss"), f"{spread:g}", run, given,
                    {"head": head, "truncation": truncation}, wrt=("logits",), outputs=("loss",),
                )  # fmt: skip


def record_critic(book: Book) -> None:
    """HL-Gauss targets, means and losses."""
    from hl_gauss_pytorch import HLGaussLoss

    def run(logits, values, low, high, bins, sigma_to_bin):
        theirs = HLGaussLoss(
            low, high, bins, sigma_to_bin_ratio=sigma_to_bin, clamp_to_range=True, warn_out_of_range=False
        )
        loss = theirs(logits, values, reduction="none")
        return loss, theirs(logits), theirs.transform_to_probs(values)

    package = ("hl-gauss-pytorch", version("hl-gauss-pytorch"), "HLGaussLoss")
    for i, (low, high, bins) in enumerate(((0.0, 5.0, 6), (-2.0, 1.0, 21))):
        logits, values = draws(6, i, count=1, shape=(12, bins))[0], 2 * draws(7, i, count=1, shape=(12,))[0]
        for sigma_to_bin in (0.75, 2.0):
            kwargs = {"low": low, "high": high, "bins": bins, "sigma_to_bin": sigma_to_bin}
            book.add(
                package, f"{bins} bins", run, {"logits": logits, "values": values}, kwargs, wrt=("logits",),
                outputs=("loss", "means", "target"),
            )  # fmt: skip


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    activate()
    book = Book("upstream")
    for record in (record_policy, record_responses, record_centering, record_critic):
        record(book)
    book.save()
