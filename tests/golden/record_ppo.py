"""Records the losses and KL estimates of PPO in verl, OpenRLHF and TRL 1.12, with their gradients.

    make peers && .peers/bin/python tests/golden/record_ppo.py

`advantages.py` records their advantages. TRL's losses are statements inside `PPOTrainer.train`, and OpenRLHF
cannot be imported on a CPU: both are executed from the installed source.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER.parents[1]), str(FOLDER.parents[0])]

import torch  # noqa: E402
from golden.advantages import source  # noqa: E402
from golden.inputs import generator, masks  # noqa: E402
from golden.record import Book  # noqa: E402
from torch import Tensor  # noqa: E402

from rlhf_kernels.stacks import activate, openrlhf, trl  # noqa: E402
from rlhf_kernels.stacks.source import extract, extract_statements, find_source  # noqa: E402

SHAPES = ((4, 7), (3, 16))
MASKS = ("full", "tail", "middle", "total_1")
# Policies far enough apart that clipping, the dual clip and the clamp of the log-ratio all happen.
SPREADS = (0.3, 2.0, 40.0)
# The dual clip cannot be turned off in verl: a bound that nothing reaches.
CLIPS = (
    {"clip": 0.2, "clip_high": None, "dual_clip": None},
    {"clip": 0.2, "clip_high": 0.28, "dual_clip": None},
    {"clip": 0.1, "clip_high": None, "dual_clip": 3.0},
)
NO_DUAL_CLIP = 1e12


def names(stack: str, function: str) -> tuple[str, str, str]:
    """Package, version, and one of its functions."""
    package, version, _ = source(stack, "gae")
    return package, version, function


def cases() -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Name and inputs: log-probabilities of three policies, values old and new, returns, advantages, mask."""
    for i, shape in enumerate(SHAPES):
        for j, (name, mask) in enumerate((n, m) for n, m in masks(*shape) if n in MASKS):
            for k, spread in enumerate(SPREADS):
                draws = iter(
                    torch.randn((8, *shape), generator=generator(i, j, k), dtype=torch.float64).float()
                )
                old = -next(draws).abs()
                values = next(draws)
                inputs = {
                    "old_logprob": old,
                    "logprob": old + spread * next(draws),
                    "reference": old + spread * next(draws),
                    "advantages": next(draws),
                    "old_values": values,
                    "values": values + spread * next(draws),
                    "returns": next(draws),
                    "mask": mask,
                }
                yield f"{shape[0]}x{shape[1]}/{name}/{spread:g}", inputs


def verl_functions() -> dict[str, Callable[..., Any]]:
    """verl's policy loss, value loss and KL estimates."""
    from verl.trainer.ppo import core_algos

    def policy(logprob, old_logprob, advantages, mask, clip, clip_high, dual_clip):
        return core_algos.compute_policy_loss(
            old_logprob, logprob, advantages, mask.float(), cliprange=clip, cliprange_high=clip_high,
            clip_ratio_c=dual_clip or NO_DUAL_CLIP,
        )[:2]  # fmt: skip

    def value(values, old_values, returns, mask, clip):
        return core_algos.compute_value_loss(values, returns, old_values, mask.float(), clip)[0]

    return {"policy": policy, "value": value, "kl": core_algos.kl_penalty}


def openrlhf_functions() -> dict[str, Callable[..., Any]]:
    """OpenRLHF's loss modules and KL estimates."""
    utils = openrlhf.source_functions("masked_mean", "compute_approx_kl")
    namespace = {"torch": torch, "nn": torch.nn, "Optional": Optional, "masked_mean": utils["masked_mean"]}
    path = find_source("openrlhf/models/loss.py")
    losses = extract(path, "aggregate_loss", "PolicyLoss", "ValueLoss", namespace=namespace)

    def policy(logprob, old_logprob, advantages, mask, clip, clip_high, dual_clip):
        loss = losses["PolicyLoss"](clip, clip_high or clip, dual_clip)
        return loss(logprob, old_logprob, advantages, mask)[:2]

    def value(values, old_values, returns, mask, clip):
        return losses["ValueLoss"](clip)(values, old_values, returns, mask)

    def kl(logprob, reference, kind):
        return utils["compute_approx_kl"](logprob, reference, kl_estimator=kind)

    return {"policy": policy, "value": value, "kl": kl}


