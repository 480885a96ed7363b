"""Records masked normalisation, GAE and the whole reward-to-advantage chain of each stack."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from golden.inputs import SHAPES, generator, masks, values
from torch import Tensor

from rlhf_kernels.stacks import openrlhf, peers, trl, verl

NORMALIZERS = ("palm_rlhf_pytorch", "verl", "trl", "openrlhf")
DISCOUNTS = ((1.0, 0.95), (0.99, 0.9), (0.9, 1.0), (0.95, 0.0))


def source(stack: str, op: str) -> tuple[str, str, str]:
    """Package, version and function of a stack's first peer for an operator."""
    peer = peers(op, stack)[0]
    return peer.package, peer.version() or "", peer.origin


def cases() -> Iterator[tuple[str, torch.dtype, tuple[int, int], Tensor, str]]:
    """(name, dtype, shape, mask, kind of values), float64 for two shapes and odd values for one."""
    for shape in SHAPES:
        for name, mask in masks(*shape):
            label = f"{shape[0]}x{shape[1]}/{name}"
            yield label, torch.float32, shape, mask, "normal"
            if shape in ((4, 7), (2, 2)):
                yield f"{label}/float64", torch.float64, shape, mask, "normal"
            if shape == (4, 7) and name in ("full", "tail", "few"):
                for kind in ("offset", "constant"):
                    yield f"{label}/{kind}", torch.float32, shape, mask, kind
            if shape == (4, 7) and name in ("tail", "head", "middle", "few"):
                yield f"{label}/nan_pads", torch.float32, shape, mask, "nan_pads"


def draw(kind: str, shape: tuple[int, int], mask: Tensor, dtype: torch.dtype, *seed: int) -> Tensor:
    """Values of a kind; `nan_pads` has NaN wherever the mask is zero."""
    drawn = values(kind, shape, generator(*seed), dtype)
    return drawn.masked_fill(~mask, float("nan")) if kind == "nan_pads" else drawn


def normalizers() -> dict[str, list[tuple[Any, dict[str, Any]]]]:
    """The functions as the stacks have them, called (x, mask, **kwargs), with the keywords to record."""
    from palm_rlhf_pytorch.ppo import masked_normalize as palm_normalize
    from verl.utils.torch_functional import masked_whiten as verl_whiten

    open_normalize = openrlhf.source_functions("masked_normalize")["masked_normalize"]
    trl_whiten, whole_batch = trl.masked_whiten(), openrlhf.normalize_advantages()

    def by_keyword(x: Tensor, mask: Tensor, **kwargs: Any) -> Tensor:
        return palm_normalize(x, mask=mask, **kwargs)

    def all_experiences(x: Tensor, mask: Tensor, whole_batch_of_experiences: bool) -> Tensor:
        assert whole_batch_of_experiences
        return whole_batch(x, mask)

    return {
        "palm_rlhf_pytorch": [(by_keyword, {}), (by_keyword, {"dim": 1}), (by_keyword, {"eps": 1e-3})],
        "verl": [(verl_whiten, {}), (verl_whiten, {"shift_mean": False})],
        "trl": [(trl_whiten, {}), (trl_whiten, {"shift_mean": False})],
        "openrlhf": [
            (open_normalize, {}),
            (open_normalize, {"dim": 0}),
            (open_normalize, {"eps": 1e-3}),
            (all_experiences, {"whole_batch_of_experiences": True}),
        ],
    }


def record_masked_normalize(book: Any) -> None:
    """Outputs and gradients of every stack's normalisation; the mask is given as the stack gives it."""
    for stack, variants in normalizers().items():
        for function, kwargs in variants:
            for i, (case, dtype, shape, mask, kind) in enumerate(cases()):
                inputs = {"x": draw(kind, shape, mask, dtype, i), "mask": mask}
                book.add(
                    source(stack, "masked_normalize"),
                    case,
                    lambda x, mask, function=function, **kwargs: function(x, mask, **kwargs),
                    inputs,
                    kwargs,
                    wrt=("x",),
                )
    from palm_rlhf_pytorch.ppo import masked_normalize as palm_normalize

    for kwargs in ({}, {"dim": 1}, {"dim": 0}):
        x = values("normal", (4, 7), generator(99), torch.float32)
        name = source("palm_rlhf_pytorch", "masked_normalize")
        book.add(name, "4x7/no_mask", lambda x, **kw: palm_normalize(x, **kw), {"x": x}, kwargs, wrt=("x",))


