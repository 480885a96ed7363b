"""Records advantages without a critic, policy losses and their averages, and the adaptive KL weight.

    make peers && .peers/bin/python tests/golden/record_policy.py

Of verl, OpenRLHF, TRL 1.16 and palm-rlhf-pytorch. What are statements inside methods there is executed from
the installed source: advantages of TRL's GRPOTrainer and RLOOTrainer, and their losses.
"""

from __future__ import annotations

import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER.parents[1]), str(FOLDER.parents[0])]

import torch  # noqa: E402
from golden.inputs import generator, masks  # noqa: E402
from golden.record import Book  # noqa: E402
from torch import Tensor  # noqa: E402

from rlhf_kernels.stacks import activate  # noqa: E402
from rlhf_kernels.stacks.source import extract, extract_statements, find_source  # noqa: E402

SAMPLES = 4
LONGEST = 20
SPREADS = (0.3, 2.0)


def scores() -> Iterator[tuple[str, Tensor]]:
    """[12] of three groups: any, wins and losses, one group of equals."""
    drawn = torch.randn(12, generator=generator(1), dtype=torch.float64).float()
    yield "normal", drawn
    yield "large", 100 + 3 * drawn
    yield "binary", (drawn > 0.3).float()
    equal = drawn.clone()
    equal[4:8] = 0.5
    yield "equal", equal


