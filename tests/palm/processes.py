"""Small runs of every kind in processes of their own: several together, or killed at a given moment."""

import multiprocessing
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from palm_rlhf.algorithms.offline_table import PAIR_ALGORITHMS
from palm_rlhf.algorithms.table import ALGORITHMS
from palm_rlhf.commands.runs import Run
from palm_rlhf.models.checkpoint import save_palm
from palm_rlhf.models.finetune import apart, learned
from palm_rlhf.models.palm import PaLM
from palm_rlhf.models.value import Policy, ValueModel
from palm_rlhf.rewards import RewardModel
from palm_rlhf.tasks.pairs import Pair
from palm_rlhf.tasks.text import lines
from palm_rlhf.tokens import ByteTokenizer
from palm_rlhf.trainers.offline import OfflineConfig, OfflineTrainer
from palm_rlhf.trainers.online import OnlineConfig, OnlineTrainer
from palm_rlhf.trainers.ranks import ranks
from palm_rlhf.trainers.reward import RewardConfig, RewardTrainer
from palm_rlhf.trainers.sft import SFTConfig, SFTTrainer
from rlhf_kernels.runtime.files import write_aside
from rlhf_kernels.stacks import activate

STEPS = 6
# What changes a folder, as CPython announces it.
_CHANGES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}
_CONTEXT = multiprocessing.get_context("forkserver")
# Imported once, by the server that the processes are forks of. Nothing has run in it.
_CONTEXT.set_forkserver_preload([__name__, "torch.utils.tensorboard", "torch._dynamo"])


def made(*scopes: str, dtype: torch.dtype = torch.float32) -> PaLM:
    """A tiny model; its adapters do something."""
    torch.manual_seed(0)
    sizes = {"dim": 32, "num_tokens": 256, "depth": 2, "heads": 2, "dim_head": 16, "ff_mult": 2}
    model = PaLM(**sizes, finetune_scopes=scopes)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape)
    return model.to(dtype)


def letters(generation):
    """One point for every small letter."""
    responses = generation.responses
    return ((responses > 96) & (responses < 123) & generation.response_mask).sum(1).float()


def online(name: str, options: dict, dtype=torch.float32, adapters=True, **config) -> OnlineTrainer:
    """Of any row of the table; without adapters the last layer of policy and critic learns."""
    row, model = ALGORITHMS[name], made(*("actor", "critic") * adapters, dtype=dtype)
    critic, reference, last = model, model, None
    if not adapters:
        last = 1
        critic, reference = (apart(model, learned(model, None, last)) for _ in range(2))
        # A divergence of 0 would be rounding, which whitening makes large.
        for parameter in learned(reference, None, last):
            parameter.data += 0.05 * torch.randn(parameter.shape)
    sizes = {"prompts": 4, "samples": 2, "max_new_tokens": 5, "minibatch": 4, "steps": STEPS, "epochs": 2}
    return OnlineTrainer(
        row, Policy(model, "actor" if adapters else None, last), letters,
        [[97 + i] * (1 + i % 3) for i in range(7)],
        config=OnlineConfig(**sizes | {"policy_lr": 1e-2, "critic_lr": 1e-2} | config),
        options=row.options(**options), reference=Policy(reference), stop=10,
        critic=ValueModel(critic, "critic" if adapters else None, last_layers=last)
        if row.critic else None,
    )  # fmt: skip


