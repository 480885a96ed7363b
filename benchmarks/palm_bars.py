"""Reproduces the figures of palm_rlhf against what one has: generation, a PPO cycle, a training step.

    python benchmarks/palm_bars.py [generation] [cycle] [step] [--rounds 3] [--threads 2] [--out FILE.jsonl]

Needs `make peers`, and an otherwise idle machine. Every implementation runs once before it is timed;
rounds are interleaved, and the table shows medians and ratios taken round by round. float32 on the CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from rlhf_kernels.stacks import activate
from rlhf_kernels.stacks.peer import installed_version

OURS = "palm_rlhf"


def generation() -> dict[str, Callable[[], int]]:
    """4 layers, 256 wide, V 256, batch 16, 256 tokens in all of which 32 are the prompt; tokens drawn."""
    from palm_rlhf_pytorch import PaLM as Upstream
    from transformers import LlamaConfig, LlamaForCausalLM

    from palm_rlhf import PaLM, generate

    prompt, total = torch.randint(1, 256, (16, 32)), 256
    ours = PaLM(dim=256, num_tokens=256, depth=4)
    theirs = Upstream(dim=256, num_tokens=256, depth=4).eval()
    llama = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8, head_dim=64,
            num_key_value_heads=1, vocab_size=256, tie_word_embeddings=True, pad_token_id=0,
            eos_token_id=None, bos_token_id=None, max_position_embeddings=512,
        )
    ).eval()  # fmt: skip
    new = total - prompt.shape[1]

    def run_llama() -> int:
        llama.generate(prompt, max_new_tokens=new, do_sample=True, use_cache=True, top_k=0)
        return new * 16

    def run_upstream() -> int:
        theirs.generate(total, prompt=prompt, temperature=1.0)
        return new * 16

    def run_ours() -> int:
        generate(ours, prompt, max_new_tokens=new)
        return new * 16

    return {
        OURS: run_ours,
        f"palm-rlhf-pytorch {installed_version('palm-rlhf-pytorch')}": run_upstream,
        f"transformers {installed_version('transformers')} Llama, cache": run_llama,
    }


def cycle() -> dict[str, Callable[[], int]]:
    """16 rollouts of 256 tokens from 32-token prompts, one epoch; 512 wide, depth 4, V 256, LoRA rank 8.

    A process each, with its models in its memory; theirs, which takes minutes, once.
    """
    return {OURS: _our_cycle, f"palm-rlhf-pytorch {installed_version('palm-rlhf-pytorch')}": _their_cycle}


def _our_cycle() -> Callable[[], int]:
    from palm_rlhf import PaLM, RewardModel
    from palm_rlhf.algorithms.table import ALGORITHMS
    from palm_rlhf.models.value import Policy, ValueModel
    from palm_rlhf.rewards import ModelReward
    from palm_rlhf.trainers.online import OnlineConfig, OnlineTrainer

    palm = PaLM(dim=512, num_tokens=256, depth=4)
    reward = ModelReward(RewardModel(palm, num_binned_output=5))
    for scope in ("actor", "critic"):
        palm.add_finetune_params(scope)
    config = OnlineConfig(prompts=16, max_new_tokens=224, minibatch=16, epochs=1, steps=1000)
    trainer = OnlineTrainer(
        ALGORITHMS["ppo"], Policy(palm, "actor"), reward, torch.randint(1, 256, (16, 32)).tolist(),
        config=config, reference=Policy(palm), critic=ValueModel(palm, "critic"),
    )  # fmt: skip

    def run() -> int:
        trainer.step(0)
        return 16 * 224

    return run


def _their_cycle() -> Callable[[], int]:
    from palm_rlhf_pytorch import PaLM, RewardModel, RLHFTrainer

    palm = PaLM(dim=512, num_tokens=256, depth=4)
    reward = RewardModel(palm, num_binned_output=5)
    trainer = RLHFTrainer(palm=palm, reward_model=reward, prompt_token_ids=torch.randint(1, 256, (16, 32)))

    def run() -> int:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            trainer.train(num_episodes=1, max_timesteps=16, update_timesteps=16, max_seq_len=256)
        return 16 * 224

    return run


def step() -> dict[str, Callable[[], int]]:
    """Forward, backward and Adam on 4 x 512 tokens; 512 wide, depth 4, V 256."""
    from palm_rlhf_pytorch import PaLM as Upstream

    from palm_rlhf import PaLM

    tokens = torch.randint(1, 256, (4, 513))

    def of(model: torch.nn.Module) -> Callable[[], int]:
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

        def run() -> int:
            model(tokens, return_loss=True).backward()
            optimizer.step()
            optimizer.zero_grad()
            return 4 * 512

        return run

    sizes = {"dim": 512, "num_tokens": 256, "depth": 4}
    return {
        OURS: of(PaLM(**sizes)),
        f"palm-rlhf-pytorch {installed_version('palm-rlhf-pytorch')}": of(Upstream(**sizes)),
    }


TASKS = {"generation": generation, "cycle": cycle, "step": step}


def timed(run: Callable[[], int]) -> float:
    """Tokens per second of one call."""
    began = time.perf_counter()
    tokens = run()
    return tokens / (time.perf_counter() - began)


def measure(task: str, rounds: int) -> dict[str, list[float]]:
    """Tokens per second of every implementation, round by round."""
    torch.manual_seed(0)
    runs = TASKS[task]()
    for run in runs.values():
        run()
    speeds: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(rounds):
        order = list(runs) if index % 2 == 0 else list(reversed(runs))
        for name in order:
            speeds[name].append(timed(runs[name]))
    return speeds


def in_process(task: str, name: str, threads: int) -> tuple[float, float]:
    """Tokens per second, and peak memory in MB above that of the imports, of one call in a process."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import palm_bars as b; "
        f"b.alone({task!r}, {name!r}, {threads})"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    speed, memory = map(float, found.stdout.split()[-2:])
    return speed, memory