def record_gae(book: Any) -> None:
    """Advantages and returns before whitening; verl's own, whitened advantages as a third output."""
    from verl.trainer.ppo.core_algos import compute_gae_advantage_return

    open_gae, verl_plain = openrlhf.advantages_and_returns(), verl.unwhitened_gae()
    trl_loop = trl.ppo_statements("lastgaelam", "returns", ("rewards", "values", "responses", "args"))

    def run_openrlhf(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Any:
        return open_gae(None, values, rewards, mask, gamma, lam)

    def run_verl(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Any:
        return verl_plain(rewards, values, mask.to(rewards.dtype), gamma, lam)

    def run_verl_whitened(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Any:
        return compute_gae_advantage_return(rewards, values, mask.to(rewards.dtype), gamma, lam)

    def run_trl(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Any:
        with torch.no_grad():
            result = trl_loop(rewards, values, rewards, SimpleNamespace(gamma=gamma, lam=lam))
        return result["advantages"], result["returns"]

    runs = (("openrlhf", run_openrlhf, False), ("verl", run_verl, False), ("verl", run_verl_whitened, True))
    for stack, run, whitened in (*runs, ("trl", run_trl, False)):
        for i, (case, dtype, shape, mask, kind) in enumerate(cases()):
            gamma, lam = DISCOUNTS[i % len(DISCOUNTS)]
            inputs = {
                "rewards": draw(kind, shape, mask, dtype, 1, i),
                "values": draw(kind, shape, mask, dtype, 2, i),
                "mask": mask,
            }
            outputs = ("whitened_advantages" if whitened else "advantages", "returns")
            book.add(source(stack, "gae"), case, run, inputs, {"gamma": gamma, "lam": lam}, outputs=outputs)


def record_token_advantages(book: Any) -> None:
    """KL term, score, GAE and normalisation; TRL's are steps 4 to 6 of its trainer."""
    functions = {stack: peers("token_advantages", stack)[0].load() for stack in ("openrlhf", "verl")}
    arguments = ("logprobs", "ref_logprobs", "values", "scores", "responses", "sequence_lengths",
                 "sequence_lengths_p1", "padding_mask", "padding_mask_p1", "args")  # fmt: skip
    statements = trl.ppo_statements("logr", "advantages", arguments)

    def run_trl(score, kl, values, mask, kl_coef, gamma, lam):
        lengths = mask.sum(1) - 1
        index = torch.arange(mask.shape[1]).expand_as(mask)
        beyond = index > lengths[:, None] + 1
        args = SimpleNamespace(kl_estimator="k1", kl_coef=kl_coef, whiten_rewards=False, gamma=gamma, lam=lam)
        kept = values.masked_fill(beyond, 0)
        zero = torch.zeros_like(kl)
        result = statements(kl, zero, kept, score, kl, lengths, lengths + 1, ~mask, beyond, args)
        return result["advantages"], result["returns"]

    names = {stack: source(stack, "token_advantages") for stack in functions}
    package, version, _ = source("trl", "gae")
    names["trl"] = (package, version, "trl.experimental.ppo.ppo_trainer.PPOTrainer.train, steps 4 to 6")
    for stack, run in (functions | {"trl": run_trl}).items():
        for i, (case, dtype, shape, mask, kind) in enumerate(cases()):
            right_padded = "full" in case or "tail" in case
            if kind != "normal" or not mask.any(1).all() or (stack == "trl" and not right_padded):
                continue
            gamma, lam = DISCOUNTS[i % len(DISCOUNTS)]
            inputs = {
                "score": values(kind, shape[:1], generator(3, i), dtype),
                "kl": draw(kind, shape, mask, dtype, 4, i),
                "values": draw(kind, shape, mask, dtype, 5, i),
                "mask": mask,
            }
            kwargs = {"kl_coef": 0.1, "gamma": gamma, "lam": lam}
            book.add(names[stack], case, run, inputs, kwargs, outputs=("advantages", "returns"))