def offline(name: str, dtype=torch.float32, **config) -> OfflineTrainer:
    """Of any row of the table."""
    pairs = [Pair("yes" + "s" * i, "no", f"{i}?", margin=1.0 + i) for i in range(10)]
    sizes = {"batch": 5, "epochs": STEPS // 2, "eval_every": 2, "lr": 1e-2}
    model = made("actor", dtype=dtype)
    return OfflineTrainer(
        PAIR_ALGORITHMS[name], Policy(model, "actor"), pairs, ByteTokenizer(), reference=Policy(model),
        config=OfflineConfig(**sizes | config), held_out=pairs[:3],
    )  # fmt: skip


def supervised(dtype=torch.float32, **config) -> SFTTrainer:
    """On lines of unlike lengths."""
    samples, judge = lines(["word " * (1 + i % 4) for i in range(12)], ByteTokenizer()).divided(0.2)
    sizes = {"steps": STEPS, "batch": 4, "warmup": 2, "eval_every": 2}
    return SFTTrainer(made(dtype=dtype), samples, judge, SFTConfig(**sizes | config))


def rewarding(dtype=torch.float32, use_lora=True, **config) -> RewardTrainer:
    """On pairs."""
    pairs = [Pair("yes" + "s" * i, "no", f"{i}?") for i in range(7)]
    sizes = {"batch": 5, "epochs": 2, "lr": 1e-2}
    model = RewardModel(made(dtype=dtype), dropout=0.0, use_lora=use_lora).to(dtype)
    return RewardTrainer(model, pairs, ByteTokenizer(), config=RewardConfig(**sizes | config))


KILLED = {
    "ppo": lambda: online("ppo", {"kl_target": 1.0}, samples=1, epochs=1),
    "dpo": lambda: offline("dpo"),
}
# In float64: what rounding makes of a step of Adam is more than 1e-6 in float32. Of odd sizes: a share may be
# larger than another, and the last batch of a pass is one pair.
SHARED = {
    "sft": lambda: supervised(torch.float64, batch=3, accumulate=2, steps=3),
    "ppo": lambda: online("ppo", {}, torch.float64, prompts=3, samples=1, minibatch=2, steps=3),
    "kto": lambda: offline("kto", torch.float64, batch=3, micro_batch=2, epochs=1),
    "reward": lambda: rewarding(torch.float64, batch=3, epochs=1),
}
# Of models in shards: adapters as above, and weights that learn themselves.
SHARDED = {kind: SHARED[kind] for kind in ("sft", "ppo", "kto")} | {
    # In its other phase the critic has no gradient, and a model makes two forward passes before a backward.
    "weights": lambda: online(
        "ppg", {"auxiliary_every": 1, "auxiliary_epochs": 1}, torch.float64, adapters=False, prompts=3,
        samples=1, minibatch=2, micro_batch=1, epochs=1, steps=3,
    ),
    "reward_weights": lambda: rewarding(torch.float64, use_lora=False, batch=3, epochs=1),
}  # fmt: skip


@dataclass
class Flags:
    """As a command's."""

    out: Path
    quiet: bool = True
    save_every: int = 1
    steps: int = STEPS
    # Where `made` would be: checkpoints leave out what does not learn.
    model: str = "made"


def _run(kind: str, folder: str, at: int) -> None:
    """A run in the folder, but for SIGKILL right before change number `at` in it; 0: to its end."""
    seen = 0

    def watch(event, given):
        nonlocal seen
        if event in _CHANGES and given and str(given[0]).startswith(folder):
            seen += 1
            if seen == at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    learner = KILLED[kind]()
    Run(kind, Flags(Path(folder)), kind).train(learner, ())
    save_palm(Path(folder) / "model.safetensors", learner.policy.model)


def _started(kind: str, folder: Path, at: int = 0):
    process = _CONTEXT.Process(target=_run, args=(kind, str(folder), at))
    process.start()
    return process


def straight(kind: str, folder: Path) -> float:
    """Runs it without any misfortune; how many seconds it took."""
    server = _CONTEXT.Process(target=int)  # which is not there yet
    server.start()
    server.join()
    began = time.perf_counter()
    process = _started(kind, folder)
    process.join()
    assert process.exitcode == 0
    return time.perf_counter() - began


def killed_and_resumed(kind: str, folder: Path, *, seed: int, changes: int, seconds: float) -> int:
    """Runs it again and again until it is through; how many times it was killed.

    Of three times two are before a random one of the next `changes`, one is after a random part of `seconds`.
    """
    draw = random.Random(seed)
    for kills in range(100):
        by_clock = kills % 3 == 2
        process = _started(kind, folder, 0 if by_clock else draw.randint(1, changes))
        process.join(draw.uniform(0, seconds) if by_clock else None)
        process.kill()
        process.join()
        if process.exitcode != -signal.SIGKILL:
            assert process.exitcode == 0
            return kills
    raise AssertionError("the run does not come to its end")


def train(kind: str, folder: Path, steps: int) -> dict[str, torch.Tensor]:
    """A run up to so many steps; all weights that came of it."""
    learner = (SHARED | SHARDED)[kind]()
    Run(kind, Flags(folder, save_every=2, steps=steps), kind).train(learner, ())
    return {
        f"{name}.{key}": x
        for name, module in learner.modules().items()
        for key, x in ranks().whole(module).state_dict().items()
    }


def _join(count: int, index: int, port: int) -> None:
    """Makes this a process of several, as torchrun and accelerate's launcher start it."""
    here = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    here |= {"WORLD_SIZE": count, "RANK": index, "LOCAL_WORLD_SIZE": count, "LOCAL_RANK": index}
    os.environ |= {name: str(value) for name, value in here.items()}
    activate()  # accelerate, where it is among the peers


def _one_of(count: int, index: int, port: int, folder: Path) -> None:
    """All kinds."""
    _join(count, index, port)
    for kind in SHARED:
        # In two goes, so that it is resumed in between.
        train(kind, folder / kind, 2)
        torch.save(train(kind, folder / kind, 3), folder / f"{kind}-{index}.pt")
    for kind in SHARDED:
        place = folder / "shards" / kind
        _in_shards(kind != "sft")  # which goes on in shards, and KTO as models that are whole
        train(kind, place, 2)
        _in_shards(kind != "kto")
        torch.save(train(kind, place, 3), folder / "shards" / f"{kind}-{index}.pt")
    torch.save(_held(supervised()), folder / f"held-{index}.pt")


def _held(learner: SFTTrainer) -> tuple[int, int]:
    """Numbers that this process holds of a model and its optimizer after a step, and how many there are."""
    learner.step(0)
    tensors = list(learner.model.parameters())
    for state in learner.optimizers()["model"].state.values():
        tensors += [tensor for tensor in state.values() if tensor.dim()]
    return sum(tensor.to_local().numel() for tensor in tensors), sum(tensor.numel() for tensor in tensors)


def _in_shards(on: bool) -> None:
    """As accelerate's launcher says it."""
    os.environ |= {"ACCELERATE_USE_FSDP": str(on).lower(), "FSDP_VERSION": "2"}
    ranks.cache_clear()


def _with_a_bad_reward(count: int, index: int, port: int, folder: Path) -> None:
    """A rollout whose reward fails in the last process; what each raises is in a file of its own."""
    _join(count, index, port)
    learner = online("ppo", {}, prompts=2 * count, samples=1, minibatch=2)

    def bad(generation):
        raise KeyError("no score")

    learner.reward = bad if index == count - 1 else learner.reward
    try:
        learner.rollout()
    except Exception as error:
        write_aside(folder / f"{index}.txt", f"{type(error).__name__}: {error}")
    # Nobody is to learn of a failure by the end of a process.
    while len(list(folder.glob("?.txt"))) < count:
        time.sleep(0.05)


def failed(count: int, folder: Path, seconds: float) -> list[str]:
    """What so many processes raise where the reward fails in one of them, "" for one that goes on waiting."""
    _launched(_with_a_bad_reward, count, folder, seconds)
    files = [folder / f"{index}.txt" for index in range(count)]
    return [file.read_text() if file.exists() else "" for file in files]


def launched(count: int, folder: Path) -> None:
    """Runs all kinds in so many processes that train together."""
    codes = _launched(_one_of, count, folder)
    assert codes == [0] * count


def _launched(run: Callable[..., None], count: int, folder: Path, seconds: float | None = None) -> list[int]:
    """The exit codes of `run` in so many processes that train together, which are killed after `seconds`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [_CONTEXT.Process(target=run, args=(count, i, port, folder)) for i in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(seconds)
        process.kill()
        process.join()
    return [process.exitcode for process in processes]