def prompts(count: int) -> Any:
    """The group of each response, as the stacks have it."""
    import numpy

    return numpy.repeat(numpy.arange(count // SAMPLES), SAMPLES)


def trl_statements(file: str, method: str, first: str, last: str, arguments: tuple[str, ...]) -> Any:
    """Statements of one of TRL's trainers, with the helpers that they call."""
    namespace: dict[str, Any] = {"torch": torch, "gather": lambda x: x}
    extract(find_source("trl/trainer/utils.py"), "nanstd", namespace=namespace)
    return extract_statements(
        find_source(f"trl/trainer/{file}"), method, first=first, last=last, arguments=arguments,
        namespace=namespace,
    )  # fmt: skip


def record_groups(book: Book) -> None:
    """Advantages of responses beside others to the same prompt."""
    from verl.trainer.ppo import core_algos

    verl, trl = version("verl"), version("trl")
    group_statements = trl_statements(
        "grpo_trainer.py", "GRPOTrainer._generate_and_score_completions", "mean_grouped_rewards",
        "is_std_zero", ("self", "rewards", "num_generations", "prompts"),
    )  # fmt: skip
    loo_statements = trl_statements(
        "rloo_trainer.py", "RLOOTrainer._generate_and_score_completions", "grouped_rewards", "advantages",
        ("self", "rewards", "num_generations", "prompts"),
    )  # fmt: skip

    def run_verl(function: Any, score: Tensor, **kwargs: Any) -> Tensor:
        mask = torch.ones(len(score), 3)
        rewards = torch.zeros(len(score), 3)
        rewards[:, -1] = score
        return function(rewards, mask, index=prompts(len(score)), **kwargs)[0][:, 0]

    def run_trl(statements: Any, score: Tensor, **kwargs: Any) -> Tensor:
        me = SimpleNamespace(accelerator=SimpleNamespace(process_index=0), **kwargs)
        return statements(me, score, SAMPLES, score)["advantages"]

    for case, score in scores():
        given = {"score": score}
        for name, kwargs in (
            ("compute_grpo_outcome_advantage", {"norm_adv_by_std_in_grpo": True}),
            ("compute_grpo_outcome_advantage", {"norm_adv_by_std_in_grpo": False}),
            ("compute_rloo_outcome_advantage", {}),
            ("compute_rloo_vectorized_outcome_advantage", {}),
        ):
            call = partial(run_verl, getattr(core_algos, name))
            book.add(("verl", verl, name), case, call, given, kwargs, outputs=("advantages",))
        for kind in ("group", "none"):
            book.add(
                ("trl", trl, "GRPOTrainer"), case, partial(run_trl, group_statements), given,
                {"scale_rewards": kind}, outputs=("advantages",),
            )  # fmt: skip
        book.add(
            ("trl", trl, "RLOOTrainer"), case, partial(run_trl, loo_statements), given,
            {"normalize_advantages": False}, outputs=("advantages",),
        )  # fmt: skip


def record_returns(book: Book) -> None:
    """REINFORCE++: verl's, whitened, and what it whitens; OpenRLHF's sums, with the baseline of groups."""
    from verl.trainer.ppo import core_algos

    openrlhf = extract(
        find_source("openrlhf/trainer/ppo_utils/experience_maker.py"),
        "RemoteExperienceMaker.get_cumulative_returns",
        namespace={"torch": torch, "Tuple": tuple},
    )["get_cumulative_returns"]

    def run_verl(rewards: Tensor, mask: Tensor, gamma: float) -> Any:
        config = SimpleNamespace(gamma=gamma)
        return core_algos.compute_reinforce_plus_plus_outcome_advantage(rewards, mask.float(), config=config)

    def run_openrlhf(rewards: Tensor, mask: Tensor, gamma: float) -> Any:
        return openrlhf(None, rewards, mask, gamma)

    for i, (case, mask) in enumerate(masks(4, 7)):
        rewards = torch.randn(4, 7, generator=generator(3, i), dtype=torch.float64).float()
        given = {"rewards": rewards.masked_fill(~mask, 0.0), "mask": mask}
        for gamma in (1.0, 0.9):
            book.add(
                ("verl", version("verl"), "compute_reinforce_plus_plus_outcome_advantage"), case, run_verl,
                given, {"gamma": gamma}, outputs=("advantages", "returns"),
            )  # fmt: skip
            book.add(
                ("openrlhf", version("openrlhf"), "get_cumulative_returns"), case, run_openrlhf, given,
                {"gamma": gamma}, outputs=("returns",),
            )  # fmt: skip


def record_losses(book: Book) -> None:
    """Policy losses with each way to average, and TRL's with the KL divergence in the loss."""
    from verl.trainer.ppo import core_algos

    grpo = grpo_loss()
    rloo = trl_statements(
        "rloo_trainer.py", "RLOOTrainer._compute_loss", "logps", "loss",
        ("self", "per_token_logps", "completion_mask", "inputs"),
    )  # fmt: skip

    def run_verl(logprob, old_logprob, advantages, mask, average, clip, clip_high, dual_clip):
        info = {"dp_size": 1, "loss_scale_factor": LONGEST}
        config = SimpleNamespace(
            clip_ratio=clip, clip_ratio_low=clip, clip_ratio_high=clip_high, global_batch_info=info,
            get=lambda name, default: dual_clip,
        )  # fmt: skip
        return core_algos.compute_policy_loss_vanilla(
            old_logprob, logprob, advantages, mask.float(), average, config
        )[0]

    def run_rloo(logprob, old_logprob, advantages, mask, clip):
        old = (old_logprob * mask).sum(1)
        me = SimpleNamespace(epsilon_low=clip, epsilon_high=clip)
        inputs = {"old_logps": old, "advantages": advantages[:, 0]}
        return rloo(me, logprob, mask, inputs)["loss"]

    for case, x in loss_inputs():
        given = {name: x[name] for name in ("logprob", "old_logprob", "advantages", "mask")}
        for average in ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"):
            kwargs = {"average": average, "clip": 0.2, "clip_high": 0.28, "dual_clip": 3.0}
            name = ("verl", version("verl"), "compute_policy_loss_vanilla")
            book.add(name, case, run_verl, given, kwargs, wrt=("logprob",), outputs=("loss",))
        for average in ("grpo", "dapo", "dr_grpo"):
            kwargs = {"average": average, "clip": 0.2, "clip_high": 0.28, "delta": 3.0, "beta": 0.04}
            name = ("trl", version("trl"), "GRPOTrainer._compute_loss")
            both = given | {"reference": x["reference"]}
            book.add(name, case, grpo, both, kwargs, wrt=("logprob",), outputs=("loss",))
        name = ("trl", version("trl"), "RLOOTrainer._compute_loss")
        book.add(name, case, run_rloo, given, {"clip": 0.2}, wrt=("logprob",), outputs=("loss",))


def loss_inputs() -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Log-probabilities of three policies, one advantage for each response, and a mask."""
    for i, (name, mask) in enumerate((n, m) for n, m in masks(4, 7) if n in ("full", "tail")):
        for j, spread in enumerate(SPREADS):
            draws = torch.randn(4, 4, 7, generator=generator(5, i, j), dtype=torch.float64).float()
            old = -draws[0].abs()
            yield (
                f"{name}/{spread:g}",
                {
                    "old_logprob": old,
                    "logprob": old + spread * draws[1],
                    "reference": old + spread * draws[2],
                    "advantages": draws[3, :, :1].expand(4, 7).contiguous(),
                    "mask": mask,
                },
            )


def grpo_loss() -> Any:
    """TRL's whole `_compute_loss`, on a trainer that has log-probabilities in place of a model."""
    namespace: dict[str, Any] = {"torch": torch}
    extract(find_source("trl/trainer/utils.py"), "nanmin", "nanmax", namespace=namespace)
    extract(find_source("trl/trainer/grpo_trainer.py"), "GRPOTrainer._compute_loss", namespace=namespace)
    theirs = namespace["_compute_loss"]

    def run(logprob, old_logprob, reference, advantages, mask, average, clip, clip_high, delta, beta):
        me = SimpleNamespace(
            loss_type=average, epsilon_low=clip, epsilon_high=clip_high, beta=beta,
            max_completion_length=LONGEST, importance_sampling_level="token", top_entropy_quantile=1.0,
            off_policy_mask_threshold=None, aux_loss_enabled=False, use_vllm=False,
            _entropy_bonus_enabled=False, current_gradient_accumulation_steps=1,
            args=SimpleNamespace(delta=delta, use_bias_correction_kl=False, steps_per_generation=1),
            model=SimpleNamespace(training=True), _metrics={"train": defaultdict(list)},
            accelerator=SimpleNamespace(
                num_processes=1, reduce=lambda x, reduction: x, gather=lambda x: x, device="cpu"
            ),
            _get_per_token_logps_and_entropies=lambda *_, **__: (logprob, torch.zeros_like(logprob), None),
        )  # fmt: skip
        inputs = {
            "prompt_ids": mask[:, :1].long(), "prompt_mask": mask[:, :1], "completion_ids": mask.long(),
            "completion_mask": mask, "advantages": advantages[:, 0], "old_per_token_logps": old_logprob,
            "ref_per_token_logps": reference, "num_items_in_batch": mask.sum().float(),
        }  # fmt: skip
        return theirs(me, None, inputs)

    return run


def record_kl_weight(book: Book) -> None:
    """The adaptive KL weight after a step."""
    from verl.trainer.ppo.core_algos import AdaptiveKLController

    path = find_source("openrlhf/trainer/ppo_utils/kl_controller.py")
    import numpy

    theirs = extract(path, "AdaptiveKLController", namespace={"np": numpy})["AdaptiveKLController"]

    def run(make: Any, kl: Tensor, coef: float, target: float, responses: int, horizon: float) -> Tensor:
        controller = make(coef, target, horizon)
        found = []
        for value in kl.tolist():
            controller.update(value, responses)
            found.append(controller.value)
        return torch.tensor(found, dtype=torch.float64)

    kl = torch.tensor([0.0, 2.0, 5.9, 6.1, 30.0, -4.0], dtype=torch.float64)
    kwargs = {"coef": 0.15, "target": 6.0, "responses": 512, "horizon": 10_000.0}
    for package, make in (("verl", AdaptiveKLController), ("openrlhf", theirs)):
        name = (package, version(package), "AdaptiveKLController")
        book.add(name, "six steps", partial(run, make), {"kl": kl}, kwargs, outputs=("coef",))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    activate()
    book = Book("policy")
    for record in (record_groups, record_returns, record_losses, record_kl_weight):
        record(book)
    book.save()