def alone(task: str, name: str, threads: int) -> None:
    """Runs one implementation once and prints what `in_process` returns."""
    activate()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    make = TASKS[task]()[name]
    import palm_rlhf_pytorch  # noqa: F401  its imports count for neither

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    speed = timed(make())
    print(speed, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def measure_cycle(rounds: int, threads: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Tokens per second and memory of a PPO cycle."""
    speeds, memory = {}, {}
    for name in (OURS, f"palm-rlhf-pytorch {installed_version('palm-rlhf-pytorch')}"):
        found = [in_process("cycle", name, threads) for _ in range(rounds if name == OURS else 1)]
        speeds[name] = [speed for speed, _ in found]
        memory[name] = statistics.median(most for _, most in found)
    return speeds, memory


def main() -> None:
    """Measures what was named, or all; prints a table and writes the raw figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tasks", nargs="*", choices=[*TASKS, []], help="what to measure; all by default")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds")
    parser.add_argument("--threads", type=int, default=2, help="threads of PyTorch")
    parser.add_argument("--out", type=Path, help="append the raw figures to this file")
    options = parser.parse_args()
    activate()
    torch.set_num_threads(options.threads)
    for task in options.tasks or TASKS:
        memory: dict[str, float] = {}
        if task == "cycle":
            speeds, memory = measure_cycle(options.rounds, options.threads)
        else:
            speeds = measure(task, options.rounds)
        print(f"\n{task}: {TASKS[task].__doc__}")
        for name, found in speeds.items():
            ratio = statistics.median(ours / theirs for ours, theirs in zip(speeds[OURS], found))
            line = f"  {name:45} {statistics.median(found):9.0f} tokens/s   ours {ratio:.2f}x"
            print(line + (f"   {memory[name]:.0f} MB" if memory else ""), flush=True)
            if options.out:
                row = {"task": task, "impl": name, "tokens_per_s": found, "threads": options.threads,
                       "torch": torch.__version__, "memory_mb": memory.get(name)}  # fmt: skip
                with options.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
