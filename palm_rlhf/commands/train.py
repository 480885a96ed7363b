"""`palm-rlhf train ALGORITHM`: reinforcement with any row of the table of algorithms."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, field, make_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor

from palm_rlhf.algorithms.table import ALGORITHMS, Algorithm
from palm_rlhf.commands import offline
from palm_rlhf.commands.common import (
    FACTORS,
    HFOptions,
    Loaded,
    Tuning,
    load_model,
    make_task,
    merged,
    save_model,
)
from palm_rlhf.commands.rewards import named_reward
from palm_rlhf.commands.rollouts import FOLDER
from palm_rlhf.commands.runs import Run
from palm_rlhf.generation import Generation
from palm_rlhf.models.value import Policy, ValueModel, frozen
from palm_rlhf.pipeline.sampling import read_prompt_texts
from palm_rlhf.rewards import ProgrammaticReward
from palm_rlhf.rollout.store import RolloutStore
from palm_rlhf.tasks.calculator import Calculator
from palm_rlhf.tokens import Tokenizer, prompt_ids, stop_token
from palm_rlhf.trainers.online import OnlineConfig, OnlineTrainer
from rlhf_kernels.runtime.files import write_aside

CRITIC = "critic"
# Every row by its name: algorithms that sample, and those that learn from pairs.
ROWS = {**ALGORITHMS, **offline.PAIR_ALGORITHMS}


@dataclass
class Train:
    """Sample responses, score them, and make the better ones more probable."""

    model: Path
    """Run or file to start from, such as that of palm-rlhf sft, or a model of transformers: its folder, or
    hf:NAME with a name on the hub. It is the reference as well."""
    out: Path
    """Folder of the run. If it is there, the run goes on."""
    task: Literal["calculator"] | None = None
    """Prompts and rewards of this task; its held-out problems judge before and after."""
    gsm8k: Path | None = None
    """The same with the products among the calculator steps in GSM8K's train.jsonl."""
    factors: tuple[int, int] = FACTORS
    """Largest first and second factor in --task calculator."""
    prompts_file: Path | None = None
    """Prompts instead of a task's: a text file with one a line, or JSON lines or Parquet with "prompt"."""
    reward: str | None = None
    """FILE.py:function, called with the texts of a prompt and a response; or a name: palm-rlhf --help."""
    reward_model: Path | None = None
    """Run of palm-rlhf reward."""
    tokenizer: str | None = None
    """'bytes', a tokenizer.json or hf:NAME, for a --model that does not say what its tokens are."""
    tuning: Annotated[Tuning, tyro.conf.arg(name="")] = field(default_factory=Tuning)
    online: Annotated[OnlineConfig, tyro.conf.arg(name="")] = field(default_factory=OnlineConfig)
    eval_every: int = 20
    """Steps between two looks at the held-out problems; 0: only before and after."""
    save_every: int = 20
    """Steps between checkpoints."""
    keep: int = 2
    """Checkpoints that stay; palm-rlhf evaluate --run looks at all that are there."""
    keep_rollouts: bool = False
    """Keep what is sampled in OUT/rollouts: palm-rlhf rollouts --run OUT shows it."""
    hf: Annotated[HFOptions, tyro.conf.arg(name="")] = field(default_factory=HFOptions)
    device: str | None = None
    """cpu or cuda; default: the GPU if there is one."""
    quiet: bool = False
    """No progress bar."""


def form(algorithm: Algorithm | offline.PairAlgorithm) -> type:
    """The flags of an algorithm: those of its kind, and its own."""
    own = field(default_factory=algorithm.options)
    flags = [("options", Annotated[algorithm.options, tyro.conf.arg(name="")], own)]
    base = offline.TrainPairs
    if isinstance(algorithm, Algorithm):
        base, usual = Train, field(default_factory=partial(OnlineConfig, **algorithm.defaults))
        flags.append(("online", Annotated[OnlineConfig, tyro.conf.arg(name="")], usual))
    found = make_dataclass(f"Train_{algorithm.name}", flags, bases=(base,))
    found.__doc__ = "\n\n".join(inspect.cleandoc(one.__doc__ or "") for one in (algorithm.options, base))
    found.algorithm = algorithm
    return found


def overview() -> str:
    """What `palm-rlhf train --help` prints."""
    kinds = (("algorithms that sample", ALGORITHMS), ("algorithms on --pairs", offline.PAIR_ALGORITHMS))
    text = "usage: palm-rlhf train ALGORITHM --model RUN --out FOLDER [flags]\n"
    for kind, rows in kinds:
        text += f"\n{kind}:\n"
        for name, row in rows.items():
            text += f"  {name:22}{row.options.__doc__.strip().splitlines()[0]}\n"
    return text + "\nflags: palm-rlhf train ALGORITHM --help\n"