def trl_functions() -> dict[str, Callable[..., Any]]:
    """Statements of TRL's PPOTrainer.train; it has neither clip-higher nor a dual clip, and neither k2."""
    path = trl._ppo_source()
    given = ("vpred", "mb_values", "mb_return", "new_logprobs", "mb_logprobs", "mb_advantage", "padding_mask",
             "padding_mask_p1", "micro_batch_inds", "args")  # fmt: skip
    namespace = extract(path, "masked_mean", namespace={"torch": torch})
    statements = extract_statements(
        path, "PPOTrainer.train", first="vpredclipped", last="loss", arguments=given, namespace=namespace
    )
    kl_statements = trl.ppo_statements("logr", "kl", ("logprobs", "ref_logprobs", "args"))

    def run(values, old_values, returns, logprob, old_logprob, advantages, mask, policy_clip, value_clip):
        args = SimpleNamespace(cliprange=policy_clip, cliprange_value=value_clip, vf_coef=0.1)
        return statements(
            values, old_values, returns, logprob, old_logprob, advantages, ~mask, ~mask, slice(None), args
        )

    def policy(logprob, old_logprob, advantages, mask, clip, clip_high, dual_clip):
        zero = torch.zeros_like(logprob)
        found = run(zero, zero, zero, logprob, old_logprob, advantages, mask, clip, 0.2)
        outside = (found["pg_losses2"] > found["pg_losses"]).float()
        return found["pg_loss"], namespace["masked_mean"](outside, mask)

    def value(values, old_values, returns, mask, clip):
        zero = torch.zeros_like(values)
        return run(values, old_values, returns, zero, zero, zero, mask, 0.2, clip)["vf_loss"]

    def kl(logprob, reference, kind):
        return kl_statements(logprob, reference, SimpleNamespace(kl_estimator=kind))["kl"]

    return {"policy": policy, "value": value, "kl": kl}


TRAIN = "trl.experimental.ppo.ppo_trainer.PPOTrainer.train"
STACKS = {
    "verl": (
        verl_functions,
        {
            "policy": "core_algos.compute_policy_loss",
            "value": "core_algos.compute_value_loss",
            "kl": "core_algos.kl_penalty",
        },
    ),
    "openrlhf": (
        openrlhf_functions,
        {
            "policy": "models.loss.PolicyLoss",
            "value": "models.loss.ValueLoss",
            "kl": "models.utils.compute_approx_kl",
        },
    ),
    "trl": (trl_functions, dict.fromkeys(("policy", "value", "kl"), TRAIN)),
}


def record_ppo(book: Any) -> None:
    """Losses averaged over real tokens and their gradients; KL estimates token by token.

    TRL has no clamp of the log-ratio, so a spread of 40 overflows there.
    """
    for stack, (make, functions) in STACKS.items():
        made = make()
        for case, inputs in cases():
            far = case.endswith("/40")
            for what, arguments, wrt, outputs, options in (
                ("policy", ("logprob", "old_logprob", "advantages", "mask"), ("logprob",),
                 ("policy_loss", "clip_fraction"), CLIPS[:1] if stack == "trl" else CLIPS),
                ("value", ("values", "old_values", "returns", "mask"), ("values",), ("value_loss",),
                 ({"clip": 0.2},)),
            ):  # fmt: skip
                for kwargs in options:
                    if stack == "trl" and what == "policy" and far:
                        continue
                    given = {name: inputs[name] for name in arguments}
                    run = made[what]
                    book.add(
                        names(stack, functions[what]), case, run, given, kwargs, wrt=wrt, outputs=outputs
                    )
            for kind in ("k1", "k3") if stack == "trl" else ("k1", "k2", "k3"):
                book.add(
                    names(stack, functions["kl"]),
                    case,
                    lambda logprob, reference, kind, run=made["kl"]: run(logprob, reference, kind),
                    {name: inputs[name] for name in ("logprob", "reference")},
                    {"kind": kind},
                    outputs=("kl",),
                )


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    activate()
    book = Book("ppo")
    record_ppo(book)
    book.save()