def run(args: Train | offline.TrainPairs, line: str) -> int:
    """Trains, and writes the model with the adapters merged."""
    if isinstance(args, offline.TrainPairs):
        return offline.run(args, line)
    folder = Run(f"train {args.algorithm.name}", args, line)
    task = make_task(args.task, args.gsm8k, args.factors)
    loaded = load_model(args.model, tokenizer=args.tokenizer, on=args.device, hf=args.hf)
    tokenizer = loaded.tokenizer
    stop = stop_token(tokenizer, task.stop) if task else loaded.stop
    prompts = [prompt_ids(tokenizer, prompt) for prompt in _prompts(args, task)]
    torch.manual_seed(args.online.seed)  # of new adapters
    reward = make_reward(args, task, tokenizer, stop)
    online = args.online
    if task is not None:
        online = replace(online, max_new_tokens=min(online.max_new_tokens, task.max_new_tokens))
    bound, longest = loaded.model.max_length, max(map(len, prompts)) + online.max_new_tokens
    if bound is not None and longest > bound:
        raise ValueError(
            f"the longest prompt and --max-new-tokens {online.max_new_tokens} make {longest} tokens, and the "
            f"model allows {bound}. Shorten the prompts or lower --max-new-tokens."
        )

    def accuracy(policy: Policy, generator: torch.Generator) -> dict[str, float]:
        return task.evaluate(policy.model, policy.scope, tokenizer, generator)

    trainer = OnlineTrainer(
        args.algorithm,
        **_models(args, loaded),
        reward=reward,
        prompts=prompts,
        config=online,
        options=args.options,
        stop=stop,
        pad=tokenizer.pad,
        evaluate=accuracy if task is not None else None,
        eval_every=args.eval_every,
        store=RolloutStore(folder.folder / FOLDER) if args.keep_rollouts and folder.main else None,
    )
    rows = folder.train(trainer, ("reward", "kl", "accuracy"))
    policy = trainer.whole_policy()
    if not folder.main:
        return 0
    saved = save_model(folder.folder, Loaded(merged(policy, without=(CRITIC,)), tokenizer, stop))
    drawn = _concluded(trainer, policy, task, rows, folder)
    curve = folder.draw(drawn, ("reward", "accuracy", "kl", "entropy", "response_tokens"), line)
    print(f"model  {saved}\n" + (f"curve  {curve}\n" if curve else ""), end="")
    return 0


def _prompts(args: Train, task: Calculator | None) -> list[str]:
    if (task is None) == (args.prompts_file is None):
        raise ValueError("give one kind of prompts: --task calculator, --gsm8k FILE, or --prompts-file FILE")
    return list(task.train) if task is not None else read_prompt_texts(args.prompts_file)


def make_reward(
    args: Any, task: Calculator | None, tokenizer: Tokenizer, stop: int
) -> Callable[[Generation], Tensor]:
    """The reward that flags name, or else the task's; ValueError where there is none, or more than one."""
    if args.reward is not None and args.reward_model is not None:
        raise ValueError("--reward and --reward-model exclude each other")
    if args.reward_model is not None:
        from palm_rlhf.commands.reward import load_reward

        return load_reward(args.reward_model, tokenizer, on=args.device)
    if args.reward is None and task is None:
        raise ValueError(
            "there is no reward: give --reward FILE.py:function, or one by name (palm-rlhf --help), or "
            "--reward-model RUN"
        )
    if args.reward is not None:
        return named_reward(args.reward, tokenizer, stop, on=args.device)
    return ProgrammaticReward(task.reward, tokenizer, stop=stop)


def _models(args: Train, loaded: Loaded) -> dict[str, Any]:
    """Policy, reference and critic: adapters on one model, or a model each."""
    model, needs, tuning = loaded.model, args.algorithm, args.tuning
    policy = tuning.policy(model)
    reference = Policy(model if tuning.lora else frozen(tuning.apart(model))) if needs.reference else None
    critic = None
    if needs.critic:
        own = tuning.policy(model if tuning.lora else tuning.apart(model), CRITIC)
        critic = ValueModel(own.model, own.scope, last_layers=own.last_layers, **_support(args))
    return {"policy": policy, "reference": reference, "critic": critic}


def _support(args: Train) -> dict[str, Any]:
    """The bins of the critic, where the algorithm's options have any."""
    o = args.options
    if not getattr(o, "critic_bins", 0):
        return {}
    return {"bins": o.critic_bins, "low": o.critic_low, "high": o.critic_high}


def _concluded(
    trainer: OnlineTrainer, policy: Policy, task: Calculator | None, rows: list[Any], folder: Run
) -> list[Any]:
    """Says, and keeps in result.json, what training brought; returns the metrics with both accuracies."""
    first, last = rows[0]["reward"], rows[-1]["reward"]
    found = {"steps": len(rows), "reward_first": first, "reward_last": last}
    print(f"mean reward {first:.3f} in the first rollout, {last:.3f} in the last")
    if task is not None:
        before = rows[0]["accuracy_before"]
        after = trainer.evaluate(policy, trainer.generators()["evaluation"])["accuracy"]
        found |= {"accuracy_before": before, "accuracy_after": after, "held_out": len(task.held_out)}
        print(f"accuracy on {len(task.held_out)} held-out problems: {before:.1%} before, {after:.1%} after")
        rows = [{"step": 0, "accuracy": before}, *rows[:-1], {**rows[-1], "accuracy": after}]
    write_aside(folder.folder / "result.json", json.dumps(found, indent=1))
    return rows
